"""The same on a GPU, where there is one; and what torch makes by default somewhere else does not get into the
library's own random numbers.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Spec, build, tokens
from oracle import TOLERANCE, error, masked, removed_columns

import fasp_fx
from fasp_fx.calibration import Columns, Gram, Random
from fasp_fx.calibration._restoration import SKETCHED, _sketch

SPEC = Spec(
    layers=2, hidden=8, kv_heads=2, repeat=2, head_dim=4, ffn=12, bias=True, gated=True, positions="rope"
)
BATCHES = [tokens(4, 9, seed=seed) for seed in range(4)]

SOURCES = Path(fasp_fx.__file__).parent


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.cuda(skip(test))


@on_gpu
def test_gram_matrices_agree_to_rounding() -> None:
    x = torch.randn(4, 128, 700, generator=torch.Generator().manual_seed(0))
    here, there = Gram(700, torch.device("cpu")), Gram(700, torch.device("cuda"))
    here.update(x, 2)
    there.update(x.cuda(), 2)
    torch.testing.assert_close(there.symmetric().cpu(), here.symmetric(), rtol=1e-4, atol=1e-2)


@on_gpu
def test_prune_on_the_device_is_mask_exact() -> None:
    model, example = (
        build(Spec(layers=2, hidden=16, kv_heads=2, repeat=2, head_dim=8, ffn=32), 0).cuda(),
        tokens(2, 6).cuda(),
    )
    result = fasp_fx.prune(model, (example,), calibration=[example], sparsity=0.2, restore=None)
    assert all(parameter.is_cuda for parameter in result.module.parameters())
    with torch.no_grad(), masked(model, removed_columns(result.plan, model)):
        expected = model(example)
    assert error(result.module(example), expected) <= TOLERANCE


@on_gpu
def test_activations_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = (
        build(Spec(layers=2, hidden=16, kv_heads=2, head_dim=8, ffn=32), 0).cuda(),
        tokens(4, 8).cuda(),
    )
    moved: list[int] = []
    original = torch.Tensor.cpu

    def watch(self: torch.Tensor) -> torch.Tensor:
        moved.append(self.numel())
        return original(self)

    monkeypatch.setattr(torch.Tensor, "cpu", watch)
    fasp_fx.prune(model, (example,), calibration=[example], sparsity=0.2)
    assert max(moved, default=0) <= 256, "something larger than the hashes of weights went to the host"


@on_gpu
@pytest.mark.parametrize("moved", [True, False], ids=["model on the device", "device argument"])
def test_restored_results_agree(moved: bool) -> None:
    model = build(SPEC)
    expected = fasp_fx.prune(model, (BATCHES[0],), calibration=BATCHES, sparsity=0.3)
    if moved:
        other = copy.deepcopy(model).cuda()
        batches = [batch.cuda() for batch in BATCHES]
        found = fasp_fx.prune(other, (batches[0],), calibration=batches, sparsity=0.3)
    else:
        found = fasp_fx.prune(model, (BATCHES[0],), calibration=BATCHES, sparsity=0.3, device="cuda")
        assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert all(parameter.device.type == "cuda" for parameter in found.module.parameters())
    assert found.plan.slices() == expected.plan.slices()
    unseen = tokens(3, 6)
    assert error(found.module(unseen.cuda()).cpu(), expected.module(unseen)) < 1e-2


@on_gpu
def test_weights_in_files_and_batches_on_the_device(tmp_path: Path) -> None:
    model = build(SPEC)
    expected = fasp_fx.prune(model, (BATCHES[0],), calibration=BATCHES, sparsity=0.3, quality="fast")
    torch.cuda.reset_peak_memory_stats()
    with fasp_fx.offload(tmp_path, device="cuda"):
        found = fasp_fx.prune(model, (BATCHES[0],), calibration=BATCHES, sparsity=0.3, quality="fast")
    assert torch.cuda.max_memory_allocated() > 0
    assert all(parameter.device.type == "cpu" for parameter in found.module.parameters())
    assert found.plan.slices() == expected.plan.slices()
    unseen = tokens(3, 6)
    assert error(found.module(unseen), expected.module(unseen)) < 1e-2


def test_draws_are_the_same_whatever_the_default_device_is() -> None:
    rows = torch.ones(SKETCHED + 3, 2)
    columns = Columns(torch.ones(2, 5), None, None, name="a")
    expected = _sketch(rows), Random(1)(columns)
    with torch.device("meta"):
        found = _sketch(rows), Random(1)(columns)
    for own, other in zip(found, expected, strict=True):
        assert own.device.type == "cpu"
        assert torch.equal(own, other)


def test_every_draw_from_a_generator_says_where() -> None:
    """A generator of the CPU does not draw on another device."""
    silent = []
    for file in SOURCES.rglob("*.py"):
        if file.relative_to(SOURCES).parts[0] in ("testing", "training"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            given = {keyword.arg for keyword in node.keywords} if isinstance(node, ast.Call) else set()
            if "generator" in given and "device" not in given:
                silent.append(f"{file.relative_to(SOURCES)}:{node.lineno}")
    assert not silent
