"""A pass of somebody else's as a step of our pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from fasp_fx.base import codegen_of, deviation, pytree, tolerable, tolerance
from fasp_fx.capturing import (
    WRITTEN_BY,
    Program,
    copied,
    export_again,
    graph_module,
    is_plain,
    recapture,
    record,
    results,
    rewound,
    stamp,
    written_names,
)
from fasp_fx.errors import FaspError, VerificationError, first_line

from ._pruned_module import own_storage


def name_of(call: Callable[[Any], Any]) -> str:
    """The name of a pass in messages and stamps: that of the function or class."""
    return getattr(call, "__name__", type(call).__name__)


def run_foreign(call: Callable[[Any], Any], program: Program, tolerated: float | None) -> Program:
    """The program that a foreign pass makes, a ``PassBase`` or a function of a ``GraphModule``; it needs an
    analysis of its own.

    The pass is given a copy of the program as a graph of ATen operators, with weights as ``get_attr`` nodes
    and up-to-date ``node.meta["val"]``; it changes the copy, or returns a ``GraphModule`` or a
    ``PassResult``.

    Precondition of what it does: a weight that keeps its name keeps its shape and the meaning of its rows and
    columns (new values are its own affair); a weight laid out otherwise gets another name. Postcondition: see
    :class:`~fasp_fx.passes.Pipeline`.

    Raises:
        VerificationError: the pass failed, or its program is not the one it was given; names the node.
    """
    expected = None if tolerated == 0 else _outputs(program)
    try:
        rewritten = _rewritten(call, program)
    except FaspError:
        raise
    except tolerable(Exception) as error:  # a graph that somebody else broke fails in any way
        raise VerificationError(f"{type(error).__name__}: {first_line(error)}") from error
    if expected is not None:
        _same_values(expected, rewritten, tolerated)
    return rewritten


def _rewritten(call: Callable[[Any], Any], program: Program) -> Program:
    copy = own_storage(program)  # a pass may write into weights
    record(copy.module)
    before = {node.name: node.target for node in copy.module.graph.nodes}
    returned = call(copy.module)
    module = returned.graph_module if isinstance(returned, PassResult) else returned
    module = copy.module if module is None else module
    if not isinstance(module, fx.GraphModule):
        raise VerificationError(
            f"it returned {type(module).__name__}; a graph pass returns a GraphModule, a PassResult or None"
        )
    module.graph.lint()
    if len(results(module.graph)) != len(results(program.module.graph)) or len(
        module.graph.find_nodes(op="placeholder")
    ) != len(program.placeholders()):
        raise VerificationError("it changed the number of the program's inputs or outputs")
    for node in module.graph.nodes:
        if node.op == "call_function" and (node.name not in before or before[node.name] != node.target):
            stamp(node, name_of(call))
        elif WRITTEN_BY in node.meta:
            stamp(node, node.meta[WRITTEN_BY])
    copy.numbers.clear()
    # A pass that copies the graph forgets how inputs and outputs are nested.
    module.graph.set_codegen(codegen_of(program.module.graph))
    copy.module = graph_module(module, module.graph, module.meta)
    weights = copy.weights()
    for name, tensor in program.weights().items():
        if name in weights and weights[name].shape != tensor.shape:
            raise VerificationError(
                f"weight '{name}' had shape {tuple(tensor.shape)} and now has {tuple(weights[name].shape)}; a"
                " weight laid out otherwise needs another name"
            )
    if all(map(is_plain, module.graph.nodes)):
        record(copy.module)
        return copy
    # Operators of another dialect: torch.add, a call of a module.
    return recapture(copy, export_again(copy.module, copy.example))


def _outputs(program: Program) -> list[Any]:
    """What a program returns on its example inputs, which stay as they are, and so do its buffers."""
    inputs = copied(pytree.tree_leaves(program.example))
    with torch.no_grad(), rewound(program.module, written_names(program.module.graph)):
        return copied(list(fx.Interpreter(program.module).run(*inputs, enable_io_processing=False)))


def _same_values(expected: list[Any], after: Program, tolerated: float | None) -> None:
    """Compare what a program returns on the example inputs with what it returned before."""
    try:
        outputs = _outputs(after)
    except tolerable(Exception) as error:  # somebody else's functions raise what they like
        raise VerificationError(
            f"the program no longer runs on its example inputs: {type(error).__name__}: {first_line(error)}"
        ) from error
    for index, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        exact = tolerance("foreign pass", b.dtype) if isinstance(b, Tensor) else 0.0
        apart, allowed = deviation(a, b), exact if tolerated is None else tolerated
        if apart > allowed:
            raise VerificationError(
                f"output {index} differs by {apart:.1e} of its largest value on the example inputs (inf: in"
                f" its shape, type or integers), more than {allowed:.1e}; a pass that changes values"
                " on purpose needs Pipeline(tolerance=…)"
            )
