"""Run steps one after another on a program, with the verifier after each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch.export import ExportedProgram

from fasp_fx.analysis._analysis import Analysis, analyze_program
from fasp_fx.analysis.plan import PruningPlan, check_fingerprint, program_fingerprint
from fasp_fx.base._tolerable import tolerable
from fasp_fx.capturing import capture
from fasp_fx.capturing._program import Program
from fasp_fx.capturing._runner import record
from fasp_fx.errors import ArgumentError, FaspError, VerificationError, first_line
from fasp_fx.passes._pruned_module import program_now

from . import _unshare
from ._foreign import Foreign
from ._pruned_module import finish
from ._split import NAME, split
from ._verify import verify

if TYPE_CHECKING:
    Removal = PruningPlan | np.ndarray | None


class Rewriting(Protocol):
    """A step of our own; :class:`~fasp_fx.passes.Pass` says what its parts are."""

    name: str
    removal: Removal
    renumbers: bool

    def rewrite(self, program: Program, analysis: Analysis) -> Program: ...


Step = Rewriting | Foreign


def run(
    steps: Sequence[Step], program: Program, analysis: Analysis, tolerance: float | None = None
) -> Program:
    """Run steps in order; the same program if there was nothing to do.

    Args:
        analysis: of the program that they start from.
        tolerance: as for :class:`~fasp_fx.passes.Pipeline`.

    Raises:
        VerificationError: a step failed, or left a program that does not compute what the analysis says;
            names the step and the node.
    """
    stale = False
    for step in steps:
        with _named(step.name):
            if stale:
                analysis, stale = (
                    analyze_program(program, None, analysis.granularity, analysis.include),
                    False,
                )
            if isinstance(step, Foreign):
                program, analysis = step.run(program, analysis, tolerance)
                continue
            rewritten = _verified(step.rewrite, program, analysis)
            if rewritten is not program and step.renumbers:
                rewritten, stale = replace(rewritten, numbers={}), True
            program = rewritten
    return program


def run_exported(
    steps: Sequence[Step], exported: ExportedProgram, tolerance: float | None = None
) -> ExportedProgram:
    """Run steps on an exported program; the same object if there was nothing to do.

    Raises:
        VerificationError: see :func:`run`.
        PlanError: a step follows a plan for another model.
        ArgumentError, CaptureError: the exported program cannot be read (it carries no example inputs, say).
    """
    plan = _plan_of(steps)
    program = capture(exported, fold=plan is not None)  # without a plan, no weight becomes another
    if plan is not None:
        check_fingerprint(plan, program_fingerprint(program))
    start = analysis_for(
        program, plan, split=split_fused if plan is not None and (plan.splits or plan.copies) else None
    )
    rewritten = run(steps, start.program, start, tolerance)
    return exported if rewritten is start.program else program_now(finish(rewritten))


def analysis_for(
    program: Program, removal: Removal, split: Callable[[Program, Analysis], Program | None] | None = None
) -> Analysis:
    """The analysis under which a removal speaks of a program; ``split`` as for
    :func:`~fasp_fx.analysis.analyze_program`.
    """
    if isinstance(removal, PruningPlan):
        return analyze_program(program, split, removal.granularity, removal.include)
    return analyze_program(program, split)


def split_fused(program: Program, analysis: Analysis) -> Program | None:
    """Part what stands in the way: tables that groups share which may be pruned, then fused producers;
    ``None`` if there is nothing to do.
    """
    for name, step in ((_unshare.NAME, _unshare.unshare), (NAME, split)):
        with _named(name):
            rewritten = _verified(step, program, analysis)
        if rewritten is not program:
            with _named(name):
                record(rewritten.module, program.module.graph)
            return replace(rewritten, numbers={})
    return None


def _plan_of(steps: Sequence[Step]) -> PruningPlan | None:
    """The plan that the steps follow."""
    removals = [step.removal for step in steps if not isinstance(step, Foreign)]
    plans = {id(removal): removal for removal in removals if isinstance(removal, PruningPlan)}
    if len(plans) > 1:
        raise ArgumentError(
            "the passes of one pipeline follow one plan; use a pipeline for each, one after the other"
        )
    return next(iter(plans.values()), None)


def _verified(
    rewrite: Callable[[Program, Analysis], Program], program: Program, analysis: Analysis
) -> Program:
    rewritten = rewrite(program, analysis)
    if rewritten.module.graph is program.module.graph and _shapes(rewritten) == _shapes(program):
        return rewritten  # other values alone, of which no channel numbers speak
    rewritten.module.graph.lint()
    rewritten.module.recompile()
    verify(rewritten, analysis)
    return rewritten


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in program.weights().items()}


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors bear the name of the step."""
    try:
        yield
    except tolerable(FaspError) as error:
        raise VerificationError(f"pass '{name}' failed: {error}") from error
    except tolerable(RuntimeError, AttributeError) as error:  # what fx says of a broken graph
        raise VerificationError(f"pass '{name}' failed: {first_line(error)}") from error


__all__ = ["Step", "analysis_for", "run", "run_exported", "split_fused"]
