"""Plans that are damaged, for another model or impossible, and wrong calls of a result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import untouched
from models import BATCH, IDS, Net, Vectors, X
from torch import nn

import fasp_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.usefixtures("no_files"),
]


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, fasp_fx.Result]:
    torch.manual_seed(0)
    model = Vectors().eval()
    return model, fasp_fx.prune(model, (X,), calibration=[BATCH], restore=None, sparsity=0.3)


def test_a_plan_is_for_its_model_alone(pruned: tuple[nn.Module, fasp_fx.Result]) -> None:
    model, result = pruned
    assert torch.equal(fasp_fx.apply(model, result.plan, (X,)).module(X), result.module(X))
    torch.manual_seed(1)
    other = Vectors().eval()
    with (
        untouched(other),
        pytest.raises(fasp_fx.PlanError, match=r"for another model.*make a plan for this model"),
    ):
        fasp_fx.apply(other, result.plan, (X,))
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
    result = fasp_fx.prune(Net().eval(), (IDS,), calibration=[IDS], sparsity=0.3)
    with pytest.raises(fasp_fx.CallError, match=r"argument 'bias' is a tensor of shape \(6,\).*capture it"):
        result.module(IDS, torch.zeros(6))
