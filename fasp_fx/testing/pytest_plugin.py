"""What pytest gets from an installed fasp_fx: the fixture ``fasp_fx_check``, and a line at the end that says
how much was tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ._verdict import TALLY, ProgramVerdict
from .program import check_program

_KEY = "fasp_fx_tally"


@pytest.fixture
def fasp_fx_check() -> Callable[..., ProgramVerdict]:
    """:func:`fasp_fx.testing.check_program`."""
    return check_program


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its counts to the process that started it."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_KEY] = dict(TALLY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add up what the workers did."""
    TALLY.update(getattr(node, "workeroutput", {}).get(_KEY, {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many programs and examples were tried, and with which seed."""
    if TALLY["programs"] or TALLY["examples"]:
        seed = getattr(terminalreporter.config.option, "hypothesis_seed", None)
        terminalreporter.write_line(
            f"fasp_fx.testing: {TALLY['programs']:,} programs and {TALLY['examples']:,} examples of"
            f" {TALLY['rules']:,} rules were tried"
            f" (hypothesis seed {seed if seed is not None else 'fixed by the profile'})"
        )
