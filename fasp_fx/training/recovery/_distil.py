"""Distillation: the front door."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast

import torch
from torch import nn

from ...analysis import plan as plans
from ...base._device import device_of, multiplies_bfloat16, products_in_bfloat16
from ...base._identity import identity_of
from ...base._options import check_callable, path_of
from ...base._tolerable import tolerable
from ...base._undisturbed import drawing_alike, in_usual_modes
from ...calibration.observe._calibration import as_calls
from ...capturing import in_training
from ...capturing._attention import ToldOfCausality
from ...errors import ArgumentError, CalibrationError, first_line
from ...pruning._result import Result
from ...pruning.report import Recovery
from ._checkpoint import Checkpoint
from ._config import DistillationConfig, DistillationOptions
from ._dense import Call, DenseOutputs
from ._hidden import Hidden
from ._matching import Divergence, Match, SquaredError
from ._memory import check_memory, kept_bytes, told_of_memory
from ._trained import Trained, trained_part
from ._training import Batches, Training

if TYPE_CHECKING:
    from ...hf import Pruned

R = TypeVar("R", bound="Result | Pruned")

#: the part of the progress shown that running the dense model takes, for each time that a batch is trained on
_DENSE = 0.33
_CRITERIA = {
    Divergence: "Kullback-Leibler divergence from the dense model",
    SquaredError: "relative squared error of the outputs",
}


@in_usual_modes
def distil(
    result: R,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    config: DistillationConfig | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[float], None] | None = None,
    **options: Unpack[DistillationOptions],
) -> R:
    """Train a pruned model towards the outputs of the dense one (Hinton et al., 2015, arXiv 1503.02531), and
    keep what does best on held-out batches.

    The module of the result is trained where it is, and on its device; its weights are at the end those that
    did best, which are the ones it came with if training brings nothing. An error or an interruption leaves
    the best so far; with ``checkpoint=`` the weights that it came with, so that the same call goes on. What
    its parameters hold in ``.grad`` does not enter, and is there again afterwards. No labels are needed.

    Args:
        result: what :func:`fasp_fx.prune`, :func:`fasp_fx.apply`, :func:`fasp_fx.load` or
            :func:`fasp_fx.hf.prune` returned.
        dense: the model that was pruned, in evaluation mode. It runs once over the data.
        data: an iterable of batches, as for ``calibration=`` there. All are held in memory; what the dense
            model returns for them is kept on disk.
        config: the options; ``None``: the defaults.
        checkpoint: a folder for the state of the training, written after each evaluation; the same call with
            the same folder goes on from there, to the same end. ``None``: nothing is kept.
        progress: called with the fraction done.
        options: fields of :class:`fasp_fx.recovery.DistillationConfig` (``epochs=2``, ``learning_rate=3e-5``,
            …) in the place of those of ``config``.

    Returns:
        The result with ``report.recovery`` filled: the curve of the held-out loss, and the step whose weights
            were kept.

    Raises:
        ArgumentError: an option is not known or out of range, ``dense`` is not the model that was pruned, or
            one of the two models is in training mode.
        CalibrationError: the data is no iterable of batches, the dense model does not take one of them, or
            nothing of one counts, such as where its mask hides all tokens.
        TrainingMemoryError: training takes more memory than is free; says what would fit.
        StoreError: the checkpoint is that of another run, or cannot be written.
    """
    asked = DistillationConfig.of(config, options)
    check_callable(progress=progress)
    pruned, more = _called(result)
    _check_dense(dense, result)
    if _has_modes(result):
        _check_mode("the module of the result", pruned)
    folder = None if checkpoint is None else path_of(checkpoint, "checkpoint").absolute()
    calls = [Call(args, {**kwargs, **more}) for args, kwargs in as_calls(data, "data")]
    batches = Batches.split(len(calls), asked.held_out)
    match = _match(asked, result)
    trained = trained_part(pruned, asked.train, asked.rank, asked.seed)
    trained.hidden = Hidden.of(tuple(asked.hidden), asked.hidden_weight, dense, pruned)
    if asked.precision == "auto":
        asked = replace(asked, precision="bfloat16" if multiplies_bfloat16(device_of(pruned)) else "weights")
    advance = progress or (lambda fraction: None)
    share = _DENSE / (_DENSE + asked.epochs)
    from accelerate import Accelerator, DistributedDataParallelKwargs

    accelerator = Accelerator(
        device_placement=False, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
    )
    with (
        told_of_memory(),
        tempfile.TemporaryDirectory(prefix="fasp_fx-", ignore_cleanup_errors=True) as temporary,
    ):
        largest = max(batches.training, key=lambda index: calls[index].numbers())
        _rehearse(trained, calls[largest], largest, asked, device_of(pruned))
        kept = None
        if folder is not None:
            with accelerator.main_process_first():
                kept = Checkpoint(folder, _run(asked, match, result, pruned, [*trained.leaves], calls))
        outputs = DenseOutputs(kept.targets if kept is not None else Path(temporary))
        with accelerator.main_process_first() if kept is not None else contextlib.nullcontext():
            coarse = batches.training if asked.precision == "bfloat16" else ()
            outputs.write(
                dense, calls, match, trained.hidden, coarse, lambda fraction: advance(share * fraction)
            )
        training = Training(trained, calls, batches, outputs, match, asked, accelerator, kept)
        outcome = training.run(lambda fraction: advance(share + (1 - share) * fraction))
    notes = () if outcome.note is None else (outcome.note,)
    recovery = Recovery(
        "distillation",
        _CRITERIA.get(type(match), type(match).__name__),
        outcome.steps,
        outcome.kept,
        outcome.curve,
        outcome.seconds,
        notes,
    )
    return cast(R, result.with_report(recovery=recovery))


def _rehearse(
    trained: Trained, call: Call, index: int, config: DistillationConfig, device: torch.device
) -> None:
    """Call the pruned model with its largest batch: what does it write into, and what is kept of it?

    Raises:
        CalibrationError: it does not take the batch.
        TrainingMemoryError: that is too much.
    """
    own = call.to(device).copied()
    coarse = products_in_bfloat16(device, config.precision == "bfloat16")
    with trained.alone(), drawing_alike(trained.parameters()), coarse, ToldOfCausality():
        try:
            trained.find_written(own.args, own.kwargs)
            kept = kept_bytes(lambda: trained(*own.args, **own.kwargs), trained)
        except tolerable(Exception) as error:  # a model raises what it likes
            raise CalibrationError(
                f"the pruned model does not take batch {index}: {type(error).__name__}: {first_line(error)}"
            ) from error
    if trained.hidden is not None:
        trained.take_readings()
    check_memory(trained, config, device, kept)


def _called(result: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The pruned module, and what every call of it and of the dense one is given besides."""
    if isinstance(result, Result):
        return result.module, {}
    from ...hf import Pruned

    if isinstance(result, Pruned):
        return result.model, {"use_cache": False}
    raise ArgumentError(
        f"result is a {type(result).__name__}; pass what fasp_fx.prune, apply, load or hf.prune returned"
    )


