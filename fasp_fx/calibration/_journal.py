"""What was decided so far, on disk, so that a calibration that was interrupted goes on after the last
consumer that was done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from fasp_fx.base import Count, digest_of, new_folder
from fasp_fx.errors import StoreError, first_line
from fasp_fx.storage import claim, read_state

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
        stops: of how many stops on the way through the graph it knows all.
        unmatched: nodes whose padding could not be told, by name.
        new: what was decided since, by number, until it is written.

    Raises:
        StoreError: the folder holds another run or something else, is damaged, or cannot be written.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        claim(folder, "prune", run)
        self._folder = folder
        self.stops = 0
        self.unmatched: list[str] = []
        self.new: dict[int, Mapping[str, Any]] = {}
        self._known: dict[int, tuple[Path, dict[str, Any]]] = {}
        for made in sorted(
            (path for path in folder.glob("stop-*") if path.name[5:].isdigit()),
            key=lambda path: int(path.name[5:]),
        ):
            events = read_state(_Events, made / _EVENTS)
            if events.after != self.stops:
                raise _damaged(made, ValueError(f"it follows stop {events.after}, which is missing"))
            self.stops, self.unmatched = int(made.name[5:]), events.unmatched
            self._known |= {number: (made, decided) for number, decided in events.decided.items()}

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

    def commit(self, stops: int, unmatched: list[str]) -> None:
        """Write what is new: so many stops are done.

        Args:
            unmatched: all nodes so far whose padding could not be told.

        Raises:
            StoreError: the folder cannot be written.
        """
        weights = {str(number): own["weight"].detach().cpu().contiguous() for number, own in self.new.items()}
        decided = {
            number: {name: value for name, value in own.items() if name != "weight"}
            for number, own in self.new.items()
        }
        events = {"after": self.stops, "decided": decided, "unmatched": unmatched}
        with new_folder(
            self._folder / f"stop-{stops}", overwrite=False, replaceable=lambda folder: False
        ) as made:
            safetensors.torch.save_file(weights, made / _WEIGHTS)
            (made / _EVENTS).write_text(json.dumps(events), encoding="utf-8")
        self.stops, self.new = stops, {}


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
