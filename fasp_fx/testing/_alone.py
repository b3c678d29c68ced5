"""Invariants 9 and 10: ties stay, and the result is a model of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..base._tolerable import tolerable
from ..base.compat import pytree
from ._case import Case
from ._in_a_row import rewinding, with_own
from ._verdict import Skipped, Violation, hold
from .oracle import error, floats, tensors_of


def ties_stay(case: Case) -> None:
    """Parameters that were one are one, under all their names."""
    named = list(case.dense.named_parameters(remove_duplicate=False))
    alike = [[name for name, other in named if other is own] for own in case.dense.parameters()]
    tied = [group for group in alike if len(group) > 1]
    if not tied:
        raise Skipped("no weights are tied")
    for result in (case.result, case.untouched):
        found = dict(result.module.named_parameters(remove_duplicate=False))
        for group in tied:
            present = [name for name in group if name in found]
            hold(
                len({id(found[name]) for name in present}) <= 1,
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
            torch.equal(tensor.detach().nan_to_num(), case.before[name].nan_to_num()),
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
    (own,) = kinds
    moved = pytree.tree_map(
        lambda leaf: leaf.to(other) if isinstance(leaf, Tensor) and leaf.dtype == own else leaf,
        (case.args, case.kwargs),
    )
    try:
        dense = case.run(copy.deepcopy(case.dense).to(other), moved)
    except tolerable(Exception):
        return  # the model itself does not take another type
    if not all(leaf.dtype == other for leaf in floats(dense)):
        return
    try:
        found = case.run(copied.to(other), moved)
    except tolerable(Exception) as problem:
        raise Violation(f"in {other} it does not run: {problem}") from problem
    as_before = [leaf.to(own) for leaf in floats(found)]
    hold(error(as_before, floats(expected)) <= 1e-3, f"in {other} it computes something else")
