"""The largest submodules that can be captured, for a model that cannot be captured as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...base._tolerable import tolerable
from ...base.compat import pytree
from ...calibration._calibration import _check_shape
from ...capturing import capture as capture_program
from ...capturing._program import Program
from ...capturing._unchanged import of_torch, rewound
from ...errors import FaspError, first_line
from ...passes._pruned_module import finish
from ._calls import Call, Seen, watching
from ._stand_in import StandIn, replaced, same_output


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


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class _Refusal:
    """Why a submodule stays whole; ``descend``: whether its own submodules may fare better."""

    reason: str
    descend: bool = True


class Search:
    """Top-down search for the largest submodules that can be captured.

    Args:
        model: the model; as it was after every step.
        call: the example inputs.

    Attributes:
        left: for each submodule that stays whole, why.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model, self.call = model, call
        self.paths: dict[int, list[str]] = {}
        for path, module in _walk(model):
            self.paths.setdefault(id(module), []).append(path)
        self.owners: dict[Any, list[tuple[int, str]]] = {}
        for module in model.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items(), *_kept(module)):
                if tensor is not None:
                    self.owners.setdefault(_storage(tensor), []).append(
                        (id(module), _join(self.paths[id(module)][0], name))
                    )
        self.left: dict[str, str] = {}

    def run(self) -> list[Part]:
        """The parts, in the order in which the model calls them.

        Raises:
            Exception: whatever the model raises on the example inputs.
        """
        versions = [(buffer, _version(buffer)) for buffer in self.model.buffers()]
        with rewound(self.model) as self.changed:
            self.expected = self.call.run(self.model)
            self.written = {_storage(buffer) for buffer, version in versions if _version(buffer) != version}
        parts: list[Part] = []
        visited: set[int] = set()
        frontier = _children(self.model)
        while frontier:
            visited |= {id(module) for module in frontier}
            seen = self._watch(frontier, parts)
            following: list[nn.Module] = []
            for module in frontier:
                outcome = self._try(module, seen.get(id(module)))
                if isinstance(outcome, Part):
                    parts.append(outcome)
                    continue
                path = self.paths[id(module)][0]
                # A single layer needs no reason of its own inside a module that has one.
                if outcome.reason and not (
                    _matrices(module) < 2 and any(_within(path, other) for other in self.left)
                ):
                    self.left[path] = outcome.reason
                if outcome.descend:
                    following += _children(module)
            frontier = [module for module in dict.fromkeys(following) if id(module) not in visited]
        return sorted(parts, key=lambda part: self.order.index(part.module))

    def _watch(self, modules: list[nn.Module], parts: list[Part]) -> dict[int, Seen]:
        """Run the model and note the calls of some modules, and the order in which these and the parts found
        so far are called.
        """
        seen: dict[int, Seen] = {}
        first: dict[nn.Module, None] = {}
        candidates = [
            module
            for module in modules
            if _matrices(module) > 1 and not isinstance(module, torch.jit.ScriptModule)
        ]

        def note(module: nn.Module, call: Call) -> None:
            first.setdefault(module)
            if module in candidates:
                seen.setdefault(id(module), Seen()).add(call)

        with rewound(self.model), watching([*candidates, *(part.module for part in parts)], note):
            output = self.call.run(self.model)
        self.reproducible = same_output(output, self.expected)
        self.order = list(first)
        return seen

    def _try(self, module: nn.Module, seen: Seen | None) -> Part | _Refusal:
        if isinstance(module, torch.jit.ScriptModule):
            return _Refusal("a scripted module cannot be captured", descend=False)
        if _matrices(module) < 2:
            return _Refusal(
                "one weight alone has nothing to be coupled with" if _matrices(module) else "", descend=False
            )
        if seen is None or seen.example is None:
            return _Refusal(
                "" if isinstance(module, _CONTAINERS) else "it is not called on the example inputs"
            )
        reason = (
            self._wavering()
            or self._attached(module)
            or _observed(module)
            or self._writes(module)
            or _opaque(seen)
        )
        if reason:
            return _Refusal(reason)
        try:
            with rewound(self.model):
                # features come in many sizes
                program = capture_program(
                    module, seen.example.args, seen.example.kwargs, image_sizes=True, own_defaults=True
                )
        except tolerable(Exception) as error:  # exporters raise what they like; then this module stays
            return _Refusal(f"it cannot be captured: {first_line(error.__cause__ or error)}")
        # What the rest of the model hands over and takes back keeps its width, caches too.
        program = replace(program, state_inputs=frozenset(), state_outputs=frozenset())
        for call in seen.kinds.values():
            misfit = why_unfit(program, call)
            if misfit:
                return _Refusal(f"one graph does not take all its calls: {misfit}")
        paths = tuple(self.paths[id(module)])
        difference = self._difference(program, module, paths, seen.example)
        if difference:
            return _Refusal(difference)
        return Part(paths, module, program, seen.count)

    def _attached(self, module: nn.Module) -> str | None:
        """What of the module is also used outside of it."""
        own = self.paths[id(module)]
        inside = set()
        for inner in module.modules():
            inside.add(id(inner))
            outside = [path for path in self.paths[id(inner)] if not any(_within(path, top) for top in own)]
            if outside:
                return f"its submodule '{self.paths[id(inner)][0]}' is also used as '{outside[0]}'"
        for inner in module.modules():
            for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
                if tensor is None:
                    continue
                others = [other for owner, other in self.owners[_storage(tensor)] if owner not in inside]
                if others and name in inner._parameters:
                    return (
                        f"its weight '{_join(self.paths[id(inner)][0], name)}' is tied to '{others[0]}'"
                        " outside of it"
                    )
                if others and _storage(tensor) in self.written:
                    return (
                        f"its buffer '{_join(self.paths[id(inner)][0], name)}' is also '{others[0]}' outside"
                        " of it, and written into"
                    )
        return None

    def _wavering(self) -> str | None:
        return (
            None
            if self.reproducible
            else "the model computes something else in each run, so that no graph in its place can be held"
            " against it; let what it draws (random, numpy) start from a seed in its forward"
        )

    def _writes(self, module: nn.Module) -> str | None:
        names = self.changed.names(module)
        return (
            f"its forward sets the attribute '{_join(self.paths[id(module)][0], names[0])}', which a graph"
            " would not"
            if names
            else None
        )

    def _difference(
        self, program: Program, module: nn.Module, paths: tuple[str, ...], example: Call
    ) -> str | None:
        """How the captured module differs from the original, called alone and in its place in the model."""
        strangers: list[nn.Module] = []
        try:
            captured = finish(program)
            with rewound(self.model):
                expected = example.run(module)
            with rewound(self.model), rewound(captured):
                if not same_output(example.run(captured), expected):
                    return "its graph computes something else"
            with (
                replaced(self.model, paths, module, StandIn(module, captured)),
                rewound(self.model),
                watching(module.modules(), lambda inner, call: strangers.append(inner)),
            ):
                found = self.call.run(self.model)
        except tolerable(Exception) as error:
            return (
                f"the model does not run with a graph in its place: {type(error).__name__}:"
                f" {first_line(error)}"
            )
        if strangers:
            return "it is also called through a reference outside of the module tree"
        if not same_output(found, self.expected):
            return "the model computes something else with a graph in its place"
        return None


