"""The options of ``fasp-fx prune`` that say how to prune, those of :class:`fasp_fx.PruningConfig`; and what
can be said of paths before any work is done.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..allocation.budgets import KINDS
from ..errors import ArgumentError, CalibrationError, FaspError, StoreError, first_line
from ..pruning.config import PruningConfig
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


#: budgets that an option asks for, with what it may be given
BUDGETS = {
    "parameters": "of the parameters: 0.8, 80%, 100M",
    "macs": "of the multiply-accumulates of a few tokens: 0.7",
    "bytes": "of the weights' bytes: 400MB",
    "cache_bytes": "of the cache's bytes per token of one sequence: 0.5",
}
_AMOUNT = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?)\s*(?:(%)|(?:([kmgt])(i?))?(b?))", re.IGNORECASE)


def option(text: str, *flags: str, more: bool = True, **settings: Any) -> Any:
    """An option as typer wants it. Its text says the default.

    Args:
        more: it stands under a heading of its own, as what few people need does.
    """
    heading = "More" if more else None
    make: Any = typer.Option
    return make(*flags, help=text, show_default=False, rich_help_panel=heading, **settings)


def with_pruning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a pruning in the place of its last parameter, ``**given``."""
    own = [*inspect.signature(command, eval_str=True).parameters.values()]
    forms = ((each, each.metadata["form"]) for each in fields(PruningConfig))
    kinds: dict[str, Any] = {
        each.name: Annotated[
            form | None, option(each.metadata["text"], more=each.name not in ("sparsity", "quality"))
        ]
        for each, form in forms
        if form is not None
    }
    for name, text in BUDGETS.items():
        flag = f"--{name.replace('_', '-')}"
        kinds[name] = Annotated[
            str | None, option(f"A budget: how much may stay {text}.", flag, metavar="AMOUNT")
        ]
    made = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in kinds.items()
    ]
    command.__signature__ = inspect.Signature([*own[:-1], *made])  # type: ignore[attr-defined]
    return command


def read_options(file: Path | None, given: Mapping[str, Any]) -> tuple[PruningConfig | None, dict[str, Any]]:
    """What was given of the options of a pruning.

    Args:
        file: a configuration as :meth:`fasp_fx.PruningConfig.to_json` writes it.
        given: by the names of parameters; ``None`` or nothing in a list: not given.

    Returns:
        The configuration of the file, and the options that stand in the place of its own.

    Raises:
        FaspError: an option is out of range, or conflicts with another; names it as it is given.
    """
    check_text("--config", file, "give one that holds what PruningConfig.to_json() wrote")
    options = {name: value for name, value in given.items() if value not in (None, [])}
    caps = [
        KINDS[(flag := name.replace("_", "-"))](read_amount(f"--{flag}", options.pop(name)))
        for name in BUDGETS
        if name in options
    ]
    if caps:
        options["budget"] = tuple(caps)
    if "restore" in options:
        options["restore"] = "least-squares" if options["restore"] else None
    with named_as_options(PruningConfig):
        config = None if file is None else PruningConfig.from_json(file.read_text(encoding="utf-8"))
        PruningConfig.of(config, options)
    return config, options


@contextmanager
def named_as_options(kind: Any) -> Iterator[None]:
    """What a configuration of that class says of its fields is said of options: ``--round-to 0``, not
    ``round_to=0``.
    """
    try:
        yield
    except FaspError as error:
        names = "|".join(each.name for each in fields(kind) if each.name != "budget")
        said = re.sub(rf"\b({names})=", lambda found: f"--{found[1].replace('_', '-')} ", str(error))
        raise type(error)(said) from error


def read_amount(option: str, text: str) -> float:
    """An amount as people type it. A share in (0, 1], such as 0.8 or 80%, is a float; others are an int,
    where K, M, G and T are powers of 1000, Ki, Mi … of 1024, and B says bytes.

    Raises:
        ArgumentError: the text is neither; names the option.
    """
    match = _AMOUNT.fullmatch(text.strip())
    number, percent, prefix, binary, unit = match.groups("") if match else ("0", "", "", "", "")
    is_whole = bool(prefix or unit) or ("." not in number and not percent)
    power = "kmgt".find(prefix.lower()) + 1 if prefix else 0
    value = float(number) * (1024 if binary else 1000) ** power / (100 if percent else 1)
    if not value or (value < 1 if is_whole else value > 1):
        raise ArgumentError(
            f"{option} '{text:.40}' is no amount; give a share in (0, 1], such as 0.8 or 80%, or how much may"
            " stay, such as 100M"
        )
    return int(value) if is_whole else value
