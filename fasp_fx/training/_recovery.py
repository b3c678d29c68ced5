"""Training after pruning: what the closed forms leave is learned back from the dense model.

:func:`distil` trains a pruned model towards the outputs of the model it was made of, by steps of AdamW,
keeps the weights that do best on batches held out of the training, and never returns worse ones than it was
given (docs/recovery.md).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fasp_fx.analysis import check_fixed
from fasp_fx.base import (
    Shown,
    advance_of,
    check_kind,
    device_of,
    digest_of,
    drawing_alike,
    fingerprint,
    in_usual_modes,
    multiplies_bfloat16,
    new_file,
    path_of,
    products_in_bfloat16,
    pytree,
    seed_of,
    short_of_memory,
    shows,
    tolerable,
)
from fasp_fx.calibration import Batches, all_of, as_calls
from fasp_fx.capturing import copied, in_training, rewound
from fasp_fx.errors import ArgumentError, CalibrationError, StoreError, TrainingMemoryError, first_line
from fasp_fx.pruning import CurvePoint, Recovery, Result, key_of
from fasp_fx.storage import claim

from ._distillation import DistillationConfig, DistillationOptions, Divergence, Match, SquaredError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fasp_fx.hf import Pruned

R = TypeVar("R", bound="Result | Pruned")

#: the part of the progress shown that running the dense model takes, for each time that a batch is trained on
_DENSE = 0.33
_CRITERIA = {
    Divergence: "Kullback-Leibler divergence from the dense model",
    SquaredError: "relative squared error of the outputs",
}


@shows("training")
@in_usual_modes
def distil(
    result: R,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    config: DistillationConfig | None = None,
    checkpoint: str | Path | None = None,
    progress: Shown = None,
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
        data: an iterable of batches, or several by the names of their sources, as for ``calibration=`` there.
            All are held in memory; what the dense model returns for them is kept on disk. Of each source some
            are held out, and as much of each counts for what does best.
        config: the options; ``None``: the defaults.
        checkpoint: a folder for the state of the training, written after each evaluation; the same call with
            the same folder goes on from there, to the same end. ``None``: nothing is kept.
        progress: as for :func:`fasp_fx.prune`, of the training.
        options: fields of :class:`fasp_fx.training.DistillationConfig` (``epochs=2``, ``learning_rate=3e-5``,
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

    Examples:
        >>> trained = fasp_fx.distil(result, model, batches, epochs=1, learning_rate=1e-3)
        >>> trained.report.recovery.method
        'distillation'
    """
    asked = DistillationConfig.of(config, options)
    pruned, more, modal = _called(result)
    _check(dense, result, {"dense": dense} | ({"the module of the result": pruned} if modal else {}))
    folder = None if checkpoint is None else path_of(checkpoint, "checkpoint").absolute()
    sources = all_of(data, "data")
    calls = [(args, kwargs | more) for args, kwargs in as_calls(sources, "data")]
    by_source = Batches(calls, sources.sources).by_source()
    training, held_out = split(by_source, asked.held_out)
    match = _match(asked, result)
    if asked.precision == "auto":
        asked = replace(asked, precision="bfloat16" if multiplies_bfloat16(device_of(pruned)) else "weights")
    advance = advance_of(progress)
    share = _DENSE / (_DENSE + asked.epochs)
    from accelerate import Accelerator

    accelerator = Accelerator(device_placement=False)
    try:
        with tempfile.TemporaryDirectory(prefix="fasp_fx-", ignore_cleanup_errors=True) as temporary:
            trained = Trained(pruned)
            lessons = Lessons(Path(temporary), calls, match)
            with contextlib.nullcontext() if folder is None else accelerator.main_process_first():
                if folder is not None:
                    run = _run(asked, result, pruned, [*trained.leaves], calls)
                    claim(folder, "distil", run | {"held out": held_out})
                    lessons = replace(lessons, folder=folder / "dense")
                coarse = training if asked.precision == "bfloat16" else ()
                lessons.write(dense, coarse, lambda fraction: advance(share * fraction))
            kept = None if folder is None else folder / "state.pt"
            state, note = Training(trained, lessons, training, held_out, asked, accelerator, kept).run(
                lambda fraction: advance(share + (1 - share) * fraction)
            )
    except short_of_memory() as error:
        raise TrainingMemoryError(
            f"the memory is too little for the dense model and the training of the pruned one:"
            f" {first_line(error)}; give smaller batches with accumulate=, or train less, with"
            " requires_grad_(False) on the rest of the pruned model"
        ) from error
    return cast(
        R,
        result.with_report(
            agreement=None,  # that of the weights before
            recovery=Recovery(
                "distillation",
                _CRITERIA.get(type(match), type(match).__name__),
                state.step,
                min(state.curve, key=lambda point: point.held_out).step,
                tuple(state.curve),
                state.seconds,
                () if note is None else (note,),
            ),
        ),
    )


