"""What earlier removals changed in the values that the outputs of consumers are added to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fasp_fx.analysis import Use
from fasp_fx.capturing import Runner, arguments, same_sizes
from fasp_fx.patterns import CASTS, CHECKS, RESHAPES, affine, lookup


@dataclass(frozen=True)
class Drift:
    """The dense model beside the pruned one, on the same batches.

    Attributes:
        dense, pruned: run them.
        strength: how much of what changed repairs are to make up for, from 0 to 1.
    """

    dense: Runner
    pruned: Runner
    strength: float

    def of(self, use: Use) -> Iterator[Tensor] | None:
        """By how much the output of a consumer about to be executed would have to differ for what it is added
        to to be the dense model's again, for each batch, ``[tokens, rows]``; ``None`` where it is added to
        nothing that is there.
        """
        residual = added_to(use)
        if residual is None or self.pruned.index(residual) > self.pruned.index(use.node):
            return None
        rows = use.node.meta["val"].shape[-1]
        pairs = zip(self.dense.read(residual), self.pruned.read(residual), strict=True)
        return ((dense - pruned).reshape(-1, rows) for dense, pruned in pairs)


def added_to(use: Use) -> fx.Node | None:
    """What a consumer's output is added to, if that is a computed value, and the output is laid out as the
    tokens are: a product with the last dimension of its input, the rows in the last of its own, which is at
    most reshaped and cast before.
    """
    end, rule = use.node, lookup(use.node.target)
    if rule is None or affine(end.target) is None or len(rule.alternatives) != 1 or len(use.columns) != 1:
        return None
    form, named = rule.alternatives[0], arguments(end)
    tokens = next((each.dims for each in form.operands if named.get(each.name) is use.activation), ())
    if not tokens or tokens[-1] not in form.summed or {*form.results[0][-1:]} <= {*tokens}:
        return None
    while len(users := [user for user in end.users if str(user.target) not in CHECKS]) == 1:
        (user,) = users
        if user.target is torch.ops.aten.add.Tensor and not user.kwargs:
            (residual, *_) = [argument for argument in user.args if argument is not end] or [end]
            if not isinstance(residual, fx.Node) or residual.op != "call_function" or residual is end:
                return None
            return residual if same_sizes(residual.meta["val"].shape, end.meta["val"].shape) else None
        if str(user.target) not in RESHAPES | CASTS:
            return None
        end = user
    return None
