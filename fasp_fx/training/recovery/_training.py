"""The loop: steps of AdamW towards the dense model's outputs, judged by batches that are held out, the best
state kept.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...base._device import products_in_bfloat16
from ...base._undisturbed import drawing_alike, seed_of
from ...capturing._attention import ToldOfCausality
from ...errors import ArgumentError
from ...pruning.report import CurvePoint
from ._asking import terms_of
from ._checkpoint import Checkpoint, State
from ._config import DistillationConfig
from ._dense import Call, DenseOutputs
from ._hidden import Hidden
from ._matching import Match
from ._trained import Trained

if TYPE_CHECKING:
    from accelerate import Accelerator

#: the largest norm of all gradients of a step together; longer ones are shortened to it
CLIP = 1.0
#: a held-out loss of so many times that before the first step means that the training diverges
DIVERGED = 2.0
#: below this no loss is worth training on, whatever is divided by it
_NOTHING = 1e-12


@dataclass(frozen=True)
class Batches:
    """Numbers of the batches to train on and of those held out."""

    training: list[int]
    held_out: list[int]

    @staticmethod
    def split(count: int, fraction: float) -> Batches:
        """Hold out a fraction of the batches, at least one, spread evenly.

        Raises:
            ArgumentError: there are too few to do so.
        """
        if count < 2:
            raise ArgumentError(f"the data holds {count} batch; give at least two, of which one is held out")
        held = min(max(1, round(count * fraction)), count - 1)
        chosen = {int((index + 0.5) * count / held) for index in range(held)}
        return Batches([index for index in range(count) if index not in chosen], sorted(chosen))


@dataclass(frozen=True)
class Outcome:
    """What a training came to; ``note`` says why it ended early, if it did."""

    steps: int
    kept: int
    curve: tuple[CurvePoint, ...]
    seconds: float
    note: str | None


class Training:
    """One training of a module.

    Args:
        trained: the module, and what of it changes.
        calls: all batches.
        batches: which of them are trained on, and which judge.
        dense: what the dense model returned for them.
        match: the loss.
        config: the options, their precision settled.
        accelerator: the processes that share the batches of a step, one by itself or as ``accelerate launch``
            started them.
        checkpoint: where states are saved after each evaluation, and from where the training goes on.
    """

    def __init__(
        self,
        trained: Trained,
        calls: Sequence[Call],
        batches: Batches,
        dense: DenseOutputs,
        match: Match,
        config: DistillationConfig,
        accelerator: Accelerator,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._trained, self._calls, self._dense, self._match, self._config, self._checkpoint = (
            trained,
            calls,
            dense,
            match,
            config,
            checkpoint,
        )
        self._batches = batches
        self._leaves = list(trained.leaves.values())
        self._device = self._leaves[0].device
        self._accelerator = accelerator
        fused = self._device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.AdamW(
            self._leaves, lr=config.learning_rate, weight_decay=0.0, fused=fused
        )
        self._per_epoch = math.ceil(len(self._batches.training) / config.accumulate)
        self._steps = config.epochs * self._per_epoch
        turns = min(config.evaluations, self._steps)
        self._evaluated = {round((turn + 1) * self._steps / turns) for turn in range(turns)}
        self._called: nn.Module = trained

    def run(self, progress: Callable[[float], None]) -> Outcome:
        """Train, and leave the module with the best weights.

        Where an error or an interruption ends it, the module is left with the best so far, or, if there is a
        checkpoint to go on from, with the weights that it came with, by which the same call is known.

        Raises:
            ArgumentError: the pruned model does not return finite numbers.
            StoreError: the checkpoint is damaged, or cannot be written.
        """
        state, ended = State(0, [], {}, self._trained.state()), False
        before = None if self._checkpoint is None else {name: held.cpu() for name, held in state.best.items()}
        with self._trained.alone():
            try:
                state = self._begin(state)
                note = self._train(state, progress)
                ended = True
            finally:
                self._trained.load(state.best if ended or before is None else before)
                self._trained.finish()
        progress(1.0)
        kept = min(state.curve, key=lambda point: point.held_out)
        return Outcome(state.step, kept.step, tuple(state.curve), state.seconds, note)

    def _begin(self, state: State) -> State:
        """The state to go on from: the newest of the checkpoint, or that of the module as it is, judged."""
        found = None if self._checkpoint is None else self._checkpoint.newest()
        if self._checkpoint is None or found is None:
            held_out = self._held_out()
            if not math.isfinite(held_out):
                raise ArgumentError(
                    "the pruned model's outputs for the held-out batches are not finite; give an undamaged"
                    " result"
                )
            state.curve.append(CurvePoint(0, None, held_out))
            return state
        try:
            for held in (found.best, found.current):
                self._trained.load(held)
            self._optimizer.load_state_dict(found.optimizer)
        except (KeyError, TypeError, ValueError) as error:
            raise self._checkpoint.damaged(error) from error
        return found

    def _train(self, state: State, progress: Callable[[float], None]) -> str | None:
        """Take the steps that are left; why they ended early, if they did."""
        note = self._early(state.curve)
        started = time.perf_counter() - state.seconds
        self._called = self._accelerator.prepare_model(self._trained)
        while note is None and state.step < self._steps:
            loss = self._step(state.step)
            state.step += 1
            if not math.isfinite(loss):
                return f"the loss was not finite after step {state.step}; a smaller learning_rate= may help"
            if state.step in self._evaluated:
                self._judge(state, loss)
                note = self._early(state.curve)
                state.seconds = time.perf_counter() - started
                if self._checkpoint is not None and self._accelerator.is_main_process:
                    state.current, state.optimizer = self._trained.state(), self._optimizer.state_dict()
                    self._checkpoint.save(state)
            progress(state.step / self._steps)
        return note

    def _step(self, step: int) -> float:
        """Take one step; the mean loss of its batches before it."""
        config, order = self._config, self._order(step // self._per_epoch)
        first = step % self._per_epoch * config.accumulate
        chosen = order[first : first + config.accumulate]
        own = chosen[self._accelerator.process_index :: self._accelerator.num_processes]
        # The gradient of a step is the mean of those of the processes.
        weight = self._accelerator.num_processes / len(chosen)
        if not own:  # the processes wait for one another's gradients, so that each has to bring some
            own, weight = chosen[:1], 0.0
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * _height(step, self._steps, config.warmup)
        total = torch.zeros(1, device=self._device)
        for place, index in enumerate(own):
            with (
                self._drawing(step, index),
                contextlib.nullcontext()
                if place + 1 == len(own)
                else self._accelerator.no_sync(self._called),
            ):
                loss = self._loss(index) * weight
                self._accelerator.backward(loss)
            total += loss.detach()
        mean = float(self._accelerator.reduce(total, "mean"))
        self._trained.collect_gradients()
        torch.nn.utils.clip_grad_norm_(self._leaves, CLIP)
        if math.isfinite(mean):
            self._optimizer.step()
            self._trained.write()
        self._optimizer.zero_grad()
        return mean

    def _order(self, epoch: int) -> list[int]:
        """The training batches in the order of an epoch, which depends on the seed and the epoch alone."""
        generator = torch.Generator().manual_seed(self._config.seed + epoch)
        return [
            self._batches.training[place]
            for place in torch.randperm(len(self._batches.training), generator=generator).tolist()
        ]

    def _drawing(self, *place: int) -> contextlib.AbstractContextManager[None]:
        """Random numbers that depend on the seed and the place in the training alone, so that a run that was
        interrupted draws as one that was not, several processes as one, and each evaluation as the first.
        """
        return drawing_alike(self._trained.parameters(), seed_of(self._config.seed, *place))

    def _loss(self, index: int) -> Tensor:
        """What is trained on: the mean of the terms, and what hidden states add to it."""
        terms, targets, inputs = self._compared(
            self._called, index, bfloat16=self._config.precision == "bfloat16"
        )
        hidden = self._trained.hidden
        if hidden is None:
            return terms.mean()
        return terms.mean() + hidden.weight * hidden.error(
            self._trained.take_readings(), targets, inputs, index
        )

    def _compared(
        self, model: nn.Module, index: int, bfloat16: bool
    ) -> tuple[Tensor, dict[str, Tensor], Mapping[str, Any]]:
        """The terms of a batch, the dense model's hidden states, and the arguments of the call by name."""
        call = self._calls[index].to(self._device)
        with products_in_bfloat16(self._device, bfloat16), ToldOfCausality():
            own = call.copied()
            outputs = model(*own.args, **own.kwargs)
        targets, hidden = Hidden.parted(self._dense.read(index, self._device))
        inputs = call.named(self._trained.student)
        return terms_of(self._match, outputs, targets, inputs, index), hidden, inputs

    @torch.no_grad()
    def _held_out(self) -> float:
        """The mean loss on the held-out batches, each term counting alike."""
        seen = torch.zeros(2, dtype=torch.float64, device=self._device)
        for index in self._batches.held_out[
            self._accelerator.process_index :: self._accelerator.num_processes
        ]:
            with self._drawing(index):
                terms, _, _ = self._compared(self._trained, index, bfloat16=False)
            seen += torch.stack(
                [
                    terms.double().sum(),
                    torch.tensor(float(terms.numel()), dtype=torch.float64, device=self._device),
                ]
            )
        total, count = self._accelerator.reduce(seen, "sum").tolist()
        return total / max(count, 1.0)

    def _judge(self, state: State, loss: float) -> None:
        best = min(point.held_out for point in state.curve)
        found = self._held_out()
        state.curve.append(CurvePoint(state.step, loss, found))
        if found < best:
            state.best = self._trained.state()

    def _early(self, curve: Sequence[CurvePoint]) -> str | None:
        """Why the training ends here, if it does."""
        if len(curve) < 2:
            return None
        first, last = curve[0].held_out, curve[-1].held_out
        if not math.isfinite(last) or last > DIVERGED * max(first, _NOTHING):
            return (
                f"the training diverged: the held-out loss rose from {first:.3g} to {last:.3g}; a smaller"
                " learning_rate= may help"
            )
        best = min(range(len(curve)), key=lambda place: curve[place].held_out)
        since = len(curve) - 1 - best
        if (
            self._config.patience is not None
            and since >= self._config.patience
            and curve[-1].step < self._steps
        ):
            return (
                f"the held-out loss did not fall any more in {since} evaluations, so the training ended after"
                f" step {curve[-1].step} of {self._steps}"
            )
        return None


def _height(step: int, steps: int, warmup: float) -> float:
    """The fraction of the highest learning rate for a step: up along a line, and down along another."""
    rising = warmup * steps
    return min(1.0, (step + 1) / rising if rising else 1.0, (steps - step) / max(steps - rising, 1.0))


__all__ = ["Batches", "Outcome", "Training"]
