"""What a pass is, and how one is used alone: in a chain of exported programs, and in torch's own pass manager
where it only touches the graph.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, overload

from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fasp_fx.analysis._analysis import Analysis
from fasp_fx.analysis.plan import PruningPlan, check_fingerprint, program_fingerprint
from fasp_fx.base._tolerable import tolerable
from fasp_fx.capturing._program import Program
from fasp_fx.capturing._signature import CallSignature
from fasp_fx.errors import FaspError, VerificationError

from ._run import analysis_for, run_exported

if TYPE_CHECKING:
    import numpy as np


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
    removal: PruningPlan | np.ndarray | None = None
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


__all__ = ["GraphPass", "Pass"]
