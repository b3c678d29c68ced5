"""What a pruning will take, held against what it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fasp_fx.budgets import Parameters
from fasp_fx.config import PruningConfig
from tiny_llama import make_model
from torch import Tensor, nn
from typer.testing import CliRunner

import fasp_fx
from fasp_fx.capturing._runner import Runner
from fasp_fx.cli._app import app
from fasp_fx.cli._prune import forecast, live_bytes

pytestmark = pytest.mark.usefixtures("shared_captures")


class Model(nn.Module):
    """A residual stream, a wide layer, and something for every layer that is returned."""

    def __init__(self, width: int = 16, inner: int = 48, layers: int = 3) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, inner) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(inner, width) for _ in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        kept = []
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
            kept.append(x.view(-1, x.shape[-1]))
        return x, kept


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.25},
        {"budget": Parameters(0.7)},
        {"sparsity": {"down.0.weight": 0.5, "down.1.weight": 0.5}},
        {"sparsity": 0.3, "exclude": ("up.0",)},
    ],
    ids=["sparsity", "budget", "patterns", "exclude"],
)
def test_what_is_left_is_foreseen_whatever_says_how_much_goes(options: dict[str, Any]) -> None:
    model = Model().eval()
    captured = fasp_fx.capture(model, (torch.randn(3, 5, 16),))
    asked: dict[str, Any] = {"score": "magnitude", "restore": None, "quality": "fast", **options}
    analysis, config = fasp_fx.analyze(captured), PruningConfig(**asked)
    result = fasp_fx.prune(captured, **asked)
    (whole, pruned), repaired = result.report.bytes, 4 * 3 * 16 * 48

    def disk(batches: int, dtype: torch.dtype) -> int:
        return forecast(analysis, config, batches, dtype=dtype).disk

    matrices = disk(0, torch.float32) - whole - repaired - pruned
    assert -0.05 * pruned <= matrices <= 32 * 48**2
    waiting = disk(2, torch.float32) - disk(0, torch.float32)
    assert waiting == 2 * (disk(2, torch.bfloat16) - disk(0, torch.bfloat16)) > 0


def _live_when_run(program: Any, batch: Tensor, returns: bool) -> list[int]:
    """Bytes of the values that a runner holds after each node, those of one storage once."""
    runner, found = Runner(program, [[batch]], returns=returns), []
    for index in range(len(runner.nodes)):
        runner.advance(index + 1)
        storages = (value.untyped_storage() for value in runner._memory[0].values())
        found.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
    return found


def test_what_is_live_is_what_a_runner_holds() -> None:
    x = torch.randn(2, 5, 16)
    program = fasp_fx.capture(Model().eval(), (x,)).program
    predicted = live_bytes(program.module.graph, lambda shape: (int(size) for size in shape))
    held = _live_when_run(program, x, returns=False)
    # a runner drops what a node was the last to read; while the node is executed it is there
    for index, node in enumerate(program.module.graph.nodes):
        if node.op == "call_function":
            read = sum(v.meta["val"].numel() * 4 for v in node.all_input_nodes if v.op != "get_attr")
            assert held[index] <= predicted[index] <= held[index] + read
    assert max(held) < max(_live_when_run(program, x, returns=True)), "what is returned is not kept"


@pytest.mark.parametrize(
    ("options", "code"),
    [("", 0), ("--length 4096", 2), ("--format plain --sparsity 0.95", 2)],
)
def test_dry_run_loads_no_weight_and_writes_nothing(tmp_path: Path, options: str, code: int) -> None:
    """And refuses what pruning would."""
    make_model(tmp_path / "model", layers=1)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not to be read" * 10_000)
    before = sorted(tmp_path.rglob("*"))
    where = ["prune", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--dry-run"]
    size = ["--length", "32", "--batches", "4", "--device", "cpu"]
    done = CliRunner().invoke(app, [*where, *size, *options.split()])
    assert done.exit_code == code, done.output
    assert ("with --stream" in " ".join(done.stdout.split())) is (code == 0)
    assert sorted(tmp_path.rglob("*")) == before
