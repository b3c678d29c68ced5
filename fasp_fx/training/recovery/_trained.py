"""Which numbers of a module are trained, and how they get into it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import ArgumentError

#: which numbers are trained
Part = Literal["all", "vectors", "low-rank"]
PARTS: tuple[str, ...] = get_args(Part)
_NOTHING = {
    "all": "parameter that requires a gradient",
    "vectors": "parameter of one dimension that requires a gradient, such as a bias",
    "low-rank": "weight that requires a gradient and has both sides larger than rank={rank}",
}


class Trained:
    """A module as an optimiser sees it; called like the module.

    What is learned lies beside the module, in float32 or finer (weights of 16 bits are too coarse for small
    steps), and takes the places of its weights in each call. So the module's own weights, and what they hold
    in ``.grad``, stay as they are until :meth:`write`; and its buffers (running averages, counters) always:
    each call begins with what they hold, as each of the dense model's does.

    Args:
        student: the module.
        train: ``"all"``, ``"vectors"``: a copy of each parameter, or of those of one dimension;
            ``"low-rank"``: the two factors of what is added to each other one, of which the left one begins
            with zeros (LoRA, arXiv 2106.09685). A weight whose sides are not larger than the rank gets none.
        rank: columns of the left factor.
        seed: of the right one.

    Attributes:
        leaves: what the optimiser changes, by name.

    Raises:
        ArgumentError: there is nothing of that kind to train.
    """

    def __init__(self, student: nn.Module, train: Part, rank: int, seed: int) -> None:
        self.student = student
        self.leaves: dict[str, Tensor] = {}
        self._weights: dict[str, tuple[nn.Parameter, list[Tensor]]] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, weight in student.named_parameters():
            if not (weight.requires_grad and weight.is_floating_point() and weight.numel()):
                continue
            learned = _learned(weight, train, rank, generator)
            if learned:
                self._weights[name] = (weight, [leaf.requires_grad_() for leaf in learned.values()])
                self.leaves.update({name + suffix: leaf for suffix, leaf in learned.items()})
        if not self.leaves:
            raise ArgumentError(
                f"train='{train}' finds no {_NOTHING[train].format(rank=rank)} in the pruned model; call"
                " requires_grad_() on it, or use another train= or rank="
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns with what is learned in the places of its weights."""
        held = {name: weight.detach() for name, weight in self.student.named_parameters()}
        held |= {name: buffer.clone() for name, buffer in self.student.named_buffers()}
        held |= {name: _DenseGradient.apply(_now(*learned)) for name, learned in self._weights.items()}
        return functional_call(self.student, held, args, kwargs)

    def state(self) -> dict[str, Tensor]:
        """A copy of what the optimiser changes, by name, on the CPU."""
        return {name: leaf.detach().to("cpu", copy=True) for name, leaf in self.leaves.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go back to a state."""
        for name, leaf in self.leaves.items():
            leaf.copy_(state[name])

    @torch.no_grad()
    def write(self, state: dict[str, Tensor]) -> None:
        """Put a state into the module's own weights."""
        self.load(state)
        for weight, learned in self._weights.values():
            weight.copy_(_now(weight, learned))


def _learned(weight: Tensor, train: Part, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What is learned of a weight, by the ends of its names; nothing where the part does not hold it."""
    like: dict[str, Any] = {"device": weight.device, "dtype": _wide(weight)}
    if train != "low-rank":
        return {"": weight.detach().to(**like, copy=True)} if train == "all" or weight.dim() <= 1 else {}
    rows, columns = (weight.shape[0], weight[0].numel()) if weight.dim() > 1 else (0, 0)
    if min(rows, columns) <= rank:
        return {}
    right = torch.randn(rank, columns, generator=generator) / rank**0.5
    return {".left": torch.zeros(rows, rank, **like), ".right": right.to(**like)}


def _now(weight: Tensor, learned: list[Tensor]) -> Tensor:
    """A weight with what was learned of it, in its dtype."""
    if len(learned) == 1:
        return learned[0].to(weight.dtype)
    left, right = learned
    added = (left @ right).reshape(weight.shape)
    return (weight.detach().to(_wide(weight)) + added).to(weight.dtype)


def _wide(weight: Tensor) -> torch.dtype:
    """What the products for a weight are computed in, which is never coarser than the weight."""
    return torch.promote_types(weight.dtype, torch.float32)


class _DenseGradient(torch.autograd.Function):
    """A weight as it is; its gradient, which ``nn.Embedding(sparse=True)`` makes sparse, is dense."""

    @staticmethod
    def forward(context: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient.to_dense() if gradient.is_sparse else gradient


__all__ = ["PARTS", "Part", "Trained"]
