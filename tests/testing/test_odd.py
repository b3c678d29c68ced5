"""Drawing finds by itself what was once found by hand: with a fault put back and nothing run, a failing
program; with everything run, no wrong result.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from mutants import Mutant, not_run
from odd_mutants import ODD, SHOWING_ON

import fasp_fx
from fasp_fx.errors import VerificationWarning
from fasp_fx.testing import CheckFailed, build, check_program, example, odd_nets
from fasp_fx.testing._case import Case
from fasp_fx.testing._exact import mask_exact
from fasp_fx.testing._net import blocks_of
from fasp_fx.testing._verdict import Violation
from fasp_fx.testing.specs import Linear, Net, Odd, Remember, Vectors

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VerificationWarning)
            most = fasp_fx.analyze(
                build(net, number, torch.float64), example(net, 2, number, torch.float64)
            ).max_sparsity
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
