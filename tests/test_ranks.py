"""Processes that share the calibration batches decide as one process does."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import rank
import torch
from models import make_model
from test_cli import printed

import fasp_fx
from fasp_fx import PruningPlan

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def fork() -> Iterator[ForkServerContext]:
    """Makes processes that have imported everything, and the captures, which takes one of them seconds."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "path", [str(HERE), *sys.path])
        context.set_forkserver_preload(["rank_made"])
        yield context


def _begin(rank_: int, size: int, folder: Path, scenario: str, port: int) -> None:
    """What one process does, its error stream in a file: a pipe that nobody reads would stop who writes
    much.
    """
    os.dup2(os.open(folder / f"error{rank_}", os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(HERE)
    os.environ["MASTER_PORT"] = str(port)
    rank.main(rank_, size, folder, scenario)


def _run(fork: ForkServerContext, size: int, folder: Path, scenario: str) -> list[tuple[int | None, str]]:
    """Exit code and error stream of every process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        fork.Process(target=_begin, args=(number, size, folder, scenario, port)) for number in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(400)
    return [(one.exitcode, (folder / f"error{number}").read_text()) for number, one in enumerate(started)]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_they_decide_as_one(fork: ForkServerContext, tmp_path: Path, size: int) -> None:
    make_model(tmp_path / "model", layers=1)
    (tmp_path / "text.txt").write_text("A smaller model answers sooner. " * 20)
    for code, error in _run(fork, size, tmp_path, "prune"):
        assert code == 0, error
    results = [torch.load(tmp_path / f"rank{number}.pt") for number in range(size)]
    for name, (plan, weights) in rank.cases(None).items():
        for found_plan, found in (result[name] for result in results):
            assert PruningPlan.from_json(found_plan).groups == plan.groups, name
            for key, tensor in weights.items():
                torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")
        first = results[0][name][1]
        assert all(torch.equal(result[name][1][key], first[key]) for result in results for key in first), (
            "all have the same to the bit"
        )
    out = fasp_fx.load(tmp_path / "out")
    text = ("--calibration", tmp_path / "text.txt")
    printed("prune", *rank.SMALL, tmp_path / "model", *text, "--out", tmp_path / "alone")
    assert out.plan.groups == fasp_fx.load(tmp_path / "alone").plan.groups


def test_one_that_fails_or_dies_ends_all_with_what_it_said(fork: ForkServerContext, tmp_path: Path) -> None:
    """Those that failed go on together until one dies (:func:`rank.dies`)."""
    ends = _run(fork, 2, tmp_path, "fails")
    assert [code for code, _ in ends] == [7, 3], ends
    assert not list(tmp_path.glob("*.pt"))
