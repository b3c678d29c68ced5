"""For oracles that are exact, and for processes that are compared: products are not rounded by themselves on
machines that would be faster so. tests/test_precision.py holds the rounded ones.
"""

from typing import Any

import torch


def compute_in_full() -> None:
    """Let the processor say of itself that it multiplies bfloat16 no faster."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return
    able = torch.cpu.get_capabilities

    def less_able() -> dict[str, Any]:
        return {**able(), "amx_bf16": False}

    torch.cpu.get_capabilities = less_able
