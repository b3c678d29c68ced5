"""Flex attention as a compiler traces it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

FLEX = torch.ops.higher_order.flex_attention


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_other_buffers: tuple[Any, ...] = (),
    mask_mod_other_buffers: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator itself; for ``torch.compile``, with the tensors that its graphs read bound to them.

    An exported program hands those tensors to the operator as arguments of their own. ``torch.compile``
    traces only calls without them, in which the graphs are functions that hold what they read, as it finds
    them in a model.
    """
    if not torch.compiler.is_dynamo_compiling():
        plain: tuple[Tensor, Tensor, Tensor] = FLEX(
            query,
            key,
            value,
            score_mod,
            block_mask,
            scale,
            kernel_options,
            score_mod_other_buffers,
            mask_mod_other_buffers,
        )
        return plain

    def score(*given: Tensor) -> Tensor:
        return score_mod(*given, *score_mod_other_buffers)

    def mask(*given: Tensor) -> Tensor:
        found: Tensor = block_mask[-1](*given, *mask_mod_other_buffers)
        return found

    attended: tuple[Tensor, Tensor, Tensor] = FLEX(
        query, key, value, score, (*block_mask[:-1], mask), scale, kernel_options
    )
    return attended


def make_traceable(graph: fx.Graph) -> None:
    """Let a compiler trace the flex attention of an exported graph; changes the graph."""
    for node in graph.find_nodes(op="call_function", target=FLEX):
        node.target = attend


__all__ = ["FLEX", "attend", "make_traceable"]
