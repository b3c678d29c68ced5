"""Invariants 1, 2, 4, 5 and 7: what is computed, that nothing happens where nothing is removed, that the plan
tells the truth, and that an operator nobody has seen freezes what it touches.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx

import fasp_fx
from fasp_fx.analysis import PruningPlan
from fasp_fx.base import pytree, tensors_in, tolerable
from fasp_fx.errors import NothingPrunableError

from ._case import Call, Case, Skipped, Violation, draw_part, hold
from .oracle import Masked, callable_of, error, kept, tensors_of


def mask_exact(case: Case) -> None:
    """The pruned program equals the dense one with the removed entries of every consumer's input at zero."""
    hold(bool(case.plan.groups), "the plan removes nothing, although channels were chosen")
    for call in case.calls:
        output = call_result(case, case.result, call)
        if output is None:
            continue
        expected, dense = case.run(case.masked, call), case.run(case.dense, call)
        wrong = error(output, expected)
        case.worst, case.compared = max(case.worst, wrong), case.compared + 1
        case.seen = min(case.seen, error(expected, dense))
        hold(
            wrong <= case.tolerance,
            f"on inputs {shapes(call)} the error against the masked dense model is {wrong:.2e};"
            f" plan:\n{case.plan}",
        )


def call_result(case: Case, result: fasp_fx.Result, call: Call) -> object | None:
    """The result's output, or ``None`` where the capture itself has fixed a size that this call changes."""
    try:
        return case.run(result.module, call)
    except tolerable(Exception) as problem:
        try:
            case.run(case.untouched.module, call)
        except tolerable(Exception):
            return None
        raise Violation(
            f"inputs {shapes(call)} are refused, though the captured program takes them:"
            f" {type(problem).__name__}: {problem}"
        ) from problem


def shapes(call: Call) -> str:
    """The shapes of the tensors of a call."""
    return ", ".join(str(tuple(leaf.shape)) for leaf in tensors_in(call))


def nothing_removed(case: Case) -> None:
    """Removing nothing returns a program bit-equal to the captured one, with the caller's weights."""
    result, program = case.untouched, case.captured
    leaves = pytree.tree_leaves(case.run(result.module, (case.args, case.kwargs)))
    captured = case.run(program.module, (tuple(program.flat_inputs(case.args, case.kwargs)), {}))
    expected = pytree.tree_leaves(captured)
    for index, (a, b) in enumerate(zip(leaves, expected, strict=True)):
        same = (
            torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
            if isinstance(a, Tensor)
            else a == b
        )
        hold(same, f"output {index} differs from that of the captured program")
    dense = case.run(case.dense, (case.args, case.kwargs))
    hold(
        error(case.run(result.module, (case.args, case.kwargs)), dense) <= case.tolerance,
        "the captured program does not compute what the model computes",
    )
    weights = tensors_of(callable_of(result.module))
    folded = {weight.name for weight in case.captured.folds}
    for name, parameter in case.dense.named_parameters(remove_duplicate=False):
        if name in weights and name not in folded:
            hold(torch.equal(weights[name], parameter), f"'{name}' changed though nothing was removed")


def plan_is_true(case: Case) -> None:
    """Channel sets partition the channels, indices are in range, the plan says what happened, and it is for
    models of these shapes alone.
    """
    _partition(case)
    _weights_are_slices(case)
    hold(
        case.result.plan.slices() == case.plan.slices(),
        f"the result says that it lost\n{case.result.plan}\nbut the plan was\n{case.plan}",
    )
    read = PruningPlan.from_json(case.plan.to_json())
    hold(read == case.plan, "the plan does not survive JSON")
    hold(same_weights(case.apply(read), case.result), "replaying the plan gives other weights")
    first, *others = case.plan.shapes
    strange = replace(case.plan, shapes=(replace(first, shape=(*first.shape, 1)), *others))
    for plan, model, what in (
        (case.plan, case.result.module, "its own result"),
        (strange, case.dense, "a model of other shapes"),
    ):
        refused(partial(case.apply, plan, model), fasp_fx.PlanError, f"a plan was applied to {what}")


def _partition(case: Case) -> None:
    tensors = tensors_of(case.reference)
    seen: dict[tuple[str, int], set[int]] = {}
    for group in case.analysis.groups:
        hold(
            len(np.unique(group.sets)) == group.size,
            f"group '{group.name}' counts {group.size} channel sets but holds {len(np.unique(group.sets))}",
        )
    for planned in case.plan.groups:
        sets: dict[tuple[str, int], set[int]] = {}
        for part in (*planned.producers, *planned.consumers):
            hold(part.name in tensors, f"the plan names '{part.name}', which the model does not have")
            size = tensors[part.name].shape[part.dim]
            for removed in map(list, part.by_block()):
                hold(removed == sorted(set(removed)), f"{part} lists an index twice or out of order")
                inside = all(0 <= index < size for index in removed)
                hold(inside, f"{part} is out of range: the dimension has {size}")
            if part.block_dim is None:
                sets[part.name, part.dim] = set(part.by_block()[0])
        for place, indices in sets.items():
            taken = seen.setdefault(place, set())
            hold(not taken & indices, f"two groups remove the same index of {place}")
            taken |= indices


