"""What a pass is, and the pipeline that runs passes one after another with the verifier after each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import fx

from fasp_fx.errors import FaspError, VerificationError

from ._verify import verify

if TYPE_CHECKING:
    from fasp_fx._program import Program
    from fasp_fx.analysis import Analysis

#: key of ``node.meta`` under which a node that a pass wrote carries the pass's name
WRITTEN_BY = "fasp_fx_pass"


class Pass(Protocol):
    """A rewrite of a program.

    ``name`` appears in error messages and in ``node.meta["fasp_fx_pass"]`` of the nodes it wrote. A pass does not change its input:
    it returns a new program, or the same object if there was nothing to do.
    """

    name: str

    def __call__(self, program: Program) -> Program: ...


def stamp(node: fx.Node, name: str, like: fx.Node | None = None) -> fx.Node:
    """Mark a node as written by the pass ``name``; provenance such as the module stack is taken from ``like``."""
    if like is not None:
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
    node.meta[WRITTEN_BY] = name
    return node


class Pipeline:
    """Runs passes in order and verifies the program after each.

    Args:
        passes: the passes, first to last.
        reference: the analysis of the program the pipeline starts from; the verifier holds every intermediate program against it.
    """

    def __init__(self, passes: Sequence[Pass], reference: Analysis) -> None:
        self.passes, self.reference = list(passes), reference

    def __call__(self, program: Program) -> Program:
        """Run all passes.

        Raises:
            VerificationError: a pass failed or left a program that does not compute what the analysis says; names the pass and the node.
        """
        for step in self.passes:
            try:
                rewritten = step(program)
                if rewritten is not program:
                    rewritten.module.graph.lint()
                    rewritten.module.recompile()
                    verify(rewritten, self.reference)
                program = rewritten
            except FaspError as error:
                raise VerificationError(f"pass '{step.name}' failed: {error}") from error
        return program
