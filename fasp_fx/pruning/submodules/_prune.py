"""Prune a model that cannot be captured as a whole by the submodules that can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...allocation._selection import is_excluded
from ...allocation.costs import CostCurve, Costs
from ...analysis import plan as plans
from ...analysis._analysis import Analysis
from ...analysis.plan import PruningPlan
from ...base.compat import pytree
from ...calibration.observe._consumers import Consumers
from ...calibration.observe._visit import Decision
from ...errors import ArgumentError, CaptureError, ExportError, PlanError
from .._chooser import Chooser
from ..config import PruningConfig
from ._analysis import PartsAnalysis
from ._assembly import Assembly
from ._calls import Call
from ._inputs import graph_inputs, not_reached, recorded, user_batches
from ._names import group_within, plan_of_part
from ._result import PartsResult
from ._submodules import Part
from ._whole import whole_fingerprint

#: losses that make sense for a part of a model by itself
PARTIAL_LOSSES = ("auto", "outputs", None)


def prune_in_parts(
    error: CaptureError,
    model: Any,
    args: Any,
    kwargs: dict[str, Any] | None,
    chooser: Chooser,
    *,
    calibration: Iterable[Any] | None,
    device: torch.device | str | None,
    progress: Callable[[float], None],
    on_analysis: Callable[[Analysis], None] | None,
) -> PartsResult:
    """Prune the largest submodules that can be captured, and put them back into a copy of the model.

    Args:
        error: why the model cannot be captured as a whole.
        chooser: how much goes of all parts, and what of each.

    Raises:
        CaptureError: none of its submodules can be pruned.
        SparsityError: the parts cannot reach the sparsity together.
        CalibrationError: the calibration data does not fit.
    """
    config = chooser.config
    assembly = Assembly(error, model, args, kwargs, config, device)
    groups = [group_within(part.paths, group) for part in assembly.parts for group in part.analysis.groups]
    whole = chooser.budget_of(assembly.counted)
    chooser.check(whole, groups)
    if on_analysis is not None:
        for part in assembly.parts:
            on_analysis(part.analysis)
    with assembly.timed("calibration"):
        batches = user_batches(calibration, assembly.device) if config.needs_data else None
    leaves = (pytree.tree_leaves((call.args, call.kwargs)) for call in batches or ())
    fixed = {
        f"{part.path}.{name}": tensor
        for part in assembly.parts
        for name, tensor in part.program.fixed().items()
    }
    chooser.ranks.check_alike(lambda: whole_fingerprint({**assembly.before, **fixed}), leaves, vars(config))
    consumers = {
        part.path: Consumers(part.analysis, config.restore is not None, part.path) for part in assembly.parts
    }
    with assembly.timed("measuring"):
        costs, missed = _measured(assembly, chooser, batches, consumers)
    budget = whole.only([part.path not in missed for part in assembly.parts for _ in part.analysis.chosen])
    shares = assembly.counted.split(budget.spread(chooser.allocate(budget, groups, costs)))
    for index, (part, lost) in enumerate(zip(assembly.parts, shares, strict=True)):
        progress(index / len(assembly.parts))
        if not any(lost):
            assembly.left[part.path] = missed.get(part.path) or _why_nothing(part, config)
            continue
        with assembly.timed("calibration"):
            calls = [] if batches is None else recorded(assembly.model, part.module, batches)
            flat, misfit = graph_inputs(part, calls)
            if batches is not None and not flat:
                assembly.left[part.path] = misfit
                continue

            def advance(fraction: float, done: int = index) -> None:
                progress((done + fraction) / len(assembly.parts))

            decision = chooser.choose(
                consumers[part.path], lost, flat if batches is not None else None, advance
            )
            del flat
        assembly.place(part, decision, calls)
    progress(1.0)
    return assembly.result(config, chooser.notes)


def _measured(
    assembly: Assembly, chooser: Chooser, batches: list[Call] | None, consumers: Mapping[str, Consumers]
) -> tuple[Costs | None, dict[str, str]]:
    """What every part costs, each by its own outputs, and which parts the calibration data do not serve, with
    the reasons.

    All are measured without gradients once one of them cannot run back: relative errors of consumers are no
    losses of outputs, and neither are compared with the other.
    """
    if batches is None:
        return None, {}
    if not chooser.measures:
        return None, not_reached(assembly.model, assembly.parts, batches)
    curves: dict[str, CostCurve] = {}
    missed: dict[str, str] = {}
    for part in assembly.parts:
        flat, misfit = graph_inputs(part, recorded(assembly.model, part.module, batches))
        if misfit:
            missed[part.path] = misfit
            continue
        took = chooser.takes_gradients
        found = chooser.measure(consumers[part.path], flat, "", lambda fraction: None, within=part.path)
        if took and not chooser.takes_gradients:
            for seen in consumers.values():
                seen.forget()
            return _measured(assembly, chooser, batches, consumers)
        curves |= {
            group_within(part.paths, group).name: found[group.name]
            for group in part.analysis.chosen
            if found is not None and group.name in found
        }
    return Costs(curves, "") if chooser.needs_costs else None, missed


def _why_nothing(part: Part, config: PruningConfig) -> str:
    """Why the allocation takes nothing from a part that the data serve."""
    groups = [group_within(part.paths, group) for group in part.analysis.chosen]
    if all(is_excluded(group, config.exclude) for group in groups):
        return "exclude= leaves it whole"
    if isinstance(config.sparsity, Mapping):
        return "no pattern of sparsity= asks for channels that its weights read"
    if callable(config.allocation):
        return "the allocation takes nothing from it"
    return "a sparsity this low takes nothing from it"


def analyze_in_parts(
    error: CaptureError, model: Any, args: Any, kwargs: dict[str, Any] | None, config: PruningConfig
) -> PartsAnalysis:
    """The analyses of the parts that :func:`prune_in_parts` would prune.

    Args:
        error: why the model cannot be captured as a whole.

    Raises:
        CaptureError: none of its submodules can be pruned.
    """
    assembly = Assembly(error, model, args, kwargs, config, None)
    return PartsAnalysis({part.path: part.analysis for part in assembly.parts}, assembly.left)


def apply_in_parts(
    error: CaptureError,
    model: Any,
    plan: PruningPlan,
    args: Any,
    kwargs: dict[str, Any] | None,
    config: PruningConfig,
) -> PartsResult:
    """Replay a plan that was made in parts.

    Args:
        error: why the model cannot be captured as a whole.
        config: how to analyse the parts.

    Raises:
        CaptureError: none of its submodules can be pruned.
        PlanError: the plan is for another model, or names weights outside of the parts found here.
    """
    plans.check_fingerprint(plan, whole_fingerprint(dict(model.named_parameters(remove_duplicate=False))))
    assembly = Assembly(error, model, args, kwargs, config, None)
    owned = [plan_of_part(plan, part.path) for part in assembly.parts]
    if sum(len(own.groups) for own in owned) != len(plan.groups):
        known = {
            f"{part.path}.{group.name}"
            for part, own in zip(assembly.parts, owned, strict=True)
            for group in own.groups
        }
        stray = next(group.name for group in plan.groups if group.name not in known)
        raise PlanError(
            f"group '{stray}' of the plan is in no part that was captured here; use the example inputs that"
            " the plan was made with"
        )
    for part, own in zip(assembly.parts, owned, strict=True):
        if own.groups and not assembly.place(part, Decision(plans.gone_of(own, part.analysis)), []):
            raise PlanError(f"part '{part.path}' of the plan cannot be put back: {assembly.left[part.path]}")
    return assembly.result(None)


def check_parts_help(error: CaptureError, model: Any, **options: object) -> None:
    """Go on only where submodules can help: the exporter failed on the code of a model whose weights are
    there, and no option asks for the whole of it.

    Raises:
        CaptureError: ``error``, where they cannot, or with ``dynamic_shapes``.
        ArgumentError: another option speaks of a model captured as a whole; names it.
    """
    if (
        options.pop("dynamic_shapes", None) is not None
        or not isinstance(error, ExportError)
        or not isinstance(model, nn.Module)
    ):
        raise error
    for name, value in options.items():
        if value:
            shown = f"{name}=" if value is True else f"{name}={value!r}"
            raise ArgumentError(
                f"{shown} needs a model that is captured as a whole; leave it out to prune this one"
                " by its submodules"
            ) from error
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(tensor) or tensor.device.type == "meta" for tensor in tensors):
        raise error


__all__ = ["analyze_in_parts", "apply_in_parts", "check_parts_help", "prune_in_parts"]
