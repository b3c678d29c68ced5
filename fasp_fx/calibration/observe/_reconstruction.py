"""Train the weights that stay, window by window, until each gives what the dense one gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...base._device import float32_products
from ...base.offload._current import keep
from ...capturing._fx import attribute, written_by
from ...capturing._runner import Runner
from ...capturing._sizes import is_dynamic
from ...errors import CalibrationError
from ..restoration import Window as Options
from ..statistics import FITTED, HELD
from ._consumers import Consumers
from ._marks import Marks
from ._ranks import Ranks
from ._visit import Decision, decided
from ._windows import Window, find_windows

#: of the moments of Adam
_BETAS = (0.9, 0.99)
#: how often a window is judged on tokens held out while it is trained
_TURNS = 2


@dataclass(frozen=True)
class _Batch:
    """What one batch is to give at the end of a window."""

    number: int
    target: Tensor
    fitted: Tensor
    held: Tensor


class Reconstruction:
    """Trains the windows of a decided program one after the other, each on what the windows before it give.

    Of several processes each step takes a batch of each, so that they come to what one process comes to whose
    batches are as many times as large.

    Args:
        consumers: those of the analysis.
        decision: what goes, and the weights restored so far; those that are trained take their place.
        options: how to train.
        part: how much of what the dense model gives in all, rather than the dense window on the inputs of
            now, the target takes (the *drift*).
        precision: of products of float32.
        ranks: the processes that share the batches.
    """

    def __init__(
        self,
        consumers: Consumers,
        decision: Decision,
        options: Options,
        part: float,
        precision: str,
        ranks: Ranks,
    ) -> None:
        self.analysis, self.consumers, self.decision = consumers.analysis, consumers, decision
        self.options, self.part, self.precision, self.ranks = options, part, precision, ranks
        self.masks = self._masks()
        self.errors: list[tuple[float, float]] = []
        self.left: dict[str, int] = {}
        self._groups = decided(self.analysis, decision)
        self._unread = {
            product.node
            for group in self._groups
            if not group.uses
            for product in consumers.products.of(group)
        }

    def run(self, batches: list[list[Any]], marks: Marks, progress: Callable[[float], None]) -> None:
        """Train every window on all batches, of which this process runs its own.

        Raises:
            CalibrationError: a batch does not run through the program.
        """
        windows, before = (
            find_windows(self.analysis, [group for group in self._groups if group.uses]),
            (marks.remark() if marks.unmatched else None),
        )
        if not windows:
            self.decision.notes.append("no window of the program loses channels, so that nothing was trained")
            return
        own = self.ranks.own(len(batches))
        given = [batches[index] for index in own]
        runner, dense = (
            Runner(self.analysis.program, given, numbers=own),
            (Runner(self.analysis.program, given, numbers=own) if self.part else None),
        )
        runner.overrides = self._pruned()
        for count, window in enumerate(windows):
            with float32_products(self.precision):
                self._one(window, runner, dense, marks)
            progress((count + 1) / len(windows))
        if marks.unmatched:  # more may be by now than the closed form has met
            self.decision.notes[:] = [note for note in self.decision.notes if note != before]
            self.decision.notes.append(marks.remark())
        self.decision.notes.append(self._said(len(windows)))

    def _one(self, window: Window, runner: Runner, dense: Runner | None, marks: Marks) -> None:
        runner.advance(window.start)
        if dense is not None:
            dense.advance(window.stop)
        live, reason = runner.live(), self._refused(window, runner)
        if reason is None:
            wholes = [None] * len(live) if dense is None else list(dense.read(window.output))
            given = [
                self._given(window, runner, marks, number, one, whole)
                for number, (one, whole) in enumerate(zip(live, wholes, strict=True))
            ]
            trained = _Training(
                window,
                runner,
                live,
                given,
                self.options,
                {name: self.masks.get(name) for name in window.weights},
                self.ranks,
            ).run()
            self.errors.append((trained.before, trained.after))
            if trained.weights:
                held = {name: self.decision.weights.get(name) for name in trained.weights}
                self.decision.windows.append(held)
                kept = {name: keep(value) for name, value in trained.weights.items()}
                self.decision.weights |= kept
                runner.overrides |= kept
        else:
            self.left[reason] = self.left.get(reason, 0) + 1
        with torch.no_grad():
            runner.advance(window.stop)

    def _refused(self, window: Window, runner: Runner) -> str | None:
        """Why a window is not trained, if it is not."""
        inside = runner.nodes[window.start : window.stop]
        if not window.weights:
            return "its weights are read elsewhere as well"
        if any(written_by(node) for node in inside):
            return "it writes into tensors"
        if self._unread & set(inside):
            return "channels go that no weight reads"
        return None

    def _given(
        self,
        window: Window,
        runner: Runner,
        marks: Marks,
        number: int,
        live: dict[fx.Node, Any],
        whole: Tensor | None,
    ) -> _Batch:
        """What a batch is to give, and which of it is for what; ``whole`` is what the dense model gives in
        all, where that counts.
        """
        with torch.no_grad():
            target: Tensor = runner.again(number, live, window.start, window.output, window.stop, {})
            if whole is not None and whole.shape == target.shape:
                target = torch.lerp(target, whole, self.part)
        kinds = marks.of(runner.numbers[number], window.output, target, _token_dims(window.output)).expand(
            target.shape
        )
        return _Batch(number, target, kinds == FITTED, kinds == HELD)

    def _masks(self) -> dict[str, Tensor]:
        """Of each weight that lost columns, where it has any left: one there, and zero in the columns that
        are gone.
        """
        found: dict[str, Tensor] = {}
        for consumer in self.consumers.by_key.values():
            gone, whole = consumer.gone(self.decision.gone), consumer.blocks_gone(self.decision.gone)
            if not gone.any() and not whole.any():
                continue
            weight = self.consumers.weight(consumer)
            stays = torch.from_numpy(~(gone | whole[:, None])).to(weight.device)
            ones = torch.ones_like(weight)
            mask = consumer.matrices.write(consumer.matrices.read(ones) * stays[:, None], ones)
            found[consumer.weight] = mask * found[consumer.weight] if consumer.weight in found else mask
        return found

    def _pruned(self) -> dict[str, Tensor]:
        """The weights as they are now."""
        values = dict(self.decision.weights)
        for name, mask in self.masks.items():
            value = values.get(name)
            values[name] = (
                attribute(self.analysis.program.module, name).detach() if value is None else value
            ) * mask
        return values

    def _said(self, windows: int) -> str:
        kept = [after / before for before, after in self.errors if after < before]
        said = f"windows: {len(kept)} of {windows} give more nearly what the dense ones give"
        if kept:
            said += (
                f"; the error on tokens held out fell by {1 - float(np.median(kept)):.0%} in the median of"
                " these"
            )
        return said + "".join(
            f"; {count} were not trained, because {reason}" for reason, count in self.left.items()
        )


def _token_dims(node: fx.Node) -> list[int]:
    """The dimensions along which tokens of a value lie: the first, and those whose sizes vary; where none
    does, all but the last.
    """
    shape = node.meta["val"].shape
    varying = [dim for dim in range(1, len(shape)) if is_dynamic(shape[dim])]
    return [0, *(varying or range(1, len(shape) - 1))]


@dataclass(frozen=True)
class _Trained:
    """What a training came to: weights, none where nothing was gained, and the mean squared error on tokens
    held out before and after.
    """

    weights: dict[str, Tensor]
    before: float
    after: float


class _Training:
    """Trains one window with Adam, whose steps are relative to the size of each weight."""

    def __init__(
        self,
        window: Window,
        runner: Runner,
        live: list[dict[fx.Node, Any]],
        batches: list[_Batch],
        options: Options,
        masks: dict[str, Tensor | None],
        ranks: Ranks,
    ) -> None:
        self.window, self.runner, self.live, self.options, self.ranks = window, runner, live, options, ranks
        self.masks = {name: mask for name, mask in masks.items() if mask is not None}
        module = runner.module
        self.first = {
            name: runner.overrides.get(name, attribute(module, name).detach()) for name in window.weights
        }
        self.leaves = {
            name: value.detach().to(torch.float32 if value.dtype != torch.float64 else value.dtype).clone()
            for name, value in self.first.items()
        }
        self.training = [batch for batch in batches if bool(batch.fitted.any())]
        self.judging = [batch for batch in batches if bool(batch.held.any())]
        #: steps of an epoch, in each of which every process that has a batch left takes one
        self.rounds = ranks.most(len(self.training))

    def run(self) -> _Trained:
        before = self._error()
        if not self.rounds or not before > 0:
            return _Trained({}, before, before)
        sizes = {name: float(leaf.square().mean().sqrt()) for name, leaf in self.leaves.items()}
        for leaf in self.leaves.values():
            leaf.requires_grad_(True)
        groups = [
            {"params": [leaf], "lr": self.options.rate * (sizes[name] or 1.0), "size": sizes[name] or 1.0}
            for name, leaf in self.leaves.items()
        ]
        optimizer = torch.optim.Adam(groups, betas=_BETAS)
        steps = self.options.epochs * self.rounds
        judged = {round((turn + 1) * steps / _TURNS) for turn in range(min(_TURNS, steps))}
        best, least = {}, before
        generator = torch.Generator(device="cpu").manual_seed(self.options.seed)
        order: list[int] = []
        for step in range(steps):
            order = order or torch.randperm(self.rounds, generator=generator, device="cpu").tolist()
            for group in optimizer.param_groups:
                group["lr"] = (
                    self.options.rate
                    * group["size"]
                    * min(1.0, (step + 1) / max(0.1 * steps, 1.0), (steps - step) / (0.9 * steps))
                )
            number = order.pop()
            batch = self.training[number] if number < len(self.training) else None
            gradients = self._gradients(batch, before)
            for leaf, gradient in zip(self.leaves.values(), gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
            with torch.no_grad():
                for name, mask in self.masks.items():
                    self.leaves[name].mul_(mask)
            if step + 1 in judged:
                found = self._error()
                if found < least:
                    best, least = self._stored(), found
        return _Trained(best, before, least)

    def _stored(self) -> dict[str, Tensor]:
        return {
            name: leaf.detach().to(self.first[name].dtype, copy=True) for name, leaf in self.leaves.items()
        }

    def _gradients(self, batch: _Batch | None, unit: float) -> list[Tensor]:
        """Those of the mean squared error, in the given unit, over what all processes train on in a step.

        Args:
            batch: this process's own; ``None``: it has none left.
        """
        count = self.ranks.total(0.0 if batch is None else float(batch.fitted.sum()))
        own = self._own_gradients(batch, count * unit)
        return [self.ranks.add(gradient.contiguous()) for gradient in own]

    def _own_gradients(self, batch: _Batch | None, unit: float) -> Sequence[Tensor]:
        leaves = list(self.leaves.values())
        if batch is None:
            return [torch.zeros_like(leaf) for leaf in leaves]
        with torch.inference_mode(False), torch.enable_grad():
            loss = self._squares(batch, batch.fitted) / unit
            return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    def _squares(self, batch: _Batch, counts: Tensor) -> Tensor:
        """The sum of the squared errors of what counts."""
        overrides = self.runner.overrides | {
            name: leaf.to(self.first[name].dtype) for name, leaf in self.leaves.items()
        }
        found = self.runner.again(
            batch.number,
            self.live[batch.number],
            self.window.start,
            self.window.output,
            self.window.stop,
            overrides,
        )
        if found.shape != batch.target.shape:
            raise CalibrationError(
                f"'{self.window.output.name}' has another shape in the pruned model, {tuple(found.shape)};"
                " leave restore=Window out"
            )
        return ((found.float() - batch.target.float()).square() * counts).sum()

    @torch.no_grad()
    def _error(self) -> float:
        """The mean squared error over what is held out."""
        total = self.ranks.total(sum(float(self._squares(batch, batch.held)) for batch in self.judging))
        count = self.ranks.total(sum(float(batch.held.sum()) for batch in self.judging))
        return total / count if count else 0.0


__all__ = ["Reconstruction"]
