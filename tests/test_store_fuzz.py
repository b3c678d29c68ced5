"""Saved results changed at random and sealed again are refused in words, or load as what they say: no code
runs, and nothing takes long.

Forty forgeries of each format by default. Slices of any length, which go on where others stopped, are run by
``python tests/forging.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import PROFILE
from forging import FORMATS, Forger, Tried

pytestmark = pytest.mark.filterwarnings("ignore")

COUNT = 2000 if PROFILE == "slow" else 40


@pytest.mark.parametrize(
    "name",
    [
        "whole",
        "parts",
        "plain",
        pytest.param("rich", marks=pytest.mark.slow),
        pytest.param("hf", marks=pytest.mark.slow),
    ],
)
def test_forgeries_at_random(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in FORMATS
    monkeypatch.chdir(tmp_path)
    forger, tried = Forger(name, tmp_path / name, tmp_path), Tried()
    for seed in range(COUNT):
        forger.try_one(seed, tried)
    assert not tried.wrong, "\n".join(tried.wrong)
    assert tried.outcomes["refused"]
    assert tried.outcomes["equal"]
