"""Every wrong input is refused by a typed error that names the thing and the remedy, and leaves the caller's
model and disk as they were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusal import BATCH, IDS, Net, Vectors, X, refused, untouched
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fasp_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.usefixtures("no_files", "shared_captures"),
]


# --- arguments


@pytest.mark.parametrize("sparsity", [0, 1, -1, 1.5, "a", float("nan"), True])
def test_sparsity_outside_of_its_range(sparsity: Any) -> None:
    refused(
        fasp_fx.SparsityError, rf"sparsity={re.escape(repr(sparsity))} is not in \(0, 1\)", sparsity=sparsity
    )


@pytest.mark.parametrize("round_to", [1, 8])
def test_sparsity_out_of_reach_names_what_is_in_reach(round_to: int) -> None:
    model = Vectors().eval()
    with untouched(model), pytest.raises(fasp_fx.SparsityError, match=r"at most 0\.\d+") as caught:
        fasp_fx.prune(model, (X,), calibration=[BATCH], sparsity=0.999, round_to=round_to)
    found = re.search(r"at most (0\.\d+)", str(caught.value))
    assert found is not None
    result = fasp_fx.prune(model, (X,), calibration=[BATCH], sparsity=float(found[1]), round_to=round_to)
    assert result.report.sparsity == pytest.approx(float(found[1]), abs=1e-3)
    assert result.module.get_parameter("up.weight").shape[0] == round_to
    if round_to == 1:
        assert fasp_fx.analyze(model, (X,)).max_sparsity == pytest.approx(float(found[1]), abs=1e-3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("score", "tasty"),
        ("restore", "magic"),
        ("allocation", "unfair"),
        ("granularity", ("atom",)),
        ("granularity", "channel"),
        ("include", ("everything",)),
        ("round_to", 0),
        ("padding_mask", "tokens"),
        ("round_to", -8),
        ("round_to", 1.5),
        ("round_to", "a"),
    ],
)
def test_unknown_options_are_named(option: str, value: Any) -> None:
    refused(fasp_fx.ArgumentError, rf"{option}=.*", **{option: value})


def test_a_device_that_does_not_exist() -> None:
    refused(fasp_fx.ArgumentError, "device 'nowhere' cannot be used here", device="nowhere")


def test_a_score_of_the_wrong_shape() -> None:
    refused(
        fasp_fx.ArgumentError,
        r"score returned shape \(3,\) for a consumer with 24 columns",
        score=lambda columns: torch.zeros(3),
    )


def test_a_score_that_is_not_finite() -> None:
    refused(fasp_fx.FaspError, "not finite", score=lambda columns: torch.full((24,), float("nan")))


@pytest.mark.parametrize("model", [None, "model", torch.zeros(3)])
def test_not_a_model(model: Any) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=r"model must be an nn\.Module"):
        fasp_fx.prune(model, (X,), calibration=[BATCH])


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [((), {}, "x"), ((X, X), {}, "too many"), ((X,), {"unheard": 1}, "unheard"), ((3,), {}, "no tensor")],
)
def test_example_inputs_that_do_not_fit(args: Any, kwargs: dict[str, Any], match: str) -> None:
    refused(fasp_fx.ArgumentError, match, args=args, kwargs=kwargs)


# --- calibration


@pytest.mark.parametrize(
    ("calibration", "match"),
    [
        (None, "no calibration data: pass calibration="),
        ([], "empty"),
        (iter(()), "empty"),
        (BATCH, r"single Tensor; pass an iterable of batches"),
        ({"x": BATCH}, r"single dict; pass an iterable"),
        ("text", "single str"),
        (7, r"calibration is a int.*iterable"),
        (np.float64(7), r"calibration is a float64.*iterable"),
        ([3], "batch 0 is a int"),
        ([BATCH, None], "batch 1 is a NoneType"),
        ([BATCH[:, :5]], r"batch 0, input 'x': dimension 1 is 5.*fixed at 6; reshape"),
        ([BATCH, BATCH[0]], r"batch 1, input 'x': shape \(6,\) has 1 dimensions, expected 2"),
        ([BATCH.double()], r"batch 0, input 'x': dtype torch\.float64, expected torch\.float32; convert"),
        ([BATCH.long()], r"dtype torch\.int64, expected torch\.float32"),
        ([BATCH, BATCH.to("meta")], r"batch 1, input 'x' is on meta, the model on cpu; move the batch"),
        ([BATCH[:0]], r"input 'x' is empty \(shape \(0, 6\)\)"),
        ([torch.full((3, 6), float("nan"))], "batch 0, input 'x' holds values that are not finite"),
        ([BATCH, torch.full((3, 6), float("inf"))], "batch 1, input 'x' holds values that are not finite"),
        ([{"y": BATCH}], r"batch 0.*'x'"),
        ([{"x": BATCH, "unheard": 1}], r"batch 0.*unheard"),
        (
            [(BATCH, BATCH)],
            r"batch 0.*too many positional.*labels.*calibration=\(batch\[0\] for batch in loader\)",
        ),
        ([[BATCH, torch.zeros(len(BATCH))]], r"batch 0.*labels.*leave them out"),
        ([()], r"batch 0.*'x'"),
        ([{"x": [BATCH, BATCH]}], r"batch 0.*"),
        ([{"x": "text"}], r"batch 0.*input 'x'.*str"),
    ],
)
def test_calibration_that_does_not_fit(calibration: Any, match: str) -> None:
    refused(fasp_fx.CalibrationError, match, calibration=calibration)


@pytest.mark.parametrize("wrong", [10, -1])
def test_token_numbers_out_of_range_name_the_batch_and_the_node(wrong: int) -> None:
    refused(
        fasp_fx.CalibrationError,
        r"batch 1 fails in the model at node 'embedding'",
        Net().eval(),
        (IDS,),
        calibration=[IDS, torch.full((2, 5), wrong)],
    )


def test_an_argument_that_was_not_captured() -> None:
    refused(
        fasp_fx.CalibrationError,
        r"batch 0: argument 'bias'.*capture it.*labels.*batch\[0\]",
        Net().eval(),
        (IDS,),
        calibration=[(IDS, torch.zeros(6))],
    )


def test_longer_than_the_positions() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.positions = Net(), nn.Embedding(8, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids, self.positions(torch.arange(ids.shape[1])))

    refused(
        fasp_fx.CalibrationError,
        r"batch 0.*(at most 8|embedding)",
        Positions().eval(),
        (IDS,),
        calibration=[torch.zeros(2, 9, dtype=torch.long)],
    )


def test_a_failing_iterable_raises_its_own_error() -> None:
    def batches() -> Iterator[Tensor]:
        yield BATCH
        raise OSError("the disk is gone")

    model = Vectors().eval()
    with untouched(model), pytest.raises(OSError, match="the disk is gone"):
        fasp_fx.prune(model, (X,), calibration=batches())


def test_activations_that_are_not_finite() -> None:
    model = Vectors().eval()
    with torch.no_grad():
        model.up.weight[0, 0] = float("nan")
    refused(fasp_fx.CalibrationError, r"'down\.weight' is not finite", model)


@pytest.mark.parametrize(
    "make",
    [
        iter,
        lambda batches: (batch for batch in batches),
        lambda batches: DataLoader(torch.cat(batches), batch_size=10),
        tuple,
    ],
)
def test_any_iterable_will_do(make: Callable[[Any], Any]) -> None:
    model = Vectors().eval()
    expected = fasp_fx.prune(model, (X,), calibration=[BATCH, BATCH.flip(0)], sparsity=0.3)
    found = fasp_fx.prune(model, (X,), calibration=make([BATCH, BATCH.flip(0)]), sparsity=0.3)
    assert found.plan.groups == expected.plan.groups
    torch.testing.assert_close(found.module(X), expected.module(X), rtol=1e-4, atol=1e-5)


def test_batches_may_come_in_one_buffer_that_is_filled_again() -> None:
    batches = [BATCH, BATCH.flip(1), -BATCH]

    def refilled() -> Iterator[Any]:
        buffer = torch.empty_like(BATCH)
        for batch in batches:
            yield buffer.copy_(batch)

    captured = fasp_fx.capture(Vectors().eval(), (X,))
    expected, found = (
        fasp_fx.prune(captured, calibration=calibration, sparsity=0.3)
        for calibration in (batches, refilled())
    )
    assert found.plan == expected.plan


def test_batches_in_every_form() -> None:
    model = Vectors().eval()
    results = [
        fasp_fx.prune(model, (X,), calibration=[batch], sparsity=0.3).module(X)
        for batch in (BATCH, (BATCH,), [BATCH], {"x": BATCH})
    ]
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.filterwarnings("default::fasp_fx.CalibrationWarning")
def test_too_few_tokens_work_and_warn() -> None:
    model = Vectors().eval()
    with (
        untouched(model),
        pytest.warns(
            fasp_fx.CalibrationWarning,
            match=r"too little .* 1 of 1 consumers.*'down\.weight' has 24 columns and saw 1 tokens",
        ),
    ):
        result = fasp_fx.prune(model, (X,), calibration=[X[:1]], sparsity=0.3)
    assert torch.isfinite(result.module(X)).all()


def test_no_data_is_needed_without_score_and_restoration_from_data() -> None:
    for score in ("magnitude", "random"):
        assert fasp_fx.prune(Vectors().eval(), (X,), score=score, restore=None, sparsity=0.3).plan.groups


# --- what is not of the kind that it should be


@pytest.mark.parametrize("value", [None, 1.0, [0.0] * 12])
def test_a_score_that_is_no_tensor(value: Any) -> None:
    refused(
        fasp_fx.errors.ArgumentError,
        "the score returned a .*one value per column",
        score=lambda columns: value,
    )


@pytest.mark.parametrize("value", [None, 3])
def test_an_allocation_that_is_no_list(value: Any) -> None:
    refused(
        fasp_fx.errors.ArgumentError,
        "the allocation returned a .*for each group",
        allocation=lambda *given: value,
    )


def test_a_batch_of_another_layout() -> None:
    refused(
        fasp_fx.CalibrationError,
        r"layout torch\.sparse_coo, expected torch\.strided.*to_dense",
        calibration=[BATCH.to_sparse()],
    )


def test_an_example_that_the_model_refuses() -> None:
    with pytest.raises(
        fasp_fx.errors.ArgumentError, match="does not run on the example inputs: RuntimeError"
    ):
        fasp_fx.prune(Vectors().eval(), (X.double(),), calibration=[BATCH])


def test_a_plan_that_is_text() -> None:
    plan = fasp_fx.prune(Vectors().eval(), (X,), score="magnitude", restore=None).plan
    with pytest.raises(fasp_fx.errors.ArgumentError, match=r"plan is a str; pass a PruningPlan"):
        fasp_fx.apply(Vectors().eval(), plan.to_json(), (X,))  # type: ignore[arg-type]


def test_a_path_that_is_none() -> None:
    with pytest.raises(fasp_fx.errors.ArgumentError, match="path is a int"):
        fasp_fx.load(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("progress", 3, "progress is a int; pass a function"),
        ("on_analysis", "x", "on_analysis is a str; pass a function"),
        ("group", "x", "group is a str; pass a process group"),
        ("device", "meta", "device 'meta' cannot be used here"),
    ],
)
def test_what_is_called_or_called_with_is_looked_at_first(option: str, value: Any, match: str) -> None:
    refused(fasp_fx.ArgumentError, match, **{option: value})


def test_files_are_read_from_paths() -> None:
    with pytest.raises(fasp_fx.ArgumentError, match="is a NoneType; pass a path"):
        fasp_fx.Costs.load(None)  # type: ignore[arg-type]


def test_a_working_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = fasp_fx.prune(Vectors().eval(), (X,), score="magnitude", restore=None)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(fasp_fx.ArgumentError, match="path='x' lies in the working folder, which is gone"):
        result.save("x")


def test_a_path_that_is_no_text_is_refused(tmp_path: Path) -> None:
    result = fasp_fx.prune(Vectors().eval(), (X,), score="magnitude", restore=None)
    with pytest.raises(fasp_fx.errors.StoreError, match="is not valid UTF-8"):
        result.save(f"{tmp_path}/\udcff")
    assert not list(tmp_path.iterdir())


def test_keyword_arguments_in_the_place_of_positional_ones() -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=r"args holds what Vectors takes by name \('x'\)"):
        fasp_fx.capture(Vectors().eval(), {"x": X})


def test_the_cpu_may_have_a_number() -> None:
    model, options = Vectors().eval(), {"calibration": [BATCH], "sparsity": 0.3}
    expected = fasp_fx.prune(model, (X,), **options)  # type: ignore[arg-type]
    assert fasp_fx.prune(model, (X,), device="cpu:0", **options).plan == expected.plan  # type: ignore[arg-type]


def test_a_name_that_no_folder_can_have(tmp_path: Path) -> None:
    result = fasp_fx.prune(Vectors().eval(), (X,), score="magnitude", restore=None)
    with pytest.raises(fasp_fx.errors.StoreError, match="null character"):
        result.save(f"{tmp_path}/a\0")
    with pytest.raises(
        fasp_fx.errors.StoreError, match="null character, which no path can; choose another checkpoint="
    ):
        fasp_fx.prune(Vectors().eval(), (X,), calibration=[X], checkpoint=f"{tmp_path}/a\0")
    assert not list(tmp_path.iterdir())
