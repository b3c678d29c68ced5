"""What earlier removals have changed at a consumer, in its inputs and in what its output is added to: that
much of it the repair can make up for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ..channels import Use, same_sizes
from ._matrices import ConsumerMatrices
from ._runner import Runner

_SUM = torch.ops.aten.add.Tensor


class Drift:
    """What earlier removals changed of what a consumer's output should be: in the value it is added to, and
    in its own inputs.

    Args:
        dense: runs the dense model, on the same batches as the pruned one.
        part: how much of the difference in what the output is added to a repair is to make up for.
        blend: how much of the difference in its own inputs.
    """

    def __init__(self, dense: Runner, part: float, blend: float) -> None:
        self.dense, self.part, self.blend = dense, part, blend

    @property
    def weight(self) -> float:
        """How much of what :meth:`at` gives a repair is to make up for."""
        return self.part or self.blend

    def at(
        self, use: Use, pruned: Runner, matrices: ConsumerMatrices, weight: Tensor, alone: bool
    ) -> Iterator[list[Tensor]] | None:
        """The difference at a consumer about to be executed: for each batch its pieces ``[tokens, rows]``, in
        step with those of its input.

        Args:
            matrices: how the use reads its weight.
            weight: what the weight is now.
            alone: whether no other use reads it.

        Returns:
            Nothing where nothing can be told: the output is added to nothing, and of its inputs nothing is
                asked for (or others are sent to it now).
        """
        beside = added_to(use) if self.part and alone else None
        if beside is not None and pruned.index(beside) > pruned.index(use.node):  # it is not there yet
            beside = None
        blends = bool(self.blend) and use.route is None and use.recurrence is None
        return (
            self._differences(use, pruned, beside, matrices, matrices.read(weight) if blends else None)
            if beside is not None or blends
            else None
        )

    def _differences(
        self,
        use: Use,
        pruned: Runner,
        beside: fx.Node | None,
        matrices: ConsumerMatrices,
        read: Tensor | None,
    ) -> Iterator[list[Tensor]]:
        added = () if beside is None else zip(self.dense.read(beside), pruned.read(beside), strict=True)
        changed = [(before - after).reshape(-1, after.shape[-1]) for before, after in added]
        if read is None:
            yield from ([change] for change in changed)
            return
        for batch, (before, after) in enumerate(
            zip(self.dense.read(use.activation), pruned.read(use.activation), strict=True)
        ):
            every = before.new_zeros((), dtype=torch.int64).expand((1,) * before.dim())
            # Values decide how many there are.
            change = before - after if before.shape == after.shape else torch.zeros_like(after)
            pieces = [
                self.blend / self.weight * (tokens @ read[block].T)
                for block, tokens, _ in matrices.tokens(change, every, None)
            ]
            yield [changed[batch] + piece for piece in pieces] if changed else pieces


def added_to(use: Use) -> fx.Node | None:
    """The computed value that a consumer's output is added to, if it is of the output's shape.

    The output must be laid out as the tokens are: a product with the last dimension of its input, the rows in
    the last of its own.
    """
    layout, node, users = use.activation_layout, use.node, list(use.node.users)
    if (
        use.route is not None
        or use.recurrence is not None
        or layout.windows
        or layout.splits
        or layout.blocks
        or len(use.columns) != 1
    ):
        return None
    if len(users) != 1 or users[0].target is not _SUM or users[0].kwargs:
        return None
    others = [
        argument for argument in users[0].args if isinstance(argument, fx.Node) and argument is not node
    ]
    found, given = node.meta.get("val"), use.activation.meta.get("val")
    if (
        len(others) != 1
        or not isinstance(found, Tensor)
        or not isinstance(given, Tensor)
        or layout.columns != (given.dim() - 1,)
    ):
        return None
    beside = others[0].meta.get("val")
    if (
        not isinstance(beside, Tensor)
        or not same_sizes(found.shape[:-1], given.shape[:-1])
        or not same_sizes(beside.shape, found.shape)
        or not beside.is_floating_point()
    ):
        return None
    return others[0] if others[0].op == "call_function" else None


__all__ = ["Drift", "added_to"]
