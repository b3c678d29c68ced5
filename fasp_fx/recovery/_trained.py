"""Which numbers of a module are trained, and how they get into it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._capture._unchanged import rewound
from ..errors import ArgumentError


class Trained(nn.Module):
    """A module as an optimiser sees it; called like the module.

    Weights of 16 bits are too coarse for small steps: they are trained by way of copies in float32. Buffers
    that the module writes into (running averages, counters) are never changed: each call begins with what
    they hold, as each of the dense model's does.

    Attributes:
        leaves: what the optimiser changes.
    """

    def __init__(self, student: nn.Module, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.student = student
        self._weights = weights
        self._written: list[str] = []
        self.leaves: list[nn.Parameter] = [
            weight if weight.dtype.itemsize > 2 else nn.Parameter(weight.detach().float())
            for weight in weights.values()
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call({}, args, kwargs)

    @torch.no_grad()
    def find_written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the buffers that the module writes into, by a call that leaves them as they were."""
        if next(self.student.buffers(), None) is None:
            return
        with rewound(self.student):
            before = {name: (buffer, buffer._version) for name, buffer in self.student.named_buffers()}
            self.student(*args, **kwargs)
            self._written = [
                name
                for name, buffer in self.student.named_buffers()
                if name in before and (buffer is not before[name][0] or buffer._version != before[name][1])
            ]

    def _call(self, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module with other weights in the places of some."""
        held = {name: self.student.get_buffer(name).clone() for name in self._written}
        if not weights and not held:
            return self.student(*args, **kwargs)
        return functional_call(self.student, {**weights, **held}, args, kwargs)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other parameter of the module takes a gradient meanwhile."""
        others = [
            weight
            for weight in self.student.parameters()
            if weight.requires_grad and not any(weight is own for own in self._weights.values())
        ]
        for weight in others:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in others:
                weight.requires_grad_(True)

    def collect_gradients(self) -> None:
        """Hand the gradients of the weights over to what the optimiser changes."""
        for weight, leaf in zip(self._weights.values(), self.leaves):
            if leaf is not weight:
                leaf.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Put what the optimiser changed into the module."""
        for weight, leaf in zip(self._weights.values(), self.leaves):
            if leaf is not weight:
                weight.copy_(leaf)

    def state(self) -> dict[str, Tensor]:
        """A copy of what the optimiser changes, by name."""
        return {str(index): leaf.detach().clone() for index, leaf in enumerate(self.leaves)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go back to a state."""
        for index, leaf in enumerate(self.leaves):
            leaf.copy_(state[str(index)])
        self.write()

    def finish(self) -> None:
        """Leave the module with the weights that it has now, and nothing else."""
        for leaf in (*self.leaves, *self._weights.values()):
            leaf.grad = None


class LowRank(Trained):
    """A module to whose weights products of narrow matrices are added, zero at first.

    Args:
        rank: columns of the matrices; a weight whose sides are not larger gets none.
    """

    def __init__(self, student: nn.Module, weights: dict[str, nn.Parameter], rank: int, seed: int) -> None:
        super().__init__(student, {})
        generator = torch.Generator().manual_seed(seed)
        self._added: dict[str, tuple[nn.Parameter, nn.Parameter, nn.Parameter]] = {}
        for name, weight in weights.items():
            rows, columns = (
                (weight.shape[0], weight[0].numel()) if weight.dim() > 1 and weight.numel() else (0, 0)
            )
            if min(rows, columns) > rank:
                left = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
                right = nn.Parameter(
                    (torch.randn(rank, columns, generator=generator) / rank**0.5).to(weight.device)
                )
                self._added[name] = (weight, left, right)
        if not self._added:
            raise ArgumentError(
                f"train='low-rank' finds no weight with both sides larger than rank={rank}; use a smaller"
                " rank, or train='all'"
            )
        self.leaves = [part for _, *parts in self._added.values() for part in parts]
        for index, leaf in enumerate(self.leaves):
            self.register_parameter(f"leaf_{index}", leaf)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        changed = {
            name: _with(weight.detach(), left, right) for name, (weight, left, right) in self._added.items()
        }
        return self._call(changed, args, kwargs)

    @torch.no_grad()
    def finish(self) -> None:
        for weight, left, right in self._added.values():
            if bool(left.any()):  # adding nothing would still round
                weight.copy_(_with(weight, left, right))


def _with(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return (weight.float() + (left @ right).reshape(weight.shape)).to(weight.dtype)


def trained_part(
    student: nn.Module, train: Literal["all", "vectors", "low-rank"], rank: int, seed: int
) -> Trained:
    """A module with the part of it that is to be trained.

    Raises:
        ArgumentError: there is nothing of that kind to train.
    """
    weights = {
        name: weight
        for name, weight in student.named_parameters()
        if weight.requires_grad and weight.is_floating_point() and weight.numel()
    }
    if train == "low-rank":
        return LowRank(student, weights, rank, seed)
    if train == "vectors":
        weights = {name: weight for name, weight in weights.items() if weight.dim() <= 1}
    if not weights:
        what = (
            "parameter that requires a gradient"
            if train == "all"
            else "parameter of one dimension that requires a gradient, such as a bias"
        )
        raise ArgumentError(
            f"train='{train}' finds no {what} in the pruned model; call requires_grad_() on it, or use"
            " another train="
        )
    return Trained(student, weights)


__all__ = ["Trained", "trained_part"]
