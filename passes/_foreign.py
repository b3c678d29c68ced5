"""A pass of somebody else's as a step of our pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassResult

from fasp_fx.base._stamps import WRITTEN_BY, stamp
from fasp_fx.base._tolerable import tolerable
from fasp_fx.base.compare import deviation, tolerance
from fasp_fx.base.compat import pytree
from fasp_fx.capturing import export_again, is_plain_graph, recapture
from fasp_fx.capturing._fx import results, written_names
from fasp_fx.capturing._program import Program, graph_module
from fasp_fx.capturing._runner import record
from fasp_fx.capturing._unchanged import copied, rewound
from fasp_fx.errors import ArgumentError, FaspError, VerificationError, first_line
from fasp_fx.passes._pruned_module import program_now

from ._pruned_module import finish, own_storage


@dataclass(frozen=True)
class Foreign:
    """A foreign pass: a ``PassBase``, or a function of a ``GraphModule`` or of an ``ExportedProgram``.

    A graph pass is given a copy of the program as a graph of ATen operators, with weights as ``get_attr``
    nodes and up-to-date ``node.meta["val"]``; it changes the copy, or returns a ``GraphModule`` or a
    ``PassResult``.

    Precondition of what it does: a weight that keeps its name keeps its shape and the meaning of its rows and
    columns (new values are its own affair); a weight laid out otherwise gets another name. Postcondition: see
    :class:`~fasp_fx.passes.Pipeline`.

    Attributes:
        call: the pass; its name is that of the function or class.
        exported: whether it takes an ``ExportedProgram``.
    """

    call: Callable[[Any], Any]
    exported: bool = False

    def __post_init__(self) -> None:
        if not callable(self.call):
            raise ArgumentError(
                f"{self.call!r} is not a pass; pass one of fasp_fx.passes, a PassBase, or a function of a"
                " GraphModule or of an ExportedProgram"
            )

    @property
    def name(self) -> str:
        """The name in messages and stamps."""
        return getattr(self.call, "__name__", type(self.call).__name__)

    def run(self, program: Program, tolerated: float | None) -> Program:
        """The rewritten program, which needs an analysis of its own.

        Raises:
            VerificationError: the pass failed, or its program is not the one it was given; names the node.
        """
        expected = None if tolerated == 0 else _outputs(program)
        try:
            rewritten = self._on_exported(program) if self.exported else self._on_graph(program)
        except FaspError:
            raise
        except tolerable(Exception) as error:  # a graph that somebody else broke fails in any way
            raise VerificationError(f"{type(error).__name__}: {first_line(error)}") from error
        if expected is not None:
            _same_values(expected, rewritten, tolerated)
        return rewritten

    def _on_graph(self, program: Program) -> Program:
        copy = own_storage(program)  # a pass may write into weights
        record(copy.module)
        before = {node.name: node.target for node in copy.module.graph.nodes}
        returned = self.call(copy.module)
        module = returned.graph_module if isinstance(returned, PassResult) else returned
        module = copy.module if module is None else module
        if not isinstance(module, fx.GraphModule):
            raise VerificationError(
                f"it returned {type(module).__name__}; a graph pass returns a GraphModule, a PassResult or"
                " None"
            )
        module.graph.lint()
        if len(results(module.graph)) != len(results(program.module.graph)) or len(
            module.graph.find_nodes(op="placeholder")
        ) != len(program.placeholders()):
            raise VerificationError("it changed the number of the program's inputs or outputs")
        self._stamp(module.graph, before)
        copy.numbers.clear()
        # A pass that copies the graph forgets how inputs and outputs are nested.
        module.graph.set_codegen(program.module.graph._codegen)
        copy.module = graph_module(module, module.graph, module.meta)
        _same_shapes(program, copy)
        if is_plain_graph(module.graph):
            record(copy.module)
            return copy
        # Operators of another dialect: torch.add, a call of a module.
        return recapture(copy, export_again(copy.module, copy.example))

    def _on_exported(self, program: Program) -> Program:
        # A pass that traces again changes no name then, and what it wrote is told by names.
        exported = program_now(finish(program, trace=True))
        before = {node.name: node.target for node in exported.graph.nodes}
        returned = self.call(exported)
        if not isinstance(returned, ExportedProgram):
            raise VerificationError(
                f"it returned {type(returned).__name__}; a pass of an ExportedProgram returns an"
                " ExportedProgram"
            )
        self._stamp(returned.graph, before)
        rewritten = recapture(replace(program, numbers={}), returned)
        _same_shapes(program, rewritten)
        return rewritten

    def _stamp(self, graph: fx.Graph, before: dict[str, Any]) -> None:
        for node in graph.nodes:
            if node.op == "call_function" and (node.name not in before or before[node.name] != node.target):
                stamp(node, self.name)
            elif WRITTEN_BY in node.meta:
                stamp(node, node.meta[WRITTEN_BY])


def _same_shapes(before: Program, after: Program) -> None:
    weights = after.weights()
    for name, tensor in before.weights().items():
        if name in weights and weights[name].shape != tensor.shape:
            raise VerificationError(
                f"weight '{name}' had shape {tuple(tensor.shape)} and now has {tuple(weights[name].shape)}; a"
                " weight laid out otherwise needs another name"
            )


def _outputs(program: Program) -> list[Any]:
    """What a program returns on its example inputs, which stay as they are, and so do its buffers."""
    inputs = copied(pytree.tree_leaves(program.example))
    with torch.no_grad(), rewound(program.module, written_names(program.module.graph)):
        return copied(list(fx.Interpreter(program.module).run(*inputs, enable_io_processing=False)))


def _same_values(expected: list[Any], after: Program, tolerated: float | None) -> None:
    """Compare what a program returns on the example inputs with what it returned before."""
    try:
        found = _outputs(after)
    except tolerable(Exception) as error:  # somebody else's functions raise what they like
        raise VerificationError(
            f"the program no longer runs on its example inputs: {type(error).__name__}: {first_line(error)}"
        ) from error
    if len(found) != len(expected):
        raise VerificationError(f"the program returned {len(expected)} values and now returns {len(found)}")
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        exact = tolerance("foreign pass", b.dtype) if isinstance(b, Tensor) else 0.0
        apart, allowed = deviation(a, b), exact if tolerated is None else tolerated
        if apart > allowed:
            raise VerificationError(
                f"output {index} differs by {apart:.1e} of its largest value on the example inputs (inf: in"
                f" its shape, type or integers), more than {allowed:.1e}; a pass that changes values"
                " on purpose needs Pipeline(tolerance=…)"
            )
