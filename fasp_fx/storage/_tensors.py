"""Named tensors in safetensors files: tied ones once, dense layouts kept, nothing pickled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..base._tolerable import tolerable
from ..errors import StoreError, first_line
from ._files import TENSORS, tensors_of
from ._untrusted import check_weight_name

#: complex numbers that safetensors has no name for, by what they are pairs of
_IN_PAIRS = {torch.float64: torch.complex128}
_DEVICE = re.compile(r"(?!meta)[a-z]{1,20}(:\d{1,4})?")


def write_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Write tensors to one file and return what the file does not hold, by name: ties, kind, device and order
    of dimensions.

    Raises:
        StoreError: a value is not a plain dense tensor.
    """
    stored: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
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
        region = (
            data.untyped_storage().data_ptr(),
            data.storage_offset(),
            tuple(data.shape),
            data.stride(),
            data.dtype,
            data.numel() or name,
        )
        kept = first.setdefault(region, name)
        strides = data.stride()
        order = sorted(range(data.dim()), key=lambda dim: -strides[dim])
        if not data.permute(order).is_contiguous():
            order = list(range(data.dim()))
        if kept == name:
            held = data.permute(order).contiguous().to("cpu")
            stored[name] = torch.view_as_real(held) if held.dtype in _IN_PAIRS.values() else held
        parameter = isinstance(tensor, nn.Parameter)
        entries[name] = {
            "stored_as": kept,
            "order": order,
            "parameter": parameter,
            "requires_grad": tensor.requires_grad,
            "device": str(tensor.device),
            "pairs": data.dtype in _IN_PAIRS.values(),
        }
    try:
        save_file(stored, path, metadata)
    except (safetensors.SafetensorError, ValueError, RuntimeError, KeyError) as error:  # shortages too
        raise StoreError(f"the tensors cannot be written to '{path.name}': {error}") from error
    return entries


def read_tensors(
    path: Path, entries: Mapping[str, Mapping[str, Any]], device: torch.device | None
) -> dict[str, Tensor]:
    """The tensors of one file, on ``device`` or where they were; tied names share one object.

    Raises:
        StoreError: the file does not hold what the entries name, or a device is missing.
    """
    tensors_of(path)
    if not isinstance(entries, Mapping) or len(entries) > TENSORS:
        raise StoreError(f"'{path.name}' is listed as no tensors, or as too many; save the result again")
    try:
        stored = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise StoreError(
            f"'{path.name}' is not a readable safetensors file: {error}; save the result again"
        ) from error
    for source in {entry["stored_as"] for entry in entries.values() if entry.get("pairs")} & stored.keys():
        held = stored[source]
        if held.dtype not in _IN_PAIRS or held.shape[-1:] != (2,):
            raise StoreError(
                f"'{path.name}' does not hold complex numbers where the graph needs them; save the result"
                " again"
            )
        stored[source] = torch.view_as_complex(held.clone())  # pairs may lie where no complex number can
    made: dict[tuple[Any, ...], Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, entry in entries.items():
        check_weight_name(name)
        source, order, parameter = entry["stored_as"], entry["order"], entry["parameter"]
        if (
            source not in stored
            or sorted(order) != list(range(stored[source].dim()))
            or type(parameter) is not bool
        ):
            raise StoreError(
                f"'{path.name}' does not hold '{name}' as the graph needs it; save the result again"
            )
        if (
            parameter
            and entry["requires_grad"]
            and not (stored[source].is_floating_point() or stored[source].is_complex())
        ):
            raise StoreError(
                f"'{name}' is said to be trained and holds {stored[source].dtype}, which cannot be; save the"
                " result again"
            )
        key = (source, parameter)
        if key not in made:
            # The file is mapped into memory: a copy keeps the tensor when the file goes.
            data = to_device(stored[source].clone(), device or device_of(entry["device"])).permute(
                _inverse(order)
            )
            made[key] = nn.Parameter(data, requires_grad=bool(entry["requires_grad"])) if parameter else data
        found[name] = made[key]
    return found


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


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
