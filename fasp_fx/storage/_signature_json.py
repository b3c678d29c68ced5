"""A caller's signature as JSON, and back."""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..base._json import ReadBy, parse
from ..capturing._signature import HELD, CallSignature
from ..errors import StoreError
from ._folder import parsing
from ._tensors import device_of

#: what generated code calls its own
_TAKEN = {"self", "_call", "_name", "_value", "fx_pytree", "torch", *keyword.kwlist}


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
            try:
                entry["default"] = value_to_json(parameter.default)
            except TypeError:
                entry["default"] = {"not_stored": repr(parameter.default)}
        parameters.append(entry)
    for name in (*signature.captured, *signature.constants):
        _name(name)
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


def _name(name: Any) -> str:
    """The name of an argument; it becomes part of generated code, and so must be nothing but a name."""
    if not isinstance(name, str) or not name.isidentifier() or name in _TAKEN or len(name) > 1000:
        raise StoreError(
            f"{name!r:.200} is no name that an argument can have in Python code, and is not stored; rename it"
        )
    return name


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
    "not_stored": lambda content: NotStored(str(content)),
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


_Name = Annotated[str, ReadBy(_name)]
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


__all__ = [
    "dtype_of",
    "signature_from_json",
    "signature_to_json",
    "value_from_json",
    "value_to_json",
]
