"""The largest submodules that can be captured, for a model that cannot be captured as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ...base._device import device_named
from ...base._tensors import storage_of
from ...base._tolerable import tolerable
from ...base.compat import pytree
from ...capturing import capture as capture_program
from ...capturing._captured import Captured
from ...capturing._program import Program
from ...capturing._signature import CallSignature, is_plain
from ...capturing._transformers import is_transformers, register_caches
from ...capturing._unchanged import copied as copied_values
from ...capturing._unchanged import noting_reads, of_torch, rewound, said_of_reads
from ...errors import ArgumentError, CaptureError, ExportError, FaspError, first_line
from ...passes._pruned_module import finish
from ._stand_in import StandIn, copied, put, same_output

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | None) -> Call:
        """The same call with its tensors on a device."""
        if device is None:
            return self
        return Call(*pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (self.args, self.kwargs)))

    def leaves(self) -> list[Any]:
        """Tensors and constants, in order."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def tensors(self) -> list[Tensor]:
        """The tensors, in order."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def size(self) -> int:
        """The number of elements."""
        return sum(tensor.numel() for tensor in self.tensors())

    def run(self, module: nn.Module) -> Any:
        """Call a module with copies of the arguments."""
        with torch.no_grad():
            return module(*copied_values(self.args), **copied_values(self.kwargs))


@contextlib.contextmanager
def watching(modules: Iterable[nn.Module], seen: Callable[[nn.Module, Call], None]) -> Iterator[None]:
    """Report every call that one of ``modules`` gets inside, with copies of what it gets."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen(module, Call(copied_values(args), copied_values(kwargs)))

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Part:
    """A captured submodule.

    Attributes:
        paths: where it stands in the model; more than one if it is shared.
        module: the original.
        calls: how often one run of the model on the example inputs calls it.
    """

    paths: tuple[str, ...]
    module: nn.Module
    program: Program
    calls: int

    @property
    def path(self) -> str:
        """The first of its paths, under which the model names its parameters."""
        return self.paths[0]


@dataclass
class _Seen:
    """The largest call of a module, and how many there were."""

    largest: Call
    count: int = 0


