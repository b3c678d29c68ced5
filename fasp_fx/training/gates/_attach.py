"""Put gates on a model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Unpack

from torch import nn
from torch.nn.utils import parametrize

from ...allocation._selection import is_excluded
from ...analysis.groups import Group, Member
from ...base._options import is_number
from ...base._tolerable import tolerable
from ...base._undisturbed import in_usual_modes, one_at_a_time
from ...capturing._captured import capture_whole
from ...errors import ArgumentError, NothingPrunableError, first_line
from ...pruning._prune import analyze
from ...pruning.config import PruningConfig, PruningOptions
from ._effect import check_effect
from ._gates import Gates
from ._kinds import HardConcrete, Kind
from ._scaled import Scaled
from ._threshold import Threshold

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
    coarse: bool = False,
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
        coarse: a gate besides for every group that may go as a whole (``include=("depth",)``, for attention
            with ``granularity=("channel", "head")``), by which all of its own are multiplied (CoFi, arXiv
            2204.00408, section 3.1): one number says whether a block is of use.

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
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
        raise ArgumentError(f"warmup={warmup!r} is not a number of steps")
    if not is_number(rate) or not math.isfinite(rate) or rate < 0:
        raise ArgumentError(f"rate={rate!r} is not a number from 0 on")
    if not isinstance(coarse, bool):
        raise ArgumentError(f"coarse={coarse!r} is neither True nor False")
    if kind is not None and not isinstance(kind, Kind):
        raise ArgumentError(
            f"kind={kind!r} is none of gates; make one, such as Projected() or HardConcrete()"
        )
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
    if coarse and all(group.needed for group in groups):
        raise ArgumentError(
            "coarse=True finds no group that may go as a whole; add 'depth' to include=, and for attention"
            " 'head' to granularity="
        )
    gates = Gates(
        model, captured.program, analysis, groups, asked, kind or HardConcrete(), warmup, rate, coarse
    )
    orders = [list(module._parameters) for module, _, _ in places]  # as they stand before any is replaced
    try:
        for (module, name, own), order in zip(places, orders, strict=True):
            _scale(module, name, Scaled(gates, own, getattr(module, name).device, holds=not gates.places))
            module.parametrizations.train(model.training)  # type: ignore[union-attr]
            gates.places.append((module, name, order))
        gates.watch()
        check_effect(gates, model, captured.program, analysis, groups)
        gates.draw()  # weights may be read before the first call
    except BaseException:
        gates.detach()
        raise
    return gates


def _scale(module: nn.Module, name: str, scaled: Scaled) -> None:
    try:
        parametrize.register_parametrization(module, name, scaled)
    except tolerable(ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"'{name}' of a {type(module).__name__} cannot be multiplied by gates: {first_line(error)}; use"
            " exclude="
        ) from error


def _asked(config: PruningConfig) -> PruningConfig:
    """What was asked for, if gates can say it.

    Raises:
        ArgumentError: an option has nothing to say here, or a closed gate would not be the channel's removal.
    """
    if others := config.beyond(_SAID):
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


__all__ = ["attach"]
