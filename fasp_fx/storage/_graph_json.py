"""An exported program as JSON, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..base._tolerable import tolerable
from ..base._warn import quiet
from ..base.compat import _serde, pytree
from ..capturing._fx import results
from ..errors import StoreError, first_line
from ._files import DIMENSIONS
from ._nested import with_tuples, without_tuples
from ._signature_json import value_from_json, value_to_json
from ._tensors import device_of, to_device
from ._untrusted import check_amount, check_program, walk

#: elements of all example inputs of a program together
EXAMPLE = 2**28


def program_to_json(program: ExportedProgram) -> dict[str, Any]:
    """The graph, its signature, ranges and guards, and the shapes of the example inputs; no tensor.

    Raises:
        StoreError: the program holds something that JSON cannot.
    """
    _check_outputs(program)
    try:
        with quiet():
            written = _serde.write(without_tuples(program))
    except tolerable(Exception) as error:
        raise StoreError(f"the program cannot be written as JSON: {first_line(error)}") from error
    tensors = len(program.state_dict) + len(program.constants)
    check_program(written, tensors)  # what is refused on loading is refused now
    fields = _serde.to_fields(written)
    check_amount(fields, tensors)
    return {"program": fields, "example": _example_to_json(program)}


def _check_outputs(program: ExportedProgram) -> None:
    """Refuse outputs that torch writes and does not read again.

    Raises:
        StoreError: says what is among them.
    """
    text = next((item for item in results(program.graph) if isinstance(item, str)), None)
    if text is not None:
        raise StoreError(
            f"the model returns the text {text!r} among its outputs, which is not stored; let forward return"
            " tensors and numbers"
        )
    for spec in _within(program.call_spec.out_spec):
        keys = spec.context if spec.type is dict else ()
        odd = next((key for key in keys if not isinstance(key, (str, int))), None)
        if odd is not None:
            raise StoreError(
                f"the model returns a dict with the key {odd!r}, which is not stored; let forward return"
                " dicts with text for keys"
            )


def _within(spec: Any) -> Iterator[Any]:
    """The specification of a tree and those of all in it."""
    yield spec
    for index in range(spec.num_children):
        yield from _within(spec.child(index))


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
    tensors = len(weights) + len(constants)
    try:
        check_amount(data["program"], tensors)
        parsed = _serde.from_fields(data["program"])
        check_program(parsed, tensors)
        if device is not None:
            _move(parsed, device)
        example = _example_from_json(
            data["example"], parsed.graph_module.module_call_graph[0].signature.in_spec, device
        )
        with quiet():
            program = _serde.read(parsed, weights, constants, example)
        with_tuples(program)
        _check_stored(program, cast)
        return program
    except StoreError:
        raise
    except tolerable(Exception) as error:  # torch's reader raises whatever it trips over
        raise StoreError(
            f"graph.json holds no program that torch {torch.__version__} can read: {first_line(error)}; save"
            " the result again"
        ) from error


def check_weights(program: ExportedProgram) -> None:
    """Refuse weights that no longer fit the graph, as after ``module.half()``."""
    for name, expected in _expected(program):
        tensor = program.state_dict.get(name, program.constants.get(name))
        for what in ("shape", "dtype", "device"):
            found, wanted = getattr(tensor, what, None), getattr(expected, what)
            if found != wanted:
                raise StoreError(
                    f"'{name}' has {what} {found}, the program was captured with {wanted}; undo the change,"
                    " or export the module again"
                )


def _check_stored(program: ExportedProgram, cast: bool) -> None:
    """Refuse tensors that are not what the graph takes them for."""
    for name, expected in _expected(program):
        tensor = program.state_dict.get(name, program.constants.get(name))
        if (
            not isinstance(tensor, Tensor)
            or tensor.shape != expected.shape
            or (tensor.dtype != expected.dtype and not cast)
        ):
            found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else "not stored"
            raise StoreError(
                f"'{name}' is {found}, the stored graph takes {expected.dtype} {list(expected.shape)}; save"
                " the result again"
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
            part.in_spec, part.out_spec = _moved(part.in_spec, device), _moved(part.out_spec, device)


def _moved(text: str, device: torch.device) -> str:
    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return (
                {**value, "s": str(device)}
                if value.get("_t") == "device"
                else {key: move(item) for key, item in value.items()}
            )
        return [move(item) for item in value] if isinstance(value, list) else value

    def visit(tree: dict[str, Any]) -> dict[str, Any]:
        context = tree["context"]
        if isinstance(context, str) and '"_t"' in context:
            context = json.dumps(move(json.loads(context)))
        return {
            **tree,
            "context": context,
            "children_spec": [visit(child) for child in tree["children_spec"]],
        }

    protocol, tree = json.loads(text)
    return json.dumps([protocol, visit(tree)])


def _example_to_json(program: ExportedProgram) -> list[dict[str, Any]]:
    leaves = []
    for leaf in pytree.tree_leaves(program.example_inputs):
        if isinstance(leaf, Tensor):
            leaves.append(
                {
                    "shape": list(leaf.shape),
                    "dtype": str(leaf.dtype).removeprefix("torch."),
                    "device": str(leaf.device),
                }
            )
            continue
        try:
            leaves.append({"value": value_to_json(leaf)})
        except TypeError as error:
            raise StoreError(
                f"an example input is {leaf!r}: {error}; capture the model with tensors and plain data"
            ) from error
    return leaves


def _example_from_json(leaves: list[dict[str, Any]], structure: str, device: torch.device | None) -> Any:
    """Example inputs of the stored shapes, all zero."""
    values = []
    elements = 0
    for leaf in leaves:
        if "value" in leaf:
            values.append(value_from_json(leaf["value"]))
            continue
        dtype = getattr(torch, leaf["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise StoreError(f"graph.json names {leaf['dtype']!r} as a dtype; save the result again")
        shape = leaf["shape"]
        if len(shape) > DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
            raise StoreError(
                f"graph.json gives an example input the shape {shape!r:.200}; save the result again"
            )
        elements += math.prod(shape)
        if elements > EXAMPLE:
            raise StoreError(
                f"the example inputs in graph.json have {elements:,} elements, and at most {EXAMPLE:,} are"
                " made; save with smaller ones"
            )
        values.append(to_device(torch.zeros(shape, dtype=dtype), device or device_of(leaf["device"])))
    return pytree.tree_unflatten(values, pytree.treespec_loads(structure))
