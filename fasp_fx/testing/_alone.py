"""Invariants 3, 6, 9 and 10: the caller's signature, recorded shapes, ties that stay, and a result that is a
model of its own.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fasp_fx.base import pytree, tolerable

from ._case import Case, alike, rewinding, with_own
from ._exact import call_result, refused, shapes
from ._verdict import Skipped, Violation, hold
from .oracle import error, floats, tensors_of


def signature(case: Case) -> None:
    """Names, kinds and defaults of the arguments, the structure of the output, and dynamic dimensions are
    those of the caller's model.
    """
    dense = case.run(case.dense, (case.args, case.kwargs))
    output = case.run(case.result.module, (case.args, case.kwargs))
    hold(
        pytree.tree_structure(output) == pytree.tree_structure(dense),
        f"the output is {pytree.tree_structure(output)} instead of {pytree.tree_structure(dense)}",
    )
    if isinstance(case.model, nn.Module):
        before, after = inspect.signature(case.model.forward), inspect.signature(case.result.module.forward)
        hold(_outline(before) == _outline(after), f"forward{after} instead of forward{before}")
        _by_keyword(case, before, output)
        _constants_are_refused(case, before)
    for call in case.calls:
        result_output, expected = call_result(case, case.result, call), case.run(case.dense, call)
        if result_output is not None:
            for a, b in zip(pytree.tree_leaves(result_output), pytree.tree_leaves(expected), strict=True):
                hold(
                    not isinstance(a, Tensor) or a.dtype == b.dtype,
                    f"on inputs {shapes(call)} an output has type {getattr(a, 'dtype', type(a))}",
                )


def _outline(outlined: inspect.Signature) -> list[tuple[str, Any, bool]]:
    return [(p.name, p.kind, p.default is not inspect.Parameter.empty) for p in outlined.parameters.values()]


def _by_keyword(case: Case, signature: inspect.Signature, expected: Any) -> None:
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    unnamed = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
    if unnamed & set(kinds.values()):
        return
    keywords: dict[str, Any] = {}
    for name, value in signature.bind(*case.args, **case.kwargs).arguments.items():
        keywords |= value if kinds[name] is inspect.Parameter.VAR_KEYWORD else {name: value}
    output = case.run(case.result.module, ((), keywords))
    hold(
        error(output, expected) == 0.0,
        f"called by keyword ({', '.join(keywords)}) it computes something else",
    )


def _constants_are_refused(case: Case, signature: inspect.Signature) -> None:
    """An argument without tensors is part of the program: another value has to be refused, never ignored."""
    for name, value in case.kwargs.items():
        default = signature.parameters[name].default if name in signature.parameters else None
        if not isinstance(value, bool) or default is not inspect.Parameter.empty:
            continue
        refused(
            partial(case.run, case.result.module, (case.args, {**case.kwargs, name: not value})),
            TypeError,
            f"'{name}={not value}' is accepted, though the program was captured with {value}",
        )


def recorded_shapes(case: Case) -> None:
    """The shape recorded at every node is the one that is executed."""
    program: ExportedProgram = case.result.program
    leaves = iter(pytree.tree_leaves(case.captured.flat_inputs(case.args, case.kwargs)))
    tensors = {**program.constants, **program.state_dict}
    inputs = [
        next(leaves) if spec.kind == InputKind.USER_INPUT else tensors[str(spec.target)]
        for spec in program.graph_signature.input_specs
    ]
    runner = _Runner(program)
    with torch.no_grad():
        runner.run(*inputs)
    hold(runner.checked > 0, "no node of the program records a shape")


class _Runner(fx.Interpreter):
    """Runs an exported program and holds every result against the recorded one."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.sizes: dict[Any, int] = {}
        self.checked = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        recorded = n.meta.get("val") if n.op != "output" else None
        leaves = () if recorded is None else zip(*map(pytree.tree_leaves, (recorded, value)), strict=True)
        for expected, actual in leaves:
            if isinstance(expected, Tensor):
                self._compare(n, expected, actual)
        return value

    def _compare(self, node: fx.Node, recorded: Tensor, value: Tensor) -> None:
        sizes = zip(recorded.shape, value.shape, strict=True)
        expected = [self._size(node, size, actual) for size, actual in sizes], recorded.dtype
        actual = list(value.shape), value.dtype
        hold(expected == actual, f"node '{node.name}' ({node.target}) records {expected} and has {actual}")
        self.checked += 1

    def _size(self, node: fx.Node, recorded: int | torch.SymInt, actual: int) -> int:
        if not isinstance(recorded, torch.SymInt):
            return recorded
        if node.op == "placeholder" and recorded.node.expr.is_Symbol:
            self.sizes.setdefault(recorded.node.expr, actual)
        value = recorded.node.expr.xreplace(self.sizes)
        return int(value) if isinstance(value, int) or value.is_number else actual


