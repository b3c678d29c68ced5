"""Checking one model: what is held against it, what is said of it, and how a user adds it to a test run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mutants import not_run
from torch import nn

import fasp_fx
from fasp_fx.errors import ArgumentError, CaptureError
from fasp_fx.testing import INVARIANTS, CheckFailed, build, check_program, example, program_test
from fasp_fx.testing.specs import (
    Activation,
    Attention,
    Conv,
    Images,
    Linear,
    Net,
    Norm,
    Scale,
    Sequences,
    Tied,
)

CHAIN = Net((Linear(6), Activation(), Linear(4)))


def test_everything_holds_for_a_chain() -> None:
    verdict = check_program(build(CHAIN), example(CHAIN))
    assert verdict.ok
    assert set(verdict.checked) | {name for name, _ in verdict.skipped} == set(INVARIANTS)
    assert dict(verdict.skipped) == {"ties": "no weights are tied"}
    assert 0 < verdict.removed < 6
    assert verdict.calls >= 2
    assert verdict.error < 1e-4 < verdict.seen
    assert "mask-exact" in str(verdict)


def test_the_seed_chooses_what_goes() -> None:
    checked = [
        check_program(build(CHAIN), example(CHAIN), seed=seed, invariants=("mask-exact",))
        for seed in range(4)
    ]
    assert len({verdict.removed for verdict in checked}) > 1


def test_what_has_nothing_to_prune_is_said() -> None:
    net = Net((Linear(4), Norm("layer"), Scale(), Linear(2)))
    verdict = check_program(build(net), example(net), invariants=("mask-exact", "nothing"))
    assert verdict.checked == ("nothing",)
    assert dict(verdict.skipped)["mask-exact"] == "nothing of this model can be pruned"


#: rows of a fused projection that is a consumer too: restoration is held where the plan's names still are
#: those of the weights
SPLIT = Net(
    (Linear(8), Activation(), Attention(kv_heads=2, head_dim=4, projection="interleaved"), Linear(4)),
    (Sequences(width=4, tokens=8),),
)
KINDS: dict[str, tuple[Net, tuple[str, ...]]] = {
    "split consumers": (SPLIT, ("restored", "mask-exact")),
    "tied": (Net((Tied(4, "pair"),), (Sequences(3),)), ("mask-exact", "steps", "ties", "plan")),
    "images": (
        Net((Conv(4, 3), Activation(), Conv(3)), (Images(2, (4, 3)),)),
        ("mask-exact", "steps", "plan"),
    ),
    "exported": (CHAIN, ("mask-exact", "plan", "shapes")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds(kind: str) -> None:
    net, invariants = KINDS[kind]
    model: Any = build(net)
    if kind == "exported":
        model = torch.export.export(model, example(net), strict=False)
    assert check_program(model, example(net), invariants=invariants).checked == invariants


def test_a_broken_invariant_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    not_run(monkeypatch)  # or the library refuses to return what it made
    original = fasp_fx.capturing._program.Program.replace_weight
    monkeypatch.setattr(
        fasp_fx.capturing._program.Program,
        "replace_weight",
        lambda self, names, value: original(self, names, value.roll(1, 0)),
    )
    with pytest.raises(CheckFailed, match="NetModule \\(seed 0\\) breaks mask-exact: on inputs") as caught:
        check_program(build(CHAIN), example(CHAIN), invariants=("mask-exact", "signature"))
    verdict: Any = caught.value.verdict
    assert isinstance(caught.value, (AssertionError, fasp_fx.FaspError))
    assert not verdict.ok
    assert [broken.invariant for broken in verdict.broken] == ["mask-exact"]
    assert verdict.checked == ("signature",)


def test_a_wrong_rule_is_found_through_a_model() -> None:
    softmax = torch.ops.aten.softmax.int
    fasp_fx.patterns.register(softmax, "self[...] -> [...]")
    try:
        model = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 2)).eval()
        with pytest.raises(
            CheckFailed, match=r"(?s)breaks mask-exact.*rules: aten\.softmax\.int.*claims too much"
        ):
            check_program(model, (torch.randn(3, 4),), invariants=("mask-exact", "rules"))
    finally:
        fasp_fx.patterns.unregister(softmax)


def test_what_cannot_be_checked_is_an_error_of_its_own() -> None:
    with pytest.raises(ArgumentError, match=r"invariants \['speed'\] are not known"):
        check_program(build(CHAIN), example(CHAIN), invariants=("speed",))
    with pytest.raises(CaptureError, match="training mode"):
        check_program(build(CHAIN).train(), example(CHAIN))
    with pytest.raises(ArgumentError):
        check_program(build(CHAIN), ())


test_one_line = program_test(lambda: (build(CHAIN), example(CHAIN)), invariants=("mask-exact",))
