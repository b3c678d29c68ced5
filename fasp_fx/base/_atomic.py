"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import StoreError

_EXCHANGE, _NO_REPLACE = 2, 1
#: what is raised where a disk is full, or a file cannot be written for another reason
_UNWRITTEN = (OSError, SafetensorError)
#: bytes by which the name of what is not yet whole is longer than the name it will take
MARK = len("..0123456789ab.partial")


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a temporary sibling of ``path`` to fill; it takes the name ``path`` when the block ends, and is
    removed when the block raises.

    Args:
        path: the folder to make.
        overwrite: replace a folder of that name, if ``replaceable`` says that it may be.

    Raises:
        StoreError: the path is taken or cannot be written.
    """
    refuse_null(path)
    _refuse_foreign(path)
    _refuse_taken(path, overwrite, replaceable)

    def put(temporary: Path) -> None:
        for file in (*temporary.rglob("*"), temporary):
            _sync(file)
        _refuse_taken(path, overwrite, replaceable)
        _install(temporary, path)

    with _sibling(path, put) as temporary:
        temporary.mkdir()
        yield temporary


@contextlib.contextmanager
def _sibling(path: Path, put: Callable[[Path], object]) -> Iterator[Path]:
    """The name of a temporary sibling of a path, which ``put`` puts there when the block ends. If it raises,
    nothing is left, nor of the folders made for it.
    """
    made = _make_parents(path.parent)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.partial"
    try:
        yield temporary
        put(temporary)
        if path.exists():
            made.clear()
            _sync(path.parent)
    except _UNWRITTEN as error:
        raise StoreError(f"'{path}' cannot be written: {error}; free space or choose another path") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def new_file(path: Path, *, replaceable: Callable[[Path], bool], keep: bool = True) -> Iterator[Path]:
    """Give a temporary sibling of ``path`` to write; it takes the name ``path`` when the block ends, and is
    removed when the block raises.

    Args:
        path: the file to make; missing folders are made.
        replaceable: whether a file of that name may be replaced.
        keep: ``False`` leaves nothing behind: it only finds out whether the file could be written.

    Raises:
        StoreError: the path is taken or cannot be written.
    """
    refuse_null(path)
    path = path.absolute()

    def put(temporary: Path) -> None:
        if keep:
            _sync(temporary)
            temporary.replace(path)

    with _sibling(path, put) as temporary:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not replaceable(path)):
            raise StoreError(
                f"'{path}' holds something that fasp_fx did not write, so it is not replaced; choose another"
                " file or remove it yourself"
            )
        temporary.touch()
        yield temporary


def write_text(path: Path, text: str) -> None:
    """Put text in the place of what a file holds, whole or not at all; a link to a file stays one, and so do
    its permissions. What is no file (a pipe, a device) is written to.

    Args:
        path: of the file; missing folders are made.

    Raises:
        StoreError: it is a folder or cannot be written; what was there stays.
    """
    refuse_null(path)
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_text(text, encoding="utf-8")
            return
    except OSError as error:
        raise StoreError(f"'{path}' cannot be written: {error}; choose another path") from error
    with new_file(path, replaceable=lambda file: True) as made:
        if path.exists():
            made.chmod(path.stat().st_mode & 0o777)
        made.write_text(text, encoding="utf-8")


def is_partial(path: Path, name: str) -> bool:
    """Whether a file is what was left of one of that name when a process was killed that wrote it."""
    return path.name.startswith(f".{name}.") and path.name.endswith(".partial")


def refuse_null(path: Path, option: str = "path") -> None:
    """Refuse a path that no file can have.

    Args:
        option: what the caller gave it as.

    Raises:
        StoreError: it is one.
    """
    if "\0" in os.fspath(path):
        raise StoreError(f"'{path}' holds a null character, which no path can; choose another {option}")


def _refuse_foreign(path: Path) -> None:
    """Refuse a path that is no Unicode text, in which safetensors writes and does not read.

    Raises:
        StoreError: it is one.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise StoreError(
            f"{os.fspath(path)!r} is not valid UTF-8, so that what is saved there could not be loaded; choose"
            " another path"
        ) from error


def _refuse_taken(path: Path, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise StoreError(
            f"'{path}' exists; choose another path, or pass overwrite=True to replace an earlier save"
        )
    if path.is_symlink() or not replaceable(path):
        raise StoreError(
            f"'{path}' exists and is not a folder that save() wrote, so it is not replaced; choose another"
            " path or remove it yourself"
        )


def _make_parents(folder: Path) -> list[Path]:
    """Make missing folders; returns those made, outermost first."""
    made: list[Path] = []
    try:
        for parent in [*reversed(folder.parents), folder]:
            if not parent.exists():
                parent.mkdir()
                made.append(parent)
    except OSError as error:
        raise StoreError(f"the folder '{folder}' cannot be made: {error}; choose another path") from error
    return made


def _sync(path: Path) -> None:
    """Wait until a file's or folder's content is on disk."""
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _install(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``; what was at ``path`` is then at ``temporary``."""
    taken = path.exists()
    if _rename(temporary, path, _EXCHANGE if taken else _NO_REPLACE):
        return
    # Without an atomic exchange the old folder steps aside, and comes back if the new one cannot take its
    # place.
    if not taken:
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


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Linux's rename with flags; ``False`` where the system or the file system lacks it."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if call(-100, os.fsencode(source), -100, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if os.strerror(number) and number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(target))


_UNSUPPORTED = {38, 22, 95}  # no such call, flags not known to the file system, not supported
