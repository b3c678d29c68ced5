"""For oracles that are exact, and for processes that are compared: products are not rounded by themselves on
machines that would be faster so. tests/test_precision.py holds the rounded ones.
"""

import torch


def compute_in_full() -> None:
    """Let the processor say of itself that it multiplies bfloat16 no faster."""
    if hasattr(torch.cpu, "get_capabilities"):
        torch.cpu.get_capabilities = dict  # type: ignore[assignment]
