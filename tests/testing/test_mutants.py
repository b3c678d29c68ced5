"""Every seeded fault is caught: by the harness, most of them without the library's own checks, and by the
run-time check of the library alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import odd_mutants
import pytest
import test_corpus
import torch
from conftest import PROFILE
from mutants import MUTANTS as ORDINARY, Mutant, not_run

import fasp_fx.passes._run
import fasp_fx.testing.rule
from fasp_fx.analysis import Interpreter
from fasp_fx.testing import CheckFailed, build, check_program, check_rule, example

MUTANTS = (*ORDINARY, *odd_mutants.ODD)

#: faults that only the library's own checks notice, because what they do cannot be written down at all
UNSEEN_BY_THE_ORACLE = {
    "boxes without blocks",
    "tokens of a fused weight stay where they are at every size",
}


#: faults of which no output of a pruned program shows anything: two copies compute what one weight did
UNSEEN_IN_OUTPUTS = {"a missed tie"}

#: how the comparison with the masked dense model tells of a fault: of a group, of all that was decided, of
#: weights that a pass took apart
TOLD = (
    "VerificationWarning: group",
    "VerificationError: what was decided cannot be removed",
    "the program whose fused weights were taken apart differs from the captured one",
    "pass 'split_fused_producers' failed",
)

#: what the others must concern for the outputs to be wrong
OUTPUTS = {"mask-exact", "restored"}

SHOWING = {
    mutant.name for mutant in MUTANTS if mutant.net is not None and set(mutant.invariants) & OUTPUTS
} - UNSEEN_IN_OUTPUTS

ORACLE = [mutant for mutant in MUTANTS if mutant.name not in UNSEEN_BY_THE_ORACLE]


def fault(mutant: Mutant, examples: int = 30) -> str | None:
    """What the harness finds wrong, if anything."""
    if mutant.operator is not None:
        verdict = check_rule(mutant.operator, examples=examples)
        return None if verdict.ok else str(verdict)
    assert mutant.net is not None
    try:
        check_program(
            build(mutant.net, mutant.seed, torch.float64),
            example(mutant.net, 3, mutant.seed, torch.float64),
            seed=mutant.seed,
            invariants=mutant.invariants,
        )
    except CheckFailed as failure:
        return str(failure)
    return None


@cache
def healthy(net: Any, invariants: tuple[str, ...], operator: Any, seed: int) -> str | None:
    """What the harness finds wrong without a fault."""
    return fault(Mutant("none", lambda monkeypatch: None, net, invariants, operator, seed), examples=8)


def _unverified(program: Any, reference: Any) -> Any:
    """The verifier's walk without its comparisons."""
    return Interpreter(program, reference.numbering, (), program.numbers).run()


#: what is caught without the checks of the library is caught with them
ALONE = ORACLE if PROFILE == "slow" else ORACLE[::2]


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if PROFILE == "slow" or mutant not in ALONE], ids=str
)
def test_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert healthy(mutant.net, mutant.invariants, mutant.operator, mutant.seed) is None, (
        "the model or the rule is wrong without the fault"
    )
    mutant.patch(monkeypatch)
    monkeypatch.setattr(fasp_fx.testing.rule, "_SEARCH", 1)  # any counter-example will do
    assert fault(mutant) is not None


def _without_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasp_fx.passes._run, "verify", _unverified)


def test_nothing_is_found_without_the_checks_where_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the harness would take a fault of these stand-ins for the one that was seeded."""
    _without_verifier(monkeypatch)
    not_run(monkeypatch)
    nets = {(mutant.net, mutant.invariants): mutant for mutant in ORACLE if mutant.operator is None}
    for mutant in list(nets.values())[::4]:
        assert fault(mutant) is None, mutant


@pytest.mark.parametrize("mutant", ALONE, ids=str)
def test_caught_without_the_checks_of_the_library(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.patch(monkeypatch)
    _without_verifier(monkeypatch)
    not_run(monkeypatch)
    found = fault(mutant)
    assert found is not None
    assert "Verification" not in found


@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if mutant.name in SHOWING], ids=str)
def test_caught_by_running_the_result(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the verifier, no fault that changes an output gets past the comparison with the masked dense
    program.
    """
    mutant.patch(monkeypatch)
    _without_verifier(monkeypatch)
    found = fault(mutant)
    assert found is not None
    assert any(text in found for text in TOLD)


#: models of the corpus on which faults show that no check of the library stands before
ON_CORPUS: dict[Mutant, str] = {
    odd_mutants.ACROSS: "movements/rolled across heads",
    odd_mutants.REGROUP: "movements/transposed and read as it was",
    odd_mutants.REMEMBER: "movements/an order of 3 that changes, False",
    odd_mutants.FOREIGN: "movements/a number",
    odd_mutants.SIZED: "movements/behind as many zeros as there are steps",
    odd_mutants.FUSED: "blocks/windows",
    odd_mutants.SHIFTED: "blocks/shifted",
}


@pytest.mark.parametrize("mutant", ON_CORPUS, ids=str)
def test_the_corpus_sees_a_fault(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.patch(monkeypatch)
    _without_verifier(monkeypatch)
    not_run(monkeypatch)
    own = test_corpus.Subject(ON_CORPUS[mutant])
    with pytest.raises(AssertionError):
        test_corpus.other_sizes(own)


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 20
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len(ORACLE) >= 10
    assert len(SHOWING) >= 15
