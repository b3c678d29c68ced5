"""The loop: steps of AdamW towards the dense model's outputs, judged by batches that are held out, the best
state kept.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...base._device import device_of, products_in_bfloat16
from ...base._undisturbed import drawing_alike, seed_of
from ...capturing._attention import ToldOfCausality
from ...errors import ArgumentError
from ...pruning.report import CurvePoint
from ._config import DistillationConfig
from ._kept import Checkpoint, Lessons, State
from ._trained import Trained

if TYPE_CHECKING:
    from accelerate import Accelerator

#: the largest norm of all gradients of a step together; longer ones are shortened to it
CLIP = 1.0
#: a held-out loss of so many times that before the first step means that the training diverges
DIVERGED = 2.0
#: below this no loss is worth training on, whatever is divided by it
_NOTHING = 1e-12


def split(count: int, fraction: float) -> tuple[list[int], list[int]]:
    """Numbers of the batches to train on, and of those held out: a fraction of them, at least one, spread
    evenly.

    Raises:
        ArgumentError: there are too few to do so.
    """
    if count < 2:
        raise ArgumentError(f"the data holds {count} batch; give at least two, of which one is held out")
    held = min(max(1, round(count * fraction)), count - 1)
    held_out = [int((index + 0.5) * count / held) for index in range(held)]
    return [index for index in range(count) if index not in held_out], held_out


@dataclass(eq=False)
class Training:
    """One training of a module.

    Attributes:
        trained: the module, and what of it changes.
        lessons: the batches, and what the dense model returned for them.
        training, held_out: numbers of those that are trained on, and of those that judge.
        config: the options, their precision settled.
        accelerator: the processes that share the batches of a step, one by itself or as ``accelerate launch``
            started them.
        checkpoint: where states are saved after each evaluation, and from where the training goes on.
    """

    trained: Trained
    lessons: Lessons
    training: list[int]
    held_out: list[int]
    config: DistillationConfig
    accelerator: Accelerator
    checkpoint: Checkpoint | None

    def __post_init__(self) -> None:
        self._leaves = list(self.trained.leaves.values())
        self._device = device_of(self.trained.student)
        fused = self._device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.AdamW(
            self._leaves, self.config.learning_rate, weight_decay=0.0, fused=fused
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
        state = None if self.checkpoint is None else self.checkpoint.newest()
        if state is None:
            state = State([CurvePoint(0, None, self._judged())], self.trained.state())
        else:
            self.trained.load(state.current)
            self._optimizer.load_state_dict(state.optimizer)
        if not math.isfinite(state.curve[0].held_out):
            raise ArgumentError(
                "the pruned model's outputs for the held-out batches are not finite; give an undamaged result"
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
        note = self._early(state.curve)
        started = time.perf_counter() - state.seconds
        while note is None and state.step < self._steps:
            loss = self._step(state.step)
            state.step += 1
            if not math.isfinite(loss):
                return f"the loss was not finite after step {state.step}; a smaller learning_rate= may help"
            if state.step in evaluated:
                best, found = min(point.held_out for point in state.curve), self._judged()
                state.curve.append(CurvePoint(state.step, loss, found))
                if found < best:
                    state.best = self.trained.state()
                note = self._early(state.curve)
                state.seconds = time.perf_counter() - started
                if self.checkpoint is not None and self.accelerator.is_main_process:
                    state.current, state.optimizer = self.trained.state(), self._optimizer.state_dict()
                    self.checkpoint.save(state)
            progress(state.step / self._steps)
        return note

    def _step(self, step: int) -> float:
        """Take one step; the mean loss of its batches before it."""
        # The order of an epoch depends on the seed and the epoch alone.
        epoch, place = divmod(step, self._per_epoch)
        generator = torch.Generator().manual_seed(self.config.seed + epoch)
        order = torch.randperm(len(self.training), generator=generator).tolist()
        chosen = order[place * self.config.accumulate :][: self.config.accumulate]
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * _height(step, self._steps, self.config.warmup)
        total = torch.zeros(1, device=self._device)
        for index in (self.training[number] for number in self._own(chosen)):
            with self._drawing(step, index):
                terms = self._terms(index, bfloat16=self.config.precision == "bfloat16")
                loss = terms.mean() / len(chosen)
                loss.backward()
            total += loss.detach()
        for leaf in self._leaves:
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            leaf.grad = self.accelerator.reduce(gradient, "sum")
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
        with products_in_bfloat16(self._device, bfloat16), ToldOfCausality():
            outputs = self.lessons.outputs(self.trained, index, self._device)
        return self.lessons.terms(self.trained.student, outputs, index, self._device)

    @torch.no_grad()
    def _judged(self) -> float:
        """The mean loss on the held-out batches, each term counting alike."""
        seen = torch.zeros(2, dtype=torch.float64, device=self._device)
        for index in self._own(self.held_out):
            with self._drawing(index):
                terms = self._terms(index, bfloat16=False).double()
            seen += torch.stack([terms.sum(), torch.ones_like(terms).sum()])
        total, count = self.accelerator.reduce(seen, "sum").tolist()
        return float(total / count)

    def _early(self, curve: Sequence[CurvePoint]) -> str | None:
        """Why the training ends here, if it does."""
        if len(curve) < 2:
            return None
        losses, step = [point.held_out for point in curve], curve[-1].step
        if not math.isfinite(losses[-1]) or losses[-1] > DIVERGED * max(losses[0], _NOTHING):
            return (
                f"the training diverged: the held-out loss rose from {losses[0]:.3g} to {losses[-1]:.3g}; a"
                " smaller learning_rate= may help"
            )
        since, patience = len(curve) - 1 - losses.index(min(losses)), self.config.patience
        if patience is not None and since >= patience and step < self._steps:
            return (
                f"the held-out loss did not fall any more in {since} evaluations, so the training ended after"
                f" step {step} of {self._steps}"
            )
        return None


def _height(step: int, steps: int, warmup: float) -> float:
    """The fraction of the highest learning rate for a step: up along a line, and down along another."""
    rising = warmup * steps
    return min(1.0, (step + 1) / rising if rising else 1.0, (steps - step) / max(steps - rising, 1.0))


__all__ = ["Training", "split"]
