"""Named tensors in safetensors files: tied ones once, dense layouts kept, nothing pickled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasp_fx.base import Count, parse, tolerable
from fasp_fx.capturing import region
from fasp_fx.errors import StoreError, first_line

from ._folder import parsing
from ._untrusted import check_weight_name

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
        strides = data.stride()
        order = sorted(range(data.dim()), key=lambda dim: -strides[dim])
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