class Search:
    """Top-down search for the largest submodules that can be captured.

    Args:
        model: the model; as it was afterwards.
        call: the example inputs.

    Attributes:
        left: for each submodule that stays whole, why.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model, self.call, self.left = model, call, dict[str, str]()
        self.paths: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(module, []).append(path)
        self.names: dict[object, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(storage_of(parameter), []).append(name)

    def run(self) -> list[Part]:
        """The parts, in the order in which the model calls them.

        Raises:
            CaptureError: the model computes something else in each run.
            Exception: whatever the model raises on the example inputs.
        """
        seen: dict[nn.Module, _Seen] = {}

        def note(module: nn.Module, call: Call) -> None:
            own = seen.setdefault(module, _Seen(call))
            own.count += 1
            if call.size() > own.largest.size():
                own.largest = call

        candidates = [module for module in self.paths if module is not self.model and _is_candidate(module)]
        versions = [(buffer, buffer._version) for buffer in self.model.buffers()]
        with rewound(self.model) as self.changed, watching(candidates, note):
            self.expected = self.call.run(self.model)
            self.written = {storage_of(buffer) for buffer, before in versions if buffer._version != before}
        with rewound(self.model):
            if not same_output(self.call.run(self.model), self.expected):
                raise CaptureError(
                    f"{type(self.model).__name__} computes something else in each run, so that no graph in"
                    " place of a submodule can be held against it; let what it draws (random, numpy) start"
                    " from a seed in its forward"
                )
        parts: list[Part] = []
        waiting = list(self.model.children())
        for module in waiting:  # which grows
            found = self._try(module, seen.get(module)) if _is_candidate(module) else None
            if isinstance(found, Part):
                parts.append(found)
                continue
            if found is not None:
                self.left[self.paths[module][0]] = found
            waiting += [child for child in module.children() if child not in waiting]
        return sorted(parts, key=lambda part: list(seen).index(part.module))

    def _try(self, module: nn.Module, seen: _Seen | None) -> Part | str | None:
        """The part that a submodule becomes, or why it stays whole."""
        if seen is None:
            return None if isinstance(module, _CONTAINERS) else "it is not called on the example inputs"
        example = seen.largest
        if reason := self._tied(module) or self._writes(module) or _hooked(module) or _opaque(example):
            return reason
        try:
            with rewound(self.model):
                # features come in many sizes
                program = capture_program(
                    module, example.args, example.kwargs, image_sizes=True, own_defaults=True
                )
        except tolerable(Exception) as error:  # exporters raise what they like; then this module stays
            return f"it cannot be captured: {first_line(error.__cause__ or error)}"
        # What the rest of the model hands over and takes back keeps its width, caches too.
        program = replace(program, state_inputs=frozenset(), state_outputs=frozenset())
        part = Part(tuple(self.paths[module]), module, program, seen.count)
        return self._difference(part, example) or part

    def _tied(self, module: nn.Module) -> str | None:
        """Which weight of the module is also used outside of it."""
        own = tuple(f"{path}." for path in self.paths[module])
        for name, parameter in module.named_parameters(self.paths[module][0], remove_duplicate=False):
            held = self.names.get(storage_of(parameter), [])
            others = [other for other in held if not other.startswith(own)]
            if others:
                return f"its weight '{name}' is also '{others[0]}' outside of it"
        return None

    def _writes(self, module: nn.Module) -> str | None:
        """What the module's forward leaves behind, which a graph would not, or others would not see."""
        inside = {self.paths[inner][0] for inner in module.modules()}
        if names := [name for name in self.changed if name.rpartition(".")[0] in inside]:
            return f"its forward sets the attribute '{names[0]}'"
        for name, buffer in module.named_buffers(self.paths[module][0]):
            if storage_of(buffer) in self.written:
                return f"its buffer '{name}' is written into"
        return None

    def _difference(self, part: Part, example: Call) -> str | None:
        """How a part's graph differs from the module, called alone and in its place in the model."""
        module, strangers = part.module, list[nn.Module]()
        try:
            captured = finish(part.program)
            with rewound(self.model):
                expected = example.run(module)
            with rewound(captured):
                if not same_output(example.run(captured), expected):
                    return "its graph computes something else"
            put(self.model, part.paths, StandIn(module, captured))
            with rewound(self.model), watching(module.modules(), lambda inner, _: strangers.append(inner)):
                found = self.call.run(self.model)
        except tolerable(Exception) as error:
            return (
                f"the model does not run with a graph in its place: {type(error).__name__}:"
                f" {first_line(error)}"
            )
        finally:
            put(self.model, part.paths, module)
        if strangers:
            return "it is also called through a reference outside of the module tree"
        if not same_output(found, self.expected):
            return "the model computes something else with a graph in its place"
        return None


def _is_candidate(module: nn.Module) -> bool:
    """Whether there may be weights to be coupled with each other, in Python."""
    matrices = sum(parameter.dim() > 1 for parameter in module.parameters())
    return matrices > 1 and not isinstance(module, torch.jit.ScriptModule)


def _hooked(module: nn.Module) -> str | None:
    """The hooks that somebody else put on a module or its submodules; a graph would run them once, at
    capture.
    """
    for path, inner in module.named_modules():
        hooks = chain(*(vars(inner).get(kind, {}).values() for kind in _HOOKS))
        if not all(map(of_torch, hooks)):
            where = f"its submodule '{path}'" if path else "it"
            return f"{where} has hooks, which a graph would not run"
    return None


def _opaque(call: Call) -> str | None:
    """An argument that may hold tensors which neither the exporter nor the graph sees."""
    for leaf in call.leaves():
        if not isinstance(leaf, Tensor) and not is_plain(leaf):
            return f"it takes a {type(leaf).__name__}, which is neither a tensor nor plain data"
    return None


