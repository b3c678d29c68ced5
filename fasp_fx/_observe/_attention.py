"""Attention over few keys, which rounded products make slower.

On CPUs the fused kernel takes a product for each head of each sample. Rounded, each of these is prepared
anew, which over few keys takes several times as long as the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
#: from so many keys on rounding pays: 8 samples of 12 heads take 3.4 times as long with 128, 2.6 with 256,
#: one of 9 heads as long with 512 and two thirds with 1,024
_MANY_KEYS = 768
_PRODUCTS = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def execute(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator gives, now and on the way back: with products in full where it is attention over few
    keys on a CPU, else with the precision that is set.
    """
    if target is not _ATTENTION or args[1].device.type != "cpu" or args[1].shape[-2] >= _MANY_KEYS:
        return target(*args, **kwargs)
    precision = _PRODUCTS.fp32_precision
    if precision in ("none", "ieee"):
        return target(*args, **kwargs)

    def set_precision(value: str) -> None:
        _PRODUCTS.fp32_precision = value

    set_precision("ieee")
    try:
        output: Tensor = target(*args, **kwargs)
    finally:
        set_precision(precision)
    if output.grad_fn is not None:
        output.grad_fn.register_prehook(lambda gradients: set_precision("ieee"))
        output.grad_fn.register_hook(lambda inputs, outputs: set_precision(precision))
    return output


__all__ = ["execute"]
