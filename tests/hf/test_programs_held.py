"""The programs of one model share their weights: what one of them cannot lose, none loses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generators import Case, dense
from oracle import masked, removed_columns

import fasp_fx
from fasp_fx import hf
from fasp_fx.pruning.check import _check
from fasp_fx.pruning.check._compare import Seen

pytestmark = pytest.mark.usefixtures("shared_captures")

OPTIONS: dict[str, Any] = {"sparsity": 0.2, "score": "magnitude", "restore": None}


def _fault_in(monkeypatch: pytest.MonkeyPatch, weight: str, program: Any) -> None:
    """Let the comparison fail where ``weight`` is smaller, in the programs of which ``program`` is true."""
    original = _check.compare

    def compare(reference: Any, module: Any, pruned: Any, inputs: Any) -> Seen:
        found = original(reference, module, pruned, inputs)
        ours, theirs = pruned.weights().get(weight), reference.weights().get(weight)
        lost = ours is not None and theirs is not None and ours.shape != theirs.shape
        return Seen(0.5, False) if lost and program(reference) else found

    monkeypatch.setattr(_check, "compare", compare)


def _takes_a_cache(program: Any) -> bool:
    return bool(program.state_inputs) and any(
        node.meta["val"].dim() == 4 and node.name in program.state_inputs for node in program.placeholders()
    )


@pytest.mark.slow
def test_a_group_that_one_program_cannot_lose_stays_whole_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = "decoder.block.0.layer.2.DenseReluDense.wo.weight"
    beside = "decoder.block.0.layer.0.SelfAttention.o.weight"
    _fault_in(monkeypatch, weight, _takes_a_cache)
    model = dense("t5")
    with pytest.warns(
        fasp_fx.VerificationWarning,
        match=f"'{weight}' stays whole.*in the program 'decode' on the example inputs",
    ):
        made = hf.prune(model, **OPTIONS)
    groups = {group.name for group in made.plan.groups}
    assert weight not in groups
    assert {beside, "encoder.block.0.layer.1.DenseReluDense.wo.weight"} <= groups
    lines = {line.name: line for line in made.report.lines}
    assert lines[weight].before == lines[weight].after
    assert lines[weight].reason.startswith("left whole: in the program 'decode'")
    assert any(weight in note for note in made.report.notes)
    assert made.model.get_parameter(weight).shape == model.get_parameter(weight).shape
    inputs = Case(2, 1).inputs("t5")
    found = made.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with masked(model, removed_columns(made.plan, model)):
        assert torch.equal(found, model.generate(**inputs, max_new_tokens=8, do_sample=False))


def test_nothing_left_in_any_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check, "compare", lambda *_: Seen(0.5, False))
    with pytest.raises(
        fasp_fx.VerificationError,
        match="of the model cannot lose what the plan removes: what was decided cannot be removed",
    ):
        hf.prune(dense("t5"), **OPTIONS)
