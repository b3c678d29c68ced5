"""An exported program as JSON, and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..base._json import Count, ReadBy, parse
from ..base._tolerable import tolerable
from ..base._warn import quiet
from ..base.compat import HigherOrderOperator, _serde, pytree
from ..capturing._fx import arguments, results
from ..capturing._program import copy_graph
from ..errors import StoreError, first_line
from ._folder import parsing
from ._signature_json import dtype_of, value_from_json, value_to_json
from ._tensors import device_of, to_device
from ._untrusted import check_program, walk

#: elements of all example inputs of a program together
EXAMPLE = 2**28


@dataclass(frozen=True)
class _Leaf:
    """A tensor among the example inputs, or another value."""

    shape: tuple[Count, ...] | None = None
    dtype: Annotated[torch.dtype, ReadBy(dtype_of)] = torch.float32
    device: str = "cpu"
    value: Annotated[Any, ReadBy(value_from_json)] = None


#: the arguments of higher-order operators that are tuples: torch writes lists of one kind and dicts of any
#: kind, so that a tuple of sizes, tensors, graphs and nothing, such as the block mask of flex attention, is
#: written as a dict with the keys ``"0"``, ``"1"`` …
_TUPLES: dict[HigherOrderOperator, tuple[str, ...]] = {
    torch.ops.higher_order.flex_attention: (
        "block_mask",
        "score_mod_other_buffers",
        "mask_mod_other_buffers",
    ),
}
#: how the structure of arguments and outputs names a device: in JSON that is a text of JSON
_DEVICE = re.compile(r'(\\+"_t\\+": \\+"device\\+", \\+"s\\+": \\+")\w+(:\d+)?')


def program_to_json(program: ExportedProgram) -> dict[str, Any]:
    """The graph, its signature, ranges and guards, and the shapes of the example inputs; no tensor.

    Raises:
        StoreError: the program holds something that JSON cannot.
    """
    text = next((item for item in results(program.graph) if isinstance(item, str)), None)
    if text is not None:  # which torch writes, and does not read again
        raise StoreError(
            f"the model returns the text {text!r} among its outputs, which is not stored; let forward return"
            " tensors and numbers"
        )
    try:
        with quiet():
            written = _serde.write(without_tuples(program))
        example = [_leaf(value) for value in pytree.tree_leaves(program.example_inputs)]
    except tolerable(Exception) as error:
        raise StoreError(f"the program cannot be written as JSON: {first_line(error)}") from error
    check_program(written)  # what is refused on loading is refused now
    return {"program": _serde.to_fields(written), "example": example}


def _leaf(value: Any) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {"value": value_to_json(value)}
    dtype = str(value.dtype).removeprefix("torch.")
    return {"shape": list(value.shape), "dtype": dtype, "device": str(value.device)}


def program_from_json(
    data: Mapping[str, Any],
    weights: dict[str, Tensor],
    constants: dict[str, Tensor],
    device: torch.device | None,
    cast: bool = False,
) -> ExportedProgram:
    """The program over the given tensors.

    Args:
        data: what :func:`program_to_json` returned.
        weights, constants: tensors by name.
        device: where the program shall run; ``None`` keeps the devices of the save.
        cast: whether the tensors may be of other types than the graph was captured with, as those of a module
            after ``double()``.

    Raises:
        StoreError: the data holds anything that :func:`program_to_json` does not write.
    """
    with parsing("graph.json"):
        parsed = _serde.from_fields(data["program"])
        check_program(parsed)
        if device is not None:
            _move(parsed, device)
        structure = parsed.graph_module.module_call_graph[0].signature.in_spec
        example = _example_from_json(json.dumps(data["example"]), structure, device)
        with quiet():
            program = _serde.read(parsed, weights, constants, example)
        with_tuples(program)
        check_weights(program, cast=cast)
        return program


def check_weights(program: ExportedProgram, *, cast: bool = False) -> None:
    """Refuse weights that are not what the graph takes them for, as after ``module.half()``.

    Args:
        cast: whether they may be of other types and on another device.

    Raises:
        StoreError: names one.
    """
    for name, expected in _expected(program):
        tensor = program.state_dict.get(name, program.constants.get(name))
        for what in ("shape",) if cast else ("shape", "dtype", "device"):
            found, wanted = getattr(tensor, what, None), getattr(expected, what)
            if found != wanted:
                raise StoreError(
                    f"'{name}' has {what} {found}, the program was captured with {wanted}; undo the change,"
                    " or export the module again"
                )


def _expected(program: ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    """The names of the tensors that a graph takes besides its inputs, and what it takes them for."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in names:
            yield names[node.name], node.meta["val"]


def _move(item: Any, device: torch.device) -> None:
    """Put every device that a parsed program names on ``device``."""
    for _, part in walk(item):
        if isinstance(part, _serde.schema.Device):
            part.type, part.index = device.type, device.index
        elif isinstance(part, _serde.schema.ModuleCallSignature):
            part.in_spec, part.out_spec = (
                _DEVICE.sub(rf"\g<1>{device}", spec) for spec in (part.in_spec, part.out_spec)
            )


def _example_from_json(text: str, structure: str, device: torch.device | None) -> Any:
    """Example inputs of the stored shapes, all zero."""
    leaves = parse(tuple[_Leaf, ...], text, "the example in graph.json")
    elements = sum(math.prod(leaf.shape) for leaf in leaves if leaf.shape is not None)
    if elements > EXAMPLE:
        raise StoreError(
            f"the example inputs in graph.json have {elements:,} elements, and at most {EXAMPLE:,} are made;"
            " save with smaller ones"
        )
    values = [
        leaf.value
        if leaf.shape is None
        else to_device(torch.zeros(leaf.shape, dtype=leaf.dtype), device or device_of(leaf.device))
        for leaf in leaves
    ]
    return pytree.tree_unflatten(values, pytree.treespec_loads(structure))


def without_tuples(program: ExportedProgram) -> ExportedProgram:
    """The same program with dicts in the place of those tuples, for writing only; the same object if it has
    none. Tensors are shared.
    """
    if not any(node.target in _TUPLES for node in program.graph.nodes):
        return program
    module = fx.GraphModule(program.graph_module, copy_graph(program.graph))
    module.meta.update(program.graph_module.meta)
    _replace(module.graph, lambda node, name, value: {str(index): item for index, item in enumerate(value)})
    return program._update(module, program.graph_signature)


def with_tuples(program: ExportedProgram) -> None:
    """Make tuples again of what :func:`without_tuples` wrote; changes the program.

    Raises:
        StoreError: an argument is nothing that it wrote.
    """
    if _replace(program.graph, _read):
        program.graph_module.recompile()


def _read(node: fx.Node, name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, dict) or list(value) != [str(index) for index in range(len(value))]:
        raise StoreError(
            f"argument '{name}' of node '{node.name}' ({node.target}) is no tuple as save() writes it; save"
            " the result again"
        )
    return tuple(value.values())


def _replace(graph: fx.Graph, change: Callable[[fx.Node, str, Any], Any]) -> bool:
    found = False
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _TUPLES:
            given = arguments(node)
            node.args, node.kwargs = (
                tuple(
                    change(node, name, value) if name in _TUPLES[node.target] else value
                    for name, value in given.items()
                ),
                {},
            )
            found = True
    return found


__all__ = ["check_weights", "program_from_json", "program_to_json"]
