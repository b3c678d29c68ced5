"""What one of several processes that prune together does (tests/test_ranks.py)."""

import datetime
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from models import block, linear, made
from patched import patch_torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import fasp_fx
from fasp_fx.allocation import Search
from fasp_fx.cli._app import app
from fasp_fx.errors import ArgumentError, CalibrationError, RankError, StoreError
from fasp_fx.training import Schedule

TOKENS = 100

warnings.simplefilter("ignore")
patch_torch()


def parts() -> nn.Module:
    """Cannot be captured as a whole."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.second(x) if x.sum().item() > -1e9 else x

    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)) for _ in range(2))
    return made(forward, first=first, second=second)


def rectified() -> nn.Module:
    """Gives zero, and no gradient, for zeros."""
    up, down = nn.Linear(12, 24, bias=False), nn.Linear(24, 12, bias=False)
    return made(lambda m, x: torch.relu(block(m, x)), up=up, down=down)


def late() -> list[Tensor]:
    """Batches of which the first show no gradient, as the first processes find out alone."""
    return [batch * (index > 1) for index, batch in enumerate(numbers())]


def llama(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def twice() -> nn.Module:
    """Two layers that are used twice, and a product of activations."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + m.down(torch.relu(m.up(x)))
        x = x + m.down(torch.tanh(m.up(x)))
        return (m.query(x) @ m.key(x).transpose(1, 2)).softmax(-1) @ x

    torch.manual_seed(0)
    return made(forward, **linear(up=(12, 24), down=(24, 12), query=(12, 8), key=(12, 8)))


def tokens(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(TOKENS, (2, 24), generator=generator) for _ in range(7)]


def numbers() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, 9, 12, generator=generator) for _ in range(5)]


@cache
def captured(model: Callable[[], nn.Module]) -> fasp_fx.Captured:
    """Before processes are forked, so that all have it."""
    if model is llama:
        return fasp_fx.capture(llama(1), (), {"input_ids": tokens()[0], "use_cache": False})
    return fasp_fx.capture(model(), (numbers()[0],))


def cases(group: dist.ProcessGroup | None) -> dict[str, tuple[Any, dict[str, Tensor]]]:
    """Prunings with their plans and weights."""
    found = {}
    texts = [{"input_ids": batch, "use_cache": False} for batch in tokens()]
    result = fasp_fx.prune(
        captured(llama), calibration=texts, sparsity=0.3, quality="best", loss="next-token", group=group
    )
    found["a Llama"] = (result.plan, result.module.state_dict())
    search = {"allocation": Search(generations=3, offspring=4, sequences=5)}
    for options in ({"quality": "balanced"}, {"quality": "fast", "include": ("exempt",)}, search):
        once = captured(twice)
        result = fasp_fx.prune(once, calibration=numbers(), sparsity=0.3, group=group, **options)  # type: ignore[arg-type]
        found[f"used twice, {sorted(options)}"] = (result.plan, result.module.state_dict())
    torch.manual_seed(0)
    result = fasp_fx.prune(rectified(), (numbers()[0],), calibration=late(), sparsity=0.3, group=group)
    found["no gradient at first"] = (result.plan, result.module.state_dict())
    return found


