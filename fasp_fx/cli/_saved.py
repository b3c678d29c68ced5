"""Pruned models on disk as the command line writes and reads them: folders of :mod:`fasp_fx.hf`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..base._atomic import MARK
from ..errors import StoreError
from ..storage._folder import MANIFEST, is_save, kind_of
from ._arguments import SHOWN, check_path
from ._models import Source, load_model, load_tokenizer

if TYPE_CHECKING:
    from ..hf import Pruned


def is_saved(model: str) -> bool:
    """Whether a command line argument is a folder that fasp_fx wrote, rather than a model of transformers."""
    folder = Path(model)
    try:
        return (folder / MANIFEST).is_file() and not is_save(folder, "plain")
    except OSError:  # no such path can be
        return False


def check_target(out: Path, *, overwrite: bool, plain: bool = False) -> None:
    """Refuse a folder that could not be written later, before any work is done.

    Args:
        plain: a plain checkpoint will be written, which replaces only such.

    Raises:
        StoreError: something is there that must not be replaced, or the folder cannot be made.
    """
    check_path("--out", out)
    if os.path.lexists(out):
        if not overwrite:
            raise StoreError(
                f"'{out}' exists; choose another --out, or pass --overwrite to replace an earlier result"
            )
        if out.is_symlink() or not is_save(out, "plain" if plain else "hf"):
            raise StoreError(
                f"'{out}' holds something other than an earlier result, which --overwrite never replaces;"
                " choose another --out or remove it yourself"
            )
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StoreError(
            f"'{out}' cannot be made: '{above}' is not a folder that you may write to; choose another --out"
        )
    try:  # some file systems refuse what their permissions allow
        os.rmdir(tempfile.mkdtemp(prefix=f".{MANIFEST}.", suffix=".partial", dir=above))
    except OSError as error:
        raise StoreError(
            f"'{out}' cannot be made: nothing can be written to '{above}' ({error.strerror}); choose another"
            " --out"
        ) from error
    longest = os.pathconf(above, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if len(os.fsencode(out.absolute().name)) + MARK > longest:
        raise StoreError(
            f"the name of --out '{str(out)[:SHOWN]}…' is too long: it may have {longest - MARK} bytes; choose"
            " a shorter one"
        )


def load_saved(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """A saved model and its tokenizer.

    Raises:
        StoreError: a file is missing, damaged or of another version.
        ArgumentError: there is no tokenizer with it.
    """
    from ..hf import PrunedForCausalLM

    model = PrunedForCausalLM.from_pretrained(folder, device_map=device)
    return model, load_tokenizer(Source(str(folder)))


def load_pruned(folder: Path, device: torch.device) -> Pruned:
    """A pruned model as :func:`fasp_fx.hf.prune` returned it, of either kind of folder.

    Raises:
        StoreError: a file is missing, damaged or of another version, or the folder is no pruned model.
        ArgumentError: there is no tokenizer with it.
    """
    from ..hf import Pruned
    from ..hf._plain_folder import read_plain

    kind = kind_of(folder)
    if kind == "plain":
        plan, report = read_plain(folder)
        return Pruned(
            load_model(Source(str(folder)), device=device), plan, report, load_tokenizer(Source(str(folder)))
        )
    if kind != "hf":
        raise StoreError(
            f"'{folder}' holds no pruned language model; give a folder that `fasp-fx prune` wrote"
        )
    model, tokenizer = load_saved(folder, device)
    return Pruned(model, model.plan, model.report, tokenizer)


__all__ = ["check_target", "is_saved", "load_pruned", "load_saved"]
