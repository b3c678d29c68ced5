"""Calibration data of several sources: each counts for as much, and is reported by itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import made, two_layers
from torch import Tensor

import fasp_fx
import fasp_fx.hf
from fasp_fx.calibration import TokenRoles, read_batches
from fasp_fx.calibration._statistics import HELD


def drawn(seed: int, count: int, scale: float = 1.0) -> list[Tensor]:
    """Batches whose columns are as large as the seed says."""
    generator = torch.Generator().manual_seed(seed)
    sizes = scale * torch.rand(12, generator=generator) ** 2
    return [torch.randn(30, 12, generator=generator) * sizes for _ in range(count)]


@pytest.fixture(scope="module")
def captured() -> fasp_fx.Captured:
    torch.manual_seed(0)
    return fasp_fx.capture(two_layers().eval(), (drawn(0, 1)[0],))


def repaired(captured: fasp_fx.Captured, data: Any, **options: Any) -> list[Tensor]:
    how: dict[str, Any] = {"quality": "fast", "sparsity": 0.4, "held_out": ()} | options
    return [*fasp_fx.prune(captured, calibration=data, **how).module.state_dict().values()]


def test_each_source_counts_for_as_much(captured: fasp_fx.Captured) -> None:
    """However many batches it has, and whatever stands first; not so in one list."""
    one, other = drawn(1, 2), drawn(2, 2)
    expected = repaired(captured, {"one": one, "other": other})
    for data in ({"one": one * 3, "other": other}, {"other": iter(other), "one": iter(one)}):
        for weight, again in zip(expected, repaired(captured, data), strict=True):
            torch.testing.assert_close(weight, again, rtol=1e-4, atol=1e-5)
    lists = (repaired(captured, one * times + other) for times in (1, 3))
    assert any(not torch.allclose(*pair, atol=1e-3) for pair in zip(*lists, strict=True))


def test_every_fourth_sequence_of_each_source_is_held_out(captured: fasp_fx.Captured) -> None:
    """Counted in turn, all of those could be of one source."""
    data = {"one": drawn(1, 1), "other": drawn(2, 1), "third": drawn(3, 2)}
    batches = read_batches(captured.program, data, None)
    assert batches.sources == [0, 1, 2, 2]
    roles = TokenRoles(captured.program, batches)
    node = captured.program.placeholders()[0]
    held = [(roles.of(index, node, batch[0], [0])[:, 0] == HELD) for index, batch in enumerate(batches)]
    expected = torch.arange(60) % 4 == 3
    for found, start in zip(held, (0, 0, 0, 30), strict=True):
        assert torch.equal(found, expected[start : start + 30])
    assert roles.weights == pytest.approx([4 / 3, 4 / 3, 2 / 3, 2 / 3])


def test_one_source_with_a_name_is_data_without_one(captured: fasp_fx.Captured) -> None:
    data = drawn(1, 8)
    for options in ({"quality": "fast"}, {"quality": "balanced"}):
        pairs = zip(repaired(captured, {"all": data}, **options), repaired(captured, data, **options))
        assert all(torch.equal(*pair) for pair in pairs)


def test_costs_are_measured_on_all_sources(captured: fasp_fx.Captured) -> None:
    """Of batches whose rows are run apart, and of those that come last."""
    seen = set[float]()

    def loss(outputs: Tensor, inputs: dict[str, Any]) -> Tensor:
        seen.add(round(float(inputs["x"].abs().max()) / 1000))
        return outputs.square().flatten()

    scales = [torch.full((12,), 1000.0 * number) for number in (1, 2, 3)]
    data = {str(scale[0]): [torch.sign(batch) * scale for batch in drawn(1, 3)] for scale in scales}
    fasp_fx.measure(captured, calibration=data, loss=loss, part=8)
    assert seen == {1, 2, 3}


@torch.no_grad()
def test_a_report_speaks_of_each_source(captured: fasp_fx.Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"one": drawn(1, 8), "other": drawn(2, 16)}
    result = fasp_fx.prune(captured, calibration=data, sparsity=0.6)
    agreed = result.report.agreement
    assert agreed is not None
    assert [(each.source, each.rows) for each in agreed.by_source] == [("one", 30), ("other", 60)]
    assert agreed.rows == 90
    dense = captured.program.module
    for each, rows in zip(agreed.by_source, (data["one"][7:], data["other"][14:]), strict=True):
        before, after = (torch.cat([model(batch) for batch in rows]) for model in (dense, result.module))
        assert each.error[0] == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-5)
        assert str(each) in str(result.report)
    whole = fasp_fx.agreement(dense, result.module, [*data["one"][7:], *data["other"][14:]])
    assert (whole.error, whole.same) == (pytest.approx(agreed.error), pytest.approx(agreed.same))
    assert fasp_fx.Report.from_json(result.report.to_json()).agreement == agreed
    assert "times as much on source" not in str(result.report)
    monkeypatch.setattr("fasp_fx.pruning._agreement._WORSE", 1.001)
    warned = fasp_fx.prune(captured, calibration=data, sparsity=0.6)
    worst = max(agreed.by_source, key=lambda each: each.error).source
    assert f"times as much on source '{worst}'" in str(warned.report)


def test_a_model_in_parts_has_sources_too() -> None:
    torch.manual_seed(0)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.part(self.part(x)[:, :1] + x) if float(x.sum()) > -1e9 else x

    one, other = drawn(1, 2), drawn(2, 2)
    model = made(forward, part=two_layers()).eval()
    how: dict[str, Any] = {"quality": "fast", "sparsity": 0.4}
    first, second = (
        fasp_fx.prune(model, (one[0],), calibration=data, **how).module.state_dict()
        for data in ({"one": one, "other": other}, {"one": one * 3, "other": other})
    )
    for weight, again in zip(first.values(), second.values(), strict=True):
        torch.testing.assert_close(weight, again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["fasp-fx", "per-layer"])
def test_language_models_have_sources(format: Any) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    one, other = ([torch.randint(low, low + 30, (4, 12)) for _ in range(8)] for low in (0, 30))
    how: dict[str, Any] = {"sparsity": 0.3, "format": format, "quality": "fast", "allocation": "uniform"}
    named = {"one": [{"input_ids": ids, "labels": ids} for ids in one], "other": other}
    pruned = fasp_fx.hf.prune(model, calibration=named, **how)
    agreed = pruned.report.agreement
    assert agreed is not None
    assert [(each.source, each.rows) for each in agreed.by_source] == [("one", 4), ("other", 4)]
    more = {"one": [*one[:7] * 2, *one[7:] * 2], "other": other}
    again = fasp_fx.hf.prune(model, calibration=more, **how)
    for weight, same in zip(pruned.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(weight, same, rtol=1e-3, atol=1e-4)
    with pytest.raises(fasp_fx.CalibrationError, match="batch 1 of calibration source 'other'"):
        fasp_fx.hf.prune(model, calibration={"one": one, "other": [other[0], torch.rand(4, 5)]}, **how)


def test_training_keeps_what_is_best_for_sources_alike() -> None:
    torch.manual_seed(0)
    model = two_layers().eval()
    data = {"one": drawn(1, 4), "other": drawn(2, 12)}
    result = fasp_fx.prune(model, (data["one"][0],), score="magnitude", restore=None, sparsity=0.4)

    @torch.no_grad()
    def loss(batch: Tensor) -> float:
        before, after = model(batch), result.module(batch)
        return float((before - after).square().mean() / before.square().mean())

    # one in ten is held out, but of each source one at least: that in the middle
    held_out = [[data["one"][2]], [data["other"][6]]]
    expected = np.mean([np.mean([loss(batch) for batch in some]) for some in held_out])
    trained = fasp_fx.distil(result, model, data, epochs=1, loss="outputs", learning_rate=1e-3)
    assert trained.report.recovery.curve[0].held_out == pytest.approx(expected, rel=1e-4)
    with pytest.raises(fasp_fx.ArgumentError, match="holds 1 batch of each source"):
        fasp_fx.distil(result, model, {"one": drawn(1, 1), "other": drawn(2, 3)}, loss="outputs")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: {"one": drawn(1, 2), "other": []}, "calibration source 'other' is empty"),
        (lambda: {"one": drawn(1, 2), "": drawn(2, 2)}, r"named \['one', ''\]; give each a name"),
        (lambda: {"one": drawn(1, 2), 2: drawn(2, 2)}, "give each a name of its own"),
        (lambda: {}, "give each a name of its own"),
        (lambda: {"one": drawn(1, 2), "other": 3}, "calibration source 'other' is a int"),
        (lambda: {"one": drawn(1, 2), "other": [torch.zeros(3, 5)]}, "batch 0 of calibration source 'other'"),
        (lambda: {"input": drawn(1, 1)[0]}, "calibration is a dict; pass an iterable of batches"),
    ],
)
def test_sources_that_do_not_fit_are_named(
    captured: fasp_fx.Captured, data: Callable[[], Any], said: str
) -> None:
    with pytest.raises(fasp_fx.CalibrationError, match=said):
        fasp_fx.prune(captured, calibration=data(), sparsity=0.4)
