"""What was decided so far, on disk, so that a calibration that was interrupted goes on after the last
consumer that was done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch

from ..base._atomic import new_folder
from ..base._json import Count
from ..base._tensors import digest_of
from ..errors import StoreError, first_line
from ..storage._folder import claim, read_state
from .restoration import Restored

_EVENTS, _WEIGHTS = "events.json", "weights.safetensors"


@dataclass(frozen=True)
class _Events:
    """What one subfolder says besides weights."""

    after: Count
    removed: dict[str, list[Count]]
    outcomes: dict[int, dict[str, int | float | bool | None]]
    unmatched: list[str]


class Journal:
    """A folder with one subfolder for each time that everything seen so far was decided.

    Args:
        folder: the folder, made if missing.
        run: what the calibration is of; equal for those that decide alike.

    Attributes:
        stops: of how many stops on the way through the graph it knows all.
        removed: channel sets that went, by group.
        unmatched: nodes whose padding could not be told, by name.

    Raises:
        StoreError: the folder holds another run or something else, is damaged, or cannot be written.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        claim(folder, "prune", run)
        self._folder = folder
        self.stops = 0
        self.removed: dict[str, np.ndarray] = {}
        self.unmatched: list[str] = []
        self._known: dict[int, tuple[Path, dict[str, Any]]] = {}
        self._new: dict[int, Restored] = {}
        self._new_removed: dict[str, list[int]] = {}
        for made in sorted(
            (path for path in folder.glob("stop-*") if path.name[5:].isdigit()),
            key=lambda path: int(path.name[5:]),
        ):
            self._read(made)

    def restored(self, number: int) -> Restored | None:
        """The outcome of the repair of that number, if it is known.

        Raises:
            StoreError: it is damaged.
        """
        if number not in self._known:
            return None
        folder, held = self._known[number]
        try:
            with safetensors.safe_open(folder / _WEIGHTS, "pt") as opened:
                return Restored(opened.get_tensor(str(number)), **held)
        except (OSError, safetensors.SafetensorError, TypeError) as error:
            raise _damaged(folder, error) from error

    def note_removed(self, group: str, removed: np.ndarray) -> None:
        """Keep in mind what a group loses, until it is written."""
        self._new_removed[group] = removed.tolist()

    def note_restored(self, number: int, outcome: Restored) -> None:
        """Keep in mind the outcome of a repair, until it is written."""
        self._new[number] = outcome

    def commit(self, stops: int, unmatched: list[str]) -> None:
        """Write what was noted: so many stops are done.

        Args:
            unmatched: all nodes so far whose padding could not be told.

        Raises:
            StoreError: the folder cannot be written.
        """
        outcomes = {
            number: {name: value for name, value in vars(outcome).items() if name != "weight"}
            for number, outcome in self._new.items()
        }
        with new_folder(
            self._folder / f"stop-{stops}", overwrite=False, replaceable=lambda folder: False
        ) as made:
            weights = {
                str(number): outcome.weight.detach().cpu().contiguous()
                for number, outcome in self._new.items()
            }
            safetensors.torch.save_file(weights, made / _WEIGHTS)
            events = {
                "after": self.stops,
                "removed": self._new_removed,
                "outcomes": outcomes,
                "unmatched": unmatched,
            }
            (made / _EVENTS).write_text(json.dumps(events), encoding="utf-8")
        self.stops, self._new, self._new_removed = stops, {}, {}

    def _read(self, folder: Path) -> None:
        events = read_state(_Events, folder / _EVENTS)
        if events.after != self.stops:
            raise _damaged(folder, ValueError(f"it follows stop {events.after}, which is missing"))
        self.stops = int(folder.name[5:])
        self.removed |= {
            group: np.array(removed, dtype=np.int64) for group, removed in events.removed.items()
        }
        self._known |= {number: (folder, outcome) for number, outcome in events.outcomes.items()}
        self.unmatched = events.unmatched


def open_journal(
    folder: Path,
    fingerprint: str,
    options: Mapping[str, Any],
    lost: Sequence[int],
    batches: Sequence[Sequence[Any]],
    processes: int,
) -> Journal:
    """The journal of a calibration.

    Args:
        fingerprint: of the model.
        options: the configuration, as JSON holds it.
        lost: channel sets that each block of each group loses, which is all that an allocation decides.
        batches: the inputs of the graph.
        processes: how many share them, on which rounding depends.

    Raises:
        StoreError: see :class:`Journal`.
    """
    run = {
        "model": fingerprint,
        "options": dict(options),
        "what goes of each group": list(lost),
        "data": digest_of(batches),
    }
    return Journal(folder, {**run, "processes": processes})


def _damaged(folder: Path, error: Exception) -> StoreError:
    return StoreError(
        f"the checkpoint '{folder}' is damaged: {first_line(error)}; remove the folder that it is in"
    )
