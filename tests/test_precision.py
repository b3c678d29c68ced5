"""Products are rounded while calibration data run, where that is asked for, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import Vectors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fasp_fx
from fasp_fx.base import float32_products
from fasp_fx.calibration import Columns
from fasp_fx.capturing._runner import execute

BATCHES = [torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
OWN = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Nothing of torch's own settings is left changed."""
    before = torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in OWN]
    yield
    assert (torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in OWN]) == before


def precisions(**options: Any) -> dict[str, set[str]]:
    """The precisions that torch was set to while a loss was taken and while a score was computed."""
    seen: dict[str, set[str]] = {"loss": set(), "score": set()}

    def loss(outputs: Any, *arguments: Any) -> Tensor:
        seen["loss"].add(torch.get_float32_matmul_precision())
        return outputs.square().sum(-1)

    def score(columns: Columns) -> Tensor:
        seen["score"].add(torch.get_float32_matmul_precision())
        return columns.weight.square().sum(0)

    result = fasp_fx.prune(
        Vectors(8).eval(),
        (BATCHES[0],),
        calibration=BATCHES,
        sparsity=0.3,
        score=score,
        allocation="global",
        loss=loss,
        **options,
    )
    assert result.report.sparsity == pytest.approx(0.3, abs=0.05)
    return seen


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes the hardware one that multiplies bfloat16, or one that does not."""
    return lambda able: monkeypatch.setattr(
        "fasp_fx.pruning._method.multiplies_bfloat16", lambda device: able
    )


def test_the_hardware_decides_in_which_precision_data_run(rounding: Callable[[bool], None]) -> None:
    for able, precision in ((True, "medium"), (False, "highest")):
        rounding(able)
        assert precisions() == {"loss": {precision}, "score": {"highest"}}


def test_what_torch_was_asked_for_before_stays(rounding: Callable[[bool], None]) -> None:
    rounding(True)
    before = [backend.fp32_precision for backend in OWN]
    torch.set_float32_matmul_precision("high")
    try:
        assert precisions() == {"loss": {"high"}, "score": {"high"}}
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend, own in zip(OWN, before, strict=True):
            backend.fp32_precision = own


def test_an_error_leaves_nothing_changed(rounding: Callable[[bool], None]) -> None:
    rounding(True)

    def fails(outputs: Any, *arguments: Any) -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(fasp_fx.errors.CalibrationError, match="no loss"):
        fasp_fx.prune(Vectors(8).eval(), (BATCHES[0],), calibration=BATCHES, sparsity=0.3, loss=fails)


class Precisions(TorchDispatchMode):
    """Notes the precision that operators whose names contain one of some words find."""

    def __init__(self, *words: str) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {word: set() for word in words}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for word in self.seen:
            if word in str(func):
                self.seen[word].add(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keys", "precision"), [(8, "ieee"), (1024, "bf16")])
def test_attention_over_few_keys_is_computed_in_full_forward_and_back(keys: int, precision: str) -> None:
    heads, weight = torch.randn(2, 3, keys, 16), torch.randn(16, 16, requires_grad=True)
    with float32_products("medium"), Precisions("attention", "mm") as precisions:
        for _ in range(2):
            projected = heads @ weight
            mixed = execute(torch.ops.aten.scaled_dot_product_attention.default, [projected] * 3, {})
            (mixed @ weight).sum().backward()
    assert precisions.seen == {"attention": {precision}, "mm": {"bf16"}}
    expected = torch.nn.functional.scaled_dot_product_attention(*[(heads @ weight)] * 3)
    torch.testing.assert_close(mixed, expected, rtol=0.2, atol=0.1)
