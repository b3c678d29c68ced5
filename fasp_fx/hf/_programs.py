"""One plan in several programs of one model, which share their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis import plan as plans
from ..analysis._analysis import Analysis
from ..analysis.plan import PlannedGroup, PruningPlan
from ..base._warn import warn
from ..base.compat import without_stack_traces
from ..calibration._visit import Decision, decided
from ..capturing._captured import Captured, capture_whole
from ..capturing._program import Program
from ..errors import PlanError, VerificationError, VerificationWarning
from ..pruning._result import Result
from ..pruning._rewriting import analyze_for, make_plan, rewrite
from ..pruning.check import UnsoundError, restricted
from ..pruning.config import PruningConfig
from ..pruning.report import said_whole
from ._stages import Stage


def captured_for(stage: Stage, device: torch.device | str | None) -> Captured:
    """The program of a stage, captured; which lines of the model made its nodes, nobody sees."""
    with without_stack_traces():
        return capture_whole(stage.model, (), dict(stage.example), state=stage.state, device=device)


@dataclass(frozen=True)
class Planned:
    """The program that a plan is made for, and what was decided for it."""

    program: Program
    analysis: Analysis
    decision: Decision


@dataclass(frozen=True)
class Served:
    """One more program of the model, in which the plan is carried out."""

    name: str
    program: Program
    analysis: Analysis


def served_by(name: str, program: Program, asked: PruningConfig | PruningPlan) -> Served:
    """One more program, analysed; it holds the weights that it reads and no others."""
    program = program.copy()
    for node in program.module.graph.find_nodes(op="get_attr"):
        if not node.users:  # weights of the other programs
            program.module.graph.erase_node(node)
    program = program.copy()  # holds what the graph looks up, and nothing else
    return Served(name, program, analyze_for(program, asked))


def carry_out_in_all(
    others: list[Served], planned: Planned
) -> tuple[Decision, dict[str, Result], dict[str, str]]:
    """Carry a plan out in every program; a group that one of them cannot lose stays whole in all, since they
    share their weights.

    Returns:
        What really went, the results by name, and the groups left whole with what was seen.

    Raises:
        VerificationError: nothing that was planned can go.
    """
    left: dict[str, str] = {}
    while True:
        plan = make_plan(planned.program, planned.analysis, planned.decision)
        results: dict[str, Result] = {}
        try:
            for other in others:
                results[other.name] = _carried_out(other, plan, planned)
        except UnsoundError as error:
            faulty = _same_groups(error.left, other, plan, planned)
            kept = [
                group for group in decided(planned.analysis, planned.decision) if group.name not in faulty
            ]
            if not faulty or not kept:
                raise VerificationError(
                    f"the program '{other.name}' of the model cannot lose what the plan removes: {error}"
                ) from error
            left |= {name: f"in the program '{other.name}' {seen}" for name, seen in faulty.items()}
            planned = replace(planned, decision=restricted(planned.analysis, planned.decision, kept))
            continue
        for name, seen in left.items():
            warn(said_whole(name, seen), VerificationWarning)
        return planned.decision, results, left


def _carried_out(other: Served, plan: PruningPlan, planned: Planned) -> Result:
    """Take out of one more program what the plan says, with the same repaired weights.

    Raises:
        UnsoundError: the program is not exact without all of it.
    """
    try:
        gone = plans.gone_of(plan, other.analysis, partial=True)
    except PlanError as error:
        raise PlanError(
            f"the program '{other.name}' of the model cannot lose what the plan removes: {error}"
        ) from error
    canonical, names = planned.program.canonical(), other.analysis.program.aliases()
    weights = {}
    for own, aliases in names.items():
        same = {canonical.get(alias, alias) for alias in aliases} & planned.decision.weights.keys()
        if same:
            weights[own] = planned.decision.weights[same.pop()]
    return rewrite(other.program, other.analysis, Decision(gone, weights), whole=True)


def _same_groups(
    faulty: Mapping[str, str], other: Served, plan: PruningPlan, planned: Planned
) -> dict[str, str]:
    """The groups of the plan that share a channel with groups of another program, given by name with what was
    seen of them.
    """
    canonical = planned.program.canonical()

    def channels(group: PlannedGroup) -> set[tuple[str, int, int, int]]:
        parts = [*group.producers, *group.consumers]
        return {
            (canonical.get(p.name, p.name), p.dim, block, index)
            for p in parts
            for block, indices in enumerate(p.by_block())
            for index in indices
        }

    gone = plans.gone_of(plan, other.analysis, partial=True)
    theirs = plans.planned(
        [group for group in other.analysis.groups if group.name in faulty], gone, other.analysis
    )
    seen = {channel: faulty[group.name] for group in theirs for channel in channels(group)}
    return {
        group.name: seen[next(iter(both))] for group in plan.groups if (both := channels(group) & seen.keys())
    }


def one_set(model: nn.Module, results: dict[str, Result]) -> dict[str, Tensor]:
    """The weights of all programs, one tensor for all names that were tied in the original model.

    Raises:
        PlanError: two programs would need different weights of one name.
    """
    ties: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        ties.setdefault(id(parameter), []).append(name)
    tied = {name: names for names in ties.values() for name in names}
    found: dict[str, Tensor] = {}
    for program, result in results.items():
        for name, tensor in result.module.state_dict(keep_vars=True).items():
            held = found.get(name)
            if held is None:
                made: Any = tensor.detach()
                made = (
                    nn.Parameter(made, requires_grad=tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else made
                )
                for alias in tied.get(name, [name]):
                    found[alias] = made
            elif held.shape != tensor.shape or not torch.equal(held, tensor):
                raise PlanError(
                    f"the program '{program}' needs another '{name}' than those before it; such a model"
                    " cannot be served"
                )
    order = {name: index for index, name in enumerate(dict(model.state_dict()))}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


__all__ = ["Planned", "Served", "captured_for", "carry_out_in_all", "one_set", "served_by"]