def _called(result: Any) -> tuple[nn.Module, dict[str, Any], bool]:
    """The pruned module, what every call of it and of the dense one is given besides, and whether it can be
    in training mode, as captured programs cannot.
    """
    if isinstance(result, Result):
        return result.module, {}, True
    from fasp_fx.hf import Pruned, PrunedModel

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
    check_kind("dense", dense, nn.Module, "pass the module that was pruned")
    for what, model in modal.items():
        for path in in_training(model):
            part = f"'{path}' of {what}" if path else what
            raise ArgumentError(
                f"{part} is in training mode, where dropout is at random; call eval() on it first"
            )
    its_fingerprint = fingerprint(dict(dense.named_parameters(remove_duplicate=False)))
    if its_fingerprint != result.plan.fingerprint:
        raise ArgumentError(
            f"dense is not the model that was pruned: its fingerprint is {its_fingerprint[:12]}…, that of the"
            f" plan {result.plan.fingerprint[:12]}…; pass the model as it was given to prune"
        )
    check_fixed(result.plan, dense)


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
    key_of(None if isinstance(config.loss, str) else config.loss, "loss=", "checkpoint=")
    return {
        "options": json.loads(config.to_json()),
        "dense": [result.plan.fingerprint, *(buffer.digest for buffer in result.plan.fixed)],
        "pruned": fingerprint(dict(pruned.named_parameters(remove_duplicate=False))),
        "trained parameters": trained,
        "data": digest_of([*leaves, str(spec)] for leaves, spec in map(pytree.tree_flatten, calls)),
    }


# --- What is trained, and what is kept on disk.


