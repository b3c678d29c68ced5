"""The independent oracle of mask-exactness: the dense model with the removed columns of every consumer's
input multiplied by zero.

It uses forward hooks of the original modules and shares no code with the library's passes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

#: the largest relative error that counts as equal in float32
TOLERANCE = 1e-4


def _columns(module: nn.Module) -> tuple[int, int]:
    """The dimension of the weight that is contracted with the input, and its size."""
    if isinstance(module, nn.Linear):
        return 1, module.in_features
    if isinstance(module, Conv1D):
        return 0, module.weight.shape[0]
    raise TypeError(f"the oracle does not know how {type(module).__name__} consumes its input")


@contextlib.contextmanager
def masked(model: nn.Module, removed: Mapping[str, Iterable[int]]) -> Iterator[None]:
    """Multiply the named columns of the inputs of modules by zero; ``removed`` maps a weight's name to its
    columns.
    """
    modules = dict(model.named_modules())
    handles = []
    for name, columns in removed.items():
        owner = modules[name.rpartition(".")[0]]
        mask = torch.ones(_columns(owner)[1])
        mask[list(columns)] = 0

        def hook(module: nn.Module, args: tuple[Tensor, ...], mask: Tensor = mask) -> tuple[Tensor, ...]:
            return (args[0] * mask.to(args[0]), *args[1:])

        handles.append(owner.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def removed_columns(plan: Any, model: nn.Module) -> dict[str, set[int]]:
    """The columns that a plan takes from each consumer, read from the plan's consumers alone."""
    modules = dict(model.named_modules())
    found: dict[str, set[int]] = {}
    for group in plan.groups:
        for part in group.consumers:
            assert part.dim == _columns(modules[part.name.rpartition(".")[0]])[0], (
                f"{part} is not along the input of its module"
            )
            found.setdefault(part.name, set()).update(part.removed)
    return found


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
                piece.index_fill_(part.dim, torch.tensor(removed, dtype=torch.long), 0)
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


def assert_exact(
    model: nn.Module,
    result: Any,
    *calls: tuple[Any, ...],
    producers: bool = False,
    tolerance: float = TOLERANCE,
) -> None:
    """Hold a result against the dense model with zeros in the columns that go, on each call's arguments; the
    zeros must show, or nothing was tested.
    """
    reference = zeroed(model, result.plan, producers)
    with torch.no_grad():
        for call in calls:
            dense, expected, found = model(*call), reference(*call), result.module(*call)
            assert error(expected, dense) > 100 * tolerance, "what goes cannot be seen"
            assert error(found, expected) <= tolerance


def assert_mask_exact(
    model: nn.Module, result: Any, call: Callable[[Any], Any], tolerance: float = TOLERANCE
) -> float:
    """Hold a result against the masked dense model on one call; the masked output must differ from the dense
    one, or nothing was tested.
    """
    removed = removed_columns(result.plan, model)
    assert any(removed.values()), "the plan removes nothing"
    with torch.no_grad():
        dense = call(model)
        with masked(model, removed):
            expected = call(model)
        found = call(result.module)
    assert error(expected, dense) > 100 * tolerance, (
        "masking changes nothing that can be seen; the comparison would prove nothing"
    )
    worst = error(found, expected)
    assert worst <= tolerance, f"relative error {worst:.2e}"
    return worst
