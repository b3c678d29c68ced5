"""What earlier removals have changed in what a consumer's output is added to: the repair can make up for a
part of that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ..analysis.channels import Use
from ..capturing._fx import written_by
from ..capturing._runner import Runner
from ..capturing._sizes import same_sizes
from ..patterns import CASTS, CHECKS, REARRANGEMENTS

_SUM = torch.ops.aten.add.Tensor
_SCALES = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar, torch.ops.aten.div.Tensor)


class Drift:
    """What earlier removals changed in the value that a consumer's output is added to.

    Args:
        dense: runs the dense model, on the same batches as the pruned one.
        part: how much of it a repair is to make up for.
    """

    def __init__(self, dense: Runner, part: float) -> None:
        self.dense, self.part = dense, part

    def at(self, use: Use, pruned: Runner) -> Iterator[Tensor] | None:
        """By how much the output of a consumer about to be executed would have to differ for the sum to be
        the dense model's again, for each batch, ``[tokens, rows]``.

        Returns:
            Nothing where the output is added to nothing that is there.
        """
        beside, end = added_to(use) or (use.node, use.node)  # which is not there before itself
        first, between = pruned.index(use.node), pruned.nodes[pruned.index(use.node) + 1 : pruned.index(end)]
        # What stands between the two is run once more.
        is_there = pruned.index(beside) < first and not any(map(written_by, between))
        return self._changes(use.node, pruned, beside, end) if is_there else None

    def _changes(self, node: fx.Node, pruned: Runner, beside: fx.Node, end: fx.Node) -> Iterator[Tensor]:
        outputs = None if end is node else pruned.ahead(node)
        for number, values in enumerate(zip(self.dense.read(beside), pruned.read(beside), strict=True)):
            change = values[0] - values[1]
            if outputs is not None:
                change = _before(change, next(outputs), node, end, pruned, number)
            yield change.reshape(-1, change.shape[-1])


def _before(
    change: Tensor, output: Tensor, node: fx.Node, end: fx.Node, runner: Runner, number: int
) -> Tensor:
    """How the output of a node changes where what is made of it up to ``end`` changes so."""
    live, first, last = runner.live()[number], runner.index(node) + 1, runner.index(end) + 1
    with torch.enable_grad():
        start = output.detach().requires_grad_()
        found = runner.again(number, live | {node: start}, first, end, last, runner.overrides)
        (moved,) = torch.autograd.grad(found, start, change.to(found), retain_graph=True)
        (ones,) = torch.autograd.grad(found, start, torch.ones_like(found))
    scale = ones.mean()  # each element comes to one place, times the same number
    return torch.where(scale == 0, torch.zeros_like(moved), moved / scale.square())


def added_to(use: Use) -> tuple[fx.Node, fx.Node] | None:
    """What a consumer's output is added to, if that is a computed value of its shape, and what is added to
    it: the consumer itself, or the last of the nodes behind it that give each element of its output once,
    perhaps elsewhere, in another type, or times a number.

    The output must be laid out as the tokens are: a product with the last dimension of its input, the rows in
    the last of its own.
    """
    layout, node = use.activation_layout, use.node
    if (
        use.route is not None
        or use.recurrence is not None
        or layout.windows
        or layout.splits
        or layout.blocks
        or len(use.columns) != 1
    ):
        return None
    found, given = _floating(node), _floating(use.activation)
    if (
        found is None
        or given is None
        or layout.columns != (given.dim() - 1,)
        or not same_sizes(found.shape[:-1], given.shape[:-1])
    ):
        return None
    end = node
    while len(users := [user for user in end.users if str(user.target) not in CHECKS]) == 1:
        (user,) = users
        others = [argument for argument in user.args if isinstance(argument, fx.Node) and argument is not end]
        if user.target is _SUM and not user.kwargs and len(others) == 1 and others[0].op == "call_function":
            beside, added = _floating(others[0]), _floating(end)
            fits = beside is not None and added is not None and same_sizes(beside.shape, added.shape)
            return (others[0], end) if fits else None
        scales = user.target in _SCALES and not isinstance(user.args[1], fx.Node)
        if (
            not (scales or str(user.target) in REARRANGEMENTS | CASTS)
            or user.args[:1] != (end,)
            or _floating(user) is None
        ):
            return None
        end = user
    return None


def _floating(node: fx.Node) -> Tensor | None:
    found = node.meta.get("val")
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


__all__ = ["Drift", "added_to"]
