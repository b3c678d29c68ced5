"""Where a model's weights are, and what its device is fast at."""

from __future__ import annotations

import contextlib
from itertools import chain
from typing import Any

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's weights."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 in hardware, which takes a fraction of the time of float32; elsewhere it may take longer."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False)) if hasattr(torch.cpu, "get_capabilities") else False
    return False


def products_in_bfloat16(device: torch.device, wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Within it, products are computed in bfloat16 by autocast, if wanted."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else contextlib.nullcontext()


__all__ = ["device_of", "multiplies_bfloat16", "products_in_bfloat16"]
