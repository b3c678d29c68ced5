"""Put gates on a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...allocation._limits import is_excluded
from ...analysis.channels import laid_by_block
from ...analysis.groups import Group, Member, by_block
from ...base._options import is_number
from ...base._tolerable import tolerable
from ...base._undisturbed import in_usual_modes, one_at_a_time
from ...base._warn import warn
from ...capturing._captured import capture_whole
from ...capturing._compare_with_model import called, trouble_with
from ...errors import ArgumentError, CalibrationError, NothingPrunableError, VerificationWarning
from ...pruning._prune import analyze
from ...pruning.check._check import largest_passing_subset
from ...pruning.check._reference import masked_program
from ...pruning.config import PruningConfig, PruningOptions
from ._gates import Gates, HardConcrete, Kind, Target, Threshold

#: the options that gates can say something of
_SAID = ("sparsity", "budget", "granularity", "include", "exclude", "round_to", "uniform_layers")


@one_at_a_time
@in_usual_modes
def attach(
    model: nn.Module,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    kind: Kind | None = None,
    config: PruningConfig | None = None,
    warmup: int = 100,
    rate: float = 0.03,
    dynamic_shapes: Any = None,
    **options: Unpack[PruningOptions],
) -> Gates:
    """Put a gate on every channel set of a model's groups, for any training loop to learn which go.

    A gate multiplies the columns of all weights that read its channel, by a parametrization of torch, so that
    a closed gate is the channel's removal. Gates are parameters of the model: give ``gates.parameters()`` to
    an optimizer (with a rate of their own, usually a hundred times that of weights), add ``gates.penalty()``
    to the loss, and call ``gates.step()`` after each step. In the end ``gates.plan()`` says what goes, and
    ``gates.detach()`` takes the gates off.

    Args:
        model: in evaluation mode, to be put into training mode afterwards.
        args, kwargs, dynamic_shapes: example inputs, as for :func:`fasp_fx.capture`.
        kind: :class:`fasp_fx.gates.HardConcrete` (the default), :class:`fasp_fx.gates.Projected` or one of
            your own.
        config, options: ``sparsity`` or ``budget``, and ``granularity``, ``include``, ``exclude``,
            ``round_to`` and ``uniform_layers`` of :class:`fasp_fx.PruningConfig`.
        warmup: over so many steps the budget that the penalty asks for grows from nothing.
        rate: how fast the multipliers of the penalty rise.

    Raises:
        ArgumentError: an option is out of range or has nothing to say here, the model has gates already, or
            closed gates are not the removal of their channels, as where the model reads a weight from a list
            of its own. Experts and what crosses a norm have no gates: they see closed ones.
        CaptureError: the model cannot be captured as a whole.
        NothingPrunableError: no group has weights of the model's own to put gates on.
        SparsityError, BudgetError: what is asked for is out of reach.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; give the module that is to be trained")
    if any(isinstance(module, Gates | Scaled) for module in model.modules()):
        raise ArgumentError("the model has gates already; call detach() of those first")
    for name, value, fits, said in (
        ("warmup", warmup, type(warmup) is int and warmup >= 0, "a number of steps"),
        ("rate", rate, is_number(rate) and rate >= 0, "a number from 0 on"),
        ("kind", kind, isinstance(kind, Kind | None), "one of gates; make one, such as Projected()"),
    ):
        if not fits:
            raise ArgumentError(f"{name}={value!r} is not {said}")
    asked = replace(_asked(PruningConfig.of(config, options)), score="fasp", allocation=Threshold())
    captured = capture_whole(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    analysis = analyze(captured, granularity=asked.granularity, include=asked.include)
    open_to = [group for group in analysis.chosen if not is_excluded(group, asked.exclude)]
    places, groups = _places(model, open_to)
    if not groups:
        raise NothingPrunableError(
            "no group can have gates: weights that lose columns are computed from others or excluded, or none"
            " can be pruned"
        )
    target = Target(captured.program, analysis, groups, asked)
    gates = Gates(model, target, kind or HardConcrete(), warmup, rate)
    orders = [list(module._parameters) for module, _, _ in places]  # as they stand before any is replaced
    try:
        for (module, name, own), order in zip(places, orders, strict=True):
            scaled = Scaled(gates, own, getattr(module, name), holds=not gates.places)
            parametrize.register_parametrization(module, name, scaled)
            module.parametrizations.train(model.training)  # type: ignore[union-attr]
            gates.places.append((module, name, order))
        model.register_forward_pre_hook(gates.before_call)
        _check_effect(gates, model)
        gates.draw()  # weights may be read before the first call
    except BaseException:
        gates.detach()
        raise
    return gates


def _asked(config: PruningConfig) -> PruningConfig:
    """What was asked for, if gates can say it.

    Raises:
        ArgumentError: an option has nothing to say here, or a closed gate would not be the channel's removal.
    """
    if others := config.non_default_fields(_SAID):
        raise ArgumentError(f"{others[0]}= has nothing to say where gates are trained; leave it out")
    if "expert" in config.granularity:
        raise ArgumentError(
            "an expert whose gates are closed is chosen all the same, so experts have no gates; leave"
            " 'expert' out of granularity="
        )
    if "approximate" in config.include:
        raise ArgumentError(
            "a norm sees channels whose gates are closed, so what crosses a norm has no gates; leave"
            " 'approximate' out of include="
        )
    return config


def _places(
    model: nn.Module, chosen: list[Group]
) -> tuple[list[tuple[nn.Module, str, list[tuple[int, Member]]]], list[Group]]:
    """Each weight that is to be scaled, by its module and name, with the numbers of the groups that do; and
    these groups in order.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    by_name = {name: names for names in aliases.values() for name in names}
    groups = [
        group
        for group in chosen
        if group.consumers and all(member.name in by_name and member.sets for member in group.consumers)
    ]
    places: dict[tuple[int, str], tuple[nn.Module, str, list[tuple[int, Member]]]] = {}
    for number, group in enumerate(groups):
        for member in group.consumers:
            owners = {
                (id(module := model.get_submodule(path)), own): module
                for path, _, own in (name.rpartition(".") for name in by_name[member.name])
            }
            for (key, own), module in owners.items():  # a module may have several names
                places.setdefault((key, own), (module, own, []))[2].append((number, member))
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
        gone = [_every_second(group) & (group.name in names) for group in target.groups]
        masked = masked_program(target.analysis, target.decision(gone))
        args, kwargs = target.program.call()
        with mock.patch.object(gates, "closed", gone):
            found, _ = called(masked, model, args, kwargs)
        return trouble_with(masked, found, args, kwargs)

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


def _every_second(group: Group) -> np.ndarray:
    return np.isin(np.arange(group.size), np.stack(by_block(group.block_of))[:, 1::2])


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
                blocks = sets.reshape(member.blocks, -1)
                laid = laid_by_block(blocks, member.dim, member.block_dim, weight.shape)
            self.register_buffer(f"sets_{index}", laid.to(weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        for index, number in enumerate(self._numbers):
            drawn: Tensor = self._gates[0].drawn(number).to(weight)
            weight = weight * torch.cat([drawn, drawn.new_ones(1)])[getattr(self, f"sets_{index}")]
        return weight
