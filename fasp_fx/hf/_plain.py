"""Prune to what a model's own config can say, so that the result is an ordinary checkpoint."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..allocation import CostAllocation
from ..allocation._allocation import TrialAllocation
from ..analysis._analysis import Analysis
from ..analysis.groups import PRUNABLE
from ..base._device import device_of
from ..base._tolerable import tolerable
from ..base.compare import distance, tolerance
from ..calibration._calibration import calibration_calls, check_calibration
from ..calibration._ranks import ended_together
from ..calibration.losses import output_tensors
from ..errors import ArgumentError, CaptureError, VerificationError, first_line
from ..pruning._prune import prune
from ..pruning._result import Result
from ..pruning.config import PruningConfig, PruningOptions
from ..pruning.eager._copy import FusedWeights
from ..pruning.report import Report
from ._experiments import Assignment, Experiments, Path, quiet, written
from ._settings import CostSettings, Settings

#: tokens of an example where there is no calibration data to take one from
_EXAMPLE = (2, 8)


@dataclass(frozen=True)
class Plain:
    """What pruning to a config gives.

    Attributes:
        model: the smaller model, of the caller's class.
        result: the pruned program that it computes.
        report: that of the result, with what the config says and why groups were left whole.
    """

    model: PreTrainedModel
    result: Result
    report: Report


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
) -> Plain:
    """Prune a transformers model by what its config can say: the result is a smaller model of the same class.

    Which fields of the config shrink which groups is found by building the class at other sizes on the meta
    device. Groups that no field shrinks alone are left whole; the report says why. The result is compared
    with the pruned program before it is handed out.

    Args:
        model: a transformers model in evaluation mode; it is left as it was.
        calibration, device, progress, on_analysis, group, checkpoint: as for :func:`fasp_fx.prune`.
        config, options: as for :func:`fasp_fx.prune`, without ``include`` and ``exclude``, with one sparsity
            and no padding mask. An allocation sees one group for each field. ``granularity=("channel",)``:
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
    mask = example.get("attention_mask")
    masked = isinstance(mask, Tensor) and mask.dim() == 2
    try:
        result = prune(
            model,
            (),
            example,
            calibration=calibration,
            config=replace(own, padding_mask="attention_mask" if masked else None),
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
    weights = smaller_weights(model, result)
    smaller, assignment = _first_equal(model, experiments, settings, weights, result, example)
    # The settings are no allocation of the caller's.
    report = replace(_explained(result.report, experiments, settings, assignment), config=asked)
    return Plain(smaller, result, report)


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
    vain = [name for name in ("include", "exclude", "padding_mask") if getattr(asked, name)]
    for applies, message in (
        (
            vain,
            f"{vain[0] if vain else ''}= cannot be had in a plain checkpoint: its config does not say it;",
        ),
        (
            asked.budgets,
            f"budget={asked.budget!r} cannot be kept by a plain checkpoint, whose steps are coarse; give"
            " sparsity=, or",
        ),
        (
            isinstance(asked.sparsity, Mapping),
            "a plain checkpoint has one sparsity: its config does not say which layers lose more;",
        ),
        (
            isinstance(asked.allocator, TrialAllocation),
            f"allocation={asked.allocation!r}: a search needs a model that is captured whole and groups that"
            " go one by one, which the fields of a config do not; use 'global', or",
        ),
        (
            not isinstance(model, PreTrainedModel),
            f"a plain checkpoint is made of a transformers model, not of a {type(model).__name__};",
        ),
    ):
        if applies:
            raise ArgumentError(f"{message} prune it without plain")
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


def _first_equal(
    model: PreTrainedModel,
    experiments: Experiments,
    settings: Settings,
    weights: dict[str, Tensor],
    result: Result,
    example: Mapping[str, Any],
) -> tuple[PreTrainedModel, Assignment]:
    """The first model that a config can build of the weights and that computes what the program computes."""
    inputs = _compared_on(model, example, device_of(result.module))
    expected = _outputs(result.module, inputs)
    most = max((tolerance("checkpoint", output.dtype) for output in expected), default=0.0)
    failures = []
    for assignment in settings.assignments():
        try:
            smaller = _built(model, experiments, assignment, weights)
            deviation = _deviation(_outputs(smaller, inputs), expected)
        except _NotBuiltError as error:
            fault = str(error)
        except tolerable(Exception) as error:  # some kernels take widths of whole 16 bytes alone
            fault = (
                f"it does not run: {first_line(error)}; widths that are multiples of 8 or 16 (round_to=) may"
                " be served"
            )
        else:
            if deviation <= most:
                made: Any = smaller
                return made.to(device_of(model)), assignment
            fault = f"its outputs differ by {deviation:.1e}"
        failures.append(f"{_said(assignment)}: {fault}")
    raise VerificationError(
        f"{type(model).__name__} built from a smaller config is not the pruned program"
        f" ({'; '.join(failures)}); nothing is returned; prune it without plain"
    )


class _NotBuiltError(Exception):
    """No model of the caller's class can be made; says why."""


def _built(
    model: PreTrainedModel, experiments: Experiments, assignment: Assignment, weights: dict[str, Tensor]
) -> PreTrainedModel:
    """A model of the caller's class with a smaller config and the smaller weights."""
    config: PreTrainedConfig = type(model.config).from_dict(experiments.without_idle_pins(assignment))
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
        raise _NotBuiltError(f"its weights cannot be loaded: {first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise _NotBuiltError(f"{problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[0]}")
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    made.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return made.eval().to(next(iter(weights.values())).device)


def _compared_on(model: PreTrainedModel, example: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The example with random tokens in place of its own: zeros, say, would look alike wherever
    they stand.
    """
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in example.items()
    }
    ids, table = moved.get("input_ids"), model.get_input_embeddings()
    if isinstance(ids, Tensor) and isinstance(table, nn.Embedding):
        generator = torch.Generator(device="cpu").manual_seed(0)
        drawn = torch.randint(0, table.num_embeddings, tuple(ids.shape), generator=generator, device="cpu")
        moved["input_ids"] = drawn.to(ids)
    return moved


def _outputs(module: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The floating-point outputs of a call."""
    with torch.no_grad():
        return [leaf for leaf in output_tensors(module(**inputs)) if leaf.is_floating_point()]


def _deviation(found: list[Tensor], expected: list[Tensor]) -> float:
    """‖a − b‖ / ‖b‖ of the output where it is largest; infinite where outputs cannot be compared."""
    if not expected or [output.shape for output in found] != [output.shape for output in expected]:
        return math.inf
    return max(distance(a, b) for a, b in zip(found, expected, strict=True))


def _explained(
    report: Report, experiments: Experiments, settings: Settings, assignment: Assignment
) -> Report:
    """The report with what the config says now, and why groups were left whole."""
    unsaid = settings.inexpressible
    lines = tuple(
        replace(line, reason=f"left whole: {unsaid[line.name]}")
        if line.status == PRUNABLE and line.name in unsaid
        else line
        for line in report.lines
    )
    note = f"the config says it with {_said(assignment, experiments.numbers())}"
    return replace(report, lines=lines, notes=(note, *report.notes))


def _said(assignment: Assignment, before: Mapping[Path, int] | None = None) -> str:
    """``intermediate_size 1536 -> 1126``, for each field."""
    was = {path: f" {before[path]} ->" if before and path in before else " =" for path in assignment}
    return ", ".join(f"{written(path)}{was[path]} {value}" for path, value in assignment.items())


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
    fused = FusedWeights(result.plan)
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in pruned and name not in folded:
            found[name] = pruned[name].detach()
        elif name in fused:
            found[name] = fused.joined(name, pruned)
        else:
            found[name] = tensor.detach().clone()
    return found
