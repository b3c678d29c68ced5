"""What common operators return of tensors without data, known from shapes alone.

Torch finds it by running each as several others, at sizes that can be symbols, which takes most of the time
of a walk through a graph. Whatever is out of the ordinary is left to torch, errors too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.compat import FakeTensor

_ATEN = torch.ops.aten


def foreseen(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of an operator on fake tensors, in whose mode this is called; ``None`` if it has to be run
    to be known.

    It is what torch would return but for memory, in which the result is nobody's view.
    """
    known = _KNOWN.get(target)
    if known is None or not args or not _is_usual(args[0]):
        return None
    sizes = known(*args, **kwargs)
    return None if sizes is None else torch.empty(sizes, dtype=args[0].dtype, device=args[0].device)


def _is_usual(given: Any) -> bool:
    """Whether a tensor has values of floating point, elements, and no gaps between them."""
    return (
        isinstance(given, FakeTensor)
        and given.layout is torch.strided
        and given.is_floating_point()
        and not (given.requires_grad and torch.is_grad_enabled())
        and given.dim() > 0
        and _is_contiguous(given)
    )


def _is_contiguous(given: Tensor) -> bool:
    expected: Any = 1
    for size, stride in zip(reversed(_plain(given.shape)), reversed(_plain(given.stride()))):
        if size == 0 or stride != expected:
            return False
        expected = expected * size
    return True


def _plain(sizes: Sequence[Any]) -> list[Any]:
    """Sizes as numbers and expressions, of which nothing is assumed when they are compared."""
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]


def _is_number(size: Any) -> bool:
    return isinstance(size, int) or bool(size.is_Integer)


def _same(given: Tensor, *options: Any, **named: Any) -> Sequence[Any] | None:
    return None if any(isinstance(option, Tensor) for option in options) else given.shape


def _linear(given: Tensor, weight: Any, bias: Any = None) -> Sequence[Any] | None:
    if given.dim() < 2 or not _fits(weight, given, 2) or not _as_wide(weight, given):
        return None
    if bias is not None and not (_fits(bias, given, 1) and bias.shape[0] == weight.shape[0]):
        return None
    return (*given.shape[:-1], weight.shape[0])


def _fits(weight: Any, given: Tensor, dims: int, sizes: bool = True) -> bool:
    """Whether a weight is of a tensor's kind, and both have channels that are numbers (``sizes``)."""
    return (
        isinstance(weight, FakeTensor)
        and (weight.dtype, weight.device, weight.layout) == (given.dtype, given.device, given.layout)
        and weight.dim() == dims
        and not (weight.requires_grad and torch.is_grad_enabled())
        and (
            not sizes
            or all(_is_number(size) and size > 0 for size in _plain((*weight.shape, given.shape[-1])))
        )
    )


def _as_wide(weight: Tensor, given: Tensor) -> bool:
    """Whether a weight takes as many channels as there are."""
    return bool(weight.shape[-1] == _plain(given.shape)[-1])


def _addmm(bias: Tensor, first: Any, second: Any, *, beta: Any = 1, alpha: Any = 1) -> Sequence[Any] | None:
    if bias.dim() != 1 or not _fits(first, bias, 2, sizes=False) or not _fits(second, bias, 2):
        return None
    inner = _plain(first.shape)[1]
    fits = _is_number(inner) and inner == second.shape[0] and bias.shape[0] == second.shape[1]
    return (first.shape[0], second.shape[1]) if fits else None


def _layer_norm(
    given: Tensor,
    normalized: Sequence[Any],
    weight: Any = None,
    bias: Any = None,
    *options: Any,
    **named: Any,
) -> Sequence[Any] | None:
    fits = len(normalized) == 1 and normalized[0] == _plain(given.shape[-1:])[0]
    affine = [part for part in (weight, bias) if part is not None]
    fits = fits and all(_fits(part, given, 1) and _as_wide(part, given) for part in affine)
    return given.shape if fits and affine else None


def _view(given: Tensor, sizes: Sequence[Any]) -> Sequence[Any] | None:
    wanted, total = _plain(sizes), math.prod(_plain(given.shape))
    if 0 in wanted:
        return None
    if -1 in wanted:
        place = wanted.index(-1)
        rest = total / math.prod(size for size in wanted if size != -1)
        if rest != int(rest) if isinstance(rest, float) else not getattr(rest, "is_Integer", False):
            return None
        wanted[place] = int(rest)
        sizes = [*sizes[:place], wanted[place], *sizes[place + 1 :]]
    return sizes if math.prod(wanted) == total else None


_KNOWN: dict[Any, Callable[..., Sequence[Any] | None]] = {
    **dict.fromkeys(
        (
            _ATEN.relu.default,
            _ATEN.gelu.default,
            _ATEN.silu.default,
            _ATEN.tanh.default,
            _ATEN.sigmoid.default,
        ),
        _same,
    ),
    _ATEN.linear.default: _linear,
    _ATEN.addmm.default: _addmm,
    _ATEN.layer_norm.default: _layer_norm,
    _ATEN.view.default: _view,
    _ATEN.reshape.default: _view,
}

#: those that are made of others while a model is traced
TRACED = tuple(
    getattr(_ATEN, name).default for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "addmm", "view")
)

__all__ = ["TRACED", "foreseen"]
