"""What the command line writes besides its results: progress, warnings and errors, all on the
error stream.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from ..base._tolerable import short_of_memory
from ..errors import CalibrationWarning, CaptureWarning, FaspError, RankError, VerificationWarning, first_line
from ._plain_text import printable
from ._processes import rank

USAGE, INTERRUPTED = 2, 130
#: a stage of several commands
CAPTURING = "capturing and analysing the model"


class Stages:
    """One stage of work after another: a bar with the time left while it runs, a line with the time it took
    when it is done.
    """

    def __init__(self) -> None:
        # Of several processes the first speaks.
        self.console = Console(stderr=True, highlight=False, quiet=rank() > 0)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._name = ""
        self._began = 0.0

    def begin(self, name: str, *, measured: bool = False) -> None:
        """Start a stage, ending the one before.

        Args:
            measured: the stage will report the fraction done.
        """
        self.end()
        columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}")]
        if measured:
            columns += [BarColumn(), TaskProgressColumn(), TimeRemainingColumn()]
        silent = not self.console.is_terminal
        self._progress = Progress(
            *columns,
            console=self.console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=silent,
        )
        self._task = self._progress.add_task(escape(printable(name)), total=1.0 if measured else None)
        self._name, self._began = name, time.perf_counter()
        self._progress.start()

    def update(self, fraction: float) -> None:
        """Report the fraction of the stage that is done."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=fraction)

    def end(self, *, done: bool = True) -> None:
        """End the stage that runs, if any."""
        if self._progress is None:
            return
        self._progress.stop()
        self._progress = None
        if done:
            self.console.print(
                f"{escape(printable(self._name))} [dim]{time.perf_counter() - self._began:.1f} s[/dim]",
                soft_wrap=True,
            )


@contextlib.contextmanager
def session() -> Iterator[Stages]:
    """Stages for one command. Errors of the library become one line and exit code 2, Ctrl-C exit code 130."""
    stages = Stages()
    held: dict[type[Warning], list[str]] = {
        CaptureWarning: [],
        VerificationWarning: [],
        CalibrationWarning: [],
    }

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        for kind in held:
            if issubclass(category, kind):
                held[kind].append(str(message))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind in held:
                warnings.simplefilter("always", kind)
            warnings.showwarning = show
            yield stages
        stages.end()
        if rank() > 0:
            held = {VerificationWarning: []}
        for message in held.pop(VerificationWarning):  # each names a group
            _complain("warning", message)
        for messages in filter(None, held.values()):
            _complain(
                "warning",
                messages[0] + (f" (and {len(messages) - 1} more like it)" if len(messages) > 1 else ""),
            )
    except FaspError as error:
        stages.end(done=False)
        if not (isinstance(error, RankError) and rank() > 0):
            _complain("error", str(error))
        raise typer.Exit(USAGE) from None
    except short_of_memory() as error:
        stages.end(done=False)
        _complain(
            "error", f"memory is too short: {first_line(error)}; give less data at a time, or free some"
        )
        raise typer.Exit(USAGE) from None
    except OSError as error:  # the machine's: a full disk, a file that went away
        stages.end(done=False)
        named = f"'{error.filename}': " if error.filename is not None else ""
        _complain("error", f"{named}{error.strerror or error}; mend that, or choose another place")
        raise typer.Exit(USAGE) from None
    except KeyboardInterrupt:
        stages.end(done=False)
        _complain("interrupted", "nothing more was written")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        stages.end(done=False)


def results() -> Console:
    """The console for results, wide enough for tables when its output goes to a file."""
    probe = Console(quiet=rank() > 0)
    return probe if probe.is_terminal else Console(width=160, highlight=False, quiet=rank() > 0)


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def _complain(kind: str, message: str) -> None:
    print(f"fasp-fx: {kind}: {printable(' '.join(message.split()))}", file=sys.stderr)


__all__ = ["CAPTURING", "Stages", "results", "say", "session"]
