"""What the command line writes: results, groups and figures as tables to the output; progress, warnings and
errors to the error stream.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from fasp_fx.base import bar_on, process, short_of_memory
from fasp_fx.errors import (
    CalibrationWarning,
    CaptureWarning,
    FaspError,
    RankError,
    VerificationWarning,
    first_line,
)

if TYPE_CHECKING:
    from fasp_fx.analysis import Analysis, Group, Member
    from fasp_fx.pruning import Report

USAGE, INTERRUPTED = 2, 130
#: how the file of an exported program ends
PROGRAM = ".pt2"
#: a stage of several commands
CAPTURING = "capturing and analysing the model"


def printable(text: str, keep: str = "") -> str:
    """The text with every character escaped that a terminal would obey or not show, except those to keep: a
    name in a model's folder may hold any.
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def console(*, errors: bool = False) -> Console:
    """Shows text as it is, without markup; results that go to a file are wide enough for tables. Of several
    processes the first speaks.
    """
    terminal = Console(stderr=errors, markup=False, highlight=False, quiet=process("RANK", 0) > 0)
    if not errors and not terminal.is_terminal:
        terminal.width = 160
    return terminal


def say(line: str, *, keep: str = "") -> None:
    """Print a line of results, however long."""
    console().print(printable(line, keep), soft_wrap=True)


class Stages:
    """One stage of work after another: a bar with the time left while it runs, a line with the time it took
    when it is done.
    """

    def __init__(self) -> None:
        self.console = console(errors=True)
        self._progress: Progress | None = None

    def begin(self, name: str) -> None:
        """Start a stage, ending the one before."""
        self.end()
        self._progress = bar_on(self.console)
        self._progress.add_task(printable(name), total=None)
        self._progress.start()

    def update(self, fraction: float) -> None:
        """Report the fraction of the stage that is done."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=fraction, total=1.0)

    def end(self, *, done: bool = True) -> None:
        """End the stage that runs, if any."""
        if self._progress is not None:
            task = self._progress.tasks[0]
            self._progress.stop()
            self._progress = None
            if done:
                self.console.print(f"{task.description} {task.elapsed:.1f} s", soft_wrap=True)


@contextlib.contextmanager
def session() -> Iterator[Stages]:
    """Stages for one command. Errors of the library and of the machine become one line and exit code 2,
    Ctrl-C exit code 130; warnings of the library are told at the end.
    """
    stages = Stages()
    # What transformers imports where it is there tells people of its own releases.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            for kind in (VerificationWarning, CaptureWarning, CalibrationWarning):
                warnings.simplefilter("always", kind)
            yield stages
        stages.end()
        # Each warning once: of several processes the first speaks, and each of the groups that it checked.
        told = VerificationWarning if process("RANK", 0) else Warning
        for message in dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, told)):
            _complain("warning", message)
    except (FaspError, OSError, KeyboardInterrupt, *short_of_memory()) as error:  # type: ignore[misc]
        stages.end(done=False)
        interrupted = isinstance(error, KeyboardInterrupt)
        if not (isinstance(error, RankError) and process("RANK", 0)):
            _complain("interrupted" if interrupted else "error", _explained(error))
        raise typer.Exit(INTERRUPTED if interrupted else USAGE) from None
    finally:
        stages.end(done=False)


def _explained(error: BaseException) -> str:
    if isinstance(error, FaspError):
        return str(error).replace("overwrite=True", "--overwrite")
    if isinstance(error, KeyboardInterrupt):
        return "nothing more was written"
    if isinstance(error, OSError) and error.errno != errno.ENOMEM:  # a full disk, a file that went away
        named = f"'{error.filename}': " if error.filename is not None else ""
        return f"{named}{error.strerror or error}; mend that, or choose another place"
    return f"memory is too short: {first_line(error)}; give less data at a time, or free some"


def _complain(kind: str, message: str) -> None:
    print(f"fasp-fx: {kind}: {printable(' '.join(message.split()))}", file=sys.stderr)


SHOWN = 6
_COLOURS = {"prunable": "green", "approximate": "yellow", "exempt": "cyan", "frozen": "red"}
#: the part of a weight's name that says which layer it is: from the last part on that is no number
_LAYER = re.compile(r"[^.]*[^.\d][^.]*(\.\d+)*(\.bias)?$")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", left: int = 1) -> Table:
    """A table of text as it is.

    Args:
        left: so many columns hold words; the others hold numbers.
    """
    columns = (
        Column(printable(heading), justify="left" if index < left else "right", overflow="fold")
        for index, heading in enumerate(headings)
    )
    rows_table = Table(*columns, title=title or None, title_justify="left")
    for row in rows:
        style = next((_COLOURS[cell] for cell in row if cell in _COLOURS), None)
        rows_table.add_row(*(printable(cell, keep="\n") for cell in row), style=style)
    return rows_table


def kinds(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups that differ only in the numbers in their names, such as the same group of every layer, together;
    what can be pruned first.
    """
    alike: dict[Any, list[Group]] = {}
    for group in sorted(groups, key=lambda group: group.status != "prunable"):
        members = ((m.name, m.dim) for m in (*group.producers, *group.consumers))
        texts = dict.fromkeys(
            (re.sub(r"\d+", "*", text), dim) for text, dim in ((group.reason, -1), *members)
        )
        alike.setdefault((group.status, group.size, group.blocks, *texts), []).append(group)
    return list(alike.values())


def short(members: Sequence[Member]) -> str:
    """The layers of these weights by their last name: ``gate_proj, up_proj``."""
    weights = (member.name.removesuffix(".weight") for member in members)
    names = dict.fromkeys(match[0] if (match := _LAYER.search(name)) else name for name in weights)
    named = [name for name in names if name.removesuffix(".bias") not in names.keys() - {name}]
    return ", ".join([*named[:SHOWN], *(["…"] if len(named) > SHOWN else [])]) or "-"


def groups_table(analysis: Analysis) -> Table:
    """All groups; those of the same kind in one row."""
    return table(
        ["groups", "status", "channels", "lose rows", "lose columns", "why"],
        (
            [
                str(len(alike)),
                one.status,
                f"{one.blocks} x {one.width}" if one.blocks > 1 else str(one.size),
                short(one.producers),
                short(one.consumers),
                one.reason,
            ]
            for alike in kinds(analysis.groups)
            for one in alike[:1]
        ),
        title=f"{len(analysis.groups)} coupled groups",
        left=6,
    )


def show_figures(report: Report) -> None:
    """Print figures and notes."""
    from fasp_fx.pruning import Figure

    figures = [Figure("parameters", *report.parameters), Figure("bytes", *report.bytes)]
    if report.cache is not None:
        figures.append(Figure("bytes of cache per token of one sequence", *report.cache))
    rows = (
        [
            row.what,
            *(f"{value:,.{row.digits}f}" for value in (row.dense, row.pruned)),
            f"{row.pruned / row.dense - 1:+.1%}" if row.dense else "",
        ]
        for row in (*figures, *report.figures)
    )
    console().print(table(["", "dense", "pruned", "change"], rows))
    for what, line in report.said():
        say(f"{what}: {line}")
    for note in report.notes:
        say(f"note: {note}")
