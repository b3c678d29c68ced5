"""Run passes one after another, ours and foreign ones, with the verifier after each; a plan is such a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor
from torch.export import ExportedProgram

from fasp_fx.analysis._analysis import Analysis
from fasp_fx.capturing._program import Program
from fasp_fx.errors import ArgumentError, VerificationError

from ._foreign import Foreign
from ._run import Pass, Step, run, run_exported
from ._split import NAME, split
from .attention import PadValueHeads, PinAttentionScale
from .dense_count import KeepDenseCount
from .remove_channels import RemoveChannels
from .skip_blocks import SkipBlocks

if TYPE_CHECKING:
    import numpy as np

    from fasp_fx.analysis.plan import PruningPlan


class Pipeline:
    """Runs passes in order and verifies the program after each. Its input stays as it was.

    Our passes are held against the channel numbers of the analysis (:func:`~fasp_fx.passes.verify`). After a
    foreign pass the program is analysed anew: weights it brought go with the channels they meet, and a plan
    that does not fit any more is refused. What no analysis can see, such as another value, is seen on the
    example inputs: each output stays within ``tolerance``. Nodes that a pass wrote, ours or foreign, carry
    its name in ``node.meta["fasp_fx_pass"]``.

    Args:
        passes: our passes, ``PassBase`` instances, functions of a ``GraphModule`` (returning one, a
            ``PassResult``, or ``None``), or functions of an ``ExportedProgram`` as ``Foreign(…,
            exported=True)``.
        reference: the analysis of the program the pipeline starts from, where that is no exported program.
        tolerance: what a foreign pass may change of an output, as a fraction of its largest value; of
            integers and booleans, the fraction of them that may be others. ``None``: the square root of the
            output type's precision (3e-4 for float32), and none of the integers; 0: outputs are not compared.
    """

    def __init__(
        self,
        passes: Sequence[Pass | Pipeline | Foreign | Callable[[Any], Any]],
        reference: Analysis | None = None,
        tolerance: float | None = None,
    ) -> None:
        self.passes: list[Step] = []
        for step in passes:
            self.passes += (
                step.passes
                if isinstance(step, Pipeline)
                else [step if isinstance(step, (Pass, Foreign)) else Foreign(step)]
            )
        self.reference, self.tolerance = reference, tolerance

    @overload
    def __call__(self, program: Program) -> Program: ...
    @overload
    def __call__(self, program: ExportedProgram) -> ExportedProgram: ...
    def __call__(self, program: Any) -> Any:
        """Run all passes; returns the given object if there was nothing to do.

        Raises:
            VerificationError: a pass failed or left a program that does not compute what the analysis says;
                names the pass and the node.
            PlanError: a pass follows a plan for another model.
            ArgumentError, CaptureError: the exported program cannot be read (it carries no example inputs,
                say).
        """
        if isinstance(program, ExportedProgram):
            return run_exported(self.passes, program, self.tolerance)
        if self.reference is None:
            raise ArgumentError(
                "Pipeline needs the analysis of the program it starts from: pass reference=, or call it with"
                " an ExportedProgram"
            )
        return run(self.passes, program, self.reference, self.tolerance)


class RestoreWeights(Pass):
    """Precondition: the restored weights have the captured shapes; columns to be removed may hold anything.

    Postcondition: the graph is unchanged; the named weights hold the given values, under all their names.

    Args:
        restored: new values by canonical name.
    """

    name = "restore_weights"

    def __init__(self, restored: dict[str, Tensor]) -> None:
        self.restored = restored

    def rewrite(self, program: Program, analysis: Analysis) -> Program:
        if not self.restored:
            return program
        program = program.with_own_weights()
        aliases, weights = program.aliases(), program.weights()
        for name, value in self.restored.items():
            if name not in aliases or value.shape != weights[name].shape:
                found = (
                    f"has shape {tuple(weights[name].shape)} there"
                    if name in weights
                    else "is not a weight of the program"
                )
                raise VerificationError(
                    f"the restored weight '{name}' of shape {tuple(value.shape)} {found}; restored weights"
                    " have the dense shapes"
                )
            program.replace_weight(aliases[name], value)
        return program


class SplitFusedProducers(Pass):
    """Precondition: the analysis is that of the program: no pass has run before.

    Postcondition: the split weights are gone; their parts, named ``<weight>_0``, ``<weight>_1`` … where these
    names are free, are recorded in ``program.parts``. A product whose parts cannot be told apart is left
    alone, and its groups stay frozen.
    """

    name = NAME
    renumbers = True

    def rewrite(self, program: Program, analysis: Analysis) -> Program:
        return split(program, analysis)


class Prune(Pipeline):
    """Apply a plan: ``Prune(plan)(exported)`` is an exported program without the plan's channels.

    Precondition: the program is of the model that the plan was made for; foreign passes may have run on it in
    the same pipeline. Postcondition: it computes what the dense program computes with the removed activations
    at zero (with ``restored``: those weights in place of its own).

    Args:
        removal: the plan; inside the library also the channel numbers that go.
        restored: repaired weights by name, of the dense shapes; a plan holds none.
        reference: as for :class:`Pipeline`.
    """

    def __init__(
        self,
        removal: PruningPlan | np.ndarray,
        restored: dict[str, Tensor] | None = None,
        reference: Analysis | None = None,
    ) -> None:
        super().__init__(
            [
                PinAttentionScale(),
                RestoreWeights(restored or {}),
                SkipBlocks(removal),
                KeepDenseCount(removal),
                RemoveChannels(removal),
                PadValueHeads(),
            ],
            reference,
        )


__all__ = ["Pipeline", "Prune", "RestoreWeights", "SplitFusedProducers"]
