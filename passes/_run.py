"""What a pass is, and how passes run one after another, with the verifier after each: in a chain of exported
programs, and in torch's own pass manager where they only touch the graph.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fasp_fx.analysis._analysis import Analysis, analyze_program
from fasp_fx.analysis.plan import PruningPlan, check_fingerprint, program_fingerprint
from fasp_fx.base._tolerable import tolerable
from fasp_fx.capturing import capture
from fasp_fx.capturing._program import Program
from fasp_fx.capturing._runner import record
from fasp_fx.capturing._signature import CallSignature
from fasp_fx.errors import ArgumentError, FaspError, VerificationError, first_line
from fasp_fx.passes._pruned_module import program_now

from ._foreign import Foreign
from ._pruned_module import finish
from ._split import NAME, split
from ._verify import verify

Removal = PruningPlan | np.ndarray | None


class Pass(ABC):
    """A rewrite of a program.

    Called with an ``ExportedProgram`` it returns another, verified (see :class:`~fasp_fx.passes.Pipeline`),
    and so stands in any chain of such functions.

    Attributes:
        name: appears in error messages and in ``node.meta["fasp_fx_pass"]`` of the nodes it wrote.
        removal: what it removes: a plan, or for every channel number of the analysis whether it goes;
            ``None`` if that is nothing to it.
        renumbers: whether the rewritten program has weights of its own, so that what follows needs a new
            analysis.
    """

    name: str
    removal: Removal = None
    renumbers: bool = False

    @abstractmethod
    def rewrite(self, program: Program, analysis: Analysis) -> Program:
        """A new program, or the same object if there was nothing to do; its input stays as it was.

        Args:
            program: the program to rewrite.
            analysis: of the program that the pipeline started from.
        """

    def __call__(self, exported: ExportedProgram) -> ExportedProgram:
        """Rewrite and verify one exported program; the same object if there was nothing to do.

        Raises:
            VerificationError: names the pass and the node.
            PlanError: the pass follows a plan for another model.
        """
        return run_exported([self], exported)


class GraphPass(Pass, PassBase):
    """A pass that touches no weight: usable in ``torch.fx.passes.infra.pass_manager.PassManager`` as well.

    There its precondition is a graph of ATen operators whose placeholders carry ``node.meta["val"]``, as
    ``torch.export`` makes them.
    """

    @overload
    def __call__(self, given: ExportedProgram) -> ExportedProgram: ...
    @overload
    def __call__(self, given: fx.GraphModule) -> PassResult: ...
    def __call__(self, given: Any) -> Any:
        """Rewrite an exported program, or a graph module into a ``PassResult``.

        Raises:
            VerificationError: names the pass and the node.
        """
        return (
            Pass.__call__(self, given)
            if isinstance(given, ExportedProgram)
            else PassBase.__call__(self, given)
        )

    def requires(self, graph_module: fx.GraphModule) -> None:
        for node in graph_module.graph.nodes:
            if node.op in ("call_module", "call_method"):
                raise VerificationError(
                    f"pass '{self.name}' failed: node '{node.name}' is a {node.op}; pass a graph of"
                    " operators, as torch.export makes it"
                )
            if node.op == "placeholder" and "val" not in node.meta:
                raise VerificationError(
                    f"pass '{self.name}' failed: node '{node.name}' has no recorded value in"
                    " node.meta['val']; export the model first"
                )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        program = Program(graph_module, CallSignature(inspect.Signature(), (), {}), ((), {}))
        if isinstance(self.removal, PruningPlan):
            check_fingerprint(self.removal, program_fingerprint(program))
        try:
            rewritten = self.rewrite(program, analysis_for(program, self.removal))
        except tolerable(FaspError) as error:
            raise VerificationError(f"pass '{self.name}' failed: {error}") from error
        rewritten.module.recompile()
        return PassResult(rewritten.module, rewritten is not program)


#: what a pipeline runs
Step = Pass | Foreign


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
    stale = is_cut = False
    for step in steps:
        with _named(step.name):
            is_cut |= bool(program.numbers)
            if is_cut and not isinstance(step, Foreign) and step.removal is not None:
                raise VerificationError(
                    "channels are gone already; this pass comes before any removal, and a removal comes once"
                )
            if isinstance(step, Foreign):
                rewritten = step.run(program, tolerance)
                brought = rewritten.weights().keys() - program.weights().keys()
                analysis = replace(analysis, brought=(analysis.brought or frozenset()) | brought)
                program, stale = rewritten, True
                continue
            if stale:
                fresh = analyze_program(program, None, analysis.granularity, analysis.include)
                analysis, stale = replace(fresh, brought=analysis.brought), False
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
    start = analysis_for(program, plan, split=split_fused if plan is not None and plan.splits else None)
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
    """Split fused producers that stand in the way; ``None`` if there is nothing to do."""
    with _named(NAME):
        rewritten = _verified(split, program, analysis)
        if rewritten is program:
            return None
        record(rewritten.module)
    return replace(rewritten, numbers={})


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


__all__ = ["GraphPass", "Pass", "Step", "run", "run_exported", "split_fused"]
