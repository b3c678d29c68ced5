"""Which numbers of a module are trained, and how they get into it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...capturing._unchanged import rewound
from ...errors import ArgumentError
from ._hidden import Hidden, Readings

#: which numbers are trained
Part = Literal["all", "vectors", "low-rank"]


class Trained(nn.Module):
    """A module as an optimiser sees it; called like the module.

    Weights of 16 bits are too coarse for small steps: they are trained by way of copies in float32. Buffers
    that the module writes into (running averages, counters) are never changed: each call begins with what
    they hold, as each of the dense model's does.

    Attributes:
        leaves: what the optimiser changes, by name.
        hidden: the hidden states that calls note; ``None``: none.
    """

    def __init__(self, student: nn.Module, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.student = student
        self.hidden: Hidden | None = None
        self._readings: Readings | None = None
        self._weights = weights
        self._written: list[str] = []
        self.leaves: dict[str, nn.Parameter] = {
            name: weight if weight.dtype.itemsize > 2 else nn.Parameter(weight.detach().float())
            for name, weight in weights.items()
        }

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
        with contextlib.ExitStack() as stack:
            if self.hidden is not None:
                own = {**dict(self.student.named_parameters(remove_duplicate=False)), **weights}
                self._readings = stack.enter_context(self.hidden.reading(own))
            if not weights and not held:
                return self.student(*args, **kwargs)
            return functional_call(self.student, {**weights, **held}, args, kwargs)

    def take_readings(self) -> Readings:
        """The hidden states of the last call, which are not kept any longer."""
        found, self._readings = self._readings, None
        assert found is not None, "hidden states are noted by calls"
        return found

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other parameter of the module takes a gradient meanwhile, and those that the caller has gathered
        in ``.grad`` are set aside: they do not enter the training, and are there again afterwards.
        """
        held = [weight for weight in self.student.parameters() if weight.requires_grad]
        gathered = [weight.grad for weight in held]
        own = {id(weight) for weight in self._weights.values()}
        for weight in held:
            weight.grad = None
            weight.requires_grad_(id(weight) in own)
        try:
            yield
        finally:
            for weight, gradient in zip(held, gathered, strict=True):
                weight.requires_grad_(True)
                weight.grad = gradient

    def collect_gradients(self) -> None:
        """Hand the gradients of the weights over to what the optimiser changes, which takes dense ones."""
        for name, weight in self._weights.items():
            gradient, weight.grad = weight.grad, None
            leaf = self.leaves[name]
            leaf.grad = None if gradient is None else _dense(gradient).to(leaf.dtype)

    @torch.no_grad()
    def write(self) -> None:
        """Put what the optimiser changed into the module."""
        for name, weight in self._weights.items():
            if self.leaves[name] is not weight:
                weight.copy_(self.leaves[name])

    def state(self) -> dict[str, Tensor]:
        """A copy of what the optimiser changes, by name."""
        return {name: leaf.detach().clone() for name, leaf in self.leaves.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go back to a state.

        Raises:
            ValueError: it is of other names or shapes; nothing was changed.
        """
        shapes, wanted = (
            {name: tuple(tensor.shape) for name, tensor in held.items()} for held in (state, self.leaves)
        )
        if shapes != wanted:
            raise ValueError(f"it holds {shapes}, where {wanted} are trained")
        for name, leaf in self.leaves.items():
            leaf.copy_(state[name])
        self.write()

    def finish(self) -> None:
        """Leave the module with the weights that it has now, where these are not in it yet."""


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
                wide = _wide(weight)
                left = nn.Parameter(torch.zeros(rows, rank, device=weight.device, dtype=wide))
                right = nn.Parameter(
                    (torch.randn(rank, columns, generator=generator) / rank**0.5).to(weight.device, wide)
                )
                self._added[name] = (weight, left, right)
        if not self._added:
            raise ArgumentError(
                f"train='low-rank' finds no weight with both sides larger than rank={rank}; use a smaller"
                " rank, or train='all'"
            )
        self.leaves = {
            f"{name}.{side}": part
            for name, (_, *parts) in self._added.items()
            for side, part in zip(("left", "right"), parts, strict=True)
        }
        for index, leaf in enumerate(self.leaves.values()):
            self.register_parameter(f"leaf_{index}", leaf)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        changed = {
            name: _DenseGradient.apply(_with(weight.detach(), left, right))
            for name, (weight, left, right) in self._added.items()
        }
        return self._call(changed, args, kwargs)

    @torch.no_grad()
    def finish(self) -> None:
        for weight, left, right in self._added.values():
            if bool(left.any()):  # adding nothing would still round
                weight.copy_(_with(weight, left, right))


def _with(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return (weight.to(_wide(weight)) + (left @ right).reshape(weight.shape)).to(weight.dtype)


def _dense(gradient: Tensor) -> Tensor:
    """A gradient as one that products and AdamW take; that of ``nn.Embedding(sparse=True)`` is none."""
    return gradient.to_dense() if gradient.is_sparse else gradient


class _DenseGradient(torch.autograd.Function):
    """A tensor as it is, whose gradient is dense."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _dense(gradient)


def _wide(weight: Tensor) -> torch.dtype:
    """What the products for a weight are computed in, which is never coarser than the weight."""
    return torch.promote_types(weight.dtype, torch.float32)


def weights_of(student: nn.Module, part: Part) -> dict[str, nn.Parameter]:
    """The parameters that a part is of, by name."""
    return {
        name: weight
        for name, weight in student.named_parameters()
        if weight.requires_grad
        and weight.is_floating_point()
        and weight.numel()
        and (part != "vectors" or weight.dim() <= 1)
    }


def trained_part(student: nn.Module, train: Part, rank: int, seed: int) -> Trained:
    """A module with the part of it that is to be trained.

    Raises:
        ArgumentError: there is nothing of that kind to train.
    """
    weights = weights_of(student, train)
    if train == "low-rank":
        return LowRank(student, weights, rank, seed)
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


__all__ = ["Part", "Trained", "trained_part", "weights_of"]
