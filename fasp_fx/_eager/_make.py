"""Make the caller's own module smaller by the plan of a result."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from .. import plan as plans
from .._analysis._depth import DEPTH
from .._capture._reaching import Reaching
from .._capture._unchanged import rewound
from .._stamps import WRITTEN_BY
from ..errors import ArgumentError, EagerError
from ..groups import APPROXIMATE, EXEMPT
from ..passes import KeepDenseCount, PinAttentionScale
from ._copy import copied
from ._saving import keep_from_saving
from ._search import Search
from ._sizes import Cuts, is_within
from ._trial import Outcome, Trial, program_of

if TYPE_CHECKING:
    from .._result import Result

#: widths that are multiples of it serve all kernels
FULL = 8


def eager(result: Result, model: nn.Module) -> nn.Module:
    """See :meth:`fasp_fx.Result.eager`."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be the nn.Module that was pruned, not {type(model).__name__}")
    _check(result, model)
    made = copied(model, result)
    cuts = Cuts(made.module, made.dense, made.shapes(), made.computed)
    trial, reaching = Trial(made.module, program_of(result)), Reaching(model, made.module)
    with rewound(model):
        outcome = Search(cuts, trial, result.plan, model).run()
        trial.run(watching=reaching)
    if reaching.said is not None:
        raise EagerError(f"{reaching.said} or use result.module")
    if not outcome.equal:
        remedy, group = _remedy(result, outcome, model)
        raise EagerError(
            f"no copy of {type(model).__name__} computes what the pruned program does, whatever sizes its"
            f" attributes are given: {outcome.said}; {remedy}",
            group,
        )
    keep_from_saving(made.module)
    return made.module


def _check(result: Result, model: nn.Module) -> None:
    """Refuse a model that the plan was not made for. The plan was made for what the program holds, which
    lacks what a capture leaves out.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = {name for name, _ in result.module.named_parameters(remove_duplicate=False)}
    known |= {split.source for split in result.plan.splits} | {
        source for weight in result.plan.folds for source in weight.sources
    }
    found = [
        plans.fingerprint(parameters),
        plans.fingerprint({name: tensor for name, tensor in parameters.items() if name in known}),
    ]
    plans.check_fingerprint(
        result.plan, result.plan.fingerprint if result.plan.fingerprint in found else found[0]
    )


def _remedy(result: Result, outcome: Outcome, model: nn.Module) -> tuple[str, str | None]:
    """What can be done instead, and what of the program no module has where that can be told; and the group
    that is to be kept.
    """
    plan, written = result.plan, {node.meta.get(WRITTEN_BY) for node in result.module.graph.nodes}
    if KeepDenseCount.name in written:
        why = (
            "the program goes on to divide by the dense count of the channels that a norm or mean has lost,"
            " and no module of the model does"
        )
        return f"{why}; use result.module, or prune without '{APPROXIMATE}' in include=", None
    if EXEMPT in plan.include and PinAttentionScale.name in written:
        why = "the program keeps the scale of an attention whose heads have become narrower"
        return f"{why}; use result.module, or prune without '{EXEMPT}' in include=", None
    if DEPTH in plan.include and any(0 in parameter.shape for parameter in result.module.parameters()):
        why = "the program leaves a block out, which the model's own module goes on to run"
        return f"{why}; use result.module, or prune without '{DEPTH}' in include=", None
    parts = {
        group.name: (*group.producers, *group.consumers)
        for group in plan.groups
        if group.granularity == "channel" and group.blocks > 1
    }
    heads = next((name for name, own in parts.items() if all(part.block_dim is None for part in own)), None)
    if heads is not None:
        whole = 'granularity=("head",) or ("channel", "head")'
        return (
            f"use result.module, or prune whole heads ({whole}) where the group '{heads}' has lost channels"
            " of each, or keep it and its like by exclude="
        ), heads
    computed = next(
        (path for path, part in model.named_modules() if nn.utils.parametrize.is_parametrized(part)), None
    )
    if computed is not None:
        return (
            f"use result.module, or call torch.nn.utils.parametrize.remove_parametrizations on '{computed}'"
            " before pruning"
        ), None
    ways = ["use result.module"]
    failing = next(
        (
            group.name
            for path in filter(None, outcome.stack)
            for group in plan.groups
            for part in (*group.producers, *group.consumers)
            if is_within(part.name.rpartition(".")[0], path)
        ),
        None,
    )
    if failing is not None:
        ways.append(f"keep the group '{failing}' and its like by exclude=")
    if math.isfinite(outcome.reached) and (result.config is None or result.config.round_to < FULL):
        ways.append(f"prune with round_to={FULL}, if a kernel takes whole 16 bytes alone")
    return ", or ".join(ways), failing


__all__ = ["eager"]
