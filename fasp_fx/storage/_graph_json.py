"""An exported program, and the signature that its caller sees, as JSON, and back."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fasp_fx.base import (
    Count,
    ReadBy,
    graph_from_fields,
    graph_to_fields,
    parse,
    pytree,
    quiet,
    read_graph,
    schema,
    tolerable,
    write_graph,
)
from fasp_fx.capturing import HELD, CallSignature, results
from fasp_fx.errors import StoreError, first_line

from ._folder import parsing
from ._tensors import device_of, to_device
from ._untrusted import check_name, check_program, walk

#: elements of all example inputs of a program together
EXAMPLE = 2**28
#: how the structure of arguments and outputs names a device: in JSON that is a text of JSON
_DEVICE = re.compile(r'(\\+"_t\\+": \\+"device\\+", \\+"s\\+": \\+")\w+(:\d+)?')


def signature_to_json(signature: CallSignature) -> dict[str, Any]:
    """Names, kinds and defaults of the parameters, and what was captured.

    Raises:
        StoreError: an argument given at capture is not plain data; names it.
    """
    parameters = []
    for parameter in signature.parameters.parameters.values():
        entry: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not inspect.Parameter.empty:
            try:
                entry["default"] = value_to_json(parameter.default)
            except TypeError:
                entry["default"] = {"not_stored": repr(parameter.default)}
        parameters.append(entry)
    for name in (*signature.captured, *signature.constants):
        check_name(name)
    return {
        "parameters": parameters,
        "captured": list(signature.captured),
        "constants": _values_to_json(signature.constants),
        "outlines": _values_to_json(signature.outlines),
    }


def _values_to_json(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        try:
            found[name] = value_to_json(value)
        except TypeError as error:
            raise StoreError(
                f"argument '{name}' was captured as {value!r}: {error}; capture the model with plain data"
                " (None, bool, int, float, str, list, tuple, dict with text for keys)"
            ) from error
    return found


def value_to_json(value: Any) -> Any:
    """Plain data with a tag where JSON lacks the type.

    Raises:
        TypeError: the value is not plain data.
    """
    if type(value) is float and not math.isfinite(value):
        return {"float": repr(value)}
    if type(value) in (type(None), bool, int, float, str):
        return value
    if value is HELD:
        return {"held": None}
    if type(value) is list:
        return [value_to_json(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [value_to_json(item) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: value_to_json(item) for key, item in value.items()}}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    raise TypeError(f"a {type(value).__name__} is not stored")


def dtype_of(name: Any) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ValueError: there is none.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r:.80} is no dtype")
    return found


#: by the tag that says of which type a value is
_READERS: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda content: tuple(map(value_from_json, content)),
    "dict": lambda content: {key: value_from_json(item) for key, item in content.items()},
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}.__getitem__,
    "device": device_of,
    "dtype": dtype_of,
    "held": lambda content: HELD,
    "not_stored": str,  # what the default of an argument that was not given at capture was shown as
}


def value_from_json(value: Any) -> Any:
    """The value that :func:`value_to_json` wrote.

    Raises:
        ValueError: it wrote none such.
    """
    if isinstance(value, list):
        return [value_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    try:
        ((tag, content),) = value.items()
        return _READERS[tag](content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{value!r:.200} is not a stored value") from error


_Name = Annotated[str, ReadBy(check_name)]
_Value = Annotated[Any, ReadBy(value_from_json)]


@dataclass(frozen=True)
class _Parameter:
    name: _Name
    kind: Literal["POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD"]
    default: _Value = inspect.Parameter.empty


@dataclass(frozen=True)
class _Signature:
    parameters: tuple[_Parameter, ...]
    captured: tuple[_Name, ...]
    constants: dict[_Name, _Value]
    outlines: dict[_Name, _Value]


def signature_from_json(text: str) -> CallSignature:
    """The signature that :func:`signature_to_json` wrote.

    Raises:
        StoreError: the text is of none.
    """
    held = parse(_Signature, text, "signature.json")
    with parsing("signature.json"):
        parameters = [
            inspect.Parameter(one.name, inspect._ParameterKind[one.kind], default=one.default)
            for one in held.parameters
        ]
        return CallSignature(inspect.Signature(parameters), held.captured, held.constants, held.outlines)


# --- Programs.


@dataclass(frozen=True)
class _Leaf:
    """A tensor among the example inputs, or another value."""

    shape: tuple[Count, ...] | None = None
    dtype: Annotated[torch.dtype, ReadBy(dtype_of)] = torch.float32
    device: str = "cpu"
    value: Annotated[Any, ReadBy(value_from_json)] = None


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
            written = write_graph(program)
        example = [_leaf(value) for value in pytree.tree_leaves(program.example_inputs)]
    except tolerable(Exception) as error:
        raise StoreError(f"the program cannot be written as JSON: {first_line(error)}") from error
    check_program(written)  # what is refused on loading is refused now
    return {"program": graph_to_fields(written), "example": example}


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
        parsed = graph_from_fields(data["program"])
        check_program(parsed)
        if device is not None:
            _move(parsed, device)
        structure = parsed.graph_module.module_call_graph[0].signature.in_spec
        example = _example_from_json(json.dumps(data["example"]), structure, device)
        with quiet():
            program = read_graph(parsed, weights, constants, example)
        check_weights(program, cast=cast)
        return program


def check_weights(program: ExportedProgram, *, cast: bool = False) -> None:
    """Refuse weights that are not what the graph takes them for, as after ``module.half()``.

    Args:
        cast: whether they may be of other types and on another device.

    Raises:
        StoreError: names one.
    """
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name not in names:
            continue
        name, expected = names[node.name], node.meta["val"]
        tensor = program.state_dict.get(name, program.constants.get(name))
        for what in ("shape",) if cast else ("shape", "dtype", "device"):
            found, wanted = getattr(tensor, what, None), getattr(expected, what)
            if found != wanted:
                raise StoreError(
                    f"'{name}' has {what} {found}, the program was captured with {wanted}; undo the change,"
                    " or export the module again"
                )


def _move(item: Any, device: torch.device) -> None:
    """Put every device that a parsed program names on ``device``."""
    for _, part in walk(item):
        if isinstance(part, schema.Device):
            part.type, part.index = device.type, device.index
        elif isinstance(part, schema.ModuleCallSignature):
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