def _check_dense(dense: Any, result: Result | Pruned) -> None:
    """Refuse a teacher that is not the model that was pruned."""
    if not isinstance(dense, nn.Module):
        raise ArgumentError(f"dense is a {type(dense).__name__}; pass the module that was pruned")
    _check_mode("dense", dense)
    found = plans.fingerprint(dict(dense.named_parameters(remove_duplicate=False)))
    if found != result.plan.fingerprint:
        raise ArgumentError(
            f"dense is not the model that was pruned: its fingerprint is {found[:12]}…, that of the plan"
            f" {result.plan.fingerprint[:12]}…; pass the model as it was given to prune"
        )
    plans.check_fixed(result.plan, dense)


def _has_modes(result: Result | Pruned) -> bool:
    """Whether a result's module can be in training mode; captured programs cannot, which
    :func:`fasp_fx.capturing.in_training` knows of those of :func:`fasp_fx.prune`.
    """
    if isinstance(result, Result):
        return True
    from ...hf._model import PrunedModel

    return not isinstance(result.model, PrunedModel)


def _check_mode(what: str, model: nn.Module) -> None:
    """Refuse a model whose dropouts are at random: what is taught and judged would be, too."""
    training = next(in_training(model), None)
    if training is not None:
        part = f"'{training}' of {what}" if training else what
        raise ArgumentError(
            f"{part} is in training mode, where dropout is at random; call eval() on it first"
        )


def _match(config: DistillationConfig, result: Any) -> Match:
    if not isinstance(config.loss, str):
        return config.loss
    if config.loss == "auto":
        predicts = not isinstance(result, Result) or (
            result.config is not None and result.config.loss == "next-token"
        )
        return Divergence(config.top_k) if predicts else SquaredError()
    return Divergence(config.top_k) if config.loss == "divergence" else SquaredError()


def _run(
    config: DistillationConfig,
    match: Match,
    result: Result | Pruned,
    pruned: nn.Module,
    trained: list[str],
    calls: list[Call],
) -> dict[str, Any]:
    """What two runs have in common that give the same result.

    Args:
        match: the loss that the options ask for.
        trained: the names of what the optimiser changes, in its order.

    Raises:
        ArgumentError: the loss or a batch holds something that does not tell it from others.
    """
    data = hashlib.sha256()
    for index, call in enumerate(calls):
        data.update(identity_of([call.args, call.kwargs], f"batch {index} of data", "checkpoint=").encode())
    return {
        "options": {**json.loads(config.to_json()), "loss": identity_of(match, "loss", "checkpoint=")},
        "dense": [result.plan.fingerprint, *(buffer.digest for buffer in result.plan.fixed)],
        "pruned": plans.fingerprint(dict(pruned.named_parameters(remove_duplicate=False))),
        "trained parameters": trained,
        "data": data.hexdigest(),
    }


__all__ = ["distil"]