def ties_stay(case: Case) -> None:
    """Parameters that were one are one, under all their names."""
    named = list(case.dense.named_parameters(remove_duplicate=False))
    alike = [[name for name, other in named if other is parameter] for parameter in case.dense.parameters()]
    tied = [group for group in alike if len(group) > 1]
    if not tied:
        raise Skipped("no weights are tied")
    for result in (case.result, case.untouched):
        parameters = dict(result.module.named_parameters(remove_duplicate=False))
        for group in tied:
            present = [name for name in group if name in parameters]
            hold(
                len({id(parameters[name]) for name in present}) <= 1,
                f"{', '.join(present)} were one parameter and are several",
            )
            hold(
                not present or present == group,
                f"of the tied {', '.join(group)} only {', '.join(present)} are left",
            )


def alone(case: Case) -> None:
    """The result shares no storage with the caller's model; it trains, changes mode and type, copies, exports
    again and, if asked, compiles.
    """
    result, call = case.result, (case.args, case.kwargs)
    expected = case.run(result.module, call)
    for module in (result.module, case.untouched.module):
        shared = _storages(tensors_of(module)) & _storages(tensors_of(case.dense))
        hold(not shared, f"{len(shared)} storages are shared with the caller's model")
    for mode in (True, False):
        hold(
            error(case.run(result.module.train(mode), call), expected) == 0.0,
            f"train({mode}) changes the output",
        )
    with rewinding(result.module):
        _trains(case, result.module, call)
    _copies(case, result.module, expected)
    plain = (Tensor, bool, int, float, str, type(None))
    others: dict[str, Any] = {}
    if isinstance(case.model, nn.Module) and all(
        isinstance(leaf, plain) for leaf in pytree.tree_leaves(call)
    ):
        others["exported again"] = torch.export.export(result.module, *call, strict=False).module()
    if case.compile:
        others["compiled"] = torch.compile(result.module)
    for how, module in others.items():
        wrong = error(case.run(module, call), expected)
        hold(wrong <= case.tolerance, f"{how} it computes something else")
    for name, tensor in tensors_of(case.dense).items():
        hold(
            alike(tensor, case.before[name]),
            f"'{name}' of the caller's model changed",
        )


def _storages(tensors: dict[str, Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()}


def _trains(case: Case, module: nn.Module, call: Any) -> None:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return
    if case.times > 1:
        try:
            _backward(copy.deepcopy(case.dense), call)
        except tolerable(RuntimeError):
            return  # the model itself writes over what a gradient needs
    module.zero_grad()
    if not _backward(module, call):
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    hold(bool(gradients), "no parameter gets a gradient")
    hold(all(bool(torch.isfinite(g).all()) for g in gradients), "a gradient is not finite")
    module.zero_grad()


def _backward(module: nn.Module, call: Any) -> bool:
    """Take gradients of a call; whether an output carries any."""
    leaves = pytree.tree_leaves(with_own(module, *call))
    outputs = [leaf.pow(2).sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if outputs:
        torch.stack(outputs).sum().backward()
    return bool(outputs)


def _copies(case: Case, module: nn.Module, expected: Any) -> None:
    copied = copy.deepcopy(module)
    hold(
        error(case.run(copied, (case.args, case.kwargs)), expected) == 0.0,
        "a deep copy computes something else",
    )
    kinds = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if len(kinds) != 1:
        return
    other = torch.float64 if kinds == {torch.float32} else torch.float32
    (dtype,) = kinds
    moved = pytree.tree_map(
        lambda leaf: leaf.to(other) if isinstance(leaf, Tensor) and leaf.dtype == dtype else leaf,
        (case.args, case.kwargs),
    )
    try:
        dense = case.run(copy.deepcopy(case.dense).to(other), moved)
    except tolerable(Exception):
        return  # the model itself does not take another type
    if not all(leaf.dtype == other for leaf in floats(dense)):
        return
    try:
        output = case.run(copied.to(other), moved)
    except tolerable(Exception) as problem:
        raise Violation(f"in {other} it does not run: {problem}") from problem
    as_before = [leaf.to(dtype) for leaf in floats(output)]
    hold(error(as_before, floats(expected)) <= 1e-3, f"in {other} it computes something else")
