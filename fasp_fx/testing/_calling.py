"""Invariants 3 and 6: the caller's signature, and recorded shapes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..base.compat import pytree
from ._case import Case
from ._exact import call_result, shapes
from ._verdict import Violation, hold
from .oracle import error


def signature(case: Case) -> None:
    """Names, kinds and defaults of the arguments, the structure of the output, and dynamic dimensions are
    those of the caller's model.
    """
    dense = case.run(case.dense, (case.args, case.kwargs))
    found = case.run(case.result.module, (case.args, case.kwargs))
    hold(
        pytree.tree_structure(found) == pytree.tree_structure(dense),
        f"the output is {pytree.tree_structure(found)} instead of {pytree.tree_structure(dense)}",
    )
    if isinstance(case.model, nn.Module):
        before, after = inspect.signature(case.model.forward), inspect.signature(case.result.module.forward)
        hold(_outline(before) == _outline(after), f"forward{after} instead of forward{before}")
        _by_keyword(case, before, found)
        _constants_are_refused(case, before)
    for call in case.calls:
        given, expected = call_result(case, case.result, call), case.run(case.dense, call)
        if given is not None:
            for a, b in zip(pytree.tree_leaves(given), pytree.tree_leaves(expected), strict=True):
                hold(
                    not isinstance(a, Tensor) or a.dtype == b.dtype,
                    f"on inputs {shapes(call)} an output has type {getattr(a, 'dtype', type(a))}",
                )


def _outline(found: inspect.Signature) -> list[tuple[str, Any, bool]]:
    return [(p.name, p.kind, p.default is not inspect.Parameter.empty) for p in found.parameters.values()]


def _by_keyword(case: Case, given: inspect.Signature, expected: Any) -> None:
    kinds = {name: parameter.kind for name, parameter in given.parameters.items()}
    unnamed = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
    if unnamed & set(kinds.values()):
        return
    keywords: dict[str, Any] = {}
    for name, value in given.bind(*case.args, **case.kwargs).arguments.items():
        keywords |= value if kinds[name] is inspect.Parameter.VAR_KEYWORD else {name: value}
    found = case.run(case.result.module, ((), keywords))
    hold(
        error(found, expected) == 0.0, f"called by keyword ({', '.join(keywords)}) it computes something else"
    )


def _constants_are_refused(case: Case, given: inspect.Signature) -> None:
    """An argument without tensors is part of the program: another value has to be refused, never ignored."""
    for name, value in case.kwargs.items():
        default = given.parameters[name].default if name in given.parameters else None
        if not isinstance(value, bool) or default is not inspect.Parameter.empty:
            continue
        try:
            case.run(case.result.module, (case.args, {**case.kwargs, name: not value}))
        except TypeError:
            continue
        raise Violation(f"'{name}={not value}' is accepted, though the program was captured with {value}")


def recorded_shapes(case: Case) -> None:
    """The shape recorded at every node is the one that is executed."""
    program: ExportedProgram = case.result.program
    leaves = pytree.tree_leaves(case.captured.flat_inputs(case.args, case.kwargs))
    runner = _Runner(program)
    with torch.no_grad():
        runner.run(*flat_inputs(program, leaves))
    hold(runner.checked > 0, "no node of the program records a shape")


class _Runner(fx.Interpreter):
    """Runs an exported program and holds every result against the recorded one."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.sizes: dict[Any, int] = {}
        self.checked = 0

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op != "output":
            self._compare(n, n.meta.get("val"), found)
        return found

    def _compare(self, node: fx.Node, recorded: Any, found: Any) -> None:
        if isinstance(recorded, (list, tuple)):
            for a, b in zip(recorded, found, strict=True):
                self._compare(node, a, b)
        elif isinstance(recorded, Tensor):
            sizes = zip(recorded.shape, found.shape, strict=True)
            expected = [self._size(node, size, actual) for size, actual in sizes], recorded.dtype
            actual = list(found.shape), found.dtype
            hold(
                expected == actual, f"node '{node.name}' ({node.target}) records {expected} and has {actual}"
            )
            self.checked += 1

    def _size(self, node: fx.Node, recorded: int | torch.SymInt, actual: int) -> int:
        if not isinstance(recorded, torch.SymInt):
            return recorded
        if node.op == "placeholder" and recorded.node.expr.is_Symbol:
            self.sizes.setdefault(recorded.node.expr, actual)
        value = recorded.node.expr.xreplace(self.sizes)
        return int(value) if isinstance(value, int) or value.is_number else actual


def flat_inputs(program: ExportedProgram, user: list[Any]) -> list[Any]:
    """Everything that the graph of a program takes, in order: weights and constants, and the caller's flat
    inputs among them.
    """
    remaining, tensors = iter(user), {**program.constants, **program.state_dict}
    found = []
    for spec in program.graph_signature.input_specs:
        held = None if spec.kind == InputKind.USER_INPUT else tensors[str(spec.target)]
        found.append(next(remaining) if held is None else held)
    return found
