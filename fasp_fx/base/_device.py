"""Where a model's weights are, and what its device is fast at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from fasp_fx.errors import ArgumentError, first_line

from ._tolerable import tolerable
from ._undisturbed import for_a_while


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


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 in hardware, which takes a fraction of the time of
    float32; elsewhere it may take longer.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(known.get("amx_bf16", False))


def products_in_bfloat16(device: torch.device, wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Within it, products are computed in bfloat16 by autocast, if wanted."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else contextlib.nullcontext()


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within it, products of float32 have a precision by :func:`torch.set_float32_matmul_precision`, unless
    the caller asked torch for one before.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except tolerable(RuntimeError):  # backends were given one each
        before = None
    if precision == before or before != "highest":
        yield
        return
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]

    def read() -> list[str]:
        return [torch.get_float32_matmul_precision(), *(backend.fp32_precision for backend in backends)]

    def write(states: list[str]) -> None:
        torch.set_float32_matmul_precision(states[0])
        for backend, value in zip(backends, states[1:], strict=True):
            # "highest" asks each of them for something, who were asked for nothing.
            backend.fp32_precision = value

    with for_a_while(read, write):
        torch.set_float32_matmul_precision(precision)
        yield
