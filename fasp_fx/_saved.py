"""Results on disk as the command line writes them: what :mod:`fasp_fx.store` saves, with the tokenizer in a subfolder."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import store
from ._models import Source, load_tokenizer
from ._result import Result
from .errors import ArgumentError, StoreError

TOKENIZER = "tokenizer"


def is_saved(model: str) -> bool:
    """Whether a command line argument is a folder that :func:`save` wrote, rather than a model."""
    return (Path(model) / store.MANIFEST).is_file()


def check_target(out: Path, *, overwrite: bool, plain: bool = False) -> None:
    """Refuse a folder that could not be written later, before any work is done.

    Args:
        plain: a plain checkpoint will be written, which replaces only such.

    Raises:
        StoreError: something is there that must not be replaced, or the folder cannot be made.
    """
    if os.path.lexists(out):
        if not overwrite:
            raise StoreError(f"'{out}' exists; choose another --out, or pass --overwrite to replace an earlier result")
        if out.is_symlink() or not (_is_plain(out) if plain else _is_result(out)):
            raise StoreError(
                f"'{out}' holds something other than an earlier result, which --overwrite never replaces; choose another --out or remove it yourself"
            )
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StoreError(f"'{out}' cannot be made: '{above}' is not a folder that you may write to; choose another --out")


def _is_result(out: Path) -> bool:
    known = {store.MANIFEST, *store.FILES, TOKENIZER}
    return is_saved(str(out)) and all(child.name in known for child in out.iterdir())


def _is_plain(out: Path) -> bool:
    from .hf._plain_folder import is_plain

    return is_plain(out)


def save(result: Result, tokenizer: Any, out: Path, *, overwrite: bool) -> None:
    """Write a result and its tokenizer.

    Raises:
        StoreError: see :func:`fasp_fx.store.save`.
    """
    with _without_tokenizer(out) if overwrite else contextlib.nullcontext():
        result.save(out, overwrite=overwrite)
    try:
        tokenizer.save_pretrained(str(out / TOKENIZER))
    except OSError as error:
        raise StoreError(f"the model was saved at '{out}', but not its tokenizer: {error}") from error


@contextlib.contextmanager
def _without_tokenizer(out: Path) -> Iterator[None]:
    """The store replaces only what it wrote, so an earlier tokenizer steps aside; it comes back if the save fails."""
    held = out / TOKENIZER
    if not held.is_dir():
        yield
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    held.rename(aside / TOKENIZER)
    try:
        yield
    except BaseException:
        (aside / TOKENIZER).rename(held)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_saved(folder: Path, device: torch.device) -> tuple[nn.Module, Any]:
    """A saved module and its tokenizer.

    Raises:
        StoreError: see :func:`fasp_fx.store.load`.
        ArgumentError: there is no tokenizer with it.
    """
    if not (folder / TOKENIZER).is_dir():
        raise ArgumentError(f"'{folder}' holds no tokenizer; save the model's with tokenizer.save_pretrained('{folder / TOKENIZER}')")
    return store.load(folder, device=device).module, load_tokenizer(Source(str(folder / TOKENIZER)))


__all__ = ["TOKENIZER", "check_target", "is_saved", "load_saved", "save"]
