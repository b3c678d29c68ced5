"""Every seeded fault is caught: by the harness, most of them without the library's own checks, and by the
run-time check of the library alone.
"""

import contextlib
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import test_corpus
import torch
from conftest import PROFILE
from hypothesis import HealthCheck, Phase, given, settings
from mutants import (
    ACROSS,
    FOREIGN,
    FUSED,
    MUTANTS as ORDINARY,
    ODD,
    REGROUP,
    REMEMBER,
    SHIFTED,
    SHOWING_ON,
    SIZED,
    Mutant,
    not_run,
)

import fasp_fx
import fasp_fx.passes._run
import fasp_fx.testing.rule
from fasp_fx.analysis import Interpreter
from fasp_fx.errors import VerificationWarning
from fasp_fx.testing import CheckFailed, build, check_program, check_rule, example, odd_nets
from fasp_fx.testing._case import Case, Violation
from fasp_fx.testing._exact import mask_exact
from fasp_fx.testing._net import blocks_of
from fasp_fx.testing.specs import Linear, Net, Odd, Remember, Vectors

MUTANTS = (*ORDINARY, *ODD)

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

BY_RUNNING = [mutant for mutant in MUTANTS if mutant.name in SHOWING]
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


@pytest.mark.parametrize("mutant", BY_RUNNING if PROFILE == "slow" else BY_RUNNING[1::2], ids=str)
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
    ACROSS: "movements/rolled across heads",
    REGROUP: "movements/transposed and read as it was",
    REMEMBER: "movements/an order of 3 that changes, False",
    FOREIGN: "movements/a number",
    SIZED: "movements/behind as many zeros as there are steps",
    FUSED: "blocks/windows",
    SHIFTED: "blocks/shifted",
}


@pytest.mark.parametrize("mutant", ON_CORPUS, ids=str)
def test_the_corpus_sees_a_fault(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.patch(monkeypatch)
    _without_verifier(monkeypatch)
    not_run(monkeypatch)
    own = test_corpus.Subject(ON_CORPUS[mutant])
    own.deep = True
    with pytest.raises(AssertionError):
        test_corpus.other_sizes(own)


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 20
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len(ORACLE) >= 10
    assert len(SHOWING) >= 15


# --- faults that drawing finds


#: draws from the family among which each fault has to be found
DRAWS = 2000


@cache
def _drawn() -> tuple[Net, ...]:
    found: list[Net] = []

    @settings(
        max_examples=DRAWS,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(odd_nets())
    def collect(net: Net) -> None:
        found.append(net)

    collect()
    return tuple(found)


def _candidates(kind: type[Odd], kinds: tuple[str, ...]) -> Iterator[tuple[int, Net]]:
    """The drawn nets on which a fault can show, none twice, with the number of the draw."""
    seen = set()
    for number, net in enumerate(_drawn()):
        shows = any(
            isinstance(block, kind) and (not kinds or getattr(block, "kind", "") in kinds)
            for block in blocks_of(net)
        )
        if shows and net not in seen:
            seen.add(net)
            yield number, net


def _check(net: Net, seed: int, **options: Any) -> str | None:
    """What is wrong with a net pruned, if anything."""
    try:
        check_program(
            build(net, seed, torch.float64),
            example(net, 2, seed, torch.float64),
            seed=seed,
            invariants=("mask-exact",),
            **options,
        )
    except CheckFailed as failure:
        return str(failure)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("fault", ODD, ids=str)
def test_drawing_finds_the_fault(fault: Mutant) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        fault.patch(monkeypatch)
        with pytest.MonkeyPatch.context() as unchecked:
            not_run(unchecked)
            number, net = next(
                (number, net)
                for number, net in _candidates(*SHOWING_ON[fault])
                if _check(net, number) is not None
            )
        print(f"{fault}: found at draw {number}: {net}")
        found = _check(net, number)
        assert found is not None
        assert "VerificationWarning: group" in found or "VerificationError" in found
        most = 0.0
        model, inputs = build(net, number, torch.float64), example(net, 2, number, torch.float64)
        # an error tells of the fault before anything goes
        with (
            warnings.catch_warnings(action="ignore", category=VerificationWarning),
            contextlib.suppress(fasp_fx.VerificationError),
        ):
            most = fasp_fx.analyze(model, inputs).max_sparsity
            found = _check(net, number, sparsity=0.7 * most) if most else None
        assert found is None or "VerificationError" in found, "a wrong result was returned"
    assert _check(net, number) is None, "without the fault the program is pruned exactly"


def test_a_fault_that_shows_on_the_second_call_alone() -> None:
    """A pruned program whose first call is right and whose second is not is found out."""
    net = Net((Linear(4), Remember("counter"), Linear(2)), (Vectors(3),))
    case = Case(build(net, 0, torch.float64), example(net, dtype=torch.float64), {}, 0.3, (), {}, 1e-9, 0)
    mask_exact(case)
    forgetful = case.result.module
    (name,) = [name for name, _ in forgetful.named_buffers() if name.endswith("calls")]

    def forget(module: Any, args: Any, output: Any) -> None:
        module.get_buffer(name).zero_()

    forgetful.register_forward_hook(forget)
    with pytest.raises(Violation, match="error against the masked dense model"):
        mask_exact(case)
