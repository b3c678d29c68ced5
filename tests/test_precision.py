"""Products are rounded while calibration data run, where that is asked for, and nowhere else."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from models import Vectors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fasp_fx
from fasp_fx.base import deviation, distance, float32_products
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
    """Makes the processor one that multiplies bfloat16 and rounds fast, or one that only multiplies it."""

    def change(able: bool) -> None:
        units = {"amx_bf16": able, "avx512_bf16": True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)

    return change


def test_the_hardware_decides_in_which_precision_data_run(rounding: Callable[[bool], None]) -> None:
    for able, precision in ((True, "medium"), (False, "highest")):
        rounding(able)
        assert precisions() == {"loss": {precision}, "score": {"highest"}}


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16", "avx2"])
def test_training_rounds_where_products_of_bfloat16_are_fast(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True}, raising=False)
    dense, seen = Vectors(8).eval(), []
    result = fasp_fx.prune(dense, (BATCHES[0],), calibration=BATCHES, sparsity=0.3)
    dense.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    fasp_fx.distil(result, dense, BATCHES, epochs=1)
    assert sum(seen) == (0 if unit == "avx2" else 3)  # of four batches one is held out, and judged in full


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


# --- how far apart outputs are


FILLINGS = (-1e9, torch.finfo(torch.float32).min, -65504.0)


def _scores() -> Tensor:
    return torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("filling", FILLINGS)
def test_fillings_hide_nothing(filling: float, added: bool) -> None:
    expected = _scores()
    expected[1, :5] = expected[1, :5] + filling if added else filling
    assert deviation(expected.clone(), expected) == distance(expected.clone(), expected) == 0
    found = expected.clone()
    found[0, 3] += 0.4
    assert deviation(found, expected) > 0.4 / float(_scores().max()) - 1e-6
    assert distance(found, expected) > 0.1
    found[1, 0] *= 0.99  # and a filling that is wrong is seen as well
    assert deviation(found, expected) > 0.4 / float(_scores().max()) - 1e-6
    found[0, 3] = expected[0, 3]
    assert 0.005 < deviation(found, expected) < 0.02


@given(st.integers(0, 2**32), st.floats(1e-6, 1e6), st.floats(1e-9, 1e-2))
def test_without_fillings_it_is_relative_to_the_largest(seed: int, scale: float, error: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = (torch.rand(64, generator=generator, dtype=torch.float64) + 0.01) * scale
    found = expected * (1 + error * (torch.rand(64, generator=generator, dtype=torch.float64) - 0.5))
    wanted = float((found - expected).abs().max() / expected.abs().max())
    assert math.isclose(deviation(found, expected), wanted, rel_tol=1e-9)


def test_an_entry_that_differs_alone_is_held_against_the_others() -> None:
    expected = torch.tensor([1.0, 0.5, -0.7, 0.01]).bfloat16()
    found = torch.tensor([1.0, 0.5, -0.7, 0.012]).bfloat16()
    assert max(deviation(found, expected), distance(found, expected)) < 0.003
    assert deviation(torch.tensor([1.0, 1e-8]), torch.tensor([1.0, 0.0])) < 1e-7