# --- A model as what was captured of it.


@dataclass(frozen=True, kw_only=True, repr=False)
class CapturedParts(Captured):
    """A model captured by its submodules.

    Attributes:
        model: a copy of the caller's, in which the parts stand.
        call: the example inputs.
        signature: how the caller's is called.
        error: why it cannot be captured as a whole.
        parts: what was captured, in the order in which the model calls it.
        left: for each submodule that was not, why.
    """

    model: nn.Module
    call: Call
    signature: CallSignature
    error: CaptureError
    parts: tuple[Part, ...]
    left: Mapping[str, str]

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedParts:
        return self  # it holds weights of its own, which nothing changes

    def __repr__(self) -> str:
        return f"CapturedParts({list(self.programs)}, left={dict(self.left)})"


def capture_parts(
    error: CaptureError,
    model: Any,
    args: Any,
    kwargs: dict[str, Any] | None,
    device: torch.device | str | None,
) -> CapturedParts:
    """Capture the largest submodules of a model that can be.

    Args:
        error: why the model cannot be captured as a whole.

    Raises:
        CaptureError: none of its submodules can be captured either.
    """
    call = Call(args if isinstance(args, tuple) else (args,), dict(kwargs or {}))
    signature = CallSignature.of(model.forward, call.args, call.kwargs)
    neither = f"{error} It cannot be pruned by its submodules either"
    try:
        copy = copied(model)
    except tolerable(Exception) as failure:
        raise CaptureError(f"{neither}, because it cannot be copied: {first_line(failure)}") from failure
    for module in copy.modules():
        if is_transformers(module):
            register_caches(module)  # before calls are recorded, so that what they hold is copied
    if device is not None:
        target = device_named(device)
        copy, call = copy.to(target), call.to(target)
    search = Search(copy, call)
    try:
        # what a model compiles for itself would not be run
        compiled = torch.compiler.set_stance("force_eager")
        with rewound(model), rewound(copy), compiled, noting_reads(model, copy) as read:
            call.run(copy)
        if read:
            raise CaptureError(f"{neither}: {said_of_reads(model, read)}.")
        parts = tuple(search.run())
    except FaspError:
        raise
    except tolerable(Exception) as failure:
        raise CaptureError(
            f"{neither}, because it does not run on the example inputs: {type(failure).__name__}:"
            f" {first_line(failure)}"
        ) from failure
    if not parts:
        raise nothing_left(error, search.left)
    return CapturedParts(
        programs={part.path: part.program for part in parts},
        _versions={},
        model=copy,
        call=call,
        signature=signature,
        error=error,
        parts=parts,
        left=search.left,
    )


def check_parts_help(error: CaptureError, model: Any, dynamic_shapes: Any, **options: object) -> None:
    """Go on only where submodules can help: the exporter failed on the code of a model whose weights are
    there, and no option speaks of the whole of it.

    Raises:
        CaptureError: ``error``, where they cannot, or with ``dynamic_shapes``.
        ArgumentError: another option speaks of a model captured as a whole; names it.
    """
    if dynamic_shapes is not None or not isinstance(error, ExportError) or not isinstance(model, nn.Module):
        raise error
    for name, value in options.items():
        if value:
            shown = f"{name}=" if value is True else f"{name}={value!r}"
            raise ArgumentError(
                f"{shown} needs a model that is captured as a whole; leave it out to prune this one by its"
                " submodules"
            ) from error
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(tensor) or tensor.device.type == "meta" for tensor in tensors):
        raise error


def nothing_left(error: CaptureError, left: Mapping[str, str]) -> CaptureError:
    reasons = "; ".join(f"'{path}': {reason}" for path, reason in left.items())
    found = CaptureError(
        f"{error} No submodule can be pruned by itself either{f': {reasons}' if reasons else ''}."
    )
    found.__cause__ = error.__cause__
    return found


__all__ = ["Call", "CapturedParts", "Part", "Search", "capture_parts", "check_parts_help", "watching"]
