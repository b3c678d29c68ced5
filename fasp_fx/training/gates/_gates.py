"""The gates of a model, and the plan that they stand for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...allocation._allocation import Budget
from ...allocation.costs import CostCurve, Costs
from ...analysis import plan as plans
from ...analysis._analysis import Analysis
from ...analysis.groups import Group, by_block
from ...analysis.plan import PruningPlan
from ...analysis.resources import InProducts
from ...base._options import is_number
from ...base.compat import is_backward
from ...calibration.observe._visit import Decision
from ...capturing._program import Program
from ...errors import ArgumentError, SparsityError
from ...pruning._allocating import allocate, budget_for, check_request, counted
from ...pruning._method import Method
from ...pruning._rewriting import make_plan
from ...pruning.config import PruningConfig
from ._calls import Calls, Draw
from ._kinds import Kind

#: stands for the chance of what has no gate, so that it goes last
_CLOSED = 1e6
_MARK = "parametrizations."


@dataclass(frozen=True)
class _Fixed:
    """What no training changes, and all copies share."""

    program: Program
    analysis: Analysis
    groups: list[Group]
    method: Method
    budget: Budget

    def __deepcopy__(self, memo: dict[int, Any]) -> _Fixed:
        return self


class Gates(nn.Module):
    """One gate for every channel set of a model's groups; :func:`fasp_fx.gates.attach` makes them.

    They are a part of the model while they are attached, so that its optimizers, checkpoints and trainers
    take them along. In training mode each call of the model draws gates, in evaluation mode those of the
    plan's removed channel sets are zero and all others one.

    Attributes:
        scores: what is learned, for each group ``[sets]``.
        coarse: what is learned of groups as a whole, ``[coarse gates]``; ``None`` where they have none.
        names: the groups' names, in the order of ``scores``.
    """

    multipliers: Tensor
    steps: Tensor
    #: what a capture refuses a model by
    is_fasp_fx_gates = True

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        analysis: Analysis,
        groups: list[Group],
        config: PruningConfig,
        kind: Kind,
        warmup: int,
        rate: float,
        coarse: bool,
    ) -> None:
        super().__init__()
        device = next(model.parameters()).device
        method = Method.of(config)
        budget = budget_for(config, analysis.chosen, lambda cap: counted(analysis, cap))
        self._model = (model,)  # in a tuple: the model is no part of the gates
        self._fixed = _Fixed(program, analysis, groups, method, budget)
        self._kind, self._warmup, self._rate = kind, warmup, rate
        check_request(
            method, budget, analysis.groups, self._costs([np.zeros(group.size) for group in groups])
        )
        self.names = [group.name for group in groups]
        self.scores = nn.ParameterList(
            nn.Parameter(torch.full((group.size,), float(kind.start), device=device)) for group in groups
        )
        whole = [number for number, group in enumerate(groups) if coarse and not group.needed]
        self._coarse_of = {number: place for place, number in enumerate(whole)}
        self.coarse = (
            nn.Parameter(torch.full((len(whole),), float(kind.start), device=device)) if whole else None
        )
        self.register_buffer("multipliers", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.places: list[tuple[nn.Module, str, list[str]]] = []
        self._calls = Calls()
        self._open: set[int] = set()  # numbers of the draws that no backward has come to yet
        self._draws = 0
        self._known: tuple[list[np.ndarray], list[np.ndarray]] | None = None
        self._closed: list[np.ndarray] | None = None
        if not kind.is_exact:
            self.expected()  # what it raises is raised before anything is trained
        self.draw()

    def watch(self) -> None:
        """Draw anew whenever the model, or a part of it that has gates, is called from outside."""
        gated = {id(module) for module, _, _ in self.places}
        for module in self._model[0].modules():
            if any(id(part) in gated for part in module.modules()):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, always_call=True)

    @contextmanager
    def closed(self, gone: list[np.ndarray]) -> Iterator[None]:
        """Inside, these gates are closed in evaluation mode, whatever the scores say; for each group, of
        shape ``[sets]``.
        """
        self._closed = gone
        try:
            yield
        finally:
            self._closed = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {
            "_drawn": self._drawn.detached(),
            "_recorded": self._recorded.detached(),
            "_open": set(),
            "_known": None,
        }
        del state["_calls"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._calls = Calls()

    def _enter(
        self, module: nn.Module, args: Any
    ) -> None:  # methods: a copy of the model has those of its own gates
        if not self._calls.begin(_caller()):
            return
        if not is_backward():
            self.draw(id(module))
        elif (wanted := self._wanted()).trained and wanted.caller == id(module):
            raise _around()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.end(_caller())

    def draw(self, caller: int | None = None) -> None:
        """Draw all gates anew; every call of the model, or of a part of it, does so.

        Args:
            caller: the identity of the module that is called.
        """
        is_trained = self._model[0].training
        stays = (
            [
                torch.from_numpy(~gone).to(scores.device)
                for gone, scores in zip(self._gone(), self.scores, strict=True)
            ]
            if self._kind.is_exact or not is_trained
            else None
        )
        kept = stays or [torch.ones_like(scores, dtype=torch.bool) for scores in self.scores]
        found = (
            [self._drawn_of(number, own) for number, own in enumerate(kept)]
            if is_trained
            else [own.to(scores) for scores, own in zip(self.scores, kept, strict=True)]
        )
        self._draws += 1
        self._drawn = Draw(self._draws, found, is_trained, torch.is_grad_enabled(), caller)
        self._calls.drew(self._drawn)
        if self._drawn.records:
            self._recorded = self._drawn
        followed = next((gates for gates in found if gates.requires_grad), None)
        if followed is not None:
            self._open.add(self._draws)
            followed.register_hook(partial(_close, self._open, self._draws))

    def drawn(self, number: int) -> Tensor:
        """The gates of a group by its number, as the last call of the model drew them, shape ``[sets]``.

        Raises:
            ArgumentError: gradient checkpointing computes a whole call anew, or one of several calls, and
                whose gates it wants cannot be told.
        """
        if is_backward():
            if self._open - {self._recorded.number}:
                raise ArgumentError(
                    "gradient checkpointing computes anew what several calls of one loss drew gates for; make"
                    " one call for each, or do without it (a call that no backward came to counts until"
                    " step())"
                )
            wanted = self._wanted()
            if wanted.trained and not wanted.records:
                raise _around()
            return wanted.gates[number]
        drawn = self._calls.drawn() or self._drawn
        if drawn.trained != self._model[0].training:
            self.draw()
            drawn = self._drawn
        return drawn.gates[number]

    def _drawn_of(self, number: int, stays: Tensor) -> Tensor:
        """Gates of a group by its number, drawn anew, of which these channel sets stay in the plan."""
        coarse = self._coarse(number)
        if coarse is None:
            return self._kind.draw(self.scores[number], stays)
        return self._kind.draw_coarse(self.scores[number], coarse, stays)

    def _chances(self) -> list[Tensor]:
        """How probable it is that each channel set stays: that its own gate and its group's are open."""
        found = []
        for number, scores in enumerate(self.scores):
            coarse, own = self._coarse(number), self._kind.chances(scores)
            found.append(own if coarse is None else own * self._kind.chances(coarse))
        return found

    def _coarse(self, number: int) -> Tensor | None:
        """The score of a group as a whole by its number, if it has one."""
        return (
            None
            if self.coarse is None or number not in self._coarse_of
            else self.coarse[self._coarse_of[number]]
        )

    def _wanted(self) -> Draw:
        """The gates of the call of which backward computes a part anew: not of one without gradients that
        came after it.
        """
        recorded = self._recorded
        is_pending = recorded.number in self._open or not (recorded.trained or self._drawn.trained)
        return recorded if is_pending else self._drawn

    def expected(self) -> Tensor:
        """For each budget, the fraction of its resource that is expected to go, by the chances of the gates;
        with a gradient, shape ``[budgets]``.

        Raises:
            ArgumentError: a budget's resource cannot be counted in parts.
        """
        chances = dict(zip(self.names, (own.double() for own in self._chances()), strict=True))
        zero = torch.zeros((), dtype=torch.float64, device=self.scores[0].device)
        lost = [
            (1 - chances[group.name]).sum() if group.name in chances else zero
            for group in self._fixed.budget.groups
        ]
        found = []
        for limit in self._fixed.budget.limits:
            if not isinstance(limit.resource, InProducts):
                raise ArgumentError(
                    f"{type(limit.resource).__name__} counts whole channel sets alone, so nothing can be"
                    " expected of it; use kind=Projected()"
                )
            found.append(limit.resource.expected(lost))
        return torch.stack(found)

    def penalty(self) -> Tensor:
        """What to add to the loss so that the expected size comes to the budget: ``λ₁ d + λ₂ d²`` (FLOP,
        arXiv 1910.04732, section 3.3).

        d is by how much less goes than shall, which grows from nothing over the first ``warmup`` steps; of
        several budgets, that of the one which is furthest from being met. Zero where what is drawn meets the
        budget by itself.
        """
        if self._kind.is_exact:
            return torch.zeros((), device=self.scores[0].device)
        short = self._short()
        first, second = self.multipliers.to(short)
        return (first * short + second * short.square()).to(self.scores[0].dtype)

    def _short(self) -> Tensor:
        """By how much less goes than shall, as a fraction of the resource."""
        need = torch.tensor(
            [limit.need for limit in self._fixed.budget.limits],
            dtype=torch.float64,
            device=self.scores[0].device,
        )
        # Budgets are ceilings: all are kept if the furthest one is, and to bring that one to nothing pulls no
        # other up to its own ceiling.
        return (need * min(1.0, (int(self.steps) + 1) / max(self._warmup, 1)) - self.expected()).max()

    @torch.no_grad()
    def step(self) -> None:
        """Call it after each step of the optimizer: the multipliers of the penalty rise where too little
        goes.
        """
        if not self._kind.is_exact:
            short = self._short().to(self.multipliers)
            self.multipliers += self._rate * torch.stack([short, short.square()])
        self.steps += 1
        self._open.clear()

    def plan(self) -> PruningPlan:
        """The plan that meets the budget with the least open gates.

        It is for the model as it is now, its weights trained or not, once the gates are detached.
        ``fasp_fx.apply`` carries it out.

        Raises:
            SparsityError: the groups that have gates cannot meet the budget.
        """
        plan = make_plan(self._fixed.program, self._fixed.analysis, self.decision(self._gone()))
        # Buffers have gone on since the capture, as they do in training; who applies the plan sees them.
        return replace(plan, fingerprint=plans.fingerprint(self.original_parameters()), fixed=())

    def decision(self, gone: list[np.ndarray]) -> Decision:
        """What is removed where these gates are closed; for each group, of shape ``[sets]``."""
        labels = self._fixed.analysis.labels
        sets = np.zeros(int(labels.max(initial=-1)) + 1, dtype=bool)
        for group, own in zip(self._fixed.groups, gone, strict=True):
            sets[group.sets[own]] = True
        return Decision(sets[labels])

    @torch.no_grad()
    def prefer(self, plan: PruningPlan, by: float = 1.0) -> None:
        """Begin with a plan: gates of the channel sets that it removes start lower by so much, all others
        higher, and so do those of groups that it removes as a whole.

        Raises:
            ArgumentError: ``by`` is not a positive number.
            PlanError: the plan is for another model.
        """
        if not is_number(by) or not math.isfinite(by) or by <= 0:
            raise ArgumentError(f"by={by!r} is not a positive number")
        plans.check_fingerprint(plan, plans.fingerprint(self.original_parameters()))
        analysis = self._fixed.analysis
        gone = plans.gone_of(plan, analysis)
        removed = np.unique(analysis.labels[: len(gone)][gone])
        for number, (group, scores) in enumerate(zip(self._fixed.groups, self.scores, strict=True)):
            closed = torch.from_numpy(np.isin(group.sets, removed)).to(scores.device)
            scores.copy_(self._kind.start + by * torch.where(closed, -1.0, 1.0))
            if (coarse := self._coarse(number)) is not None:
                coarse.fill_(self._kind.start + (-by if closed.all() else by))

    def original_parameters(self) -> dict[str, Tensor]:
        """The model's own parameters by the names that they have without gates."""
        found: dict[str, Tensor] = {}
        own = {id(parameter) for parameter in self.parameters()}
        gated = {(id(module), name) for module, name, _ in self.places}
        for name, parameter in self._model[0].named_parameters(remove_duplicate=False):
            if id(parameter) in own:
                continue
            path, mark, weight = name.removesuffix(".original").rpartition(_MARK)
            is_gated = mark and (id(self._model[0].get_submodule(path.rstrip("."))), weight) in gated
            found[path + weight if is_gated else name] = parameter
        return found

    def detach(self) -> None:
        """Take the gates off: the model is as it was, with its weights as they are now.

        Raises:
            ArgumentError: a weight has parametrizations of others since, or its gates are gone; names it.
        """
        for module, name, _ in self.places:
            found = getattr(module, "parametrizations", {})
            if name not in found or len(found[name]) != 1:
                raise ArgumentError(
                    f"'{name}' of a {type(module).__name__} has other parametrizations than when its gates"
                    " were put on; take off what came since, and nothing else"
                )
        for module in self._model[0].modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
        for module, name, _ in self.places:
            own = type(module)  # copies of the model share it, and taking a parametrization off changes it
            module.__class__ = type(
                own.__name__,
                own.__bases__,
                {key: value for key, value in vars(own).items() if key not in ("__dict__", "__weakref__")},
            )
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for module, _, order in self.places:
            for parameter in order:  # as they stood, which optimizers and checkpoints go by
                module._parameters[parameter] = module._parameters.pop(parameter)
        self.places = []

    def _costs(self, chances: list[np.ndarray]) -> Costs:
        """Chances in the place of costs, the least first."""
        curves = {
            group.name: CostCurve(np.arange(group.width + 1) * _CLOSED)
            for group in self._fixed.analysis.chosen
        }
        for group, own in zip(self._fixed.groups, chances, strict=True):
            rows = np.sort(own[np.stack(by_block(group.block_of))], 1)
            curves[group.name] = CostCurve(np.concatenate([[0.0], np.cumsum(rows.mean(0))]))
        return Costs(curves, "")

    def _gone(self) -> list[np.ndarray]:
        """Which channel sets the plan removes, for each group that has gates; worked out anew where chances
        have changed.

        Raises:
            ArgumentError: chances are none, as where training has made scores NaN; names the group.
        """
        if self._closed is not None:
            return self._closed
        with torch.no_grad():
            chances = [own.double().cpu().numpy() for own in self._chances()]
        for group, own in zip(self._fixed.groups, chances, strict=True):
            if own.shape != (group.size,) or not ((own >= 0) & (own <= 1)).all():
                raise ArgumentError(
                    f"the chances of the gates of '{group.name}' are not {group.size} numbers from 0 to 1;"
                    " training has made their scores NaN, which a lower learning rate may prevent, or"
                    f" {type(self._kind).__name__}.chances() is wrong"
                )
        # By their values: a checkpoint may put other tensors in, and what writes into data is not counted.
        if self._known is None or not all(map(np.array_equal, self._known[0], chances)):
            self._known = chances, self._planned(chances)
        return self._known[1]

    def _planned(self, chances: list[np.ndarray]) -> list[np.ndarray]:
        fixed = self._fixed
        counts, _ = allocate(fixed.method, fixed.budget, fixed.analysis.groups, self._costs(chances))
        lost = {group.name: count for group, count in zip(fixed.budget.groups, counts, strict=True)}
        beyond = [name for name, count in lost.items() if count and name not in self.names]
        if beyond:
            raise SparsityError(
                f"the groups that have gates do not reach the budget; '{beyond[0]}' has none; ask for less"
            )
        found = []
        for group, own in zip(self._fixed.groups, chances, strict=True):
            members = np.stack(by_block(group.block_of))
            order = np.take_along_axis(members, np.argsort(own[members], 1, kind="stable"), 1)
            gone = np.zeros(group.size, dtype=bool)
            gone[order[:, : lost[group.name]]] = True
            found.append(gone)
        return found

    def extra_repr(self) -> str:
        return (
            f"{len(self.names)} groups, {sum(group.size for group in self._fixed.groups)} gates, {self._kind}"
        )


def _caller() -> FrameType | None:
    """The frame of the call whose hook asks."""
    frame = inspect.currentframe()
    return frame and frame.f_back and frame.f_back.f_back


def _close(open_draws: set[int], number: int, gradient: Tensor) -> None:
    open_draws.discard(number)


def _around() -> ArgumentError:
    return ArgumentError(
        "gradient checkpointing computes a whole call anew, and with it the gates that it drew; checkpoint"
        " parts within forward, and not what calls the model"
    )


__all__ = ["Gates"]
