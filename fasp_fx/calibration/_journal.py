"""What was decided so far, on disk, so that a calibration that was interrupted goes on after the last
consumer that was done.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch

from fasp_fx.base import Count, new_folder
from fasp_fx.errors import StoreError, first_line
from fasp_fx.storage import claim, read_state

from ._ranks import Ranks

_EVENTS, _WEIGHTS = "events.json", "weights.safetensors"


@dataclass(frozen=True)
class _Events:
    """What one subfolder says besides tensors."""

    after: Count
    decided: dict[int, dict[str, int | float | bool | None]]
    unmatched: list[str]


class Journal:
    """A folder with one subfolder for each time that everything seen so far was decided.

    What is decided is a mapping with one tensor, its ``weight``; decisions are numbered as they are made.

    Args:
        folder: the folder, made if missing.
        run: what the calibration is of; equal for those that decide alike.

    Attributes:
        points: of how many observation points it knows all.
        unmatched: nodes whose padding could not be told, by name.
        new: what was decided since, by number, until it is written.

    Raises:
        StoreError: the folder holds another run or something else, is damaged, or cannot be written.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        claim(folder, "prune", run)
        self._folder = folder
        self.points = 0
        self.unmatched: list[str] = []
        self.new: dict[int, Mapping[str, Any]] = {}
        self._known: dict[int, tuple[Path, dict[str, Any]]] = {}
        for subfolder in sorted(
            (path for path in folder.glob("stop-*") if path.name[5:].isdigit()),
            key=lambda path: int(path.name[5:]),
        ):
            events = read_state(_Events, subfolder / _EVENTS)
            if events.after != self.points:
                raise _damaged(subfolder, ValueError(f"it follows stop {events.after}, which is missing"))
            self.points, self.unmatched = int(subfolder.name[5:]), events.unmatched
            self._known |= {number: (subfolder, decided) for number, decided in events.decided.items()}

    def known(self, number: int) -> dict[str, Any]:
        """The decision of that number.

        Raises:
            StoreError: it is damaged.
        """
        try:
            folder, decided = self._known[number]
            with safetensors.safe_open(folder / _WEIGHTS, "pt") as opened:
                return {**decided, "weight": opened.get_tensor(str(number))}
        except (OSError, safetensors.SafetensorError, KeyError) as error:
            raise _damaged(self._folder, error) from error

    def commit(self, points: int, unmatched: list[str]) -> None:
        """Write what is new: so many points are done.

        Args:
            unmatched: all nodes so far whose padding could not be told.

        Raises:
            StoreError: the folder cannot be written.
        """
        weights = {
            str(number): decision["weight"].detach().cpu().contiguous()
            for number, decision in self.new.items()
        }
        decided = {
            number: {name: value for name, value in decision.items() if name != "weight"}
            for number, decision in self.new.items()
        }
        events = {"after": self.points, "decided": decided, "unmatched": unmatched}
        with new_folder(self._folder / f"stop-{points}", replaceable=None) as subfolder:
            safetensors.torch.save_file(weights, subfolder / _WEIGHTS)
            (subfolder / _EVENTS).write_text(json.dumps(events), encoding="utf-8")
        self.points, self.new = points, {}


#: makes a decision, or recalls it: a mapping with one tensor, its ``weight``
Decide = Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]


class Ledger:
    """Decisions, numbered as they are made, the same in all processes.

    Args:
        ranks: the processes.
        journal: what was decided before, and where that is written which is decided now; of the first process
            alone.

    Attributes:
        points: of how many observation points the journal knows all.
        unmatched: nodes whose padding could not be told, by name.
    """

    def __init__(self, ranks: Ranks, journal: Journal | None = None) -> None:
        self.ranks, self._journal, self._numbers = ranks, journal, itertools.count()
        before = (0, list[str]()) if journal is None else (journal.points, journal.unmatched)
        self.points, self.unmatched = ranks.first(before)

    def decide(self, point: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The next decision at an observation point: as the journal has it that knows all of that point, or
        else as the process makes it whose turn it is.
        """
        number = next(self._numbers)
        if point < self.points:
            return cast(dict[str, Any], self.ranks.share(0, self._journal and self._journal.known(number)))
        owner = number % self.ranks.size
        decision: dict[str, Any] = self.ranks.share(owner, make() if owner == self.ranks.rank else None)
        if self._journal is not None:
            self._journal.new[number] = decision
        return decision

    def commit(self, points: int, unmatched: list[str]) -> None:
        """Write into the journal that so many points are done; as :meth:`Journal.commit`."""
        if self._journal is not None:
            self._journal.commit(points, unmatched)


def _damaged(folder: Path, error: Exception) -> StoreError:
    return StoreError(
        f"the checkpoint '{folder}' is damaged: {first_line(error)}; remove the folder that it is in"
    )
