"""Long work shows where it is, where somebody looks on."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
from rich.console import Console

from fasp_fx.base import _shown


@pytest.mark.parametrize("width", [10, 80])
@pytest.mark.parametrize("given", [{}, {"progress": None}, {"progress": False}, {"progress": [].append}])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_drawn_in_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], width: int, is_terminal: bool
) -> None:
    @_shown.shows("pruning")
    def work(progress: _shown.Shown = None) -> None:
        _shown.advance_of(progress)(0.5)

    drawn = io.StringIO()
    console = partial(Console, file=drawn, width=width, force_terminal=is_terminal)
    monkeypatch.setattr(_shown, "Console", lambda stderr, quiet: console(quiet=quiet))
    work(**given)
    assert ("pruning" in drawn.getvalue()) == (is_terminal and given.get("progress") is None)
