"""The largest submodules that can be captured, for a model that cannot be captured as a whole."""

from __future__ import annotations

import contextlib
import copy
import enum
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from fasp_fx.base import (
    PRESERVED,
    deviation,
    device_named,
    fingerprint,
    pytree,
    storage_of,
    tolerable,
    tolerance,
    version_of,
)
from fasp_fx.capturing import (
    PLAIN,
    CallSignature,
    Captured,
    Program,
    is_transformers,
    noting_reads,
    of_torch,
    register_caches,
    rewound,
    said_of_reads,
)
from fasp_fx.capturing import (
    capture as capture_program,
)
from fasp_fx.capturing import (
    copied as copied_values,
)
from fasp_fx.errors import CaptureError, ExportError, first_line
from fasp_fx.passes import finish

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | None) -> Call:
        """The same call with its tensors on a device."""
        return Call(
            *pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device=device), (self.args, self.kwargs))
        )

    def __iter__(self) -> Iterator[Any]:
        """Tensors and constants, in order."""
        return iter(pytree.tree_leaves((self.args, self.kwargs)))

    def tensors(self) -> list[Tensor]:
        """The tensors, in order."""
        return [leaf for leaf in self if isinstance(leaf, Tensor)]

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
        paths: where it stands in the model, more than one if it is shared; by the first its parameters are
            named.
        module: the original.
        calls: how often one run of the model on the example inputs calls it.
    """

    paths: tuple[str, ...]
    module: nn.Module
    program: Program
    calls: int


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

    def run(self) -> list[Part]:
        """The parts, in the order in which the model calls them.

        Raises:
            Exception: whatever the model raises on the example inputs.
        """
        largest, calls = dict[nn.Module, Call](), Counter[nn.Module]()

        def note(module: nn.Module, call: Call) -> None:
            calls[module] += 1
            largest[module] = max(largest.get(module, call), call, key=Call.size)

        candidates = [module for module in self.paths if module is not self.model and _is_candidate(module)]
        versions = [(buffer, version_of(buffer)) for buffer in self.model.buffers()]
        with rewound(self.model) as self.changed, watching(candidates, note):
            self.expected = self.call.run(self.model)
            self.written = {storage_of(buffer) for buffer, before in versions if version_of(buffer) != before}
        parts: list[Part] = []
        waiting = list(self.model.children())
        for module in waiting:  # which grows
            try:
                if module in largest:
                    parts.append(self._part(module, largest[module], calls[module]))
                    continue
                if _is_candidate(module) and not isinstance(module, _CONTAINERS):
                    self.left[self.paths[module][0]] = "it is not called on the example inputs"
            except tolerable(CaptureError) as error:
                self.left[self.paths[module][0]] = str(error)
            waiting += [child for child in module.children() if child not in waiting]
        return sorted(parts, key=lambda part: list(calls).index(part.module))

    def _part(self, module: nn.Module, example: Call, calls: int) -> Part:
        """The part that a submodule becomes.

        Raises:
            CaptureError: it stays whole; says why.
        """
        self._check_alone(module)
        try:
            with rewound(self.model):
                # features come in many sizes
                program = capture_program(
                    module, example.args, example.kwargs, image_sizes=True, own_defaults=True
                )
        except tolerable(Exception) as error:  # exporters raise what they like; then this module stays
            raise CaptureError(f"it cannot be captured: {first_line(error.__cause__ or error)}") from error
        # What the rest of the model hands over and takes back keeps its width, caches too.
        program = replace(program, state_inputs=frozenset(), state_outputs=frozenset())
        part = Part(tuple(self.paths[module]), module, program, calls)
        self._check_in_place(part)
        return part

    def _check_alone(self, module: nn.Module) -> None:
        """Refuse a module that shares weights with others, whose forward leaves something behind, which a
        graph would not, or others would not see, or that carries hooks, which a graph would not run.
        """
        paths = self.paths[module]
        inside = {storage_of(own): name for name, own in module.named_parameters(paths[0])}
        for other, parameter in self.model.named_parameters(remove_duplicate=False):
            own = inside.get(storage_of(parameter))
            if own is not None and not other.startswith(tuple(f"{path}." for path in paths)):
                raise CaptureError(f"its weight '{own}' is also '{other}' outside of it")
        for name, buffer in module.named_buffers(paths[0]):
            if storage_of(buffer) in self.written:
                raise CaptureError(f"its buffer '{name}' is written into")
        for path, inner in ((self.paths[inner][0], inner) for inner in module.modules()):
            if names := [name for name in self.changed if name.rpartition(".")[0] == path]:
                raise CaptureError(f"its forward sets the attribute '{names[0]}'")
            hooks = chain(*(vars(inner).get(kind, {}).values() for kind in _HOOKS))
            if not all(map(of_torch, hooks)):
                raise CaptureError(f"'{path}' has hooks, which a graph would not run")

    def _check_in_place(self, part: Part) -> None:
        """Refuse a part with whose graph in its place the model does something else."""
        module, strangers = part.module, list[nn.Module]()
        try:
            put(self.model, part.paths, StandIn(module, finish(part.program)))
            with rewound(self.model), watching(module.modules(), lambda inner, _: strangers.append(inner)):
                found = self.call.run(self.model)
        except tolerable(Exception) as error:
            raise CaptureError(
                f"the model does not run with a graph in its place: {type(error).__name__}:"
                f" {first_line(error)}"
            ) from error
        finally:
            put(self.model, part.paths, module)
        if strangers:
            raise CaptureError("it is also called through a reference outside of the module tree")
        if not same_output(found, self.expected):
            raise CaptureError(
                "the model computes something else with a graph in its place, or in each run (let what it"
                " draws start from a seed in its forward)"
            )


def _is_candidate(module: nn.Module) -> bool:
    """Whether there may be weights to be coupled with each other, in Python."""
    matrices = sum(parameter.dim() > 1 for parameter in module.parameters())
    return matrices > 1 and not isinstance(module, torch.jit.ScriptModule)


# --- Put a captured part in the place of a submodule, and find out whether the model can tell the difference.


#: what a parent may read of a submodule besides calling it
_SIMPLE = (*PLAIN, enum.Enum, torch.dtype, torch.device)


def _simple_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are plain data, such as ``out_channels``."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not hasattr(fx.GraphModule, name)
        and all(isinstance(leaf, _SIMPLE) for leaf in pytree.tree_leaves(value))
    }


class StandIn(nn.Module):
    """A captured part that shows its parent nothing but a forward, simple attributes and a flat list of
    parameters of other sizes and values.

    A parent that reads more, such as a layer inside the part, fails, and one that reads more of a parameter
    than its device and dtype (its values for a penalty, its size for a count) computes something else: what
    it reads would change with the pruning.
    """

    def __init__(self, original: nn.Module, module: nn.Module) -> None:
        super().__init__()
        for index, parameter in enumerate(original.parameters()):
            other = torch.full([1] * parameter.dim(), 3, dtype=parameter.dtype, device=parameter.device)
            self.register_parameter(f"weight_{index}", nn.Parameter(other, parameter.requires_grad))
        self.eval()
        vars(self).update(_simple_attributes(original), _captured=(module,))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (module,) = vars(self)["_captured"]  # in a tuple, so that it is no submodule
        return module(*args, **kwargs)


def dressed(module: fx.GraphModule, original: nn.Module) -> fx.GraphModule:
    """The pruned part with the simple attributes of the original, which copies and pickles keep."""
    attributes = {
        name: value for name, value in _simple_attributes(original).items() if not hasattr(module, name)
    }
    vars(module).update(attributes)
    module.meta[PRESERVED] = {**module.meta.get(PRESERVED, {}), **attributes}
    return module


def put(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Place a module at each of its paths."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def same_output(found: Any, expected: Any) -> bool:
    """Whether two outputs have the same structure and, up to rounding, the same values."""
    a, first = pytree.tree_flatten(found)
    b, second = pytree.tree_flatten(expected)
    return first == second and all(_same_leaf(x, y) for x, y in zip(a, b, strict=True))


def _same_leaf(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return deviation(found, expected) <= tolerance("two ways", expected.dtype)
    if type(found) is type(expected) and hasattr(expected, "__dict__"):  # not registered with pytree
        return bool(found == expected) or same_output(vars(found), vars(expected))
    return deviation(found, expected) == 0


def whole_fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """The fingerprint of a model; sparse weights, which no part holds, do not enter."""
    return fingerprint(
        {name: tensor for name, tensor in parameters.items() if tensor.layout == torch.strided}
    )


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares no storage. Python cannot copy weights that a hook computes; those are cloned. Torch
    copies a parameter without its attributes.
    """
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    made = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    for own, parameter in zip(model.parameters(), made.parameters(), strict=False):
        vars(parameter).update(copy.copy(vars(own)))
    return made


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
    try:
        own = copied(model)
        for module in own.modules():
            if is_transformers(module):
                register_caches(module)  # before calls are recorded, so that what they hold is copied
        if device is not None:
            target = device_named(device)
            own, call = own.to(target), call.to(target)
        # what a model compiles for itself would not be run
        compiled = torch.compiler.set_stance("force_eager")
        with rewound(model), rewound(own), compiled, noting_reads(model, own) as read:
            call.run(own)
        if read:
            raise CaptureError(said_of_reads(model, read))
        search = Search(own, call)
        parts = tuple(search.run())
    except tolerable(Exception) as failure:
        raise CaptureError(
            f"{error} It cannot be pruned by its submodules either: {type(failure).__name__}:"
            f" {first_line(failure)}"
        ) from failure
    if not parts:
        reasons = "; ".join(f"'{path}': {reason}" for path, reason in search.left.items())
        raise CaptureError(
            f"{error} No submodule can be pruned by itself either: {reasons or 'there is none'}."
        ) from error.__cause__
    return CapturedParts(
        programs={part.paths[0]: part.program for part in parts},
        _versions={},
        model=own,
        call=call,
        signature=signature,
        error=error,
        parts=parts,
        left=search.left,
    )


def check_parts_help(error: CaptureError, model: Any, dynamic_shapes: Any, state: tuple[str, ...]) -> None:
    """Go on only where submodules can help: the exporter failed on the code of a model whose weights are
    there, and nothing was said of its program.

    Raises:
        CaptureError: ``error``, where they cannot, or with ``dynamic_shapes`` or ``state``.
    """
    asked = state or dynamic_shapes is not None
    if asked or not isinstance(error, ExportError) or not isinstance(model, nn.Module):
        raise error
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(tensor) or tensor.device.type == "meta" for tensor in tensors):
        raise error


__all__ = [
    "Call",
    "CapturedParts",
    "Part",
    "Search",
    "capture_parts",
    "check_parts_help",
    "copied",
    "dressed",
    "put",
    "watching",
    "whole_fingerprint",
]
