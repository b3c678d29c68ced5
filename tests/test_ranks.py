"""Processes that share the calibration batches decide as one process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import rank
import torch
from tiny_llama import make_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fasp_fx import PruningPlan
from fasp_fx.cli import app

HERE = Path(__file__).parent
COMMAND = ["prune", *rank.SMALL]


def _run(size: int, folder: Path, scenario: str) -> list[tuple[int, str]]:
    """Exit code and error stream of every process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, started = [sys.executable, str(HERE / "rank.py")], []
    for number in range(size):
        with (folder / f"error{number}").open(
            "w"
        ) as error:  # a pipe that nobody reads would stop who writes much
            environment = {**os.environ, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            started.append(
                subprocess.Popen(
                    [*command, str(number), str(size), str(folder), scenario],
                    stderr=error,
                    cwd=HERE,
                    env=environment,
                )
            )
    codes = [process.wait(timeout=400) for process in started]
    return [(code, (folder / f"error{number}").read_text()) for number, code in enumerate(codes)]


@cache
def _alone() -> dict[str, tuple[PruningPlan, dict[str, torch.Tensor]]]:
    return rank.cases(None)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_they_decide_as_one(tmp_path: Path, size: int) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("A smaller model answers sooner. " * 20)
    for code, error in _run(size, tmp_path, "prune"):
        assert code == 0, error
    results = [torch.load(tmp_path / f"rank{number}.pt") for number in range(size)]
    for name, (plan, weights) in _alone().items():
        for found_plan, found in (result[name] for result in results):
            assert PruningPlan.from_json(found_plan).groups == plan.groups, name
            for key, tensor in weights.items():
                torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4, msg=f"{name}: {key}")
        first = results[0][name][1]
        assert all(torch.equal(result[name][1][key], first[key]) for result in results for key in first), (
            "all have the same to the bit"
        )
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    alone = CliRunner().invoke(
        app,
        [
            *COMMAND,
            str(tmp_path / "model"),
            "--calibration",
            str(tmp_path / "text.txt"),
            "--out",
            str(tmp_path / "alone"),
        ],
    )
    assert alone.exit_code == 0, alone.output
    assert out.plan.groups == AutoModelForCausalLM.from_pretrained(tmp_path / "alone").plan.groups


def test_one_that_dies_ends_all(tmp_path: Path) -> None:
    codes = [code for code, _ in _run(2, tmp_path, "dies")]
    assert codes == [7, 3]
    assert not list(tmp_path.glob("*.pt"))
