"""How long work shows where it is: a function of the caller's, or a bar where somebody looks on. The
command shows it before torch is imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from fasp_fx.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")

#: what ``progress=`` takes: a function that is called with the fraction done; ``None``: a bar in a terminal
#: or a notebook, and nothing elsewhere; ``False``: nothing
Shown = Callable[[float], None] | bool | None


def process(name: str, default: int) -> int:
    """What ``torchrun`` says of this process: ``RANK``, ``LOCAL_RANK`` or ``WORLD_SIZE``."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def bar_on(console: Console) -> Progress:
    """A bar with the time that remains, which goes when the work is done; none in a file or a pipe."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not (console.is_terminal or console.is_jupyter),
    )


def shows(doing: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a function be given a function as ``progress``, whatever its caller gives (:data:`Shown`).

    Args:
        doing: what stands before the bar; until the first fraction comes, it says that it gets ready.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            progress: Any = kwargs.get("progress")
            if not (progress is None or isinstance(progress, bool) or callable(progress)):
                raise ArgumentError(
                    f"progress is a {type(progress).__name__}; pass a function, or False to be quiet"
                )
            if callable(progress):
                return function(*args, **kwargs)
            quiet = progress is False or process("RANK", 0) > 0
            with bar_on(Console(stderr=True, quiet=quiet)) as bar:
                task = bar.add_task(f"{doing}: getting ready", total=None)

                def update(fraction: float) -> None:
                    said = doing if fraction < 1 else f"{doing}: finishing"
                    bar.update(task, description=said, completed=fraction, total=1.0)

                kwargs["progress"] = update
                return function(*args, **kwargs)

        return run

    return decorated


def advance_of(progress: Shown) -> Callable[[float], None]:
    """The function to call with the fraction done."""
    return progress if callable(progress) else lambda fraction: None


def between(advance: Callable[[float], None], start: float, end: float) -> Callable[[float], None]:
    """The progress of a step, as a part of that of all."""
    return lambda fraction: advance(start + (end - start) * fraction)
