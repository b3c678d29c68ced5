"""What a save holds beside a graph: named tensors in safetensors files (tied ones once, dense layouts kept,
nothing pickled); plain values and the signature that a caller of a program sees, as JSON, and back.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasp_fx.base import Count, ReadBy, parse, tolerable
from fasp_fx.capturing import HELD, CallSignature, region
from fasp_fx.errors import StoreError, first_line

from ._folder import parsing
from ._untrusted import check_name, check_weight_name

K = TypeVar("K")
_DEVICE = re.compile(r"(?!meta)[a-z]{1,20}(:\d{1,4})?")
#: the entry of a file's metadata that says what safetensors does not
_ENTRIES = "fasp_fx"


@dataclass(frozen=True)
class _Entry:
    """What a file does not hold of a tensor by itself: ties, order of dimensions, kind and device."""

    stored_as: str
    order: tuple[Count, ...]
    parameter: bool
    requires_grad: bool
    device: str


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors to one file.

    Raises:
        StoreError: a value is not a plain dense tensor.
    """
    stored: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        if (
            not isinstance(tensor, Tensor)
            or tensor.layout is not torch.strided
            or tensor.device.type == "meta"
        ):
            raise StoreError(
                f"'{name}' is not a dense tensor with values ({type(tensor).__name__}); a save holds plain"
                " tensors only"
            )
        data = tensor.detach()
        kept = first.setdefault((region(data, name), data.dtype), name)
        order = sorted(range(data.dim()), key=data.stride, reverse=True)
        if not data.permute(order).is_contiguous():
            order = list(range(data.dim()))
        if kept == name:
            stored[name] = data.permute(order).contiguous().to("cpu")
        kind = (isinstance(tensor, nn.Parameter), tensor.requires_grad)
        entries[name] = asdict(_Entry(kept, tuple(order), *kind, str(tensor.device)))
    save_file(stored, path, {"format": "pt", _ENTRIES: json.dumps(entries)})


def read_tensors(path: Path, device: torch.device | None) -> dict[str, Tensor]:
    """The tensors of one file, on ``device`` or where they were; tied names share one object.

    Raises:
        StoreError: the file is damaged, or a device is missing.
    """
    tensors: dict[tuple[str, bool], Tensor] = {}
    named: dict[str, Tensor] = {}
    with parsing(path.name):  # safetensors holds the header against the size of the file
        stored = load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            listed = file.metadata()[_ENTRIES]
        for name, entry in parse(dict[str, _Entry], listed, f"the metadata of {path.name}").items():
            check_weight_name(name)
            key = (entry.stored_as, entry.parameter)
            if key not in tensors:
                # The file is mapped into memory: a copy keeps the tensor when the file goes.
                data = to_device(stored[entry.stored_as].clone(), device or device_of(entry.device))
                data = data.permute(sorted(range(data.dim()), key=entry.order.__getitem__))
                tensors[key] = nn.Parameter(data, entry.requires_grad) if entry.parameter else data
            named[name] = tensors[key]
    return named


def device_of(name: Any) -> torch.device:
    """The device of that name.

    Raises:
        StoreError: it is no name of a device that can hold values.
    """
    try:
        if not isinstance(name, str) or _DEVICE.fullmatch(name) is None:
            raise ValueError("it is no name of a device")
        return torch.device(name)
    except tolerable(RuntimeError, ValueError) as error:
        raise StoreError(
            f"the save names the device {name!r:.80}: {first_line(error)}; pass device='cpu' to load()"
        ) from error


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device.

    Raises:
        StoreError: this machine lacks the device.
    """
    try:
        return tensor.to(device)
    except tolerable(RuntimeError, AssertionError, ImportError) as error:
        raise StoreError(
            f"the save needs the device '{device}', which cannot be used here ({first_line(error)}); pass"
            " device='cpu' to load()"
        ) from error


# --- Plain values, and the signature.


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
