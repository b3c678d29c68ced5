"""The smaller model: module, program, plan and report."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from ._calling._guards import guard_calls
from ._calling._signature import CallerCodeGen, CallSignature
from ._capture import export_again
from ._capture._assemble import assemble
from ._capture._names import own_names
from ._compile._flex import make_traceable
from ._program import Program, graph_module
from ._pruned_module import PrunedModule, remember
from ._stamps import read_stamps
from .channels import attribute, target_name
from .config import PruningConfig
from .plan import PruningPlan
from .report import Report


@dataclass(frozen=True)
class Result:
    """What :func:`fasp_fx.prune` returns.

    Attributes:
        module: the smaller model behind the caller's signature; trains, moves, compiles and exports again.
        program: the same as an exported program; shares its weights with ``module``.
        plan: what was removed.
        report: what it cost.
        config: what was asked for; ``None`` for a plan that was replayed, and for what was loaded.
    """

    module: fx.GraphModule
    program: ExportedProgram
    plan: PruningPlan
    report: Report
    signature: CallSignature = field(repr=False)
    config: PruningConfig | None = field(default=None, compare=False)

    def with_report(self, **fields: Any) -> Self:
        """The same, sharing its module, with some fields of its report replaced."""
        found = copy.copy(self)
        object.__setattr__(found, "report", replace(self.report, **fields))
        return found

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the result to a new folder (see :mod:`fasp_fx.store`)."""
        from .store import save

        return save(self, path, overwrite=overwrite)

    def eager(self, model: nn.Module) -> nn.Module:
        """Make a smaller copy of the caller's own module, which trains as the caller's does: norms and dropouts follow ``train()`` and ``eval()``.

        The copy is of the model's class and holds the weights that ``module`` holds now, under their names in the model. Attributes that are sizes
        (``out_features``, ``num_heads``, …) are set by experiment: with those it has in the end the copy, in evaluation mode, computes what the pruned
        program does, on the example inputs and at other sizes where these can vary. Which parameters are trained, and which submodules are in
        training mode, is as in the model (docs/eager.md).

        Args:
            model: the model that was pruned, with the weights that it had then; it is left as it was, and shares no storage with the copy.

        Raises:
            EagerError: no copy computes what the program does; says what fails first, and what to do.
            PlanError: the model is not the one that the plan was made for.
        """
        from ._eager._make import eager

        return eager(self, model)


def own_storage(program: Program) -> Program:
    """The same program with every tensor copied, tied ones together, so that nothing is shared with the caller's model."""
    program = program.copy()
    for name, names in program.aliases().items():
        tensor = program.weights()[name]
        if (
            name in program.numbers
            and isinstance(tensor, nn.Parameter)
            and tensor._base is None
            and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        ):
            continue  # made by a pass
        with torch.no_grad():
            copy: Tensor = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
        program.replace_weight(names, copy)
    return program


def wrap(exported: ExportedProgram, signature: CallSignature) -> fx.GraphModule:
    """The module of an exported program behind the caller's signature."""
    lifted = exported.module(check_guards=True)
    guard_calls(lifted, exported)
    own_names(lifted)
    for node in lifted.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        # Strides were settled without gradients; with them attention can pick another kernel, whose result a view does not fit.
        node.target = torch.ops.aten.reshape.default
    for node in lifted.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        written: Any = node.args[0]
        if written.op == "get_attr" and isinstance(attribute(lifted, target_name(written)), nn.Parameter):
            # An embedding with a largest norm writes into its parameter, without gradients, which no exporter keeps.
            with lifted.graph.inserting_before(node):
                node.update_arg(0, lifted.graph.call_function(torch.ops.aten.detach.default, (written,)))
    make_traceable(lifted.graph)
    module = graph_module(lifted, lifted.graph, lifted.meta, PrunedModule)
    remember(module, exported, signature)
    generated: Any = lifted.graph._codegen
    module.graph._codegen = CallerCodeGen(signature, generated.pytree_info)
    module.recompile()
    # transformers' Trainer gives the loss's own arguments to a model that takes **kwargs, unless it says this. Copies keep what is noted in ``meta``.
    module.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = {"accepts_loss_kwargs": False}
    marked: Any = module
    marked.accepts_loss_kwargs = False
    return module.eval()


def finish(program: Program, trace: bool = False) -> tuple[fx.GraphModule, ExportedProgram]:
    """The module of a rewritten program and its exported program, put together where that can be and traced where not.

    Args:
        trace: trace in any case, which gives nodes the names that the exporter would.
    """
    program = own_storage(program)
    exported = None if trace or program.facts is None else assemble(program.module, program.example, program.facts)
    if exported is None:
        exported = export_again(program.module, program.example)
        read_stamps(exported.graph)
    return wrap(exported, program.signature), exported


__all__ = ["Result", "finish", "own_storage", "wrap"]