def trains(group: dist.ProcessGroup, rank: int) -> None:
    """A model that shrinks as it is trained on other rows in each process, whose norms see nothing else."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))
    schedule = Schedule({2: 0.3, 4: 0.5}, [batch.flatten(0, 1) for batch in numbers()], group=group)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    wrapped, rows = DistributedDataParallel(model), numbers()[rank].flatten(0, 1)
    for step in range(1, 6):
        wrapped(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        small = schedule.step(step, model, optimizer)
        if small is not model:
            model, wrapped = small, DistributedDataParallel(small)
    assert schedule.plan is not None
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, (weights, schedule.plan.to_json(), optimizer.state_dict()))
    for others, plan, state in found:
        assert plan == schedule.plan.to_json()
        assert all(torch.equal(others[name], weight) for name, weight in weights.items())
        torch.testing.assert_close(state, optimizer.state_dict(), rtol=0, atol=0)
    assert len(weights["0.weight"]) <= 12


def refusals(group: dist.ProcessGroup, rank: int) -> None:
    """What all processes refuse, if one of them is given something else."""

    once = captured(twice)

    def refused(kind: type[Exception], said: str, model: fasp_fx.Captured = once, **other: Any) -> None:
        options: dict[str, Any] = {
            "calibration": numbers(),
            "sparsity": 0.3,
            "quality": "fast",
            "group": group,
        } | other
        with pytest.raises(kind, match=said):
            fasp_fx.prune(model, **options)

    refused(ArgumentError, "other calibration data", calibration=[batch * (1 + rank) for batch in numbers()])
    changed = twice()
    with torch.no_grad():
        changed.get_parameter("up.weight").mul_(1 + rank)
    refused(ArgumentError, "other model", model=fasp_fx.capture(changed, (numbers()[0],)))
    refused(CalibrationError, "too few for", calibration=numbers()[:1])
    refused(ArgumentError, "other options", sparsity=0.3 + 0.1 * rank)
    refused(ArgumentError, "other calibration data", calibration=numbers()[rank:])
    model = parts()
    with torch.no_grad():
        next(model.parameters()).mul_(1 + rank)
    with pytest.raises(ArgumentError, match="other model"):
        fasp_fx.prune(model, (numbers()[0],), calibration=numbers(), sparsity=0.3, group=group)
    broken = numbers()
    broken[-1][:] = 1e30  # of one process alone; what it sees is not finite
    for quality in ("fast", "balanced"):
        refused(CalibrationError, "not finite", calibration=broken, quality=quality)


#: options of the command line for a small model
SMALL = [
    "--length",
    "32",
    "--batches",
    "4",
    "--eval-batches",
    "2",
    "--round-to",
    "1",
    "--device",
    "cpu",
    "--quality",
    "fast",
]


def command_line(rank: int, size: int, folder: Path) -> None:
    """The command, as torchrun starts it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
    }
    arguments = [
        "prune",
        str(folder / "model"),
        "--calibration",
        str(folder / "text.txt"),
        "--text",
        str(folder / "text.txt"),
        "--out",
        str(folder / "out"),
        *SMALL,
        "--stream",  # the one process has its weights in memory
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert bool(done.output) == (rank == 0), "the first speaks for all"


def dies(group: dist.ProcessGroup, rank: int) -> None:
    """One process ends in the middle; what becomes of the others."""
    from fasp_fx.capturing import Runner

    if rank == 1:
        Runner.advance = lambda self, stop: os._exit(3)  # type: ignore[method-assign, assignment]
    with pytest.raises(RankError, match="lost the others"):
        fasp_fx.prune(captured(twice), calibration=numbers(), sparsity=0.3, quality="fast", group=group)
    os._exit(7)  # as a process does that ends in an error, without waiting for the others


class Own(Exception):
    """What nobody but the user raises."""


def fails(group: dist.ProcessGroup, rank: int, folder: Path) -> None:
    """One process fails, wherever it is; it raises its own error, and the other one says what that was. Then
    they go on together.
    """
    from fasp_fx.calibration import Journal, _visit
    from fasp_fx.calibration._repair import Repairs
    from fasp_fx.capturing import Runner
    from fasp_fx.pruning import _prune, _subject

    shortage = torch.OutOfMemoryError("no memory is left")
    places: list[tuple[int, BaseException, Any, str, dict[str, Any]]] = [
        (1, shortage, Runner, "advance", {"quality": "fast"}),
        (1, shortage, Repairs, "finish", {"quality": "best"}),
        (0, StoreError("no space is left"), Journal, "commit", {"checkpoint": folder / "run"}),
        (1, KeyboardInterrupt(), Runner, "_execute", {"quality": "balanced"}),
        (0, SystemExit(3), _visit, "_chosen", {}),
        (1, Own("mine"), _prune, "check_given", {}),
        (0, CalibrationError("one batch"), Runner, "advance", {"quality": "fast"}),
        (1, Own("late"), _subject, "rewrite", {}),
        (0, Own("dry"), _subject, "analyze_for", {}),
    ]
    once = captured(twice)
    common: dict[str, Any] = {"calibration": numbers(), "sparsity": 0.3, "group": group}

    def told(failed: int, error: type[BaseException], text: str, **options: Any) -> None:
        of_others = RankError, f"process {failed} of 2 has failed .{error.__name__}: {text}"
        kind, said = (error, text) if rank == failed else of_others
        with pytest.raises(kind, match=said):
            fasp_fx.prune(once, **common, **options)

    for failed, error, owner, name, options in places:
        with pytest.MonkeyPatch.context() as patch:
            if rank == failed:
                patch.setattr(owner, name, Mock(side_effect=error))
            told(failed, type(error), str(error), **options)
    told(1, ArgumentError, "quality=", **({"quality": "none of these"} if rank == 1 else {}))
    found = fasp_fx.prune(once, **common)
    assert found.plan.groups == fasp_fx.prune(once, **common | {"group": None}).plan.groups


def main(rank: int, size: int, folder: Path, scenario: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=120)
    )
    group = dist.group.WORLD
    assert group is not None
    if scenario == "fails":
        fails(group, rank, folder)
        dies(group, rank)
    torch.save(
        {name: (plan.to_json(), weights) for name, (plan, weights) in cases(group).items()},
        folder / f"rank{rank}.pt",
    )
    trains(group, rank)
    refusals(group, rank)
    dist.destroy_process_group()
    command_line(rank, size, folder)
