"""A caller's signature as JSON, and back."""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from ..base._tolerable import tolerable
from ..capturing.calling._constants import HELD
from ..capturing.calling._signature import CallSignature, has_tensor
from ..errors import StoreError, first_line
from ._tensors import device_of

#: Python compiles some thousand quickly, and models take some dozen
ARGUMENTS = 4096
#: what generated code calls its own
_TAKEN = {"self", "_call", "_name", "_value", "fx_pytree", "torch", "True", "False", "None"}


@dataclass(frozen=True)
class NotStored:
    """Stands for a default value that JSON cannot hold, of an argument that was not given at capture."""

    text: str

    def __repr__(self) -> str:
        return self.text


def signature_to_json(signature: CallSignature) -> dict[str, Any]:
    """Names, kinds and defaults of the parameters, and what was captured.

    Raises:
        StoreError: an argument given at capture is not plain data; names it.
    """
    parameters = []
    for parameter in signature.parameters.parameters.values():
        entry: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not inspect.Parameter.empty:
            entry["default"] = _default_to_json(parameter.default)
        parameters.append(entry)
    for name in (*signature.captured, *signature.constants):
        if not name.isidentifier() or keyword.iskeyword(name):
            raise StoreError(
                f"argument {name!r} has a name that Python code cannot spell, which is not stored; rename it"
            )
    constants = {}
    for name, value in signature.constants.items():
        try:
            constants[name] = value_to_json(value)
        except TypeError as error:
            plain = "None, bool, int, float, str, list, tuple, dict"
            raise StoreError(
                f"argument '{name}' was captured as {value!r}: {error}; capture the model with plain data"
                f" ({plain})"
            ) from error
    outlines = {name: _outline_to_json(name, outline) for name, outline in signature.outlines.items()}
    return {
        "parameters": parameters,
        "captured": list(signature.captured),
        "constants": constants,
        "outlines": outlines,
    }


def _outline_to_json(name: str, outline: Any) -> Any:
    try:
        return value_to_json(outline)
    except TypeError as error:
        raise StoreError(
            f"argument '{name}' is built of what is not stored ({error}); call the model with lists, tuples"
            " and dicts with text for keys"
        ) from error


def signature_from_json(data: Mapping[str, Any]) -> CallSignature:
    """The signature that :func:`signature_to_json` wrote.

    Raises:
        StoreError: the data is not a signature.
    """
    try:
        if max(len(data[part]) for part in ("parameters", "captured", "constants", "outlines")) > ARGUMENTS:
            raise ValueError(f"no function takes more than {ARGUMENTS} arguments")
        parameters = []
        for entry in data["parameters"]:
            default = value_from_json(entry["default"]) if "default" in entry else inspect.Parameter.empty
            parameters.append(
                inspect.Parameter(
                    _name(entry["name"]), inspect._ParameterKind[entry["kind"]], default=default
                )
            )
        captured = tuple(_name(name) for name in data["captured"])
        constants = {_name(name): value_from_json(value) for name, value in data["constants"].items()}
        outlines = {_name(name): value_from_json(value) for name, value in data["outlines"].items()}
        return CallSignature(inspect.Signature(parameters), captured, constants, outlines)
    except tolerable(KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        # A RecursionError is a RuntimeError.
        raise StoreError(
            f"signature.json is damaged: {type(error).__name__}: {first_line(error)}; save the result again"
        ) from error


def check_fit(program: ExportedProgram, signature: CallSignature) -> None:
    """Refuse a signature that is not that of the program: the code of a call is made of both.

    Raises:
        StoreError: names the argument.
    """
    in_spec = program.call_spec.in_spec
    by_position, by_name = in_spec.child(0).num_children, list(in_spec.child(1).context or [])
    given = signature.given()
    passed = {*given[:by_position], *by_name}
    parameters = signature.parameters.parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    args, kwargs = program.example_inputs or ((), {})
    known = {*signature.captured, *signature.constants}
    wrong = [
        *(f"argument {index}" for index in range(len(given), by_position)),
        *(name for name in by_name if name not in known),
        *(name for name in signature.captured if name not in passed),
        *(name for name, value in zip(given, args) if has_tensor(value) != (name in signature.captured)),
        *(name for name, value in kwargs.items() if has_tensor(value) != (name in signature.captured)),
        *(name for name in signature.outlines if name not in signature.captured),
        *(
            name
            for name in given
            if name not in signature.parameters.parameters
            and not takes_any
            and name not in signature.variadic()
        ),
    ]
    if wrong:
        raise StoreError(
            f"signature.json is not that of the stored graph: they differ in '{wrong[0]}'; save the result"
            " again"
        )


def _name(name: Any) -> str:
    """The name of an argument; it becomes part of generated code, and so must be nothing but a name."""
    if (
        not isinstance(name, str)
        or not name.isidentifier()
        or keyword.iskeyword(name)
        or name in _TAKEN
        or len(name) > 1000
    ):
        raise ValueError(f"{name!r:.200} is not the name of an argument")
    return name


def _default_to_json(value: Any) -> Any:
    try:
        return value_to_json(value)
    except TypeError:
        return {"not_stored": value.text if isinstance(value, NotStored) else repr(value)}


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


def value_from_json(value: Any) -> Any:
    """The value that :func:`value_to_json` wrote.

    Raises:
        ValueError: an unknown tag.
    """
    if isinstance(value, list):
        return [value_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    (tag, content), *rest = value.items()
    if not rest:
        if tag == "tuple":
            return tuple(value_from_json(item) for item in content)
        if tag == "dict":
            return {key: value_from_json(item) for key, item in content.items()}
        if tag == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if tag == "device":
            return device_of(content)
        if tag == "dtype" and isinstance(getattr(torch, content, None), torch.dtype):
            return getattr(torch, content)
        if tag == "held":
            return HELD
        if tag == "not_stored":
            return NotStored(str(content))
    raise ValueError(f"{value!r} is not a stored value")