def why_unfit(program: Program, call: Call) -> str | None:
    """Why a captured program does not take a call, or ``None`` if it does; tensors need no data."""
    try:
        flat = program.flat_inputs(call.args, call.kwargs)
        nodes = program.placeholders()
        if len(flat) != len(nodes):
            return f"a call brings {len(flat)} values, another {len(nodes)}"
        for node, leaf, held in zip(nodes, flat, pytree.tree_leaves(program.example), strict=True):
            expected = node.meta.get("val")
            if isinstance(expected, Tensor) != isinstance(leaf, Tensor):
                return (
                    f"'{node.name}' is a {type(leaf).__name__} in one call and a {type(held).__name__} in"
                    " another"
                )
            if isinstance(expected, Tensor):
                if leaf.dtype != expected.dtype:
                    return f"'{node.name}' is {leaf.dtype} in one call and {expected.dtype} in another"
                _check_shape(leaf, expected, f"'{node.name}'")
            elif leaf is not held and leaf != held:
                return f"'{node.name}' is {leaf!r} in one call and {held!r} in another"
    except tolerable(FaspError) as error:
        return first_line(error)
    return None


def _opaque(seen: Seen) -> str | None:
    hidden = next(
        (
            name
            for call in (seen.example, *seen.kinds.values())
            if call is not None and (name := call.opaque())
        ),
        None,
    )
    return f"it takes a {hidden}, which holds tensors that the exporter does not see" if hidden else None


def _observed(module: nn.Module) -> str | None:
    """The hooks that somebody else put on a module or its submodules; a graph would run them once, at
    capture.
    """
    for path, inner in module.named_modules():
        if isinstance(inner, torch.jit.ScriptModule):
            continue  # cannot be captured anyway
        hooks = (
            *inner._forward_hooks.values(),
            *inner._forward_pre_hooks.values(),
            *inner._backward_hooks.values(),
            *inner._backward_pre_hooks.values(),
        )
        if not all(map(of_torch, hooks)):
            where = f"its submodule '{path}'" if path else "it"
            return f"{where} has hooks, which a graph would not run"
    return None


def _walk(
    module: nn.Module, path: str = "", above: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Every path to every module; a module that holds one above it is not entered again."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and not any(child is other for other in (*above, module)):
            yield from _walk(child, _join(path, name), (*above, module))


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in dict.fromkeys(module._modules.values()) if child is not None]


def _matrices(module: nn.Module) -> int:
    """The number of weights with rows and columns."""
    return sum(parameter.dim() > 1 for parameter in module.parameters())


def _kept(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are plain attributes of a module."""
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield name, value


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written into, where that is counted."""
    return None if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> Any:
    try:
        pointer = tensor.untyped_storage().data_ptr()
    except tolerable(NotImplementedError, RuntimeError):  # sparse layouts have none
        pointer = 0
    return (tensor.device, pointer) if pointer else id(tensor)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _within(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}.")


__all__ = ["Part", "Search", "why_unfit"]
