"""Invariants 7 and 8: an operator nobody has seen freezes what it touches, and never crashes or prunes
wrongly; the rules of the operators that occur in a graph are right.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx

import fasp_fx
from fasp_fx import patterns
from fasp_fx.base._tolerable import tolerable
from fasp_fx.errors import ArgumentError, NothingPrunableError

from ..base.compat import OpOverload
from ._case import Case
from ._verdict import Skipped, Violation, hold
from .oracle import Masked, error
from .rule import RuleVerdict, check_rule

#: calls per rule; rules are held against more in the tests of the library itself
_EXAMPLES = 12
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
    nodes = [node for node in module.graph.nodes if _carries(node)]
    if not nodes:
        raise Skipped("no node of the graph has a floating-point activation")
    for index in sorted({int(case.random.integers(len(nodes))) for _ in range(2)}):
        with module.graph.inserting_after(nodes[index]):
            added = module.graph.call_function(torch.ops.fasp_fx_testing.opaque.default, (nodes[index],))
        nodes[index].replace_all_uses_with(added, delete_user_cb=lambda user, own=added: user is not own)
    module.recompile()
    inputs = tuple(program.flat_inputs(case.args, case.kwargs))
    try:
        analysis = fasp_fx.analyze(module, inputs)
    except tolerable(Exception) as problem:
        raise Violation(f"the analysis fails: {type(problem).__name__}: {problem}") from problem
    most = analysis.max_sparsity
    try:
        result = fasp_fx.prune(module, inputs, sparsity=max(0.7 * most, 1e-6), score="random", restore=None)
    except (NothingPrunableError, fasp_fx.SparsityError):
        return
    _seen.clear()
    case.run(module, (inputs, {}))
    before = list(_seen)
    _seen.clear()
    found = case.run(result.module, (inputs, {}))
    hold(before == _seen, f"the operator saw {before} in the dense program and sees {_seen}")
    wrong = error(found, case.run(Masked(module, result.plan), (inputs, {})))
    hold(
        wrong <= case.tolerance,
        f"behind an unseen operator the error against the masked dense model is {wrong:.2e};"
        f" plan:\n{result.plan}",
    )


def _carries(node: fx.Node) -> bool:
    """Whether a node gives an activation, which depends on an input."""
    value = node.meta.get("val")
    real = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    return node.op == "call_function" and real and _depends(node, set())


def _depends(node: fx.Node, seen: set[fx.Node]) -> bool:
    """Whether a node depends on an input of the graph."""
    if node.op == "placeholder":
        return True
    fresh = [source for source in node.all_input_nodes if source not in seen]
    seen.update(fresh)
    return any(_depends(source, seen) for source in fresh)


def rules_held(case: Case) -> None:
    """No rule of an operator in the graph claims more than the operator keeps."""
    targets = {node.target for node in case.captured.module.graph.nodes}
    operators = sorted((target for target in targets if isinstance(target, OpOverload)), key=str)
    rules = {operator: rule for operator in operators if (rule := patterns.lookup(operator)) is not None}
    verdicts = list(filter(None, (_verdict(operator, str(rule)) for operator, rule in rules.items())))
    for verdict in verdicts:
        hold(verdict.kind != "claims too much", str(verdict))
    if not verdicts:
        raise Skipped("no operator of the graph has a rule that can be sampled")


@cache
def _verdict(operator: OpOverload, rule: str) -> RuleVerdict | None:
    """The verdict on a rule, once per process; ``None`` for operators of which no call can be made up."""
    try:
        return check_rule(operator, examples=_EXAMPLES)
    except ArgumentError:
        return None
