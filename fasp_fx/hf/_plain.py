"""Prune to what a model's own config can say, so that the result is an ordinary checkpoint."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..allocation import Allocation, Budget, CostAllocation, Target, lost_per_block, uniform, validate
from ..allocation._allocation import TrialAllocation
from ..allocation._limits import joined
from ..allocation.costs import Costs
from ..analysis._analysis import Analysis
from ..analysis.groups import PRUNABLE
from ..analysis.plan import PruningPlan
from ..analysis.resources import most_lost
from ..base._device import device_of
from ..base._tolerable import tolerable
from ..base.compare import distance, tolerance
from ..calibration._calibration import calibration_calls, check_calibration
from ..calibration._ranks import ended_together
from ..calibration.losses import output_tensors
from ..errors import (
    ArgumentError,
    CaptureError,
    NothingPrunableError,
    SparsityError,
    VerificationError,
    first_line,
)
from ..pruning._prune import prune
from ..pruning._result import Result
from ..pruning.config import PruningConfig, PruningOptions
from ..pruning.eager import fused_weights
from ..pruning.report import Report
from ..pruning.submodules._parts import Joined
from ._experiments import Assignment, Experiments, Knob, Path, find_knobs, quiet, written

#: tokens of an example where there is no calibration data to take one from
_EXAMPLE = (2, 8)
_NEGLIGIBLE = 1e-12


@ended_together
def prune_plain(
    model: nn.Module,
    *,
    calibration: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    group: dist.ProcessGroup | None = None,
    checkpoint: str | pathlib.Path | None = None,
    **options: Unpack[PruningOptions],
) -> tuple[PreTrainedModel, PruningPlan, Report]:
    """Prune a transformers model by what its config can say: the result is a smaller model of the same class,
    with the plan and the report.

    Which fields of the config shrink which groups is found by building the class at other sizes on the meta
    device. Groups that no field shrinks alone are left whole; the report says why. The result is compared
    with the pruned program before it is handed out.

    Args:
        model: a transformers model in evaluation mode; it is left as it was.
        calibration, device, progress, on_analysis, group, checkpoint: as for :func:`fasp_fx.prune`.
        config, options: as for :func:`fasp_fx.prune`, without ``include`` and ``exclude``, with one
            sparsity. An allocation sees one group for each field. ``granularity=("channel",)``:
            neurons only; ``("channel", "head")``: whole heads lose the same fraction, to the nearest head,
            and neurons carry the rest; ``("head",)``: heads only; not given: neurons, and as few heads as it
            takes where neurons alone cannot reach the
            sparsity. ``round_to`` is for channels; whole heads are not rounded.

    Raises:
        ArgumentError: the model is not one of transformers', or its config does not describe it or what the
            options ask for.
        NothingPrunableError: its config can say nothing; the message says what stands in the way.
        SparsityError: its config cannot say enough; the message says how much it can.
        VerificationError: no model built from the smaller config computes what the pruned program computes.
        CalibrationError, CaptureError: as for :func:`fasp_fx.prune`.
    """
    asked = PruningConfig.of(config, options)
    experiments, settings, own = plain_config(model, asked, config is not None or "granularity" in options)
    assert isinstance(model, PreTrainedModel)
    if asked.needs_data:
        check_calibration(calibration)
    calibration, example = _batches(model, calibration)
    try:
        result = prune(
            model,
            (),
            example,
            calibration=calibration,
            config=own,
            device=device,
            progress=progress,
            on_analysis=on_analysis,
            group=group,
            checkpoint=checkpoint,
        )
    except ArgumentError as error:
        if isinstance(error.__cause__, CaptureError):
            # The option that stands in the way of pruning by submodules is none of the caller's.
            raise error.__cause__ from None
        raise
    smaller = _built(model, experiments, settings.assignment, smaller_weights(model, result))
    _check_equal(smaller, model, result, example)
    lines = tuple(
        replace(line, reason=f"left whole: {settings.whole[line.name]}")
        if line.status == PRUNABLE and line.name in settings.whole
        else line
        for line in result.report.lines
    )
    said = (
        f"{written(path)} {experiments.values.get(path)} -> {value}"
        for path, value in settings.assignment.items()
        if value != experiments.values.get(path)
    )
    note = f"the config says it with {', '.join(said)}"
    # The settings are no allocation of the caller's.
    report = replace(result.report, lines=lines, notes=(note, *result.report.notes), config=asked)
    made: Any = smaller
    return made.to(device_of(model)), result.plan, report


def plain_config(
    model: nn.Module, asked: PruningConfig, heads_asked: bool
) -> tuple[Experiments, Settings, PruningConfig]:
    """The configuration with which a model is pruned to a plain checkpoint.

    Args:
        asked: what the caller asks for.
        heads_asked: whether that says of heads what is to become of them; if not, they go where neurons alone
            cannot reach the sparsity.

    Returns:
        What builds the model's class at other sizes, the allocation, and the configuration that has it.

    Raises:
        ArgumentError: see :func:`prune_plain`.
    """
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(
            f"a plain checkpoint is made of a transformers model, not of a {type(model).__name__}"
        )
    vain = [name for name in ("include", "exclude", "budget") if getattr(asked, name)]
    vain += ["sparsity by pattern"] * isinstance(asked.sparsity, Mapping)
    vain += ["allocation by trial"] * isinstance(asked.allocator, TrialAllocation)
    if vain:
        raise ArgumentError(
            f"{vain[0]}= cannot be had in a plain checkpoint, whose config says one width for many layers;"
            " leave it out, or prune without plain"
        )
    experiments = Experiments(model)
    kind = CostSettings if isinstance(asked.allocator, CostAllocation) else Settings
    settings = kind(experiments, heads_asked, asked.allocator)
    own = replace(
        asked,
        allocation=settings,
        uniform_layers=False,  # one number for all layers is what a config says by itself
        loss="next-token" if asked.loss == "auto" and cast(Any, model).can_generate() else asked.loss,
        granularity=asked.granularity if heads_asked else ("channel", "head"),
    )
    return experiments, settings, own


class _Settled(Budget):
    """A budget for one group of each field that may be turned, where the other groups have lost what they
    will.

    Args:
        whole: the budget of all groups.
        places: as for :meth:`fasp_fx.allocation.Budget.narrowed`.
        settled: channel sets per block that each of the other groups loses.
    """

    def __init__(self, whole: Budget, places: Sequence[int | None], settled: Sequence[int]) -> None:
        super().__init__(whole.narrowed(places).groups, whole.limits, whole, places)
        self._settled = settled

    def spread(self, lost: Sequence[int], whole: Budget | None = None) -> list[int]:
        if self is whole:
            return list(lost)
        return [own + more for own, more in zip(super().spread(lost, whole), self._settled, strict=True)]

    def reach(self, round_to: int) -> tuple[float, float]:
        """The least and the largest sparsity that is left to choose from."""
        deepest = [most_lost(group, round_to) for group in self.groups]
        return self.removed([0] * len(deepest))[0], self.removed(deepest)[0]

    def joined(self, costs: Costs) -> Costs:
        """Cost curves of all groups that a field shrinks as one, by the name of the first."""
        assert self._whole is not None
        taking = [pair for pair in zip(self._whole.groups, self._places, strict=True) if pair[1] is not None]
        return joined(costs, [group for group, _ in taking], [place or 0 for _, place in taking], False)


class Settings:
    """An allocation (see :data:`fasp_fx.allocation.Allocation`) that stays within what a config can say.

    Neurons and other channels carry the sparsity. Whole heads are coarse: they go when they are asked for, or
    when the sparsity is out of reach without.

    Args:
        experiments: builds the model's class.
        heads_asked: whether whole heads shall go like all else, rather than only where nothing else is left.
        allocate: how the channels share what is to go; it sees one group for each field.

    Attributes:
        whole: for each group that no field can shrink alone, why; known once the allocation was made.
        assignment: the values of the config's fields that say what was allocated; likewise.
    """

    def __init__(self, experiments: Experiments, heads_asked: bool, allocate: Allocation = uniform) -> None:
        self.experiments, self.heads_asked, self.allocate = experiments, heads_asked, allocate
        self.whole: dict[str, str] = {}
        self.assignment: dict[Path, Any] = {}

    def __call__(self, budget: Budget, round_to: int, costs: Costs | None = None) -> list[int]:
        """Channel sets lost per block of each group.

        Raises:
            NothingPrunableError: the config can say nothing.
            SparsityError: it cannot say enough, or its smallest step is too large.
        """
        knobs, free = self._planned(budget, round_to)
        allocate: Any = self.allocate
        given = () if costs is None else (free.joined(costs),)
        lost = validate(allocate(free, round_to, *given), free) if free.groups else []
        found = free.spread(lost, budget)
        by_name = {group.name: count for group, count in zip(budget.groups, found, strict=True)}
        turned = [(knob, steps) for knob in knobs if (steps := by_name[min(knob.groups)])]
        if not turned:
            raise SparsityError(
                f"the sparsity is less than half a step of what {self.experiments.name} can say; ask for more"
            )
        self.assignment = {
            path: value for knob, steps in turned for path, value in knob.lowered(steps).items()
        }
        return found

    def _planned(self, budget: Budget, round_to: int) -> tuple[list[Knob], _Settled]:
        """What can be turned, and the budget of channels once it is settled how many heads go; errors as for
        a call.
        """
        (limit,) = budget.limits
        assert isinstance(limit, Target)  # other budgets are refused before
        if isinstance(limit.resource, Joined):
            raise CaptureError(
                "the model cannot be captured as a whole, which a plain checkpoint needs; prune it without"
                " plain"
            )
        knobs, self.whole = find_knobs(self.experiments, budget.groups)
        if not knobs:
            raise NothingPrunableError("; ".join(dict.fromkeys(self.whole.values())))
        return knobs, self._with_heads(budget, knobs, limit.sparsity, round_to)

    def _with_heads(self, budget: Budget, knobs: Sequence[Knob], sparsity: float, round_to: int) -> _Settled:
        """The budget of channels with the heads that go settled, from none to all but one; a field of fewer
        steps waits until its next is reached.
        """
        heads = {name: knob for knob in knobs if knob.is_coarse for name in knob.groups}
        channels = [knob for knob in knobs if not knob.is_coarse]
        number = {name: place for place, knob in enumerate(channels) for name in knob.groups}
        places = [number.get(group.name) for group in budget.groups]
        levels = []  # fraction of heads, the budget of channels then, and the sparsities in reach
        for fraction in sorted({0.0, *(steps / own.width for own in heads.values() for steps in own.steps)}):
            gone = {name: knob.reached(fraction) for name, knob in heads.items()}
            free = _Settled(budget, places, [gone.get(group.name, 0) for group in budget.groups])
            levels.append((fraction, free, *free.reach(round_to)))
        most = max(high for *_, high in levels)
        if sparsity > most + _NEGLIGIBLE:
            raise SparsityError(
                f"sparsity={sparsity:.4g} is out of reach: {self.experiments.name} can say at most"
                f" {math.floor(most * 1e4) / 1e4:.4f}"
                + (f" with round_to={round_to}" if round_to > 1 else "")
                + "; ask for less, or prune without plain"
            )
        fitting = [level for level in levels if level[2] <= sparsity <= level[3] + _NEGLIGIBLE]
        if not channels or not fitting:  # between what two numbers of heads can give
            return min(levels, key=lambda level: min(abs(bound - sparsity) for bound in level[2:]))[1]
        if not self.heads_asked:
            return fitting[0][1]

        def off(level: tuple[float, _Settled, float, float]) -> float:
            """How far off the sparsity is when channels lose the same fraction as heads."""
            fraction, free, *_ = level
            lost = [lost_per_block(group.width, fraction, round_to) for group in free.groups]
            return abs(free.removed(lost)[0] - sparsity)

        return min(fitting, key=off)[1]


class CostSettings(Settings, CostAllocation):
    """Settings whose channels are shared out by what they cost."""

    def check(self, budget: Budget, round_to: int) -> None:
        """Refuse what the config cannot say; errors as for a call."""
        self._planned(budget, round_to)


def _batches(
    model: PreTrainedModel, calibration: Iterable[Any] | None
) -> tuple[Iterable[Any] | None, dict[str, Any]]:
    """The calibration data, and keyword arguments like its first batch to capture with, without a cache.

    Batches of a decoder get the positions that ``generate`` gives its tokens, which are counted from the
    first one that the mask shows.
    """
    encodes = model.config.is_encoder_decoder
    if calibration is None:
        tokens = torch.zeros(_EXAMPLE, dtype=torch.long, device=device_of(model))
        decoded = {"decoder_input_ids": tokens} if encodes else {}
        return None, {"input_ids": tokens, **decoded, "use_cache": False}
    check_calibration(calibration)
    batches = iter(calibration)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    if takes and model.can_generate() and not encodes:
        batches = map(_with_positions, batches)
    first = list(itertools.islice(batches, 1))
    args, kwargs = next(calibration_calls(first))
    if len(args) > 1:
        raise ArgumentError(
            "a calibration batch for a plain checkpoint is a tensor of tokens or a dict of keyword arguments,"
            " not a tuple"
        )
    named = {"input_ids": args[0]} if args else kwargs
    return itertools.chain(first, batches), {**named, "use_cache": False}


def _with_positions(batch: Any) -> Any:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or batch.get("position_ids") is not None:
        return batch
    return {**batch, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}


def _built(
    model: PreTrainedModel, experiments: Experiments, assignment: Assignment, weights: dict[str, Tensor]
) -> PreTrainedModel:
    """A model of the caller's class with a smaller config and the smaller weights.

    Raises:
        VerificationError: the class does not take them.
    """
    config = experiments.config(assignment)
    config._name_or_path = ""
    if hasattr(config, "quantization_config"):
        # Of the file that the model came from: what is pruned are the weights it was expanded to.
        del config.quantization_config
    attention = getattr(model.config, "_attn_implementation", None)
    options = {} if attention is None else {"attn_implementation": attention}
    options |= {"config": config, "state_dict": dict(weights), "dtype": model.dtype}
    kind: Any = type(model)
    try:
        with quiet():
            made, info = kind.from_pretrained(None, output_loading_info=True, **options)
    except tolerable(Exception) as error:
        raise _other(kind, f"its weights cannot be loaded: {first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise _other(kind, f"{problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[0]}")
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    made.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return made.eval().to(next(iter(weights.values())).device)


def _other(kind: type, fault: str) -> VerificationError:
    return VerificationError(
        f"{kind.__name__} built from the smaller config is not the pruned program: {fault}; nothing is"
        " returned; prune it without plain"
    )


def _check_equal(
    smaller: PreTrainedModel, model: PreTrainedModel, result: Result, example: Mapping[str, Any]
) -> None:
    """Hold a model that was built from a config against the program that it ought to compute, on random
    tokens: zeros, say, would look alike wherever they stand.

    Raises:
        VerificationError: they differ, or it does not run.
    """
    device, table = device_of(result.module), model.get_input_embeddings()
    given = {name: own.to(device) if isinstance(own, Tensor) else own for name, own in example.items()}
    if isinstance(given.get("input_ids"), Tensor) and isinstance(table, nn.Embedding):
        generator = torch.Generator(device="cpu").manual_seed(0)
        shape = tuple(given["input_ids"].shape)
        drawn = torch.randint(0, table.num_embeddings, shape, generator=generator, device="cpu")
        given["input_ids"] = drawn.to(given["input_ids"])
    expected = _outputs(result.module, given)
    try:
        found = _outputs(smaller, given)
    except tolerable(Exception) as error:  # some kernels take widths of whole 16 bytes alone
        raise _other(
            type(model),
            f"it does not run: {first_line(error)}; widths that are multiples of 8 or 16 (round_to=) may be"
            " served",
        ) from error
    if not expected or [output.shape for output in found] != [output.shape for output in expected]:
        raise _other(type(model), "its outputs are others")
    deviation = max(distance(own, other) for own, other in zip(found, expected, strict=True))
    if not deviation <= max(tolerance("checkpoint", output.dtype) for output in expected):
        raise _other(type(model), f"its outputs differ by {deviation:.1e}")


def _outputs(module: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The floating-point outputs of a call."""
    with torch.no_grad():
        return [leaf for leaf in output_tensors(module(**inputs)) if leaf.is_floating_point()]


def smaller_weights(model: nn.Module, result: Result) -> dict[str, Tensor]:
    """The smaller parameters of ``model`` and its persistent buffers, under all their names; none shares
    storage with ``model``.

    A fused weight that the program holds in parts is put together again. A parameter that the program does
    not use is as it was.

    Raises:
        ArgumentError: the program lost rows or columns of a weight that the model computes from others.
    """
    folded = {weight.name: weight for weight in result.plan.folds}
    lost = next((folded[name] for name, _ in result.plan.slices() if name in folded), None)
    if lost is not None:
        raise ArgumentError(
            f"the model computes {lost} in every call, so that no checkpoint of its class can hold it"
            " smaller; prune it without plain"
        )
    pruned = dict(result.module.named_parameters(remove_duplicate=False))
    fused = fused_weights(result.plan, pruned)
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in pruned and name not in folded:
            found[name] = pruned[name].detach()
        elif name in fused:
            found[name] = fused[name]
        else:
            found[name] = tensor.detach().clone()
    return found
