"""Distillation: the front door."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast

from torch import nn

from ...analysis import plan as plans
from ...base._device import device_of, multiplies_bfloat16
from ...base._options import check_callable, path_of
from ...base._tensors import digest_of
from ...base._tolerable import short_of_memory
from ...base._undisturbed import in_usual_modes
from ...base.compat import pytree
from ...calibration._calibration import as_calls
from ...capturing import in_training
from ...errors import ArgumentError, TrainingMemoryError, first_line
from ...pruning._result import Result
from ...pruning.report import Recovery
from ._config import DistillationConfig, DistillationOptions, Divergence, Match, SquaredError
from ._training import Checkpoint, Lessons, Trained, Training, split

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

    The module of the result is trained on its device; its weights are at the end those that did best, which
    are the ones it came with if training brings nothing. An error or an interruption leaves the best so far;
    with ``checkpoint=`` the weights that it came with, so that the same call goes on. No labels are needed.

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
        TrainingMemoryError: the memory does not hold the training.
        StoreError: the checkpoint is that of another run, or cannot be written.
    """
    asked = DistillationConfig.of(config, options)
    check_callable(progress=progress)
    pruned, more, modal = _called(result)
    _check(dense, result, {"dense": dense} | ({"the module of the result": pruned} if modal else {}))
    folder = None if checkpoint is None else path_of(checkpoint, "checkpoint").absolute()
    calls = [(args, kwargs | more) for args, kwargs in as_calls(data, "data")]
    training, held_out = split(len(calls), asked.held_out)
    match = _match(asked, result)
    if asked.precision == "auto":
        asked = replace(asked, precision="bfloat16" if multiplies_bfloat16(device_of(pruned)) else "weights")
    advance = progress or (lambda fraction: None)
    share = _DENSE / (_DENSE + asked.epochs)
    from accelerate import Accelerator

    accelerator = Accelerator(device_placement=False)
    try:
        with tempfile.TemporaryDirectory(prefix="fasp_fx-", ignore_cleanup_errors=True) as temporary:
            trained = Trained(pruned, asked.train, asked.rank, asked.seed)
            kept, lessons = None, Lessons(Path(temporary), calls, match)
            with contextlib.nullcontext() if folder is None else accelerator.main_process_first():
                if folder is not None:
                    kept = Checkpoint(folder, _run(asked, result, pruned, [*trained.leaves], calls))
                    lessons = replace(lessons, folder=kept.targets)
                coarse = training if asked.precision == "bfloat16" else ()
                lessons.write(dense, coarse, lambda fraction: advance(share * fraction))
            state, note = Training(trained, lessons, training, held_out, asked, accelerator, kept).run(
                lambda fraction: advance(share + (1 - share) * fraction)
            )
    except short_of_memory() as error:
        raise TrainingMemoryError(
            f"the memory is too little for the dense model and the training of the pruned one:"
            f" {first_line(error)}; give smaller batches with accumulate=, or train='low-rank'"
        ) from error
    recovery = Recovery(
        "distillation",
        _CRITERIA.get(type(match), type(match).__name__),
        state.step,
        min(state.curve, key=lambda point: point.held_out).step,
        tuple(state.curve),
        state.seconds,
        () if note is None else (note,),
    )
    return cast(R, result.with_report(recovery=recovery))


def _called(result: Any) -> tuple[nn.Module, dict[str, Any], bool]:
    """The pruned module, what every call of it and of the dense one is given besides, and whether it can be
    in training mode, as captured programs cannot.
    """
    if isinstance(result, Result):
        return result.module, {}, True
    from ...hf import Pruned
    from ...hf._model import PrunedModel

    if isinstance(result, Pruned):
        return result.model, {"use_cache": False}, not isinstance(result.model, PrunedModel)
    raise ArgumentError(
        f"result is a {type(result).__name__}; pass what fasp_fx.prune, apply, load or hf.prune returned"
    )


def _check(dense: Any, result: Result | Pruned, modal: dict[str, Any]) -> None:
    """Refuse a teacher that is not the model that was pruned, and models whose dropouts are at random: what
    is taught and judged would be, too.

    Args:
        modal: models that can be in training mode, by what they are called.
    """
    if not isinstance(dense, nn.Module):
        raise ArgumentError(f"dense is a {type(dense).__name__}; pass the module that was pruned")
    for what, model in modal.items():
        for path in in_training(model):
            part = f"'{path}' of {what}" if path else what
            raise ArgumentError(
                f"{part} is in training mode, where dropout is at random; call eval() on it first"
            )
    found = plans.fingerprint(dict(dense.named_parameters(remove_duplicate=False)))
    if found != result.plan.fingerprint:
        raise ArgumentError(
            f"dense is not the model that was pruned: its fingerprint is {found[:12]}…, that of the plan"
            f" {result.plan.fingerprint[:12]}…; pass the model as it was given to prune"
        )
    plans.check_fixed(result.plan, dense)


def _match(config: DistillationConfig, result: Any) -> Match:
    if not isinstance(config.loss, str):
        return config.loss
    predicts = config.loss == "divergence" or (
        config.loss == "auto"
        and not (isinstance(result, Result) and getattr(result.config, "loss", None) != "next-token")
    )
    return Divergence(config.top_k) if predicts else SquaredError()


def _run(
    config: DistillationConfig,
    result: Result | Pruned,
    pruned: nn.Module,
    trained: list[str],
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> dict[str, Any]:
    """What two runs have in common that give the same result.

    Args:
        trained: the names of what the optimiser changes, in its order.

    Raises:
        ArgumentError: nothing tells the loss from others.
    """
    if not isinstance(config.loss, str) and config.key is None:
        raise ArgumentError(
            "checkpoint= goes on with the same loss alone, and this one is of your own; say which it is by"
            " a text, key="
        )
    given = map(pytree.tree_flatten, calls)
    return {
        "options": json.loads(config.to_json()),
        "dense": [result.plan.fingerprint, *(buffer.digest for buffer in result.plan.fixed)],
        "pruned": plans.fingerprint(dict(pruned.named_parameters(remove_duplicate=False))),
        "trained parameters": trained,
        "data": digest_of([*leaves, str(spec)] for leaves, spec in given),
    }
