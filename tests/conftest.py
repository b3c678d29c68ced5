"""Profiles, and captures shared by tests: exporting a model costs seconds, so each is captured once per
process.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import none
from models import ZOO
from patched import DAY, PROFILE, patch_torch
from saved import small_result

import fasp_fx

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
settings.register_profile(
    "fast",
    max_examples=10,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    **_COMMON,
)
settings.register_profile("slow", max_examples=500, derandomize=False, print_blob=True, **_COMMON)
settings.load_profile(PROFILE)
#: examples per property
EXAMPLES = settings.default.max_examples


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until everything is imported: what modules leave is no garbage
    patch_torch()
    # Kernels are compiled here, not by processes that would first take seconds to begin.
    torch._inductor.config.compile_threads = 1
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    if PROFILE == "slow" and getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


def pytest_report_header(config: pytest.Config) -> str:
    seed = getattr(config.option, "hypothesis_seed", None)
    return (
        f"fasp_fx profile: {PROFILE} ({settings.default.max_examples} examples per property, seed"
        f" {seed or 'fixed'}, FASP_FX_DAY={DAY})"
    )


@given(none())
def _begin(_: None) -> None:
    """Lets hypothesis make its random numbers, which it looks for the holders of."""


def pytest_collection_finish() -> None:
    """What is imported stays; looking through it again and again would take a tenth of the time."""
    _begin()  # holders that are frozen are not found
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    gc.enable()


#: files that share captures, so that one worker runs them; the dearest first
TOGETHER = (
    (
        "tests/hf/test_model.py",
        "tests/hf/test_generation.py",
        "tests/hf/test_folder.py",
    ),
    ("tests/test_ranks.py", "tests/test_offload.py"),
    ("tests/test_cli.py",),
    ("tests/hf/test_plain.py",),
    # these take long, and nobody shall wait for them at the end
    ("tests/testing/test_mutants.py",),
    ("tests/test_eager.py",),
    ("tests/testing/test_check_rule.py",),
)


#: tests that take more than one and a half seconds: where a whole folder is run, each case has its turn one
#: day in so many
TURNS, DEAR_EVERY = Path(__file__).with_name("turns.txt"), 5

#: where each of these files stands
_TURN = {file: turn for turn, files in enumerate(TOGETHER) for file in files}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files in the order of their collection, and what shares captures by one worker."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            # The runs of a model share what is made of it.
            return nodeid.rpartition("-")[0] if "test_corpus" in file else str(_TURN.get(file, file))

    config.option.loadscopereorder = False
    return Together(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    takes_turns = all(Path(each.partition("::")[0]).is_dir() for each in config.args)
    items.sort(key=lambda item: _TURN.get(item.nodeid.split("::")[0], len(_TURN)))
    if PROFILE == "slow":
        return
    skip = pytest.mark.skip(reason="runs only with FASP_FX_PROFILE=slow, or on another FASP_FX_DAY")
    listed = TURNS.read_text("utf-8").splitlines() if takes_turns else []
    dear = {test: itertools.count(first) for first, test in enumerate(listed)}
    turns: dict[str, itertools.count[int]] = defaultdict(itertools.count, dear)
    for item in items:
        test, sampled = item.nodeid.partition("[")[0], item.get_closest_marker("sampled")
        days = max(DEAR_EVERY if test in dear else 1, sampled.args[0] if sampled else 1)
        if item.get_closest_marker("slow") or (next(turns[test]) + DAY) % days:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def llama() -> fasp_fx.Captured:
    """A small Llama; tests must not change it."""
    return fasp_fx.capture(ZOO["llama_gqa"].build(), (), ZOO["llama_gqa"].example())


@pytest.fixture
def no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder that must be empty afterwards."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def result() -> fasp_fx.Result:
    """A small result with everything that a save must keep."""
    torch.manual_seed(0)
    return small_result()


@pytest.fixture
def saved(result: fasp_fx.Result, tmp_path: Path) -> Path:
    """That result on disk."""
    return result.save(tmp_path / "out")
