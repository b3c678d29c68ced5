"""Checks of what every command takes: paths and the seed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import ArgumentError, CalibrationError

#: a text is read and tokenised as a whole; the largest of the usual benchmarks, WikiText-103, has half of it
TEXT_BYTES = 2**30
#: characters of a path that a message quotes
SHOWN = 200
#: what torch takes
_SEEDS = range(-(2**63), 2**64)


def check_path(option: str, given: str | os.PathLike[str] | None) -> None:
    """Refuse a path that no file can have, or that the libraries which write files cannot be told.

    Raises:
        ArgumentError: names the option.
    """
    if given is None:
        return
    text = os.fspath(given)
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
    if not text or text.isspace():
        raise ArgumentError(f"{option} '{shown}' is empty; give a name")
    if "\0" in text:
        raise ArgumentError(
            f"{option} '{shown}' holds a null character, which no path can; give another name"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{option} '{shown}' is not UTF-8; rename the file or folder, or give another one"
        ) from error
    try:
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass  # said later, in words that fit
    except OSError as error:  # too long, in a folder that may not be looked into, or in a circle of links
        raise ArgumentError(
            f"{option} '{shown}' cannot be used: {error.strerror}; give another name"
        ) from error


def check_apart(out: Path, **others: Path | None) -> None:
    """Refuse paths inside of the folder that a result takes as a whole.

    Args:
        others: by the names of their options, without dashes.

    Raises:
        ArgumentError: names the option.
    """
    taken = out.absolute()
    for name, path in others.items():
        if path is not None and taken in (path.absolute(), *path.absolute().parents):
            raise ArgumentError(
                f"--{name} '{path}' lies in --out '{out}', which the result takes as a whole; give another"
                " path"
            )


def check_text(option: str, file: Path | None, remedy: str = "give a text file") -> None:
    """Refuse what is not a file of text that can be read whole.

    Raises:
        ArgumentError: the path cannot be one.
        CalibrationError: names the option and the file.
    """
    check_path(option, file)
    if file is None:
        return
    try:
        found = file.stat()
    except OSError:
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise CalibrationError(f"{option} '{file}' is not a file; {remedy}")
    if found.st_size > TEXT_BYTES:
        raise CalibrationError(
            f"{option} '{file}' has {found.st_size:,} bytes, and a text of at most {TEXT_BYTES:,} is read;"
            " cut it"
        )
    if not os.access(file, os.R_OK):
        raise CalibrationError(
            f"{option} '{file}' may not be read by you; change its permissions, or {remedy}"
        )


def check_seed(seed: int) -> None:
    """Refuse a seed that torch does not take.

    Raises:
        ArgumentError: names the nearest that will do.
    """
    if seed not in _SEEDS:
        nearest = _SEEDS[0] if seed < 0 else _SEEDS[-1]
        raise ArgumentError(
            f"--seed {seed} does not fit into 64 bits; use a smaller number, {nearest} at the outside"
        )


__all__ = ["SHOWN", "TEXT_BYTES", "check_path", "check_seed", "check_text"]
