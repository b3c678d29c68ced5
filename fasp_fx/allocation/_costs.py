"""Cost curves: for each group, in which order its channel sets go and what that is predicted to cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fasp_fx.base import Page, check_kind, from_document, path_of, to_document, write_text
from fasp_fx.errors import ArgumentError

from ._budgets import Cap


@dataclass(frozen=True)
class CostCurve:
    """What one group costs.

    Attributes:
        losses: the predicted rise of the loss once each block of the group lost 0, 1, 2, … channel sets;
            begins with 0 and never falls.

    Examples:
        >>> curve = costs["2.weight"]
        >>> bool((np.diff(curve.losses) >= 0).all())
        True
    """

    losses: np.ndarray

    def __post_init__(self) -> None:
        losses = np.asarray(self.losses, dtype=np.float64)
        if (
            losses.ndim != 1
            or not len(losses)
            or losses[0] != 0
            or not np.isfinite(losses).all()
            or (np.diff(losses) < 0).any()
        ):
            raise ArgumentError(
                "a cost curve holds finite numbers that begin with 0 and never fall, one for each number of"
                " channel sets lost"
            )
        object.__setattr__(self, "losses", losses)


@dataclass(frozen=True)
class Point:
    """What would be left of a model, and what that would cost.

    Attributes:
        sparsity: what goes, as :class:`fasp_fx.Report` counts it.
        parameters: those that stay.
        macs: the multiply-accumulates of one forward pass on the example inputs that stay; ``None`` where
            they cannot be counted.
        cost: the predicted rise of the loss.

    Examples:
        >>> costs.at(0.0).parameters
        884
    """

    sparsity: float
    parameters: int
    macs: int | None
    cost: float


@dataclass(frozen=True)
class _Written:
    """What a file holds of :class:`Costs`."""

    fingerprint: str
    score: str
    granularity: list[str]
    losses: dict[str, list[float]]


class Costs(Page, dict[str, CostCurve]):
    """The cost curves of a model's groups by their names, measured once (:func:`fasp_fx.measure`) for several
    prunings.

    Args:
        curves: those of the groups.
        fingerprint: of all that the model that was measured computes with
            (:func:`fasp_fx.analysis.computed_fingerprint`).
        score: what tells the score that gave the orders from others (``PruningConfig.score_name``); the
            curves hold for no other. Empty: for any.
        granularity: what the channel sets are that the curves count.

    Attributes:
        point_at: what :meth:`at` calls; it counts in the model that was measured, and so is not there where
            curves were read from a file.
        in_words: says a predicted rise of the loss on a scale that people know.

    Examples:
        >>> costs.save("costs.json")
        >>> smaller = fasp_fx.prune(captured, calibration=batches, costs=fasp_fx.Costs.load("costs.json"))
    """

    point_at: Callable[[Costs, float | Cap], Point] | None = None
    in_words: Callable[[float], str] = "{:.3g}".format

    def __init__(
        self,
        curves: Mapping[str, CostCurve],
        fingerprint: str,
        score: str = "",
        granularity: Iterable[str] = ("channel",),
    ) -> None:
        super().__init__(curves)
        self.fingerprint, self.score, self.granularity = fingerprint, score, frozenset(granularity)

    def __repr__(self) -> str:
        return f"Costs({len(self)} curves, score={self.score!r})"

    def predicted(self, lost: Mapping[str, int]) -> float:
        """The predicted rise of the loss when blocks of these groups lose so many channel sets: the sum over
        the groups.

        Args:
            lost: channel sets per block; where none go, nothing is lost, also of a group that has no curve.
        """
        gone = {name: count for name, count in lost.items() if count}
        return float(sum(self[name].losses[count] for name, count in gone.items()))

    def at(self, asked: float | Cap) -> Point:
        """What would be left of the whole model, and the predicted rise of the loss, with each group losing
        what :func:`fasp_fx.prune` would take from it.

        Args:
            asked: a sparsity in [0, 1), or a budget.

        Raises:
            ArgumentError: the curves were read from a file.
            SparsityError, BudgetError: it is out of reach.

        Examples:
            >>> costs.at(0.2).cost < costs.at(0.5).cost
            True
        """
        if self.point_at is None:
            raise ArgumentError(
                "a file of cost curves does not hold the sizes of the model; measure it anew, or call"
                " costs.predicted on what each group loses"
            )
        return self.point_at(self, asked)

    def to_json(self) -> str:
        """The curves as text."""
        losses = {name: curve.losses.tolist() for name, curve in self.items()}
        return to_document(
            "costs", vars(_Written(self.fingerprint, self.score, sorted(self.granularity), losses))
        )

    @staticmethod
    def from_json(text: str) -> Costs:
        """The curves that :meth:`to_json` wrote.

        Raises:
            ArgumentError: the text holds none.
        """
        read = from_document("costs", _Written, text, "write them with Costs.to_json()", ArgumentError)
        curves = {name: CostCurve(np.array(losses)) for name, losses in read.losses.items()}
        return Costs(curves, read.fingerprint, read.score, read.granularity)

    def save(self, file: str | Path) -> None:
        """Write the curves to a file of JSON, whole or not at all.

        Raises:
            StoreError: the file cannot be written; what it held stays.
        """
        write_text(path_of(file, "file"), self.to_json())

    @staticmethod
    def load(file: str | Path) -> Costs:
        """The curves that :meth:`save` wrote.

        Raises:
            ArgumentError: the file holds none, or cannot be read.
        """
        try:
            return Costs.from_json(path_of(file, "file").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"cost curves cannot be read from {str(file)!r}: {error}") from error


def check_costs(costs: Costs, fingerprint: str, score: str, granularity: Iterable[str]) -> None:
    """Refuse cost curves of another model, score or granularity.

    Args:
        fingerprint: of the model that is to be pruned.
        score: the name of the score to prune by.
        granularity: what is to go.

    Raises:
        ArgumentError: they are of another, or none.
    """
    check_kind("costs", costs, Costs, "pass what fasp_fx.measure returned")
    if costs.fingerprint != fingerprint:
        raise ArgumentError(
            f"the cost curves are of another model: its fingerprint is {costs.fingerprint[:12]}…, this"
            f" model's is {fingerprint[:12]}…; measure this one"
        )
    measured, wanted = (costs.score or score, costs.granularity), (score, frozenset(granularity))
    if measured != wanted:
        of, by = (f"score={name!r}, granularity={sorted(names)}" for name, names in (measured, wanted))
        raise ArgumentError(
            f"the cost curves are of {of}, and this pruning is by {by}, where other channels go in another"
            " order; measure with that"
        )
