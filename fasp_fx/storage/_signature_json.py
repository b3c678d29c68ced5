"""The signature that a caller of a program sees, and plain values, as JSON, and back."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch

from fasp_fx.base import (
    ReadBy,
    parse,
)
from fasp_fx.capturing import HELD, CallSignature
from fasp_fx.errors import StoreError

from ._folder import parsing
from ._tensors import device_of
from ._untrusted import check_name

K = TypeVar("K")


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
    fields = {}
    for name, value in values.items():
        try:
            fields[name] = value_to_json(value)
        except TypeError as error:
            raise StoreError(
                f"argument '{name}' was captured as {value!r}: {error}; capture the model with plain data"
                " (None, bool, int, float, str, list, tuple, dict with text for keys)"
            ) from error
    return fields


def _refuse(value: Any) -> Any:
    raise TypeError(f"a {type(value).__name__} is not stored")


def value_to_json(value: Any, other: Callable[[Any], Any] = _refuse) -> Any:
    """Plain data with a tag where JSON lacks the type.

    Args:
        other: writes values of other types.

    Raises:
        TypeError: the value is not plain data.
    """
    if type(value) in (float, complex) and not (type(value) is float and math.isfinite(value)):
        return {type(value).__name__: repr(value)}
    if type(value) in (type(None), bool, int, float, str):
        return value
    if value is HELD:
        return {"held": None}
    if type(value) is list:
        return [value_to_json(item, other) for item in value]
    if type(value) is tuple:
        return {"tuple": [value_to_json(item, other) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: value_to_json(item, other) for key, item in value.items()}}
    if isinstance(value, (torch.device, *_CONSTANTS)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    return other(value)


#: constants of torch that have names there
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


def constant_of(kind: type[K]) -> Callable[[Any], K]:
    """What finds a constant of torch of a kind by its name; a ``ValueError`` says that there is none."""

    def find(name: Any) -> K:
        constant = getattr(torch, name, None) if isinstance(name, str) else None
        if not isinstance(constant, kind):
            raise ValueError(f"{name!r:.80} is no {kind.__name__}")
        return constant

    return find


#: by the tag that says of which type a value is
_READERS: dict[str, Callable[[Any], Any]] = {
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}.__getitem__,
    "complex": complex,
    "device": device_of,
    **{kind.__name__: constant_of(kind) for kind in _CONSTANTS},
    "held": lambda content: HELD,
    "not_stored": str,  # what the default of an argument that was not given at capture was shown as
}


def value_from_json(value: Any, readers: Mapping[str, Callable[[Any], Any]] = _READERS) -> Any:
    """The value that :func:`value_to_json` wrote.

    Args:
        readers: by the tag that says of which type a value is.

    Raises:
        ValueError: it wrote none such.
    """
    if isinstance(value, list):
        return [value_from_json(item, readers) for item in value]
    if not isinstance(value, dict):
        return value
    try:
        ((tag, content),) = value.items()
        if tag == "tuple":
            return tuple(value_from_json(item, readers) for item in content)
        if tag == "dict":
            return {key: value_from_json(item, readers) for key, item in content.items()}
        return readers[tag](content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{value!r:.200} is not a stored value") from error


def readers_with(**readers: Callable[[Any], Any]) -> dict[str, Callable[[Any], Any]]:
    """Those of plain data, and these."""
    return {**_READERS, **readers}


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
    fields = parse(_Signature, text, "signature.json")
    with parsing("signature.json"):
        parameters = [
            inspect.Parameter(one.name, getattr(inspect.Parameter, one.kind), default=one.default)
            for one in fields.parameters
        ]
        return CallSignature(
            inspect.Signature(parameters), fields.captured, fields.constants, fields.outlines
        )
