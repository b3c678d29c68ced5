"""Folders that keep the state of one run, so that the same call goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base._atomic import is_partial, refuse_null, write_text
from ..base._json import parse
from ..errors import StoreError, first_line

RUN = "run.json"
FORMAT = "fasp_fx.run/1"


def claim(folder: Path, kind: str, run: Mapping[str, Any]) -> None:
    """Take a folder for a run, or go on with the run that it is of.

    Args:
        folder: made if missing.
        kind: of the run.
        run: what the run is of; equal for runs that give the same result.

    Raises:
        StoreError: the folder holds another run or something else, or cannot be written.
    """
    file, run = folder / RUN, {"format": FORMAT, "kind": kind, **run}
    refuse_other(folder)
    if not file.exists():
        write_text(file, json.dumps(run))
    found = read_state(dict[str, Any], file)
    different = sorted(name for name in {*run, *found} if run.get(name) != found.get(name))
    if different:
        raise StoreError(
            f"'{folder}' is the checkpoint of another run: {', '.join(different)} differ; choose another"
            " checkpoint=, or remove the folder"
        )


def refuse_other(folder: Path, option: str = "checkpoint=") -> None:
    """Refuse a folder that holds something else than the state of a run, and what is no folder.

    Args:
        option: what the caller gave it as.

    Raises:
        StoreError: it does, or cannot be read.
    """
    refuse_null(folder, option)
    try:
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"'{folder}' is no folder; choose another {option}")
        if (
            folder.exists()
            and not (folder / RUN).is_file()
            and any(not is_partial(path, RUN) for path in folder.iterdir())
        ):
            raise StoreError(f"'{folder}' holds something that is no checkpoint; choose another {option}")
    except OSError as error:
        raise StoreError(
            f"'{folder}' cannot be written: {first_line(error)}; choose another {option}"
        ) from error


def read_state(target: Any, file: Path) -> Any:
    """What JSON in a file of such a folder holds, as a dataclass.

    Raises:
        StoreError: it holds something else.
    """
    try:
        text = file.read_bytes()
    except OSError as error:
        raise StoreError(f"'{file}' cannot be read: {first_line(error)}; remove the folder") from error
    return parse(target, text, f"'{file}'", "remove the folder that it is in")


__all__ = ["claim", "read_state", "refuse_other"]
