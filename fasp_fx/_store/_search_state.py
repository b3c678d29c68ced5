"""How far a search came, on disk, so that one that was interrupted goes on after the last generation that was
done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._atomic import write_text
from .._observe._calibration import digest_of
from .._search import Found
from ..config import PruningConfig
from ..errors import StoreError
from ._run_folder import SEARCH, claim, read_object, refuse_other

FORMAT = "fasp_fx.search/2"
_STATE = "state.json"


class SearchState:
    """A folder that holds the state of one search.

    Args:
        folder: the folder, made if missing.
        run: what it is a search for; equal for those that find the same.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._folder, self._run = folder, run

    def recall(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state, if there is one.

        Args:
            run: what else the search is of.

        Raises:
            StoreError: the folder holds another search or something else, is damaged, or cannot be written.
        """
        claim(self._folder, {**self._run, **run})
        file = self._folder / _STATE
        if not file.exists():
            return None
        state = read_object(file)
        fits = (
            state.keys() == Found.__annotations__.keys()
            and isinstance(state["lost"], list)
            and len(state["lost"]) == len(run["start"])
        )
        whole, real = (("generation", "tried"), ("loss", "first"))
        if (
            not fits
            or not all(_is_count(state[name]) for name in whole)
            or not all(_is_count(count) for count in state["lost"])
        ):
            raise StoreError(
                f"the checkpoint '{self._folder}' is damaged: '{file.name}' holds no state of a search;"
                " remove the folder"
            )
        if not all(isinstance(state[name], float) and state[name] == state[name] for name in real):
            raise StoreError(
                f"the checkpoint '{self._folder}' is damaged: '{file.name}' holds a loss that is none; remove"
                " the folder"
            )
        return state

    def record(self, state: Mapping[str, Any]) -> None:
        """Write the state in the place of the last one.

        Raises:
            StoreError: the folder cannot be written.
        """
        write_text(self._folder / _STATE, json.dumps(dict(state)))


def open_search(
    folder: Path, fingerprint: str, config: PruningConfig, batches: Sequence[Sequence[Any]], processes: int
) -> SearchState:
    """The state of the search that comes before a calibration; arguments and errors as for
    :func:`fasp_fx._store._journal.open_journal`.

    It lies beside the journal of the calibration, which has to know what the search found.
    """
    refuse_other(folder)
    if callable(config.allocation):
        config = replace(config, allocation=None)
    options = json.loads(config.to_json())
    return SearchState(
        folder / SEARCH,
        {
            "format": FORMAT,
            "model": fingerprint,
            "options": options,
            "data": digest_of(batches),
            "processes": processes,
        },
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


__all__ = ["SearchState", "open_search"]
