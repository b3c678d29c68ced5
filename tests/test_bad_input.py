"""Every wrong input is refused by a typed error that names the thing and the remedy, and leaves the caller's
model and disk as they were.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import refused, untouched
from models import BATCH, IDS, Vectors, X, block, made, wide
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fasp_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.usefixtures("no_files"),
]


A, C = fasp_fx.ArgumentError, fasp_fx.CalibrationError
NAN, INFINITE = torch.full((3, 6), float("nan")), torch.full((3, 6), float("inf"))
#: options by their values, what is raised for any of these, and what it says
OPTIONS: dict[str, list[tuple[Any, type[fasp_fx.FaspError], str]]] = {
    "sparsity": [
        (value, fasp_fx.SparsityError, rf"sparsity={re.escape(repr(value))} is not in \(0, 1\)")
        for value in (0, 1, -1, 1.5, "a", float("nan"), True)
    ],
    "score": [
        ("tasty", A, "score="),
        (lambda columns: torch.zeros(3), A, r"score must return a dense .* shape \(24,\)"),
        (lambda columns: torch.full((24,), float("nan")), fasp_fx.FaspError, "not finite"),
        *(
            (lambda columns, value=value: value, A, "the score must return a dense tensor of real")
            for value in (None, 1.0, [0.0] * 12)
        ),
    ],
    "allocation": [
        ("unfair", A, r"use 'uniform', 'global', 'search', a fasp_fx\."),
        (lambda *_: None, A, "the allocation takes None .*for each group"),
        (lambda *_: [3, 3], A, "the allocation returned 2 numbers for 1 groups"),
        (lambda *_: [24], A, "takes 24 channel sets.*from 0 to 23"),
        (lambda *_: [-1], A, "takes -1"),
        (lambda *_: [0.5], A, "takes 0.5"),
    ],
    "restore": [("magic", A, "restore=")],
    "granularity": [(("atom",), A, "granularity="), ("channel", A, "granularity=")],
    "include": [(("everything",), A, "include=")],
    "round_to": [(value, A, "round_to=") for value in (0, -8, 1.5, "a")],
    "device": [
        ("nowhere", A, "device 'nowhere' cannot be used here"),
        ("meta", A, "device 'meta' cannot be used here"),
    ],
    "progress": [(3, A, "progress is a int; pass a function")],
    "on_analysis": [("x", A, "on_analysis is a str; pass a function")],
    "group": [("x", A, "group is a str; pass a process group")],
    "args": [
        ((), A, "x"),
        ((X, X), A, "too many"),
        ((3,), A, "no tensor"),
        ((X.double(),), A, "does not run on the example inputs: RuntimeError"),
        ({"x": X}, A, r"args holds what Vectors takes by name \('x'\)"),
    ],
    "kwargs": [({"unheard": 1}, A, "unheard")],
    "checkpoint": [(__file__, fasp_fx.StoreError, "cannot be used.*choose another checkpoint=")],
    "calibration": [
        (value, C, said)
        for value, said in (
            (None, "no calibration data: pass calibration="),
            ([], "empty"),
            (iter(()), "empty"),
            (BATCH, r"is a Tensor; pass an iterable of batches"),
            ({"x": BATCH}, r"is a dict; pass an iterable"),
            ("text", "is a str; pass an iterable"),
            (7, r"calibration is a int.*iterable"),
            (np.float64(7), r"calibration is a float64.*iterable"),
            ([3], "batch 0 is a int"),
            ([BATCH, None], "batch 1 is a NoneType"),
            ([BATCH[:, :5]], r"batch 0, input 'x': shape \(\d+, 5\), .* takes \(any, 6\); reshape"),
            ([BATCH, BATCH[0]], r"batch 1, input 'x': shape \(6,\), the captured program takes"),
            ([BATCH.double()], r"batch 0, input 'x': dtype torch\.float64, expected torch\.float32; convert"),
            ([BATCH.long()], r"dtype torch\.int64, expected torch\.float32"),
            ([BATCH.to_sparse()], r"layout torch\.sparse_coo, expected torch\.strided.*to_dense"),
            ([BATCH, BATCH.to("meta")], r"batch 1, input 'x': device meta, expected cpu; move the batch"),
            ([BATCH[:0]], r"input 'x' is empty \(shape \(0, 6\)\)"),
            ([NAN], "batch 0, input 'x' holds values that are not finite"),
            ([BATCH, INFINITE], "batch 1, input 'x' holds values that are not finite"),
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
        )
    ],
}


@pytest.mark.parametrize(
    ("option", "at"), [(option, at) for option, values in OPTIONS.items() for at in range(len(values))]
)
def test_values_of_options_are_refused_by_name(option: str, at: int) -> None:
    value, error, said = OPTIONS[option][at]
    refused(error, said, **{option: value})


class Spoilt(Vectors):
    def __init__(self) -> None:
        super().__init__()
        self.up.weight.detach()[0, 0] = float("nan")


def net() -> nn.Module:
    """Token numbers through one feed-forward block with a residual."""

    def forward(m: Any, ids: Tensor, bias: Tensor | None = None) -> Tensor:
        hidden = m.embed(ids) if bias is None else m.embed(ids) + bias
        return hidden + block(m, hidden)

    return wide(forward, embed=nn.Embedding(10, 6))


def positioned() -> nn.Module:
    return made(
        lambda m, ids: m.net(ids, m.positions(torch.arange(ids.shape[1]))),
        net=net(),
        positions=nn.Embedding(8, 6),
    )


#: models, calibration, what is raised and what it says
MODELS: dict[str, tuple[Callable[[], Any], Any, type[fasp_fx.FaspError], str]] = {
    **{
        f"token number {wrong}": (
            net,
            [IDS, torch.full((2, 5), wrong)],
            C,
            r"batch 1 fails in the model at node 'embedding'",
        )
        for wrong in (10, -1)
    },
    "an argument that was not captured": (
        net,
        [(IDS, torch.zeros(6))],
        C,
        r"batch 0: argument 'bias'.*capture it.*labels.*batch\[0\]",
    ),
    "longer than the positions": (
        positioned,
        [torch.zeros(2, 9, dtype=torch.long)],
        C,
        r"batch 0.*(at most 8|embedding)",
    ),
    "activations that are not finite": (Spoilt, [BATCH], C, r"'down\.weight' is not finite"),
}


@pytest.mark.parametrize("name", MODELS)
def test_batches_that_a_model_does_not_take(name: str) -> None:
    make, calibration, error, said = MODELS[name]
    args = (X,) if make is Spoilt else (IDS,)
    refused(error, said, make().eval(), args, calibration=calibration)


class Branch(Vectors):
    """Its inputs decide what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Broken(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("lost")


def partly_training() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 24), nn.Dropout(0.5), nn.Linear(24, 6)).eval()
    model[1].train()
    return model


