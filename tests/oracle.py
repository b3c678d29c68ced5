"""The independent oracle of mask-exactness: the dense model with zeros in the removed columns of every
consumer. It shares no code with the library's passes.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: the largest relative error that counts as equal in float32
TOLERANCE = 1e-4


def zeroed(model: nn.Module, plan: Any, producers: bool = False) -> nn.Module:
    """A copy of the model whose consumers' removed columns are zero: the same function, also where no
    module's hook sees the input.

    With ``producers``, their removed rows are zero as well.
    """
    copied = copy.deepcopy(model)
    weights = dict(copied.named_parameters(remove_duplicate=False))
    buffers = {name for name, _ in copied.named_buffers(remove_duplicate=False)}
    with torch.no_grad():
        for part in (
            part
            for group in plan.groups
            for part in (*group.consumers, *(group.producers if producers else ()))
        ):
            if part.name in buffers:
                continue
            pieces = (
                [weights[part.name]]
                if part.block_dim is None
                else weights[part.name].chunk(len(part.removed), part.block_dim)
            )
            for piece, removed in zip(
                pieces, [part.removed] if part.block_dim is None else part.removed, strict=True
            ):
                piece.index_fill_(part.dim, torch.tensor(removed, dtype=torch.long, device=piece.device), 0)
    return copied


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order."""
    # Outputs of transformers are known to pytree only once exported.
    output = dict(output) if isinstance(output, Mapping) else output
    return [
        leaf.detach()
        for leaf in pytree.tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def error(found: Any, expected: Any) -> float:
    """max|a−b| / max|b| of the worst floating-point output."""
    pairs = list(zip(floats(found), floats(expected), strict=True))
    assert pairs, "the outputs hold no floating-point tensor"
    for a, b in pairs:
        assert a.shape == b.shape, f"shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        assert bool(torch.isfinite(b).all()), "the dense model's own output is not finite"
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def assert_exact(model: nn.Module, result: Any, *args: Any) -> None:
    """Hold a result against the dense model with zeros in the columns that go; these
    must show, or nothing was tested.
    """
    with torch.no_grad():
        dense, expected, found = model(*args), zeroed(model, result.plan)(*args), result.module(*args)
    assert error(expected, dense) > 100 * TOLERANCE, "what goes cannot be seen"
    assert error(found, expected) <= TOLERANCE
