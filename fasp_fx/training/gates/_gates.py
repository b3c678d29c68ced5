"""The gates of a model: kinds of them, what they stand for, and the module that holds them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...allocation import Budget, CostAllocation, check_reach, deepest_loss
from ...allocation.costs import CostCurve, Costs
from ...analysis import plan as plans
from ...analysis._analysis import Analysis
from ...analysis.groups import Group, by_block
from ...analysis.plan import PruningPlan
from ...analysis.resources import Counted
from ...base.compat import is_backward
from ...calibration._visit import Decision
from ...capturing._program import Program
from ...errors import ArgumentError, SparsityError
from ...pruning._allocating import allocate, budget_for, check_request, counted
from ...pruning._method import Method
from ...pruning._rewriting import make_plan
from ...pruning.config import PruningConfig

#: how far a concrete variable is stretched beyond 0 and 1 before it is cut off there
_LOW, _HIGH = -0.1, 1.1
_EDGE = 1e-6


class Kind(ABC):
    """How gates are drawn from scores. Derive from it for one of your own.

    Attributes:
        start: the score that every gate begins with.
    """

    start: float

    @abstractmethod
    def draw(self, scores: Tensor, stays: Tensor) -> Tensor:
        """The gates of a group for one training step, shape ``[sets]``.

        Args:
            scores: what is learned, shape ``[sets]``.
            stays: which channel sets the plan of these scores keeps.
        """

    @abstractmethod
    def chances(self, scores: Tensor) -> Tensor:
        """How probable it is that each gate is open: the lower, the sooner its channel set goes."""

    @property
    def is_exact(self) -> bool:
        """Whether what is drawn meets the budget by itself, so that no penalty is wanted."""
        return False


@dataclass(frozen=True)
class HardConcrete(Kind):
    """Stretched and cut binary concrete variables (Louizos et al., arXiv 1712.01312), as in FLOP (1910.04732)
    and CoFi (2204.00408).

    With u drawn evenly from (0, 1), ``z = clamp(1.2 σ((ln u − ln(1 − u) + a)/β) − 0.1, 0, 1)`` for the score
    a; a gate is open with the chance ``σ(a − β ln(0.1/1.1))``. A Lagrangian brings the expected size to the
    budget (:meth:`fasp_fx.gates.Gates.penalty`).

    Args:
        temperature: β.
        start: the score that every gate begins with; 2.5 means that nearly all are open.
    """

    temperature: float = 2 / 3
    start: float = 2.5

    def draw(self, scores: Tensor, stays: Tensor) -> Tensor:
        u = torch.rand_like(scores).clamp(_EDGE, 1 - _EDGE)
        concrete = torch.sigmoid((u.log() - (1 - u).log() + scores) / self.temperature)
        return (concrete * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def chances(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores - self.temperature * math.log(-_LOW / _HIGH))


@dataclass(frozen=True)
class Projected(Kind):
    """Hard masks that meet the budget in every step, with gradients that pass straight through (GRASPrune,
    arXiv 2604.19398; DDP, 2603.08065).

    Forward, the channel sets that the plan of the scores keeps have the gate 1 and all others 0; backward, a
    gate is ``σ(a/τ)`` for the score a.

    Args:
        temperature: τ.
        start: the score that every gate begins with.
    """

    temperature: float = 1.5
    start: float = 1.0

    def draw(self, scores: Tensor, stays: Tensor) -> Tensor:
        soft = self.chances(scores)
        return stays.to(soft) + soft - soft.detach()

    def chances(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores / self.temperature)

    @property
    def is_exact(self) -> bool:
        return True


#: stands for the chance of what has no gate, so that it goes last
_CLOSED = 1e6
#: by how much the last of a group's gates counts more than the first, so that of equal ones the same part
#: goes from every group
_TIE = 1e-9


class Threshold(CostAllocation):
    """Closes the gates with the least chances to be open, as many as meet the budget best (GRASPrune, arXiv
    2604.19398; CoFi, 2204.00408).

    Of layers that lose alike the mean of the chances counts: a gate is held against one threshold, however
    many layers its place stands for.
    """

    averages = True

    def __call__(self, budget: Budget, round_to: int, costs: Costs) -> list[int]:
        """Channel sets lost per block of each group; arguments and errors as for
        :class:`fasp_fx.allocation.Global`.
        """
        check_reach(budget, round_to)
        chances = []
        for group in budget.groups:
            own = np.diff(costs[group.name].losses)[: deepest_loss(group)]
            chances.append(own + _TIE * (np.arange(len(own)) + 1) / group.width)
        thresholds = np.unique(np.concatenate([np.zeros(1), *chances]))

        def lost(place: int) -> list[int]:
            counts = (int(np.searchsorted(own, thresholds[place], "right")) for own in chances)
            stay = (
                -(-(group.width - count) // group.step(round_to)) * group.step(round_to)
                for group, count in zip(budget.groups, counts, strict=True)
            )
            return [
                group.width - min(kept, group.width) for group, kept in zip(budget.groups, stay, strict=True)
            ]

        low, high = 0, len(thresholds) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if budget.over(lost(middle)) > 0 else (low, middle)
        return budget.closest([lost(low), lost(high)])


class Target:
    """What is asked of the gates of a model, which no training changes and all copies share.

    Args:
        program: the model as it was captured without gates.
        groups: those that have gates.
        config: what is asked for.

    Raises:
        SparsityError, BudgetError: it is out of reach.
    """

    def __init__(
        self, program: Program, analysis: Analysis, groups: list[Group], config: PruningConfig
    ) -> None:
        self.program, self.analysis, self.groups = program, analysis, groups
        self._method = Method.of(config)
        self.budget = budget_for(config, analysis.chosen, lambda cap: counted(analysis, cap))
        none = self._costs([np.zeros(group.size) for group in groups])
        check_request(self._method, self.budget, analysis.groups, none)

    def __deepcopy__(self, memo: dict[int, Any]) -> Target:
        return self

    def gone(self, chances: list[np.ndarray]) -> list[np.ndarray]:
        """Which channel sets go, ``[sets]`` for each group.

        Args:
            chances: how probable it is that each stays, ``[sets]`` for each group.

        Raises:
            ArgumentError: they are none, as where training has made scores NaN; names the group.
            SparsityError: the groups that have gates cannot meet the budget.
        """
        for group, own in zip(self.groups, chances, strict=True):
            if own.shape != (group.size,) or not ((own >= 0) & (own <= 1)).all():
                raise ArgumentError(
                    f"the chances of the gates of '{group.name}' are not {group.size} numbers from 0 to 1;"
                    " training has made their scores NaN, which a lower learning rate may prevent, or"
                    " chances() of your kind= is wrong"
                )
        counts, _ = allocate(self._method, self.budget, self.analysis.groups, self._costs(chances))
        lost = {group.name: count for group, count in zip(self.budget.groups, counts, strict=True)}
        if beyond := [
            name for name in lost if lost[name] and name not in {group.name for group in self.groups}
        ]:
            raise SparsityError(
                f"the groups that have gates do not reach the budget; '{beyond[0]}' has none; ask for less"
            )
        found = []
        for group, own in zip(self.groups, chances, strict=True):
            members = np.stack(by_block(group.block_of))
            order = np.take_along_axis(members, np.argsort(own[members], 1, kind="stable"), 1)
            found.append(np.isin(np.arange(group.size), order[:, : lost[group.name]]))
        return found

    def decision(self, gone: list[np.ndarray]) -> Decision:
        """What is removed where these channel sets go, ``[sets]`` for each group."""
        labels = self.analysis.labels
        sets = np.concatenate([group.sets[own] for group, own in zip(self.groups, gone, strict=True)])
        return Decision(np.isin(labels, sets))

    def _costs(self, chances: list[np.ndarray]) -> Costs:
        """Chances in the place of costs, the least first."""
        curves = {
            group.name: CostCurve(np.arange(group.width + 1) * _CLOSED) for group in self.analysis.chosen
        }
        for group, own in zip(self.groups, chances, strict=True):
            rows = np.sort(own[np.stack(by_block(group.block_of))], 1)
            curves[group.name] = CostCurve(np.concatenate([[0.0], np.cumsum(rows.mean(0))]))
        return Costs(curves, "")


_MARK = "parametrizations."


class Gates(nn.Module):
    """One gate for every channel set of a model's groups; :func:`fasp_fx.gates.attach` makes them.

    They are a part of the model while they are attached, so that its optimizers, checkpoints and trainers
    take them along. In training mode each call of the model draws gates, in evaluation mode those of the
    plan's removed channel sets are zero and all others one.

    Attributes:
        scores: what is learned, for each group ``[sets]``.
        names: the groups' names, in the order of ``scores``.
    """

    multipliers: Tensor
    steps: Tensor
    #: what a capture refuses a model by
    is_fasp_fx_gates = True

    def __init__(self, model: nn.Module, target: Target, kind: Kind, warmup: int, rate: float) -> None:
        super().__init__()
        start, device = float(kind.start), next(model.parameters()).device
        self._model = (model,)  # in a tuple: the model is no part of the gates
        self.target, self._kind, self._warmup, self._rate = target, kind, warmup, rate
        self.names = [group.name for group in target.groups]
        self.scores = nn.ParameterList(
            nn.Parameter(torch.full((group.size,), start, device=device)) for group in target.groups
        )
        self.register_buffer("multipliers", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.places: list[tuple[nn.Module, str, list[str]]] = []
        self._known: tuple[list[np.ndarray], list[np.ndarray]] | None = None
        #: gates that are closed in evaluation mode whatever the scores say, for each group ``[sets]``
        self.closed: list[np.ndarray] | None = None
        if not kind.is_exact:
            self.expected()  # what it raises is raised before anything is trained
        self.draw()

    def __getstate__(self) -> dict[str, Any]:
        # No backward leads from a copy to the scores of these.
        return self.__dict__ | {"_drawn": [gates.detach() for gates in self._drawn], "_known": None}

    @torch.compiler.disable
    def before_call(self, module: nn.Module, args: Any) -> None:
        """A hook of the model: it draws anew. Bound, since a copy of the model has that of its own gates."""
        self.draw()

    def draw(self) -> None:
        """Draw all gates anew: every call of the model does, and the first of a part of it after a step."""
        self._is_trained: bool | None = self._model[0].training
        if self._is_trained and not self._kind.is_exact:
            stays = [torch.ones_like(scores, dtype=torch.bool) for scores in self.scores]
        else:
            stays = [
                torch.from_numpy(~gone).to(scores.device)
                for gone, scores in zip(self._gone(), self.scores, strict=True)
            ]
        self._drawn = [
            self._kind.draw(scores, own) if self._is_trained else own.to(scores)
            for scores, own in zip(self.scores, stays, strict=True)
        ]

    def drawn(self, number: int) -> Tensor:
        """The gates of a group by its number, as the last call of the model drew them, shape ``[sets]``.

        Raises:
            ArgumentError: gradient checkpointing computes a part of the model anew.
        """
        if is_backward():
            raise ArgumentError(
                "gradient checkpointing computes parts of the model anew, and which gates they take cannot"
                " be told; do without it while gates are attached (of transformers' models"
                " gradient_checkpointing_disable())"
            )
        if self._is_trained != self._model[0].training:
            self.draw()
        return self._drawn[number]

    def expected(self) -> Tensor:
        """For each budget, the fraction of its resource that is expected to go, by the chances of the gates;
        with a gradient, shape ``[budgets]``.

        Raises:
            ArgumentError: a budget's resource cannot be counted in parts.
        """
        chances = map(self._kind.chances, self.scores)
        lost = {name: (1 - own.double()).sum() for name, own in zip(self.names, chances, strict=True)}
        zero = torch.zeros((), dtype=torch.float64, device=self.scores[0].device)
        found = []
        for limit in self.target.budget.limits:
            if not isinstance(limit.resource, Counted):
                raise ArgumentError(
                    f"{type(limit.resource).__name__} counts whole channel sets alone, so nothing can be"
                    " expected of it; use kind=Projected()"
                )
            own = [lost.get(group.name, zero) for group in self.target.budget.groups]
            found.append(limit.resource.expected(own))
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
        expected = self.expected()
        need = expected.new_tensor([limit.need for limit in self.target.budget.limits])
        # Budgets are ceilings: all are kept if the furthest one is, and to bring that one to nothing pulls no
        # other up to its own ceiling.
        return (need * min(1.0, (int(self.steps) + 1) / max(self._warmup, 1)) - expected).max()

    @torch.no_grad()
    def step(self) -> None:
        """Call it after each step of the optimizer: the multipliers of the penalty rise where too little
        goes.
        """
        if not self._kind.is_exact:
            short = self._short().to(self.multipliers)
            self.multipliers += self._rate * torch.stack([short, short.square()])
        self.steps += 1
        self._is_trained = None  # what was drawn before is of other scores

    def plan(self) -> PruningPlan:
        """The plan that meets the budget with the least open gates.

        It is for the model as it is now, its weights trained or not, once the gates are detached.
        ``fasp_fx.apply`` carries it out.

        Raises:
            SparsityError: the groups that have gates cannot meet the budget.
        """
        plan = make_plan(self.target.program, self.target.analysis, self.target.decision(self._gone()))
        # Buffers have gone on since the capture, as they do in training; who applies the plan sees them.
        return replace(plan, fingerprint=plans.fingerprint(self.original_parameters()), fixed=())

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
        hooks = self._model[0]._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
            del hooks[key]
        for module, name, _ in self.places:
            own = type(module)  # copies of the model share it, and taking a parametrization off changes it
            held = {key: value for key, value in vars(own).items() if key not in ("__dict__", "__weakref__")}
            module.__class__ = type(own.__name__, own.__bases__, held)
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for module, _, order in self.places:
            for parameter in order:  # as they stood, which optimizers and checkpoints go by
                module._parameters[parameter] = module._parameters.pop(parameter)
        self.places = []

    def _gone(self) -> list[np.ndarray]:
        """Which channel sets the plan removes, for each group; worked out anew where chances have changed."""
        if self.closed is not None:
            return self.closed
        with torch.no_grad():
            chances = [self._kind.chances(scores).double().cpu().numpy() for scores in self.scores]
        # By their values: a checkpoint may put other tensors in, and what writes into data is not counted.
        if self._known is None or not all(map(np.array_equal, self._known[0], chances)):
            self._known = chances, self.target.gone(chances)
        return self._known[1]

    def extra_repr(self) -> str:
        return f"{len(self.names)} groups, {sum(map(len, self.scores))} gates, {self._kind}"
