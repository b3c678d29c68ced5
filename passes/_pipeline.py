"""Run passes one after another, ours and foreign ones, with the verifier after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, overload

from torch.export import ExportedProgram

from fasp_fx._capture import capture
from fasp_fx._program import Program
from fasp_fx._result import finish
from fasp_fx.analysis import Analysis, analyze_program
from fasp_fx.errors import ArgumentError, FaspError, VerificationError, first_line
from fasp_fx.plan import PruningPlan, check_fingerprint, program_fingerprint

from ._base import Pass, analysis_for
from ._foreign import Foreign
from ._verify import verify
from .split_fused import SplitFusedProducers

Step = Pass | Foreign


class Pipeline:
    """Runs passes in order and verifies the program after each. Its input stays as it was.

    Our passes are held against the channel numbers of the analysis (:func:`~fasp_fx.passes.verify`). A foreign pass is, too: every node executes,
    outputs keep their shapes, channels meet that met before, none meets an operator without a rule that was free; weights it brought get numbers of
    their own, which go with the channels they meet. What no analysis can see, such as another value, is seen on the example inputs: each output stays
    within ``tolerance``. Nodes that a pass wrote, ours or foreign, carry its name in ``node.meta["fasp_fx_pass"]``.

    Args:
        passes: our passes, ``PassBase`` instances, functions of a ``GraphModule`` (returning one, a ``PassResult``, or ``None``) or of an
            ``ExportedProgram`` (recognised by the annotation of the first parameter, or wrapped in ``Foreign(…, exported=True)``).
        reference: the analysis of the program the pipeline starts from, where that is no exported program.
        tolerance: what a foreign pass may change of an output, as a fraction of its largest value; ``None``: the square root of the output type's
            precision (3e-4 for float32); 0: outputs are not compared.
    """

    def __init__(
        self, passes: Sequence[Pass | Pipeline | Foreign | Callable[[Any], Any]], reference: Analysis | None = None, tolerance: float | None = None
    ) -> None:
        self.passes: list[Step] = []
        for step in passes:
            self.passes += step.passes if isinstance(step, Pipeline) else [step if isinstance(step, (Pass, Foreign)) else Foreign(step)]
        self.reference, self.tolerance = reference, tolerance

    @overload
    def __call__(self, program: Program) -> Program: ...
    @overload
    def __call__(self, program: ExportedProgram) -> ExportedProgram: ...
    def __call__(self, program: Any) -> Any:
        """Run all passes; returns the given object if there was nothing to do.

        Raises:
            VerificationError: a pass failed or left a program that does not compute what the analysis says; names the pass and the node.
            PlanError: a pass follows a plan for another model.
            ArgumentError, CaptureError: the exported program cannot be read (it carries no example inputs, say).
        """
        if isinstance(program, ExportedProgram):
            start = self._start(capture(program, fold=self._plan() is not None))  # without a plan, no weight becomes another
            rewritten = self._run(start.program, start)
            return program if rewritten is start.program else finish(rewritten)[1]
        if self.reference is None:
            raise ArgumentError("Pipeline needs the analysis of the program it starts from: pass reference=, or call it with an ExportedProgram")
        return self._run(program, self.reference)

    def _start(self, program: Program) -> Analysis:
        """Analyse the program that the pipeline starts from, as the plan it follows was made."""
        plan = self._plan()
        if plan is not None:
            check_fingerprint(plan, program_fingerprint(program))
        return analysis_for(program, plan, split=split_fused if plan is not None and plan.splits else None)

    def _plan(self) -> PruningPlan | None:
        """The plan that the passes follow."""
        plans = {id(step.removal): step.removal for step in self.passes if isinstance(step, Pass) and isinstance(step.removal, PruningPlan)}
        if len(plans) > 1:
            raise ArgumentError("the passes of one pipeline follow one plan; use a pipeline for each, one after the other")
        return next(iter(plans.values()), None)

    def _run(self, program: Program, analysis: Analysis) -> Program:
        stale = False
        for step in self.passes:
            try:
                if stale:
                    analysis, stale = analyze_program(program, None, analysis.granularity, analysis.include), False
                if isinstance(step, Foreign):
                    program, analysis = step.run(program, analysis, self.tolerance)
                    continue
                rewritten = step.rewrite(program, analysis)
                if rewritten is program:
                    continue
                rewritten.module.graph.lint()
                rewritten.module.recompile()
                verify(rewritten, analysis)
                program = rewritten
                if step.renumbers:
                    program, stale = replace(rewritten, numbers={}), True
            except FaspError as error:
                raise VerificationError(f"pass '{step.name}' failed: {error}") from error
            except (RuntimeError, AttributeError) as error:  # what fx says of a broken graph
                raise VerificationError(f"pass '{step.name}' failed: {first_line(error)}") from error
        return program


def split_fused(program: Program, analysis: Analysis) -> Program | None:
    """Split the fused producers that stand in the way, or ``None`` if none can be."""
    rewritten = Pipeline([SplitFusedProducers()], analysis)(program)
    return None if rewritten is program else replace(rewritten, numbers={})