class Trained:
    """A module as an optimiser sees it; called like the module.

    What is learned lies beside the module, in float32 or finer (weights of 16 bits are too coarse for small
    steps), and takes the places of its weights in each call. So the module's own weights, and what they hold
    in ``.grad``, stay as they are until :meth:`write`; and its buffers (running averages, counters) always:
    each call begins with what they hold, as each of the dense model's does.

    Args:
        student: the module.

    Attributes:
        leaves: what the optimiser changes, by the names of the parameters that require a gradient.

    Raises:
        ArgumentError: there are none.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.leaves = {
            name: weight.detach()
            .to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            .requires_grad_()
            for name, weight in student.named_parameters()
            if weight.requires_grad and weight.is_floating_point() and weight.numel()
        }
        if not self.leaves:
            raise ArgumentError(
                "no weight of the pruned model requires a gradient; call requires_grad_() on what is to be"
                " trained"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns with what is learned in the places of its weights."""
        tensors = {name: weight.detach() for name, weight in self.student.named_parameters()}
        tensors |= {name: buffer.clone() for name, buffer in self.student.named_buffers()}
        tensors |= {name: leaf.to(tensors[name].dtype) for name, leaf in self.leaves.items()}
        return functional_call(self.student, tensors, args, kwargs)

    def state(self) -> dict[str, Tensor]:
        """A copy of what the optimiser changes, by name, on the CPU."""
        return {name: leaf.detach().to("cpu", copy=True) for name, leaf in self.leaves.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go back to a state."""
        for name, leaf in self.leaves.items():
            leaf.copy_(state[name])

    @torch.no_grad()
    def write(self, state: dict[str, Tensor]) -> None:
        """Put a state into the module's own weights."""
        weights = dict(self.student.named_parameters())
        for name, value in state.items():
            weights[name].copy_(value)


@dataclass
class State:
    """Everything that the rest of a training depends on.

    Attributes:
        curve: what the evaluations so far came to.
        best: what is trained, by name, as it was at the best evaluation.
        current: the same as it is now; empty before the first step.
        optimizer: the optimiser's ``state_dict``.
        step: steps taken.
        seconds: spent on training and evaluating so far.
    """

    curve: list[CurvePoint]
    best: dict[str, Tensor]
    current: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Lessons:
    """The batches, and what the loss keeps of what the dense model returns for them, one file for each.

    Attributes:
        folder: where the files are.
        calls: positional and keyword arguments of each batch.
        match: the loss.
    """

    folder: Path
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    match: Match

    @torch.no_grad()
    def write(self, model: nn.Module, coarse: Collection[int], progress: Callable[[float], None]) -> None:
        """Run the dense model on the batches whose files are not there yet, with products in bfloat16 for
        those whose numbers are in ``coarse``. What it writes into its buffers is put back after each.

        Raises:
            ArgumentError: the loss does not compare what the model returns.
            CalibrationError: the model does not take a batch, nothing of it counts, or the loss of the
                model's outputs, against themselves, is not finite.
            StoreError: the disk is full or cannot be written to, or a file that is there is damaged.
        """
        device = device_of(model)
        for index in range(len(self.calls)):
            if self.file(index).exists():
                _load(self.file(index), "cpu")
            else:
                with rewound(model), products_in_bfloat16(device, index in coarse):
                    outputs = self.outputs(model, index, device)
                targets = self.match.targets(outputs)
                self.terms(model, outputs, targets, index, device)
                _save(self.file(index), {name: tensor.clone() for name, tensor in targets.items()})
            progress((index + 1) / len(self.calls))

    def outputs(self, model: Callable[..., Any], index: int, device: torch.device) -> Any:
        """What a model returns for a batch.

        Raises:
            CalibrationError: the model does not take it.
        """
        args, kwargs = self._on(index, device)
        try:
            return model(*args, **kwargs)
        except tolerable(Exception) as error:  # a model raises what it likes
            raise CalibrationError(
                f"the {'dense' if isinstance(model, nn.Module) else 'pruned'} model does not take batch"
                f" {index}: {type(error).__name__}: {first_line(error)}"
            ) from error

    def terms(
        self, model: nn.Module, outputs: Any, targets: dict[str, Tensor], index: int, device: torch.device
    ) -> Tensor:
        """The terms of the loss of what a model returned for a batch, at least one.

        Raises:
            CalibrationError: nothing of the batch counts.
        """
        args, kwargs = self._on(index, device)
        named = dict(zip(inspect.signature(model.forward).parameters, args)) | kwargs
        terms = self.match.terms(outputs, targets, named)
        if not terms.numel():
            raise CalibrationError(
                f"nothing of batch {index} counts, as where its attention_mask hides every token; leave it"
                " out"
            )
        return terms

    def _on(self, index: int, device: torch.device) -> Any:
        """The arguments of a batch on a device, in tensors that a model may write into."""
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), copied(self.calls[index]))

    def file(self, index: int) -> Path:
        """Where what is kept for a batch is, or will be."""
        return self.folder / f"{index}.pt"


