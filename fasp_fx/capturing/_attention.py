"""Attention as it is fastest while batches run.

Over few keys rounded products make it slower: on CPUs the fused kernel takes a product for each head of each
sample, and each of these is prepared anew, which over few keys takes several times as long as the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

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


# --- Flex attention as a compiler traces it.


FLEX = torch.ops.higher_order.flex_attention


def attend(*inputs: Any) -> Any:
    """The operator itself; for ``torch.compile``, with the tensors that its graphs read bound to them.

    An exported program hands those tensors to the operator as arguments of their own, the last two.
    ``torch.compile`` traces only calls without them, in which the graphs are functions that hold what they
    read, as it finds them in a model.
    """
    if not torch.compiler.is_dynamo_compiling():
        return FLEX(*inputs)
    query, key, value, score_mod, block_mask, scale, options, of_scores, of_masks = (*inputs, (), ())[:9]

    def score(*numbers: Tensor) -> Tensor:
        return score_mod(*numbers, *of_scores)

    def mask(*numbers: Tensor) -> Tensor:
        return block_mask[-1](*numbers, *of_masks)

    return FLEX(query, key, value, score, (*block_mask[:-1], mask), scale, options)


def make_traceable(graph: fx.Graph) -> None:
    """Let a compiler trace the flex attention of an exported graph; changes the graph."""
    for node in graph.find_nodes(op="call_function", target=FLEX):
        node.target = attend
