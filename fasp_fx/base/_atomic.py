"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from fasp_fx.errors import StoreError

#: what is raised where a disk is full, or a file cannot be written for another reason
_UNWRITTEN = (OSError, SafetensorError)


@contextlib.contextmanager
def new_folder(
    path: Path, *, replaceable: Callable[[Path], bool] | None, keep: bool = True
) -> Iterator[Path]:
    """Give a temporary sibling of ``path`` to fill; it takes the name ``path`` when the block ends, and is
    removed when the block raises.

    Args:
        path: the folder to make; missing folders above it are made too.
        replaceable: whether a folder of that name may be replaced; ``None``: none may.
        keep: ``False`` leaves nothing behind: it only finds out whether the folder could be made.

    Raises:
        StoreError: the path is taken or cannot be written.
    """
    _refuse_taken(path, replaceable)
    with _sibling(path) as temporary:
        temporary.mkdir()
        yield temporary
        if keep:
            _refuse_taken(path, replaceable)
            _install(temporary, path)


@contextlib.contextmanager
def new_file(path: Path, *, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a temporary sibling of ``path`` to write; it takes the name ``path`` when the block ends, and is
    removed when the block raises.

    Args:
        path: the file to make; missing folders are made.
        replaceable: whether a file of that name may be replaced.

    Raises:
        StoreError: the path is taken or cannot be written.
    """
    path = path.absolute()
    with _sibling(path) as temporary:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not replaceable(path)):
            raise StoreError(
                f"'{path}' holds something that fasp_fx did not write, so it is not replaced; choose another"
                " file or remove it yourself"
            )
        temporary.touch()
        yield temporary
        temporary.replace(path)


@contextlib.contextmanager
def _sibling(path: Path) -> Iterator[Path]:
    """The name of a temporary sibling of a path; what has it when the block ends is removed."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except _UNWRITTEN as error:
        raise StoreError(f"'{path}' cannot be written: {error}; free space or choose another path") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Put text in the place of what a file holds, whole or not at all.

    Args:
        path: of the file; missing folders are made.

    Raises:
        StoreError: it is a link or no file, or cannot be written; what was there stays.
    """
    with new_file(path, replaceable=lambda file: True) as partial:
        partial.write_text(text, encoding="utf-8")


def _refuse_taken(path: Path, replaceable: Callable[[Path], bool] | None) -> None:
    if not os.path.lexists(path):
        return
    if replaceable is None:
        raise StoreError(
            f"'{path}' exists; choose another path, or pass overwrite=True to replace an earlier save"
        )
    if path.is_symlink() or not replaceable(path):
        raise StoreError(
            f"'{path}' exists and is not a folder that save() wrote, so it is not replaced; choose another"
            " path or remove it yourself"
        )


def _install(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``. What was there steps aside, and comes back if the new folder cannot
    take its place.
    """
    if not path.exists():
        temporary.rename(path)
        return
    aside = temporary.with_suffix(".old")
    path.rename(aside)
    try:
        temporary.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)
