"""Invariant 7: an operator nobody has seen freezes what it touches; it never crashes and never prunes
wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx

import fasp_fx
from fasp_fx.base._tolerable import tolerable
from fasp_fx.errors import NothingPrunableError

from ._case import Case
from ._verdict import Skipped, Violation, hold
from .oracle import Masked, error

_shapes: list[tuple[int, ...]] | None = None


@torch.library.custom_op("fasp_fx_testing::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """Mixes the last dimension in a way that no rule describes, and notes the shapes it sees while
    :func:`_noted` listens.

    The strides stay, since a view behind it may depend on them.
    """
    if _shapes is not None:
        _shapes.append(tuple(x.shape))
    return torch.empty_like(x).copy_(x + 0.5 * x.flip(-1)) if x.dim() else x.clone()


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@contextmanager
def _noted() -> Iterator[list[tuple[int, ...]]]:
    global _shapes
    _shapes = []
    try:
        yield _shapes
    finally:
        _shapes = None


def unseen_operator(case: Case) -> None:
    """With an operator without a rule put between two nodes, pruning is still mask-exact and every tensor the
    operator sees keeps its shape.
    """
    program = case.captured.copy()
    module: fx.GraphModule = program.module
    nodes = [node for node in module.graph.nodes if _carries(node, program)]
    if not nodes:
        raise Skipped("no node of the graph has a floating-point activation")
    for index in sorted({int(case.random.integers(len(nodes))) for _ in range(2)}):
        _insert(module.graph, nodes[index])
    module.recompile()
    inputs = tuple(program.flat_inputs(case.args, case.kwargs))
    try:
        analysis = fasp_fx.analyze(module, inputs)
    except tolerable(Exception) as problem:
        raise Violation(f"the analysis fails: {type(problem).__name__}: {problem}") from problem
    most = analysis.max_sparsity
    try:
        result = fasp_fx.prune(module, inputs, sparsity=max(0.7 * most, 1e-6), score="random", restore=None)
    except NothingPrunableError:
        return
    except fasp_fx.SparsityError:
        return
    with _noted() as before:
        case.run(module, (inputs, {}))
    with _noted() as after:
        found = case.run(result.module, (inputs, {}))
    hold(before == after, f"the operator saw {before} in the dense program and sees {after}")
    wrong = error(found, case.run(Masked(module, result.plan), (inputs, {})))
    hold(
        wrong <= case.tolerance,
        f"behind an unseen operator the error against the masked dense model is {wrong:.2e};"
        f" plan:\n{result.plan}",
    )


def _carries(node: fx.Node, program: object) -> bool:
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() > 1
        and _depends(node, set())
    )


def _depends(node: fx.Node, seen: set[fx.Node]) -> bool:
    """Whether a node depends on an input of the graph."""
    if node.op == "placeholder":
        return True
    fresh = [source for source in node.all_input_nodes if source not in seen]
    seen.update(fresh)
    return any(_depends(source, seen) for source in fresh)


def _insert(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_after(node):
        added = graph.call_function(torch.ops.fasp_fx_testing.opaque.default, (node,))
    node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
