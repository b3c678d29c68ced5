"""What removing more and more would cost: predicted by one measurement, and measured at a few points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from fasp_fx.allocation import Cap, Costs, Point
from fasp_fx.base import Page, Shown, advance_of, between, in_usual_modes, one_at_a_time, shows
from fasp_fx.calibration import HeldOut
from fasp_fx.capturing import Captured, Model
from fasp_fx.errors import BudgetError, SparsityError

from ._agreement import Agreement, percent
from ._config import PruningConfig, PruningOptions
from ._method import Method
from ._prune import asking, capture, measure, prune

#: what is asked for, and what of it is measured, where nothing else is said
USUAL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), (0.5,)


@dataclass(frozen=True)
class Sweep(Page):
    """What :func:`fasp_fx.sweep` found; ``str(sweep)`` is a table, and a notebook shows pictures.

    Attributes:
        points: what would be left, and the predicted cost, by what was asked for; 0 is the dense model.
        measured: how far the model so pruned agrees with the dense one, where that was measured.
        costs: the curves of the groups, by which :func:`fasp_fx.prune` goes on.
        unreached: what was asked for and is out of reach.

    Examples:
        >>> swept = fasp_fx.sweep(captured, calibration=batches * 2, at=(0.2,), measured_at=(0.5,))
        >>> [round(point.sparsity, 1) for point in swept.points.values()]
        [0.0, 0.2, 0.5]
        >>> list(swept.measured)
        [0.5]
    """

    points: Mapping[float | Cap, Point]
    measured: Mapping[float | Cap, Agreement]
    costs: Costs
    unreached: tuple[float | Cap, ...] = ()

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text, its headings first."""
        rows = (
            (
                "" if asked == 0 else str(asked) if isinstance(asked, Cap) else f"{asked:.1%}",
                f"{point.sparsity:.1%}",
                self.costs.in_words(point.cost),
                percent(agreed.error, 2) if agreed else "",
                percent(agreed.same, 1) if agreed and agreed.same else "",
                f"{point.parameters:,}",
                "unknown" if point.macs is None else f"{point.macs:,}",
            )
            for asked, point, agreed in ((at, self.points[at], self.measured.get(at)) for at in self.points)
        )
        head = "asked", "removed", "predicted", "measured: outputs differ by", "first choices stay"
        return [(*head, "parameters", "multiply-accumulates"), *rows]

    def __str__(self) -> str:
        columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in zip(*self.rows())]
        lines = ["  ".join(cells).rstrip() for cells in zip(*columns)]
        lines += [f"out of reach: {asked}" for asked in self.unreached]
        nothing = (
            "nothing was measured: that takes a point of measured_at, and rows to hold out: eight batches or"
            " more, or those of held_out="
        )
        return "\n".join(lines if self.measured else [*lines, nothing])


@shows("sweeping")
@one_at_a_time
@in_usual_modes
def sweep(
    model: Model | Captured,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    calibration: Iterable[Any],
    at: Iterable[float | Cap] = USUAL[0],
    measured_at: Iterable[float | Cap] = USUAL[1],
    config: PruningConfig | None = None,
    device: torch.device | str | None = None,
    progress: Shown = None,
    held_out: Iterable[Any] | None = None,
    **options: Unpack[PruningOptions],
) -> Sweep:
    """Predict what removing more and more would cost, of one measurement; and prune for a few of the points,
    to measure what it did cost.

    Args:
        model, args, kwargs, calibration, device, progress, held_out: as for :func:`fasp_fx.prune`. Of fewer
            than eight batches none is held out, and without ``held_out`` nothing is measured.
        at: sparsities in (0, 1), or budgets.
        measured_at: those to prune for, which takes as long as one pruning each.
        config, options: as for :func:`fasp_fx.prune`, without ``sparsity`` and ``budget``.

    Raises:
        ArgumentError, CalibrationError, CaptureError, SparsityError: see :func:`fasp_fx.prune`.

    Examples:
        >>> swept = fasp_fx.sweep(captured, calibration=batches, at=(0.2, 0.5), measured_at=())
        >>> swept.points[0.5].cost > swept.points[0.2].cost
        True
    """
    captured = model if isinstance(model, Captured) else capture(model, args, kwargs, device=device)
    asked = PruningConfig.of(config, options)
    data = HeldOut(calibration, held_out)
    return sweep_by((measure, prune), captured, data, (at, measured_at), asked, progress)


def sweep_by(
    steps: tuple[Callable[..., Costs], Callable[..., Any]],
    captured: Any,
    batches: HeldOut,
    at: tuple[Iterable[float | Cap], Iterable[float | Cap]],
    config: PruningConfig,
    progress: Shown,
) -> Sweep:
    """As :func:`sweep`.

    Args:
        steps: what measures and what prunes what was captured, called as :func:`fasp_fx.measure` and
            :func:`fasp_fx.prune` are.
        at: what is asked for, and what of it is measured.
    """
    (measure, prune), (wanted, tried), advance = steps, map(dict.fromkeys, at), advance_of(progress)
    for asked in (*wanted, *tried):
        asking(config, asked)  # refuses what no model can lose
    step = 1 / (len(tried) + 1)
    data: dict[str, Any] = {"calibration": batches}
    costs = measure(captured, **data, config=config, part=None, progress=between(advance, 0.0, step))
    points = dict[float | Cap, Point]()
    for asked in (0.0, *wanted, *tried):
        with suppress(SparsityError, BudgetError):
            points[asked] = costs.at(asked)
    data |= {"costs": costs} if Method.of(config).needs_costs else {}
    measured = {}
    for number, asked in enumerate([asked for asked in tried if asked in points and batches.rows], 1):
        how = {
            "config": asking(config, asked),
            "progress": between(advance, number * step, (number + 1) * step),
        }
        measured[asked] = prune(captured, **data, **how, held_out=batches.rows).report.agreement
    unreached = tuple(asked for asked in {**wanted, **tried} if asked not in points)
    ordered = dict(sorted(points.items(), key=lambda item: item[1].sparsity))
    return Sweep(ordered, measured, costs, unreached)
