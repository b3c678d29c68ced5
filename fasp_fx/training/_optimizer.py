"""Cut what an optimiser remembers of a model's weights as the weights were cut."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fasp_fx.analysis import PruningPlan, strange_weight
from fasp_fx.capturing import Cut
from fasp_fx.errors import ArgumentError, PlanError


def cut_optimizer(optimizer: Optimizer, plan: PruningPlan, model: nn.Module, small: nn.Module) -> None:
    """Let an optimiser of ``torch.optim`` go on with a smaller model: its parameters are exchanged in place,
    and what it remembers of them (momentum, moments) is cut by the plan. It stays the same object with the
    same groups and rates, so that schedulers of its rate go on.

    What lies like a weight along each dimension, or has one entry there (Adafactor's rows and columns, of
    which each is a mean and stays one), is cut; numbers stay. Repaired weights keep what is remembered of
    them. Gradients are not taken over: call it between two steps.

    Args:
        optimizer: holds parameters of ``model``, and maybe others, which stay.
        plan: of the pruning, ``result.plan``; of a chain the last step counts.
        model: what was pruned.
        small: what came of it: ``result.eager(model)``, or ``result.module``.

    Raises:
        ArgumentError: the optimiser holds no parameter of the model, or remembers something whose shape does
            not say how it lies (LBFGS); names the parameter and the key. The optimiser is left as it was.
        PlanError: the plan is not that of this pruning; names a weight.

    Examples:
        >>> from fasp_fx.training import cut_optimizer
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> small = result.eager(model)
        >>> cut_optimizer(optimizer, result.plan, model, small)
        >>> optimizer.param_groups[0]["params"][0] is small[0].weight
        True
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    names = {weight: [name for name in weights if weights[name] is weight] for weight in weights.values()}
    if strange := strange_weight(plan, weights):
        raise PlanError(f"the plan is not that of this pruning: {strange}; pass the plan of its result")
    successors = dict(small.named_parameters(remove_duplicate=False))
    for fold in (fold for fold in plan.folds if successors.keys().isdisjoint(fold.sources)):
        raise ArgumentError(f"the optimiser knows what {fold} is made of; prune without, or make it anew")
    become = {
        weight: {
            successors[name]: _remembered(optimizer, weight, name, cuts, successors[name])
            for name, cuts in _parts(plan, weight, names[weight])
            if name in successors
        }
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight in names
    }
    if not any(become.values()):
        raise ArgumentError(
            "the optimiser holds no parameter of the model that the smaller one has too; pass the model"
            " that it trains"
        )
    for weight, parts in become.items():
        optimizer.state.pop(weight, None)
        optimizer.state.update({part: state for part, state in parts.items() if state})
    for group in optimizer.param_groups:
        places = [become.get(weight, (weight,)) for weight in group["params"]]
        group["params"][:] = chain(*places)
        if "param_names" in group:
            pairs = zip(group["param_names"], places)
            group["param_names"][:] = [name for name, parts in pairs for _ in parts]


def _parts(plan: PruningPlan, weight: Tensor, names: list[str]) -> Iterator[tuple[str, list[Cut]]]:
    """The names that a weight, or rows of it, can have in the smaller model, with what stays of it. Blocks
    are those of the whole weight, and so are cut first.
    """
    stays: dict[tuple[int, int | None], np.ndarray] = {}
    for part in (part for group in plan.groups for part in group.parts if part.name in names):
        whole = np.ones((len(part.by_block()), weight.shape[part.dim]), dtype=bool)
        for left, gone in zip(stays.setdefault((part.dim, part.block_dim), whole), part.by_block()):
            left[list(gone)] = False
    order = sorted(stays.items(), key=lambda item: item[0][1] is None)
    cuts = [Cut.of(names[0], dim, left, block_dim) for (dim, block_dim), left in order]
    yield from ((name, cuts) for name in names)
    for split in (split for split in plan.splits if split.source in names):
        kept = next((cut.kept[0] for cut in cuts if cut.dim == split.dim), split.rows)
        rows = [row for row in split.rows if row in kept]
        yield split.name, [Cut(split.dim, np.array([rows])), *(cut for cut in cuts if cut.dim != split.dim)]


def _remembered(
    optimizer: Optimizer, weight: Tensor, name: str, cuts: list[Cut], small: Tensor
) -> dict[str, Any]:
    """What an optimiser remembers of what is left of a weight.

    Raises:
        ArgumentError: it cannot be told what of it that is.
        PlanError: the weight has not become ``small``.
    """
    shape = _left(weight.detach(), weight.shape, cuts).shape
    if shape != small.shape:
        raise PlanError(
            f"by the plan '{name}' has the shape {list(shape)} in the smaller model, and there it is"
            f" {list(small.shape)}; pass the plan, the model and the copy of one pruning"
        )
    remembered = {}
    for key, value in optimizer.state.get(weight, {}).items():
        shape = value.shape if isinstance(value, Tensor) else torch.Size()
        lies_along = (
            isinstance(value, Tensor)
            and len(shape) == weight.dim()
            and all(size in (1, whole) for size, whole in zip(shape, weight.shape))
        )
        is_number = isinstance(value, (Tensor, int, float, str, type(None))) and shape.numel() == 1
        if not (lies_along or is_number):
            raise ArgumentError(
                f"{type(optimizer).__name__} remembers of '{name}' as '{key}' a {type(value).__name__} of the"
                f" shape {list(shape)}, which does not say what of it is left; make the optimiser anew with"
                " the parameters of the smaller model"
            )
        remembered[key] = _left(value, weight.shape, cuts) if lies_along else value
    return remembered


def _left(value: Tensor, whole: torch.Size, cuts: list[Cut]) -> Tensor:
    """What some cuts leave of what lies along a weight of the shape ``whole``, or has one entry there."""
    along = [cut for cut in cuts if value.shape[cut.dim] == whole[cut.dim]]
    return reduce(lambda left, cut: cut.apply(left), along, value)