#: models that are refused, what is raised and what it says
REFUSED: dict[str, tuple[Callable[[], nn.Module], type[fasp_fx.FaspError], str]] = {
    "control flow that depends on data": (
        lambda: Branch().eval(),
        fasp_fx.CaptureError,
        r"Branch cannot be captured.*in line \d+ of .*`return super.* if x\.sum\(\) > 0 else x`.*submodule",
    ),
    "frozen": (
        lambda: nn.Linear(6, 6).eval(),
        fasp_fx.NothingPrunableError,
        "no group of this model can be pruned",
    ),
    "without weights": (lambda: nn.ReLU().eval(), fasp_fx.NothingPrunableError, "no coupled weights"),
    "in training mode": (
        Vectors,
        fasp_fx.CaptureError,
        r"Vectors is in training mode.*model\.eval\(\)",
    ),
    "spread over devices": (
        lambda: nn.DataParallel(Vectors()).eval(),
        A,
        r"several places; pass its \.module",
    ),
    "partly in training mode": (partly_training, fasp_fx.CaptureError, r"'1'.*training mode.*eval\(\)"),
    "without values": (lambda: Vectors().eval().to("meta"), A, "meta"),
    "broken": (
        lambda: Broken().eval(),
        A,
        r"does not run on the example inputs: KeyError: 'lost'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name: str) -> None:
    make, error, said = REFUSED[name]
    refused(error, said, make())
    if make().training or name == "control flow that depends on data":
        with pytest.raises(fasp_fx.CaptureError, match=r"training|No submodule can be pruned by itself"):
            fasp_fx.analyze(make(), (X,))


def test_what_is_of_another_kind_is_refused(tmp_path: Path) -> None:
    result = fasp_fx.prune(Vectors().eval(), (X,), score="magnitude", restore=None)
    with pytest.raises(A, match=r"call result\.module"):
        result(X)
    with pytest.raises(AttributeError, match=r"no attribute 'parameters'; .* is result\.module"):
        torch.optim.SGD(result.parameters())  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"no attribute 'weights'$"):
        result.weights  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(A, match=r"not Result; pass its \.module"):
        fasp_fx.prune(result, (X,), calibration=[BATCH])  # type: ignore[call-overload]
    with pytest.raises(A, match=r"Latency\(0\.5\) does not say .* seconds="):
        fasp_fx.allocation.Latency(0.5)
    with pytest.raises(A, match="'scores' is not known; did you mean 'score'"):
        fasp_fx.PruningConfig(scores="fasp")  # type: ignore[call-arg]
    with pytest.raises(A, match=r"source is a Vectors; pass a result"):
        fasp_fx.to_html(Vectors())
    for model in (None, "model", torch.zeros(3)):
        with pytest.raises(A, match=r"model must be an nn\.Module"):
            fasp_fx.prune(model, (X,), calibration=[BATCH])  # type: ignore[arg-type]
    for call, said in (
        (lambda: fasp_fx.apply(Vectors().eval(), result.plan.to_json(), (X,)), "plan is a str; pass a Prun"),
        (lambda: fasp_fx.load(3), "path is a int"),
        (lambda: fasp_fx.Costs.load(None), "is a NoneType; pass a path"),
    ):
        with pytest.raises(A, match=said):
            call()


def test_sparsity_out_of_reach_names_what_is_in_reach() -> None:
    model = Vectors().eval()
    with untouched(model), pytest.raises(fasp_fx.SparsityError, match=r"at most 0\.\d+") as caught:
        fasp_fx.prune(model, (X,), calibration=[BATCH], sparsity=0.999, round_to=8)
    found = re.search(r"at most (0\.\d+)", str(caught.value))
    assert found is not None
    result = fasp_fx.prune(model, (X,), calibration=[BATCH], sparsity=float(found[1]), round_to=8)
    assert result.report.sparsity == pytest.approx(float(found[1]), abs=1e-3)
    assert result.module.get_parameter("up.weight").shape[0] == 8


def test_a_failing_iterable_raises_its_own_error() -> None:
    def batches() -> Iterator[Tensor]:
        yield BATCH
        raise OSError("the disk is gone")

    model = Vectors().eval()
    with untouched(model), pytest.raises(OSError, match="the disk is gone"):
        fasp_fx.prune(model, (X,), calibration=batches())


def refilled(batches: list[Tensor]) -> Iterator[Any]:
    """One buffer, that is filled again."""
    buffer = torch.empty_like(batches[0])
    for batch in batches:
        yield buffer.copy_(batch)


BATCHES = [BATCH, BATCH.flip(1), -BATCH]
FORMS: dict[str, Callable[[], Any]] = {
    "a generator": lambda: (batch for batch in BATCHES),
    "a loader": lambda: DataLoader(torch.cat(BATCHES), batch_size=40),
    "one buffer": lambda: refilled(BATCHES),
    "tuples": lambda: tuple((batch,) for batch in BATCHES),
    "lists": lambda: [[batch] for batch in BATCHES],
    "mappings": lambda: iter([{"x": batch} for batch in BATCHES]),
}


def test_batches_in_every_form() -> None:
    captured = fasp_fx.capture(Vectors().eval(), (X,))
    expected = fasp_fx.prune(captured, calibration=BATCHES, sparsity=0.3)
    for name, form in FORMS.items():
        found = fasp_fx.prune(captured, calibration=form(), sparsity=0.3, device="cpu:0")
        assert found.plan == expected.plan, name
        torch.testing.assert_close(found.module(X), expected.module(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("default::fasp_fx.CalibrationWarning")
def test_too_few_tokens_work_and_warn() -> None:
    model = Vectors().eval()
    with (
        untouched(model),
        pytest.warns(
            fasp_fx.CalibrationWarning,
            match=r"too little .* 1 of 1 consumers.*'down\.weight' has 24 columns and saw 1 inputs",
        ),
    ):
        result = fasp_fx.prune(model, (X,), calibration=[X[:1]], sparsity=0.3)
    assert torch.isfinite(result.module(X)).all()


# --- plans that are damaged, for another model or impossible, and wrong calls of a result


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, fasp_fx.Result]:
    torch.manual_seed(0)
    model = Vectors().eval()
    return model, fasp_fx.prune(model, (X,), calibration=[BATCH], restore=None, sparsity=0.3)


def test_a_plan_is_for_models_of_its_structure_alone(pruned: tuple[nn.Module, fasp_fx.Result]) -> None:
    model, result = pruned
    assert torch.equal(fasp_fx.apply(model, result.plan, (X,)).module(X), result.module(X))
    torch.manual_seed(1)
    other = Vectors().eval()
    old = replace(result.plan, shapes=())  # from before they were written down
    with (
        untouched(other),
        pytest.raises(fasp_fx.PlanError, match=r"for another model.*make a plan for this model"),
    ):
        fasp_fx.apply(other, old, (X,))
    with untouched(result.module), pytest.raises(fasp_fx.PlanError, match="already applied"):
        fasp_fx.apply(result.module, result.plan, (X,))


def consuming(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda group: replace(group, consumers=tuple(map(change, group.consumers)))


def emptied(group: Any) -> Any:
    """Nothing of it is left."""
    own, read = (
        tuple(replace(part, removed=tuple(range(24))) for part in parts)
        for parts in (group.producers, group.consumers)
    )
    return replace(group, producers=own, consumers=read)


FROZEN = (fasp_fx.ParameterSlice("down.weight", 0, (1,)), fasp_fx.ParameterSlice("down.bias", 0, (1,)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (consuming(lambda part: replace(part, name="unheard")), "'unheard'.*another model"),
        (consuming(lambda part: replace(part, removed=(999,))), "999.*another model"),
        (consuming(lambda part: replace(part, removed=(-1,))), "-1"),
        (consuming(lambda part: replace(part, removed=part.removed[1:])), "cuts through a channel set"),
        (consuming(lambda part: replace(part, dim=5)), "dimension 5"),
        (
            consuming(lambda part: replace(part, dim=0)),
            r"index \d+ along dimension 0 of 'down\.weight'.*another model",
        ),
        (emptied, "keep one"),
        (
            lambda group: replace(group, producers=FROZEN, consumers=()),
            r"down\.\w+.*cannot be pruned",
        ),
    ],
)
def test_a_plan_that_asks_for_the_impossible(
    pruned: tuple[nn.Module, fasp_fx.Result], change: Callable[[Any], Any], match: str
) -> None:
    model, result = pruned
    plan = replace(result.plan, groups=(change(result.plan.groups[0]),))
    with untouched(model), pytest.raises(fasp_fx.PlanError, match=match):
        fasp_fx.apply(model, plan, (X,))


def damaged(text: str) -> dict[str, str]:
    data = json.loads(text)
    group = data["groups"][0]
    return {
        "empty": "",
        "cut": text[: len(text) // 2],
        "list": "[]",
        "text": '"plan"',
        "format": json.dumps({**data, "format": "fasp_fx.document/9"}),
        "no format": json.dumps({key: value for key, value in data.items() if key != "format"}),
        "no groups": json.dumps({key: value for key, value in data.items() if key != "groups"}),
        "groups of text": json.dumps({**data, "groups": "none"}),
        "groups are null": json.dumps({**data, "groups": None}),
        "size": json.dumps({**data, "groups": [{**group, "size": "many"}]}),
        "indices": json.dumps(
            {**data, "groups": [{**group, "producers": [{**group["producers"][0], "removed": ["a"]}]}]}
        ),
        "fractions": json.dumps(
            {**data, "groups": [{**group, "producers": [{**group["producers"][0], "removed": [1.5]}]}]}
        ),
        "sparsity": json.dumps({**data, "sparsity": "high"}),
        "splits": json.dumps({**data, "splits": [{}]}),
    }


@pytest.mark.parametrize("kind", damaged('{"groups": [{"producers": [{}]}]}'))
def test_a_damaged_plan(pruned: tuple[nn.Module, fasp_fx.Result], kind: str) -> None:
    text = pruned[1].plan.to_json()
    assert fasp_fx.PruningPlan.from_json(text) == pruned[1].plan
    with pytest.raises(fasp_fx.PlanError, match="the plan is"):
        fasp_fx.PruningPlan.from_json(damaged(text)[kind])


# --- calls of the result


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [((), {}, "x"), ((X,), {"unheard": 1}, "unheard"), ((None,), {}, "'x' is missing")],
)
def test_wrong_calls_of_a_result(
    pruned: tuple[nn.Module, fasp_fx.Result], args: Any, kwargs: dict[str, Any], match: str
) -> None:
    plan = pruned[1].plan
    with pytest.raises(TypeError, match=match):
        pruned[1].module(*args, **kwargs)
    for other, said in (({"fingerprint": "other"}, "different models"), ({"result": None}, "never applied")):
        with pytest.raises(fasp_fx.PlanError, match=said):
            plan.after(replace(plan, **other))


def test_an_argument_of_the_model_that_was_left_out_at_capture() -> None:
    result = fasp_fx.prune(net(), (IDS,), calibration=[IDS], sparsity=0.3)
    with pytest.raises(fasp_fx.CallError, match=r"argument 'bias' is a tensor of shape \(6,\).*capture it"):
        result.module(IDS, torch.zeros(6))