def _weights_are_slices(case: Case) -> None:
    """Every weight of the result is the model's without what the plan lists."""
    tensors, pruned = tensors_of(case.reference), tensors_of(case.result.module)
    masks = {name: torch.ones(tensor.shape, dtype=torch.bool) for name, tensor in tensors.items()}
    for part in (part for group in case.plan.groups for part in (*group.producers, *group.consumers)):
        left = kept(tensors[part.name].detach().cpu(), part)
        for name in (name for name, tensor in tensors.items() if tensor is tensors[part.name]):
            masks[name] &= left
    pieces = {split.name: split for split in case.result.plan.splits}
    for name, tensor in pruned.items():
        whole = pieces[name].source if name in pieces else name
        if whole not in tensors:
            continue
        source, mask = tensors[whole].detach().cpu(), masks[whole]
        if name in pieces:
            rows = torch.tensor(pieces[name].rows)
            source, mask = (t.index_select(pieces[name].dim, rows) for t in (source, mask))
        hold(
            int(mask.sum()) == tensor.numel(),
            f"'{name}' has shape {tuple(tensor.shape)}, but the plan leaves {int(mask.sum())} of its"
            " elements",
        )
        hold(
            torch.equal(source[mask].reshape(tensor.shape), tensor.detach().cpu()),
            f"'{name}' is not the model's without what the plan removes",
        )


def same_weights(first: fasp_fx.Result, second: fasp_fx.Result) -> bool:
    """Whether two results hold the same weights under the same names."""
    a, b = tensors_of(first.module), tensors_of(second.module)
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and torch.equal(a[name], b[name]) for name in a
    )


def refused(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    """Raise :class:`Violation` unless a call ends in this error."""
    try:
        call()
    except kind:
        return
    raise Violation(message)


def two_steps(case: Case) -> None:
    """Pruning by one plan and then by another, renumbered, equals pruning by both at once."""
    whole = case.chosen()
    part = draw_part(case.analysis, whole, case.random)
    rest = whole if bool(case.random.integers(2)) else whole & ~part
    first = case.apply(case.plan_of(part))
    second = case.apply(case.plan_of(rest).after(first.plan), first.module)
    at_once = case.apply(case.plan_of(whole))
    # Of one block that is left, rows may be taken apart that lay in turn with those of others.
    split_later = {split.source for split in second.plan.splits} - {
        split.source for split in at_once.plan.splits
    }
    hold(
        bool(split_later) or same_weights(second, at_once),
        f"two steps lead to other weights than one; first\n{first.plan}\nthen\n{case.plan_of(rest)}",
    )
    call = case.calls[-1]
    output, expected = call_result(case, second, call), call_result(case, at_once, call)
    if output is not None and expected is not None:
        hold(
            error(output, expected) <= case.tolerance,
            f"two steps compute something else than one: {error(output, expected):.2e}",
        )


#: the shapes that the operator sees while somebody listens
_seen: list[tuple[int, ...]] = []


@torch.library.custom_op("fasp_fx_testing::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """Mixes the last dimension in a way that no rule describes, and notes the shapes it sees.

    The strides stay, since a view behind it may depend on them.
    """
    _seen.append(tuple(x.shape))
    return torch.empty_like(x).copy_(x + 0.5 * x.flip(-1)) if x.dim() else x.clone()


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def unseen_operator(case: Case) -> None:
    """With an operator without a rule put between two nodes, pruning is still mask-exact and every tensor the
    operator sees keeps its shape.
    """
    program = case.captured.copy()
    module: fx.GraphModule = program.module
    nodes: list[fx.Node] = [node for node, value in _activations(module.graph) if value.dim() > 1]
    if not nodes:
        raise Skipped("no node of the graph has a floating-point activation")
    for index in sorted({int(case.random.integers(len(nodes))) for _ in range(2)}):
        with module.graph.inserting_after(nodes[index]):
            added = module.graph.call_function(torch.ops.fasp_fx_testing.opaque.default, (nodes[index],))
        nodes[index].replace_all_uses_with(added, partial(operator.is_not, added))
    module.recompile()
    inputs = tuple(program.flat_inputs(case.args, case.kwargs))
    try:
        analysis = fasp_fx.analyze(module, inputs)
    except tolerable(Exception) as problem:
        raise Violation(f"the analysis fails: {type(problem).__name__}: {problem}") from problem
    sparsity = max(0.7 * analysis.max_sparsity, 1e-6)
    try:
        result = fasp_fx.prune(module, inputs, sparsity=sparsity, score="random", restore=None)
    except (NothingPrunableError, fasp_fx.SparsityError):
        return
    _seen.clear()
    case.run(module, (inputs, {}))
    before = list(_seen)
    _seen.clear()
    output = case.run(result.module, (inputs, {}))
    hold(before == _seen, f"the operator saw {before} in the dense program and sees {_seen}")
    wrong = error(output, case.run(Masked(module, result.plan), (inputs, {})))
    hold(
        wrong <= case.tolerance,
        f"behind an unseen operator the error against the masked dense model is {wrong:.2e};"
        f" plan:\n{result.plan}",
    )


def _activations(graph: fx.Graph) -> Iterator[tuple[fx.Node, Tensor]]:
    """The floating-point results of operators that depend on an input."""
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not fed.isdisjoint(node.all_input_nodes):
            fed.add(node)
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
                yield node, value
