"""Capture a model as one program, or else the largest of its submodules that can be captured."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fasp_fx.base import (
    built_alike,
    deviation,
    device_named,
    hooks_of,
    pytree,
    storage_of,
    tolerable,
    tolerance,
    version_of,
)
from fasp_fx.errors import CallError, CaptureError, ExportError, first_line

from ._assemble import size_check
from ._capture import Captured, capture, capture_whole
from ._fx import grouped, weights_of
from ._parts import Call, Part, Parts, model_copy, replace_submodule, simple_attributes, watching
from ._program import Program
from ._runner import Runner
from ._signature import CallSignature
from ._transformers import is_transformers, register_caches
from ._unchanged import noting_reads, of_torch, rewound, said_of_reads

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


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
        self.paths = grouped((module, path) for path, module in model.named_modules(remove_duplicate=False))

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
                program = capture(module, example.args, example.kwargs, image_sizes=True, own_defaults=True)
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
        inside = {storage_of(weight): name for name, weight in module.named_parameters(paths[0])}
        for other, parameter in self.model.named_parameters(remove_duplicate=False):
            name = inside.get(storage_of(parameter))
            if name is not None and not other.startswith(tuple(f"{path}." for path in paths)):
                raise CaptureError(f"its weight '{name}' is also '{other}' outside of it")
        for name, buffer in module.named_buffers(paths[0]):
            if storage_of(buffer) in self.written:
                raise CaptureError(f"its buffer '{name}' is written into")
        for path, inner in ((self.paths[inner][0], inner) for inner in module.modules()):
            if names := [name for name in self.changed if name.rpartition(".")[0] == path]:
                raise CaptureError(f"its forward sets the attribute '{names[0]}'")
            if not all(map(of_torch, hooks_of(inner))):
                raise CaptureError(f"'{path}' has hooks, which a graph would not run")

    def _check_in_place(self, part: Part) -> None:
        """Refuse a part with whose graph in its place the model does something else."""
        module, strangers = part.module, list[nn.Module]()
        try:
            replace_submodule(self.model, part.paths, StandIn(module, part.program))
            with rewound(self.model), watching(module.modules(), lambda inner, _: strangers.append(inner)):
                output = self.call.run(self.model)
        except tolerable(Exception) as error:
            raise CaptureError(
                f"the model does not run with a graph in its place: {type(error).__name__}:"
                f" {first_line(error)}"
            ) from error
        finally:
            replace_submodule(self.model, part.paths, module)
        if strangers:
            raise CaptureError("it is also called through a reference outside of the module tree")
        if not same_output(output, self.expected):
            raise CaptureError(
                "the model computes something else with a graph in its place, or in each run (let what it"
                " draws start from a seed in its forward)"
            )


def _is_candidate(module: nn.Module) -> bool:
    """Whether there may be weights to be coupled with each other, in Python."""
    matrices = sum(parameter.dim() > 1 for parameter in module.parameters())
    return matrices > 1 and not isinstance(module, torch.jit.ScriptModule)


# --- Put a captured part in the place of a submodule, and find out whether the model can tell the difference.


class StandIn(nn.Module):
    """A captured part that shows its parent nothing but a forward, simple attributes and a flat list of
    parameters of other sizes and values.

    A parent that reads more, such as a layer inside the part, fails, and one that reads more of a parameter
    than its device and dtype (its values for a penalty, its size for a count) computes something else: what
    it reads would change with the pruning.
    """

    def __init__(self, original: nn.Module, program: Program) -> None:
        super().__init__()
        for index, parameter in enumerate(original.parameters()):
            other = torch.full([1] * parameter.dim(), 3, dtype=parameter.dtype, device=parameter.device)
            self.register_parameter(f"weight_{index}", nn.Parameter(other, parameter.requires_grad))
        self.eval()
        vars(self).update(simple_attributes(original))
        self._captured = program, size_check(program)  # in a tuple, so that nothing is a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program, check = self._captured
        flat, nodes = program.flat_inputs(args, kwargs), program.placeholders()
        check(*flat)
        for node, leaf in zip(nodes, flat, strict=True):
            if isinstance(leaf, Tensor) and leaf.dtype != node.meta["val"].dtype:
                raise CallError(f"'{node.name}' is of {leaf.dtype} in one call, and was of another before")
        return pytree.tree_unflatten(
            Runner(program, [flat]).outputs(),
            program.facts.call.signature.out_spec,  # type: ignore[union-attr]
        )


def same_output(output: Any, expected: Any) -> bool:
    """Whether two outputs have the same structure and, up to rounding, the same values."""
    return built_alike(output, expected, _same_leaf)


def _same_leaf(leaf: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return deviation(leaf, expected) <= tolerance("two ways", expected.dtype)
    if type(leaf) is type(expected) and hasattr(expected, "__dict__"):  # not registered with pytree
        return bool(leaf == expected) or same_output(vars(leaf), vars(expected))
    return deviation(leaf, expected) == 0


def capture_model(model: Any, args: Any, kwargs: dict[str, Any] | None, **options: Any) -> Captured:
    """A model as one program, or else in parts, where nothing speaks of the whole of it: the exporter failed
    on the code of a model whose weights are there, and nothing was said of its program.

    Args:
        options: as for :func:`capture_whole`.

    Raises:
        CaptureError: neither it nor any of its submodules can be captured.
    """
    try:
        return capture_whole(model, args, kwargs, **options)
    except tolerable(CaptureError) as error:
        if (
            options["state"]
            or options["dynamic_shapes"] is not None
            or not isinstance(error, ExportError)
            or not isinstance(model, nn.Module)
            or any(tensor.device.type == "meta" for tensor in weights_of(model).values())
        ):
            raise
        return _in_parts(error, model, args, kwargs, options["device"])


def _in_parts(
    error: CaptureError,
    model: nn.Module,
    args: Any,
    kwargs: dict[str, Any] | None,
    device: torch.device | str | None,
) -> Captured:
    """The largest submodules of a model that can be captured.

    Args:
        error: why the model cannot be captured as a whole.

    Raises:
        CaptureError: none of its submodules can be captured either.
    """
    call = Call(args if isinstance(args, tuple) else (args,), dict(kwargs or {}))
    signature = CallSignature.of(model.forward, call.args, call.kwargs)
    try:
        own_model = model_copy(model)
        for module in own_model.modules():
            if is_transformers(module):
                register_caches(module)  # before calls are recorded, so that what they hold is copied
        if device is not None:
            target = device_named(device)
            own_model, call = own_model.to(target), call.to(target)
        with (
            rewound(model),
            rewound(own_model),
            torch.compiler.set_stance("force_eager"),  # what a model compiles for itself would not be run
            noting_reads(model, own_model) as read,
        ):
            call.run(own_model)
        if read:
            raise CaptureError(said_of_reads(model, read))
        search = Search(own_model, call)
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
    in_parts = Parts(own_model, call, signature, error, parts, search.left)
    return Captured({part.paths[0]: part.program for part in parts}, {}, in_parts=in_parts)
