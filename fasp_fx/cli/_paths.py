"""What can be said of paths before any work is done."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import ArgumentError, CalibrationError, StoreError, first_line
from ..storage._folder import is_save

#: a text is read and tokenised as a whole; the largest of the usual benchmarks, WikiText-103, has half of it
TEXT_BYTES = 2**30
#: characters of a path that a message quotes
SHOWN = 200


def check_path(option: str, given: str | os.PathLike[str]) -> None:
    """Refuse a path that no file can have, or that the libraries which write files cannot be told.

    Raises:
        ArgumentError: names the option.
    """
    text = os.fspath(given)
    try:
        if not text.strip():
            raise ValueError("it is empty")
        text.encode("utf-8")
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass  # said later, in words that fit
    except (OSError, ValueError) as error:  # too long, no text, in a folder that is closed
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
        why = getattr(error, "strerror", None) or first_line(error)
        raise ArgumentError(f"{option} '{shown}' cannot be used: {why}; give another name") from error


def check_text(option: str, file: Path | None, remedy: str = "give a text file") -> None:
    """Refuse what is not a file of text that can be read whole.

    Raises:
        ArgumentError: the path cannot be one.
        CalibrationError: names the option and the file.
    """
    if file is None:
        return
    check_path(option, file)
    if not file.is_file():
        raise CalibrationError(f"{option} '{file}' is not a file; {remedy}")
    if (size := file.stat().st_size) > TEXT_BYTES:
        raise CalibrationError(
            f"{option} '{file}' has {size:,} bytes, and a text of at most {TEXT_BYTES:,} is read; cut it"
        )


def check_target(out: Path, *, overwrite: bool, plain: bool, **others: Path | None) -> None:
    """Refuse a folder that could not be written later.

    Args:
        plain: a plain checkpoint will be written, which replaces only such.
        others: other paths to write, by the names of their options: what lies in the folder would be
            replaced along with it.

    Raises:
        ArgumentError: a path cannot be used.
        StoreError: something is there that must not be replaced, or the folder cannot be made.
    """
    check_path("--out", out)
    if os.path.lexists(out) and not overwrite:
        raise StoreError(
            f"'{out}' exists; choose another --out, or pass --overwrite to replace an earlier result"
        )
    if os.path.lexists(out) and (out.is_symlink() or not is_save(out, "plain" if plain else "hf")):
        raise StoreError(
            f"'{out}' holds something other than an earlier result, which --overwrite never replaces; choose"
            " another --out or remove it yourself"
        )
    above = next(parent for parent in out.absolute().parents if parent.exists())
    try:  # as the result will be written: under a name that is longer, beside the one it will take
        os.rmdir(tempfile.mkdtemp(prefix=f".{out.absolute().name}.", suffix="mark.partial", dir=above))
    except OSError as error:
        raise StoreError(
            f"'{str(out)[:SHOWN]}' cannot be made in '{above}': {error.strerror}; choose another --out"
        ) from error
    for name, path in others.items():
        if path is not None:
            check_path(f"--{name}", path)
            if out.absolute() in (path.absolute(), *path.absolute().parents):
                raise ArgumentError(
                    f"--{name} '{path}' lies in --out '{out}', which the result takes as a whole; give"
                    " another path"
                )

