"""Learned gates: a number for each channel set, trained with any loop of yours, that says what goes.

:func:`attach_gates` puts gates on a model, ``gates.plan()`` is the plan that they stand for, and
``fasp_fx.apply(model, plan, args, calibration=batches)`` carries it out and restores what stays
(docs/recovery.md).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Unpack
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fasp_fx.allocation import Budget, check_reach, counted, is_excluded
from fasp_fx.analysis import Analysis, Group, Member, PruningPlan, by_block, laid_by_block
from fasp_fx.base import (
    check_kind,
    fingerprint,
    forward_pre_hooks,
    in_usual_modes,
    largest_passing_subset,
    one_at_a_time,
    tolerable,
    version_of,
    warn,
)
from fasp_fx.calibration import Decision
from fasp_fx.capturing import Program, capture_whole, tied_names, trouble_with
from fasp_fx.errors import (
    ArgumentError,
    CalibrationError,
    NothingPrunableError,
    SparsityError,
    VerificationWarning,
)
from fasp_fx.pruning import (
    Method,
    PruningConfig,
    PruningOptions,
    allocate,
    analyze_for,
    make_plan,
    masked_program,
    open_budget,
)

#: a gate is open with the chance ``σ(score / τ)``
TEMPERATURE = 1.5
#: the score that every gate begins with
START = 1.0
#: stands for the chance of what has no gate, so that it goes last
_CLOSED = 1e6
#: by how much the last of a group's gates counts more than the first, so that of equal ones the same part
#: goes from every group
_TIE = 1e-9


def threshold(chances: Mapping[str, np.ndarray], budget: Budget, round_to: int | None) -> list[int]:
    """Channel sets lost per block of each group: the gates with the least chances to be open are closed, as
    many as meet the budget best (GRASPrune, arXiv 2604.19398; CoFi, 2204.00408).

    Args:
        chances: of the groups that have gates, by name: how probable it is that each channel set stays, from
            the least on, in the mean of all blocks. What has no gates goes last.
        budget, round_to: as for :class:`fasp_fx.allocation.Global`, with its errors.
    """
    check_reach(budget, round_to)
    ties = (_TIE * (np.arange(group.deepest_loss) + 1) / group.width for group in budget.groups)
    levels = [
        chances.get(group.name, np.full(group.width, _CLOSED))[: len(tie)] + tie
        for group, tie in zip(budget.groups, ties, strict=True)
    ]
    thresholds = np.unique(np.concatenate([np.zeros(1), *levels]))

    def lost(place: int) -> list[int]:
        kept = [
            -(-(group.width - count) // group.step(round_to)) * group.step(round_to)
            for group, count in zip(
                budget.groups,
                (int(np.searchsorted(level, thresholds[place], "right")) for level in levels),
                strict=True,
            )
        ]
        return [max(group.width - width, 0) for group, width in zip(budget.groups, kept, strict=True)]

    enough = bisect_left(range(len(thresholds) - 1), True, key=lambda place: budget.over(lost(place)) <= 0)
    return budget.closest([lost(max(enough - 1, 0)), lost(enough)])


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
        self._config = config
        self.budget = open_budget(config, analysis, partial(counted, analysis))
        self._lost([np.zeros(group.size) for group in groups])

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
        for group, chance in zip(self.groups, chances, strict=True):
            if chance.shape != (group.size,) or not ((chance >= 0) & (chance <= 1)).all():
                raise ArgumentError(
                    f"the scores of the gates of '{group.name}' are not {group.size} numbers; training has"
                    " made them NaN, which a lower learning rate may prevent"
                )
        lost = self._lost(chances)
        if beyond := [name for name in lost if name not in {group.name for group in self.groups}]:
            raise SparsityError(
                f"the groups that have gates do not reach the budget; '{beyond[0]}' has none; ask for less"
            )
        gone = []
        for group, chance in zip(self.groups, chances, strict=True):
            members = np.stack(by_block(group.block_of))
            order = np.take_along_axis(members, np.argsort(chance[members], 1, kind="stable"), 1)
            gone.append(np.isin(np.arange(group.size), order[:, : lost.get(group.name, 0)]))
        return gone

    def decision(self, gone: list[np.ndarray]) -> Decision:
        """What is removed where these channel sets go, ``[sets]`` for each group."""
        sets = np.concatenate([group.sets[places] for group, places in zip(self.groups, gone, strict=True)])
        return Decision(np.isin(self.analysis.labels, sets))

    def _lost(self, chances: list[np.ndarray]) -> dict[str, int]:
        """How many channel sets each block of the groups loses that lose any, by name."""
        by_name = {
            group.name: np.sort(chance[np.stack(by_block(group.block_of))], 1).mean(0)
            for group, chance in zip(self.groups, chances, strict=True)
        }
        method = Method.of(replace(self._config, allocation=partial(threshold, by_name)))
        counts = zip(self.analysis.chosen, allocate(method, self.budget), strict=True)
        return {group.name: count for group, count in counts if count}


class Gates(nn.Module):
    """One gate for every channel set of a model's groups; :func:`fasp_fx.training.attach_gates` makes them.

    They are a part of the model while they are attached, so that its optimizers, checkpoints and trainers
    take them along. A gate is zero where the plan of the scores removes its channel set, and else one. In
    training mode the gradient of ``σ(score / τ)`` passes straight through.

    Attributes:
        scores: what is learned, for each group ``[sets]``.
        names: the groups' names, in the order of ``scores``.

    Examples:
        >>> gated = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4)).eval()
        >>> gates = fasp_fx.training.attach_gates(gated, (x,), sparsity=0.5)
        >>> [(name, len(scores)) for name, scores in zip(gates.names, gates.scores)]
        [('2.weight', 32)]
        >>> gates.detach()
    """

    #: what a capture refuses a model by
    is_fasp_fx_gates = True

    def __init__(self, model: nn.Module, target: Target) -> None:
        super().__init__()
        device = next(model.parameters()).device
        self._model = (model,)  # in a tuple: the model is no part of the gates
        self.target = target
        self.names = [group.name for group in target.groups]
        self.scores = nn.ParameterList(
            nn.Parameter(torch.full((group.size,), START, device=device)) for group in target.groups
        )
        self.places: list[tuple[nn.Module, str, list[str]]] = []
        self._known: tuple[list[int | None], list[np.ndarray]] | None = None
        #: gates that are closed in evaluation mode whatever the scores say, for each group ``[sets]``
        self.closed: list[np.ndarray] | None = None

    def before_call(self, module: nn.Module, args: Any) -> None:
        """A hook of the model: scores may have changed. Bound, since a copy of the model has that of its own
        gates.
        """
        self._known = None

    @torch.compiler.disable
    def drawn(self, number: int) -> Tensor:
        """The gates of a group by its number, shape ``[sets]``."""
        scores = self.scores[number]
        stays = torch.from_numpy(~self._gone()[number]).to(scores)
        if not self._model[0].training:
            return stays
        soft = torch.sigmoid(scores / TEMPERATURE)
        return stays + soft - soft.detach()

    def plan(self) -> PruningPlan:
        """The plan that meets the budget with the least open gates.

        It is for the model as it is now, its weights trained or not, once the gates are detached.
        ``fasp_fx.apply`` carries it out.

        Raises:
            SparsityError: the groups that have gates cannot meet the budget.
        """
        self._known = None
        plan = make_plan(self.target.program, self.target.analysis, self.target.decision(self._gone()))
        # Buffers have gone on since the capture, as they do in training; who applies the plan sees them.
        return replace(plan, fingerprint=fingerprint(self.original_parameters()), fixed=())

    def original_parameters(self) -> dict[str, Tensor]:
        """The model's own parameters by the names that they have without gates."""
        of_gates = {id(parameter) for parameter in self.parameters()}
        lists = ((getattr(module, "parametrizations", {}), name) for module, name, _ in self.places)
        gated = {id(parametrized[name].original) for parametrized, name in lists if name in parametrized}
        return {
            _without_gate(name) if id(parameter) in gated else name: parameter
            for name, parameter in self._model[0].named_parameters(remove_duplicate=False)
            if id(parameter) not in of_gates
        }

    def detach(self) -> None:
        """Take the gates off: the model is as it was, with its weights as they are now.

        Raises:
            ArgumentError: a weight has parametrizations of others since, or its gates are gone; names it.
        """
        for module, name, _ in self.places:
            parametrizations = getattr(module, "parametrizations", {})
            if name not in parametrizations or len(parametrizations[name]) != 1:
                raise ArgumentError(
                    f"'{name}' of a {type(module).__name__} has other parametrizations than when its gates"
                    " were put on; take off what came since, and nothing else"
                )
        hooks = forward_pre_hooks(self._model[0])
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
            del hooks[key]
        for module, name, _ in self.places:
            kind = type(module)  # copies of the model share it, and taking a parametrization off changes it
            attributes = {
                key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")
            }
            module.__class__ = type(kind.__name__, kind.__bases__, attributes)
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for module, _, order in self.places:
            for parameter in order:  # as they stood, which optimizers and checkpoints go by
                tensor = getattr(module, parameter)
                delattr(module, parameter)
                module.register_parameter(parameter, tensor)
        self.places = []

    def _gone(self) -> list[np.ndarray]:
        """Which channel sets the plan removes, for each group; worked out once for the scores of a call."""
        if self.closed is not None:
            return self.closed
        versions = [version_of(scores) for scores in self.scores]  # of a part that is called by itself
        if self._known is None or self._known[0] != versions:
            chances = [
                torch.sigmoid(scores.detach().double() / TEMPERATURE).cpu().numpy() for scores in self.scores
            ]
            self._known = versions, self.target.gone(chances)
        return self._known[1]


