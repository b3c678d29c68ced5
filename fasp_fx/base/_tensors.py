"""Tensors as bytes, as digests, by the memory they share, and without any; and the devices they are on."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasp_fx.errors import ArgumentError, first_line

from ._tolerable import tolerable
from .compat import pytree, storage_id

#: whole numbers of 32 bits that are hashed into one of 64
_WIDTH = 2048
#: of so many bytes at a time: what stays in the cache of a core, and what keeps an accelerator at work
_BYTES, _BYTES_ACCELERATED = 2**19, 2**26
#: one odd number for each of the numbers that are hashed into one, the same everywhere
_KEYS = np.frombuffer(hashlib.shake_256(b"fasp_fx").digest(8 * _WIDTH), dtype="<i8") | 1


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and all values, the same on any device; of tensors without values, of names
    and shapes alone.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() and tensor.device.type != "meta":
            for hashes in _hashed(bytes_of(tensor)):
                digest.update(hashes.cpu().numpy().tobytes())
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> Tensor:
    """The values of a tensor as bytes, shape ``[bytes]``; a view where they lie one after another."""
    return dense(tensor).resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)


def dense(tensor: Tensor) -> Tensor:
    """A tensor with the same values, dense and not quantised; itself where it is so."""
    return tensor.dequantize() if tensor.is_quantized else tensor.to_dense()


def _hashed(values: Tensor) -> Iterator[Tensor]:
    """A number of 64 bits for each run of bytes of a fixed length, some runs at a time, shape ``[runs]``.

    It is the sum of products with odd keys, modulo 2⁶⁴. Whole numbers are added up to the same in any order,
    so that neither device nor threads matter, and much faster than a cryptographic digest of all bytes.
    """
    run = 4 * _WIDTH
    size = min(_BYTES if values.device.type == "cpu" else _BYTES_ACCELERATED, -(-len(values) // run) * run)
    keys = torch.from_numpy(_KEYS.copy()).to(values.device)
    padded = torch.empty(size, dtype=torch.uint8, device=values.device)
    for chunk in values.split(size):
        piece = padded[: -(-len(chunk) // run) * run]
        piece[: len(chunk)].copy_(chunk)
        piece[len(chunk) :].zero_()
        # Numbers of 32 bits: whichever of their bits differ, the product with an odd number of 64 bits does.
        numbers = piece.view(torch.int32).view(-1, _WIDTH).to(torch.int64)
        yield numbers.mul_(keys).sum(1)


def digest_of(batches: Iterable[Iterable[Any]]) -> str:
    """What tells calibration data from others: types, shapes and values."""
    digest = hashlib.sha256()
    for leaf in (leaf for batch in batches for leaf in batch):
        digest.update(repr((leaf.dtype, tuple(leaf.shape)) if isinstance(leaf, Tensor) else leaf).encode())
        if isinstance(leaf, Tensor):
            digest.update(bytes_of(leaf.detach().cpu()).numpy())
    return digest.hexdigest()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among arguments or outputs, however these are nested."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def storage_of(value: object) -> object:
    """What tells whether two tensors share memory, also where they hold no values; for anything else,
    something that is equal to nothing.
    """
    return storage_id(value) if isinstance(value, Tensor) and value.layout == torch.strided else object()


def lying_otherwise(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and type, without its values, whose memory is in no order that an operator
    may hope for: the dimensions are in reverse order, and every other element is left out.
    """
    strides = list(accumulate(tensor.shape, operator.mul, initial=2))
    # What lies between is the same each time: a model may read it, and would differ from itself.
    return tensor.new_zeros(strides[-1]).as_strided(tensor.shape, strides[: tensor.dim()]).detach()


def laid_otherwise(tensor: Tensor) -> Tensor:
    """A copy that lies so."""
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized
    return lying_otherwise(tensor).copy_(tensor) if is_plain else tensor.clone()


def with_values(tensor: Tensor, values: Tensor) -> Tensor:
    """A parameter, or what is none, that holds other values."""
    values = values.detach()
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def without_values(tensor: Tensor) -> Tensor:
    """A tensor of the same kind on the meta device."""
    return with_values(tensor, tensor.detach().to("meta"))


# --- Devices.


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's weights."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def check_device(device: torch.device | str, values: bool = True) -> torch.device:
    """The device of a name, if it can be used.

    Args:
        values: whether it must be one that keeps values, as the meta device does not.

    Raises:
        ArgumentError: there is no such device here.
    """
    try:
        place = device_named(device)
        probe = torch.empty(1, device=place)
        if values:
            probe.tolist()
    except tolerable(Exception) as error:  # each backend raises what it likes
        raise ArgumentError(
            f"the device '{device}' cannot be used here: {first_line(error)}; try 'cpu', or leave it out"
        ) from error
    return place


def device_named(device: torch.device | str) -> torch.device:
    """The device of a name; that of the CPU has no number, as tensors there say it."""
    place = torch.device(device)
    return torch.device("cpu") if place.type == "cpu" else place


def multiplies_bfloat16(device: torch.device, *, from_float32: bool = False) -> bool:
    """Whether a device multiplies matrices of bfloat16 in hardware, which takes a fraction of the time of
    float32; elsewhere it may take longer.

    Args:
        from_float32: whether each product rounds what it multiplies, too. With AMX that still pays; AVX-512
            takes half the time for products of bfloat16, and nine tenths with the rounding.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    units = ("amx_bf16",) if from_float32 else ("amx_bf16", "avx512_bf16")
    return device.type == "cpu" and any(known.get(unit, False) for unit in units)
