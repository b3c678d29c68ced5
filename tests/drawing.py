"""Nets at random by the thousand: each is captured once, pruned twice at random, and held against the masked
dense module at several sizes.

Programs run as the passes leave them, without the export of a whole ``prune``. As a script it tries slices of
250 nets, which are the same wherever they run, leaves out those that are done, and prints what they came to::

    python tests/drawing.py FIRST LAST FOLDER [exempt] [approximate]
"""

from __future__ import annotations

import collections
import gc
import json
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import fasp_fx
from fasp_fx.calibration import Decision
from fasp_fx.errors import CallError
from fasp_fx.passes import finish, remove
from fasp_fx.pruning import make_plan
from fasp_fx.testing import build, example, programs
from fasp_fx.testing._case import Case, draw_sets
from fasp_fx.testing._odd import Odd
from fasp_fx.testing.oracle import Masked, error, floats
from fasp_fx.testing.specs import Net

NETS = 250
#: random choices of channels that each net is pruned by
CHOICES = 2
TOLERANCE = 1e-9


class _AsCaptured:
    """A program as the library works on it, called as the model is."""

    def __init__(self, program: Any) -> None:
        self.program, self.module = program, program.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*self.program.flat_inputs(args, kwargs))


def hold(net: Net, number: int, include: Sequence[str] = ()) -> collections.Counter[str]:
    """Prune what was drawn, and compare.

    Args:
        include: statuses of groups that are pruned as well.

    Returns:
        How many prunings and comparisons were made, and in how many of these masking shows.

    Raises:
        AssertionError: an output differs.
    """
    count: collections.Counter[str] = collections.Counter()
    case = Case(
        build(net, number, torch.float64),
        example(net, 2, number, torch.float64),
        {},
        None,
        (),
        {},
        TOLERANCE,
        number,
    )
    program = case.captured
    analysis = fasp_fx.analysis.analyze_program(program, fasp_fx.passes.split_fused, include=include)
    captured = _AsCaptured(program)
    calls = []
    for call in case.calls:
        dense = case.run(case.dense, call)
        try:
            if error(case.run(captured, call), dense) <= TOLERANCE:
                calls.append((call, dense))  # else the capture itself has fixed a size that this call changes
        except Exception:
            count["sizes fixed by the capture"] += 1
    assert calls, "the capture does not compute what the model computes"
    for _ in range(CHOICES):
        chosen = draw_sets(analysis, case.random)
        if not chosen.any():
            count["nets without anything to prune"] += 1
            break
        gone = chosen[analysis.labels]
        plan = make_plan(program, analysis, Decision(gone))
        smaller = _AsCaptured(remove(analysis, gone))
        masked = Masked(case.reference, plan)
        count["prunings"] += 1
        for call, dense in calls:
            expected = case.run(masked, call)
            wrong = error(case.run(smaller, call), expected)
            if wrong > TOLERANCE and _refused(case, call):
                count["sizes fixed by the capture"] += 1
                continue
            assert wrong <= TOLERANCE, (
                f"off by {wrong:.1e} on {[tuple(leaf.shape) for leaf in floats(call)]}; plan:\n{plan}"
            )
            count["comparisons"] += 1
            count["comparisons in which masking shows"] += error(expected, dense) > 1e-4
    return count


def _refused(case: Case, call: Any) -> bool:
    """Whether a result for this program would refuse the call, as the model was captured for other sizes."""
    module = finish(case.captured)
    try:
        case.run(module, call)
    except CallError:
        return True
    return False


def try_slice(number: int, include: Sequence[str] = ()) -> dict[str, Any]:
    """Draw and hold the nets of one slice.

    Returns:
        Counts, seconds, and the failures: the net, its number and what was raised.
    """
    total: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []

    @seed(number)
    @settings(
        max_examples=NETS,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(net=programs(), weights=st.integers(0, 999))
    def draw(net: Net, weights: int) -> None:
        total["nets"] += 1
        total["nets with odd blocks"] += any(
            f"{kind.__name__}(" in repr(net) for kind in Odd.__subclasses__()
        )
        try:
            total.update(hold(net, weights, include))
        except Exception as problem:
            failures.append(
                {
                    "net": repr(net),
                    "weights": weights,
                    "problem": f"{type(problem).__name__}: {problem}",
                    "trace": traceback.format_exc()[-3000:],
                }
            )

    started = time.perf_counter()
    draw()
    return {
        "slice": number,
        "seconds": round(time.perf_counter() - started, 1),
        **total,
        "failures": failures,
    }


def main() -> None:
    first, last, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # what is imported stays; looking through it again and again takes a seventh of the time
    gc.set_threshold(200_000, 20, 100)
    total: collections.Counter[str] = collections.Counter()
    for number in range(first, last):
        file = folder / f"{number}.json"
        if not file.exists():
            file.write_text(json.dumps(try_slice(number, sys.argv[4:]), indent=1), encoding="utf-8")
            gc.collect()
        found = json.loads(file.read_text(encoding="utf-8"))
        total.update(
            {
                name: value
                for name, value in found.items()
                if isinstance(value, (int, float)) and name != "slice"
            }
        )
        total["failures"] += len(found["failures"])
        for failure in found["failures"]:
            print(
                f"slice {number}: {failure['net']}, weights {failure['weights']}: {failure['problem'][:300]}",
                flush=True,
            )
        print(f"slice {number}: {found['seconds']} s", flush=True)
    print(dict(total))


if __name__ == "__main__":
    main()
