"""What earlier removals have changed beside a consumer: where its output is added to something, that much of it the repair can make up for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ..channels import Use
from ._runner import Runner

_SUM = torch.ops.aten.add.Tensor


class Drift:
    """The difference between the dense and the pruned model in what a consumer's output is added to.

    Args:
        dense: runs the dense model, on the same batches as the pruned one.
        part: how much of the difference a repair is to make up for.
    """

    def __init__(self, dense: Runner, part: float) -> None:
        self.dense, self.part = dense, part

    def at(self, use: Use, pruned: Runner) -> Iterator[Tensor]:
        """The difference at a consumer about to be executed, ``[tokens, rows]`` for each batch; nothing where its output is added to nothing."""
        beside = added_to(use)
        if beside is None or pruned.index(beside) > pruned.index(use.node):  # it is not there yet
            return
        for before, after in zip(self.dense.read(beside), pruned.read(beside), strict=True):
            yield (before - after).reshape(-1, after.shape[-1])


def added_to(use: Use) -> fx.Node | None:
    """The computed value that a consumer's output is added to, if it is of the output's shape.

    The output must be laid out as the tokens are: a product with the last dimension of its input, the rows in the last of its own.
    """
    layout, node, users = use.activation_layout, use.node, list(use.node.users)
    if use.route is not None or use.recurrence is not None or layout.windows or layout.splits or layout.blocks or len(use.columns) != 1:
        return None
    if len(users) != 1 or users[0].target is not _SUM or users[0].kwargs:
        return None
    others = [argument for argument in users[0].args if isinstance(argument, fx.Node) and argument is not node]
    found, given = node.meta.get("val"), use.activation.meta.get("val")
    if len(others) != 1 or not isinstance(found, Tensor) or not isinstance(given, Tensor) or layout.columns != (given.dim() - 1,):
        return None
    beside = others[0].meta.get("val")
    if not isinstance(beside, Tensor) or found.shape[:-1] != given.shape[:-1] or beside.shape != found.shape or not beside.is_floating_point():
        return None
    return others[0] if others[0].op == "call_function" else None


__all__ = ["Drift", "added_to"]
