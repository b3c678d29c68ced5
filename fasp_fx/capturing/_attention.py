"""Attention as it is fastest while batches run.

Over few keys rounded products make it slower: on CPUs the fused kernel takes a product for each head of each
sample, and each of these is prepared anew, which over few keys takes several times as long as the product.

A captured graph makes a mask of what a model asks for as causal. Where a mask is that, kernels are told: they
leave out what it hides, half of the work, and give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
#: from so many keys on rounding pays: 8 samples of 12 heads take 3.4 times as long with 128, 2.6 with 256,
#: one of 9 heads as long with 512 and two thirds with 1,024
_MANY_KEYS = 768
#: rows of a mask that are looked at together
_ROWS = 1024
#: of masks that all layers share: the version of their values that was looked at, and whether it is causal
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()
_PRODUCTS = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def execute(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator gives, now and on the way back: with products in full where it is attention over few
    keys on a CPU, else with the precision that is set.
    """
    if target is _ATTENTION:
        args, kwargs = _told_of_causality(args, kwargs)
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


class ToldOfCausality(TorchFunctionMode):
    """Within it, attention is told of causal masks, whoever calls it; nothing else is changed."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION or func is functional.scaled_dot_product_attention:
            told, kwargs = _told_of_causality(args, kwargs)
            return func(*told, **kwargs)
        return func(*args, **kwargs)


def _told_of_causality(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments of attention, with a flag in the place of a mask that says the same."""
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if (
        len(args) < 3
        or not isinstance(mask, Tensor)
        or mask.requires_grad
        or not _is_causal(mask, args[0], args[1])
    ):
        return args, kwargs
    dropout = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    rest = {name: kwargs[name] for name in kwargs if name in ("scale", "enable_gqa")}
    return (*args[:3], None, dropout, True), rest


def _is_causal(mask: Tensor, queries: Tensor, keys: Tensor) -> bool:
    """Whether a mask hides from every query the keys behind its own position, and nothing else."""
    length = queries.shape[-2]
    if keys.shape[-2] != length or mask.shape[-2:] != (length, length):
        return False
    if mask.is_inference():  # of which it is not known whether it was written into since
        return _hides_what_follows(mask)
    known = _KNOWN.get(mask)
    if known is None or known[0] != mask._version:
        known = _KNOWN[mask] = mask._version, _hides_what_follows(mask)
    return known[1]


def _hides_what_follows(mask: Tensor) -> bool:
    """The same, of a mask for as many queries as keys."""
    length = mask.shape[-1]
    for dim in range(mask.dim() - 2):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    columns = torch.arange(length, device=mask.device)
    for start in range(0, length, _ROWS):
        seen = columns[start : start + _ROWS, None] >= columns
        part = mask[..., start : start + _ROWS, :]
        alike = (
            part == seen
            if part.dtype == torch.bool
            else torch.where(seen, part == 0, part <= torch.finfo(part.dtype).min)
        )
        if not bool(alike.all()):
            return False
    return True


# --- Flex attention as a compiler traces it.


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