def _save(file: Path, value: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values to a file, whole or not at all.

    Raises:
        StoreError: the file cannot be written.
    """
    with new_file(file, replaceable=lambda _: True) as temporary:
        try:
            torch.save(value, temporary)
        except short_of_memory():
            raise
        except RuntimeError as error:  # what torch raises for a full disk
            raise OSError(first_line(error)) from error


def _load(file: Path, device: torch.device | str) -> dict[str, Any]:
    """What :func:`_save` wrote.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        value: dict[str, Any] = torch.load(file, weights_only=True, map_location=device)
    except tolerable(Exception) as error:  # readers raise whatever a file makes them trip over
        raise StoreError(
            f"'{file}' is damaged: {first_line(error)}; remove it, and the same call makes it anew"
        ) from error
    return value


#: the largest norm of all gradients of a step together; longer ones are shortened to it
CLIP = 1.0
#: the fraction of all steps over which the learning rate rises
WARMUP = 0.1


def split(by_source: Sequence[Sequence[int]], fraction: float) -> tuple[list[int], list[list[int]]]:
    """Numbers of the batches to train on, and of those held out, by their sources: a fraction of each, at
    least one, spread evenly.

    Raises:
        ArgumentError: there are too few to do so.
    """
    held_out = []
    for numbers in by_source:
        if (count := len(numbers)) < 2:
            of_each = " of each source" if len(by_source) > 1 else ""
            raise ArgumentError(
                f"the data holds {count} batch{of_each}; give at least two, of which one is held out"
            )
        judging = min(max(1, round(count * fraction)), count - 1)
        held_out.append([numbers[int((index + 0.5) * count / judging)] for index in range(judging)])
    away = {*chain(*held_out)}
    return [number for number in sorted(chain(*by_source)) if number not in away], held_out


@dataclass(eq=False)
class Training:
    """One training of a module.

    Attributes:
        trained: the module, and what of it changes.
        lessons: the batches, and what the dense model returned for them.
        training, held_out: numbers of those that are trained on, and by their sources of those that judge.
        config: the options, their precision settled.
        accelerator: the processes that share the batches of a step, one by itself or as ``accelerate launch``
            started them.
        checkpoint: the file that is written after each evaluation, and from which the training goes on.
    """

    trained: Trained
    lessons: Lessons
    training: list[int]
    held_out: list[list[int]]
    config: DistillationConfig
    accelerator: Accelerator
    checkpoint: Path | None

    def __post_init__(self) -> None:
        self._leaves = list(self.trained.leaves.values())
        self._device = device_of(self.trained.student)
        self._optimizer = torch.optim.AdamW(
            self._leaves,
            self.config.learning_rate,
            weight_decay=0.0,
            fused=self._device.type in ("cpu", "cuda"),
        )
        self._per_epoch = math.ceil(len(self.training) / self.config.accumulate)
        self._steps = self.config.epochs * self._per_epoch

    def run(self, progress: Callable[[float], None]) -> tuple[State, str | None]:
        """Train, and leave the module with the best weights; how the training ended, and why it did early, if
        it did.

        Where an error or an interruption ends it, the module is left with the best so far, or, if there is a
        checkpoint to go on from, with the weights that it came with, by which the same call is known.

        Raises:
            ArgumentError: the pruned model does not return finite numbers.
            StoreError: the checkpoint is damaged, or cannot be written.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            state = State([CurvePoint(0, None, self._judged())], self.trained.state())
        else:
            saved = _load(self.checkpoint, "cpu")
            state = State(**saved | {"curve": [CurvePoint(*point) for point in saved["curve"]]})
            self.trained.load(state.current)
            self._optimizer.load_state_dict(state.optimizer)
        if not math.isfinite(state.curve[0].held_out):
            raise ArgumentError(
                "the loss of the held-out batches is not finite; check them, the loss and both models"
            )
        try:
            note = self._train(state, progress)
        except BaseException:
            if self.checkpoint is None:
                self.trained.write(state.best)
            raise
        self.trained.write(state.best)
        progress(1.0)
        return state, note

    def _train(self, state: State, progress: Callable[[float], None]) -> str | None:
        """Take the steps that are left; why they ended early, if they did."""
        turns = min(self.config.evaluations, self._steps)
        evaluated = {round((turn + 1) * self._steps / turns) for turn in range(turns)}
        started = time.perf_counter() - state.seconds
        while state.step < self._steps:
            loss = self._step(state.step)
            state.step += 1
            if not math.isfinite(loss):
                return f"the loss was not finite after step {state.step}; a smaller learning_rate= may help"
            if state.step in evaluated:
                best, judged = min(point.held_out for point in state.curve), self._judged()
                state.curve.append(CurvePoint(state.step, loss, judged))
                if judged < best:
                    state.best = self.trained.state()
                state.seconds = time.perf_counter() - started
                if self.checkpoint is not None and self.accelerator.is_main_process:
                    state.current, state.optimizer = self.trained.state(), self._optimizer.state_dict()
                    _save(self.checkpoint, vars(state) | {"curve": [astuple(point) for point in state.curve]})
            progress(state.step / self._steps)
        return None

    def _step(self, step: int) -> float:
        """Take one step; the mean loss of its batches before it."""
        # The order of an epoch depends on the seed and the epoch alone.
        epoch, place = divmod(step, self._per_epoch)
        generator = torch.Generator().manual_seed(self.config.seed + epoch)
        order = torch.randperm(len(self.training), generator=generator).tolist()
        chosen = order[place * self.config.accumulate :][: self.config.accumulate]
        # Up along a line, and down along another.
        rising = WARMUP * self._steps
        height = min(1.0, (step + 1) / rising, (self._steps - step) / max(self._steps - rising, 1.0))
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * height
        total = torch.zeros(1, device=self._device)
        for index in (self.training[number] for number in self._own(chosen)):
            with self._drawing(step, index):
                loss = self._terms(index, bfloat16=self.config.precision == "bfloat16").mean() / len(chosen)
                loss.backward()
            total += loss.detach()
        for leaf in self._leaves:
            leaf.grad = self.accelerator.reduce(
                torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, "sum"
            )
        mean = float(self.accelerator.reduce(total, "sum"))
        torch.nn.utils.clip_grad_norm_(self._leaves, CLIP)
        if math.isfinite(mean):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return mean

    def _own(self, numbers: list[int]) -> list[int]:
        """Those of which this process has the care."""
        return numbers[self.accelerator.process_index :: self.accelerator.num_processes]

    def _drawing(self, *place: int) -> contextlib.AbstractContextManager[None]:
        """Random numbers that depend on the seed and the place in the training alone, so that a run that was
        interrupted draws as one that was not, several processes as one, and each evaluation as the first.
        """
        return drawing_alike(self.trained.student.parameters(), seed_of(self.config.seed, *place))

    def _terms(self, index: int, bfloat16: bool) -> Tensor:
        """The terms of a batch."""
        with products_in_bfloat16(self._device, bfloat16):
            outputs = self.lessons.outputs(self.trained, index, self._device)
        return self.lessons.terms(
            self.trained.student, outputs, _load(self.lessons.file(index), self._device), index, self._device
        )

    @torch.no_grad()
    def _judged(self) -> float:
        """The mean loss on the held-out batches, each term of a source counting alike, and each source."""
        seen = torch.zeros(len(self.held_out), 2, dtype=torch.float64, device=self._device)
        for source, numbers in enumerate(self.held_out):
            for index in self._own(numbers):
                with self._drawing(index):
                    terms = self._terms(index, bfloat16=False).double()
                seen[source] += torch.stack([terms.sum(), torch.ones_like(terms).sum()])
        totals, counts = self.accelerator.reduce(seen, "sum").T
        return float((totals / counts).mean())
