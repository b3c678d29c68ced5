"""Products are rounded while calibration data run, where that is asked for, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fasp_fx.scoring import Columns
from refusal import Vectors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fasp_fx
from fasp_fx.base._device import float32_products
from fasp_fx.capturing._attention import ToldOfCausality, _told_of_causality, execute

pytestmark = pytest.mark.usefixtures("shared_captures")

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


def _masks(length: int) -> dict[str, tuple[Tensor, bool]]:
    """Masks of as many queries as keys, and whether each is causal."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    window = causal.triu(-2)
    far, near = causal.clone(), causal.clone()
    far[-1, 0], near[0, 1] = False, True
    found = {
        "causal": (causal, True),
        "a window": (window, False),
        "one hidden": (far, False),
        "one shown": (near, False),
        "causal for all samples": (causal.expand(2, 3, length, length), True),
        "one sample padded": (torch.stack([causal, causal & (torch.arange(length) > 0)])[:, None], False),
    }
    for name, (mask, is_causal) in list(found.items()):
        for least in (float("-inf"), torch.finfo(torch.float32).min):
            shown = torch.zeros(mask.shape).masked_fill(~mask, least)
            found[f"{name}, {least}"] = shown, is_causal
    found["a slope"] = (torch.zeros(length, length).masked_fill(~causal, float("-inf")) - 0.5 * causal, False)
    return found


def test_attention_is_told_of_causal_masks() -> None:
    """What a kernel is told is what the mask says: the results are those with the mask."""
    torch.manual_seed(0)
    length = 5
    target = torch.ops.aten.scaled_dot_product_attention.default
    queries, keys, values = (torch.randn(2, 3, length, 4) for _ in range(3))
    for name, (mask, is_causal) in _masks(length).items():
        for args, kwargs in (
            ((queries, keys, values, mask), {"scale": 0.3}),
            ((queries, keys, values), {"attn_mask": mask}),
        ):
            told = _told_of_causality(args, kwargs)
            assert (told == (args, kwargs)) is not is_causal, name
            expected = target(*args, **kwargs)
            torch.testing.assert_close(execute(target, args, kwargs), expected, equal_nan=True, msg=name)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    assert _told_of_causality((queries, keys, values, mask), {})[0][3] is None
    mask[-1, 0] = False
    assert _told_of_causality((queries, keys, values, mask), {})[0][3] is mask, "written into since"
    assert _told_of_causality((queries[:, :, 1:], keys, values, mask[..., 1:, :]), {})[0][3] is not None


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
def test_attention_is_told_of_causal_masks_whoever_calls_it(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a training computes with it, values and gradients, is what it computes without."""
    torch.manual_seed(0)
    target = torch.ops.aten.scaled_dot_product_attention.default
    call = target if captured else torch.nn.functional.scaled_dot_product_attention
    heads = [torch.randn(1, 3, 9, 4, requires_grad=True) for _ in range(3)]
    mask = torch.ones(9, 9).tril() > 0
    asked: list[Any] = []

    def ask(args: Any, kwargs: Any) -> Any:
        asked.append(_told_of_causality(args, kwargs))
        return asked[-1]

    monkeypatch.setattr("fasp_fx.capturing._attention._told_of_causality", ask)
    expected = call(*heads, attn_mask=mask)
    assert not asked, "what is outside of it is not told"
    with ToldOfCausality():
        found = call(*heads, attn_mask=mask) + 0
    ((args, _),) = asked
    assert args[5] is True
    torch.testing.assert_close(found, expected)
    gradients, wanted = (torch.autograd.grad(output.sum(), heads) for output in (found, expected))
    torch.testing.assert_close(gradients, wanted)
