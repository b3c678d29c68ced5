"""Call what may remember its calls: several times in a row, and without a trace of them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.compat import pytree


@contextmanager
def rewinding(module: nn.Module) -> Iterator[None]:
    """Afterwards the buffers of a module hold what they held before."""
    held = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in held:
                if not torch.equal(buffer.nan_to_num(), before.nan_to_num()):
                    # A write of the same is a write to those who count them.
                    buffer.copy_(before)


def in_a_row(called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], times: int) -> Any:
    """The outputs of one call, or a list of those of several calls in a row.

    Args:
        called: a module, or what holds one as its ``module``.
        times: how often; with 1 the module is taken to remember nothing.
    """
    if times == 1:
        return with_own(called, args, kwargs)
    module = called if isinstance(called, nn.Module) else getattr(called, "module", None)
    assert isinstance(module, nn.Module), f"{called!r} has no buffers to rewind"
    with rewinding(module):
        return [_copied(with_own(called, args, kwargs)) for _ in range(times)]


def remembers(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call leaves anything in the buffers of a module; it is rewound."""
    before = [buffer.detach().clone() for buffer in module.buffers()]
    with rewinding(module):
        with_own(module, args, kwargs)
        return any(
            not torch.equal(old.nan_to_num(), new.nan_to_num())
            for old, new in zip(before, module.buffers(), strict=True)
        )


def with_own(called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call with copies of the inputs returns: a model may write into them."""
    own_args, own_kwargs = _copied((args, kwargs))
    return called(*own_args, **own_kwargs)


def _copied(value: Any) -> Any:
    """Inputs, or outputs, that the next call cannot write into."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)