# --- Put gates on a model.

#: the options that gates can say something of
_SAID = ("sparsity", "budget", "granularity", "include", "exclude", "round_to")


@one_at_a_time
@in_usual_modes
def attach_gates(
    model: nn.Module,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    config: PruningConfig | None = None,
    dynamic_shapes: Any = None,
    **options: Unpack[PruningOptions],
) -> Gates:
    """Put a gate on every channel set of a model's groups, for any training loop to learn which go.

    A gate multiplies the columns of all weights that read its channel, by a parametrization of torch, so that
    a closed gate is the channel's removal. In every call as many are closed as the budget asks for, those of
    the lowest scores, with gradients that pass straight through (GRASPrune, arXiv 2604.19398; DDP,
    2603.08065). Gates are parameters of the model: give ``gates.parameters()`` to an optimizer, with a rate
    of their own, usually a hundred times that of weights. In the end ``gates.plan()`` says what goes, and
    ``gates.detach()`` takes the gates off.

    Args:
        model: in evaluation mode, to be put into training mode afterwards.
        args, kwargs, dynamic_shapes: example inputs, as for :func:`fasp_fx.capture`.
        config, options: ``sparsity`` or ``budget``, and ``granularity``, ``include``, ``exclude``
            and ``round_to`` of :class:`fasp_fx.PruningConfig`.

    Raises:
        ArgumentError: an option is out of range or has nothing to say here, the model has gates already, or
            closed gates are not the removal of their channels, as where the model reads a weight from a list
            of its own. Experts and what crosses a norm have no gates: they see closed ones.
        CaptureError: the model cannot be captured as a whole.
        NothingPrunableError: no group has weights of the model's own to put gates on.
        SparsityError, BudgetError: what is asked for is out of reach.

    Examples:
        >>> gated = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4)).eval()
        >>> gates = fasp_fx.training.attach_gates(gated, (x,), sparsity=0.5)
        >>> optimizer = torch.optim.Adam(gates.parameters(), lr=0.05)  # for a loop of one's own
        >>> plan = gates.plan()
        >>> gates.detach()
        >>> smaller = fasp_fx.apply(gated, plan, (x,), calibration=batches)
    """
    check_kind("model", model, nn.Module, "give the module that is to be trained")
    asked = replace(_asked(PruningConfig.of(config, options)), score="fasp")
    captured = capture_whole(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    analysis = analyze_for(captured.program, asked)
    places, groups = _places(
        model, [group for group in analysis.chosen if not is_excluded(group, asked.exclude)]
    )
    if not groups:
        raise NothingPrunableError(
            "no group can have gates: weights that lose columns are computed from others or excluded, or none"
            " can be pruned"
        )
    gates = Gates(model, Target(captured.program, analysis, groups, asked))
    orders = [  # as they stand before any is replaced
        [own for own, _ in module.named_parameters(recurse=False, remove_duplicate=False)]
        for module, _, _ in places
    ]
    try:
        for (module, name, members), order in zip(places, orders, strict=True):
            parametrize.register_parametrization(
                module, name, Scaled(gates, members, getattr(module, name), holds=not gates.places)
            )
            module.parametrizations.train(model.training)  # type: ignore[union-attr]
            gates.places.append((module, name, order))
        model.register_forward_pre_hook(gates.before_call)
        _check_effect(gates, model)
    except BaseException:
        gates.detach()
        raise
    return gates


def _asked(config: PruningConfig) -> PruningConfig:
    """What was asked for, if gates can say it.

    Raises:
        ArgumentError: an option has nothing to say here, or a closed gate would not be the channel's removal.
    """
    others = config.non_default_fields(_SAID)
    for is_asked, message in (
        (others, f"{', '.join(others[:1])}= has nothing to say where gates are trained; leave it out"),
        (
            "expert" in config.granularity,
            "an expert whose gates are closed is chosen all the same, so experts have no gates; leave"
            " 'expert' out of granularity=",
        ),
        (
            "approximate" in config.include,
            "a norm sees channels whose gates are closed, so what crosses a norm has no gates; leave"
            " 'approximate' out of include=",
        ),
    ):
        if is_asked:
            raise ArgumentError(message)
    return config


def _places(
    model: nn.Module, chosen: list[Group]
) -> tuple[list[tuple[nn.Module, str, list[tuple[int, Member]]]], list[Group]]:
    """Each weight that is to be scaled, by its module and name, with the numbers of the groups that do; and
    these groups in order.
    """
    by_name = tied_names(model)
    groups = [
        group
        for group in chosen
        if group.consumers and all(member.name in by_name and member.sets for member in group.consumers)
    ]
    places: dict[tuple[int, str], tuple[nn.Module, str, list[tuple[int, Member]]]] = {}
    for number, group in enumerate(groups):
        for member in group.consumers:
            owners = {
                (id(module := model.get_submodule(path)), weight): module
                for path, _, weight in (name.rpartition(".") for name in by_name[member.name])
            }
            for (key, weight), module in owners.items():  # a module may have several names
                places.setdefault((key, weight), (module, weight, []))[2].append((number, member))
    return list(places.values()), groups


def _check_effect(gates: Gates, model: nn.Module) -> None:
    """Hold a model with gates against the dense program with the closed channels masked, before it is
    trained, with every second gate of each block closed: a weight that the model reads past the attribute of
    its module is not multiplied by them.

    Raises:
        ArgumentError: closed gates are not the removal of their channels; names the groups.

    Warns:
        VerificationWarning: the masked program does not run on the example inputs.
    """
    target = gates.target

    def fault(closed: list[Group]) -> str | None:
        """How the model differs when gates of these groups are closed."""
        names = {group.name for group in closed}
        gone = [
            np.isin(np.arange(group.size), np.stack(by_block(group.block_of))[:, 1::2])  # every second
            & (group.name in names)
            for group in target.groups
        ]
        masked = masked_program(target.analysis, target.decision(gone))
        args, kwargs = target.program.call()
        with mock.patch.object(gates, "closed", gone):
            return trouble_with(masked, model, args, kwargs)

    try:
        without = largest_passing_subset(target.groups, fault)[1]
    except tolerable(CalibrationError) as error:
        warn(f"what gates do was not compared with the removal of channels: {error}", VerificationWarning)
        return
    if without:
        names = ", ".join(f"'{group.name}'" for group, _ in without)
        raise ArgumentError(
            f"closed gates of {names} are not the removal of their channels: {without[0][1]}; the model reads"
            " weights past the attributes of their modules, such as from a list of its own. Read them there,"
            f" or leave them whole with exclude=('{without[0][0].consumers[0].name}',)"
        )


class Scaled(nn.Module):
    """A parametrization that multiplies the columns of a weight by the gates of the channels that they read.

    Args:
        gates: all gates.
        places: for each group that takes columns of the weight along, its number, and the member that says
            which.
        weight: the weight as it is.
        holds: whether the gates are a part of the model by this. A submodule of their own would be called by
            a model that calls all it has in turn.
    """

    #: what a capture refuses a model by, though it be a part that the gates themselves are not in
    is_fasp_fx_gates = True

    def __init__(self, gates: Gates, places: list[tuple[int, Member]], weight: Tensor, holds: bool) -> None:
        super().__init__()
        self._gates = (gates,)  # in a tuple: no part of this module
        if holds:
            self.gates = gates
        self._numbers = [number for number, _ in places]
        for index, (_, member) in enumerate(places):
            sets = torch.full((member.size,), -1)  # the channel set of each column, the last one for none
            sets[torch.tensor(member.indices)] = torch.tensor(member.sets)
            if member.block_dim is None:
                laid = sets.reshape([-1 if dim == member.dim else 1 for dim in range(weight.dim())])
            else:
                laid = laid_by_block(
                    sets.reshape(member.blocks, -1), member.dim, member.block_dim, weight.shape
                )
            self.register_buffer(f"sets_{index}", laid.to(weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        for index, number in enumerate(self._numbers):
            drawn: Tensor = self._gates[0].drawn(number).to(weight)
            weight = weight * torch.cat([drawn, drawn.new_ones(1)])[getattr(self, f"sets_{index}")]
        return weight


def _without_gate(name: str) -> str:
    """The name of a parametrised weight without the parametrisation."""
    return "".join(name.removesuffix(".original").rsplit("parametrizations.", 1))
