"""A program of one operator, pruned by the library and held against the masked dense one.

Every operand is a weight, or a weight plus an input (an activation that has channels along every dimension);
a matrix consumes the result along one dimension, or along two laid out as one: different positions of the
second can then go at each position of the first. What the analysis, reading the rule, then takes to be
prunable must be mask-exact once the rewriter has adapted every argument.
"""

import math
import operator as operators
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fasp_fx.analysis import PruningPlan, analyze_program, planned
from fasp_fx.base import schema_of, tolerable
from fasp_fx.capturing import CallSignature, Program
from fasp_fx.errors import FaspError, first_line
from fasp_fx.passes import remove_channels, verify
from fasp_fx.patterns import Rule

from .._case import draw_sets
from ..oracle import Masked, error, floats
from ._calls import Call, Draw
from ._claims import Lie

_ATEN = torch.ops.aten
CLAIM = "what the rule makes prunable can be removed"


@dataclass(frozen=True)
class Outcome:
    """Whether there was anything to remove; what went wrong; and why the verifier refused a program that was
    right.
    """

    pruned: bool = False
    lie: Lie | None = None
    refusal: str | None = None


def rewritten(rule: Rule, call: Call, results: list[Tensor], draw: Draw) -> Outcome:
    """Prune a program around one call."""
    program = one_operator(rule, call, results, draw)
    if program is None:
        return Outcome()
    inputs = [torch.tensor(value, dtype=torch.float64) for value in (0.0, 0.37)]

    def lie(fact: str) -> Outcome:
        return Outcome(True, Lie(call, CLAIM, fact, direct=False))

    try:
        analysis = analyze_program(program)
    except tolerable(Exception) as problem:
        return lie(f"the analysis fails: {type(problem).__name__}: {problem}")
    chosen = draw_sets(analysis, np.random.default_rng(draw.integer(0, 2**31)))
    if not chosen.any():
        return Outcome()
    gone = chosen[analysis.labels]
    groups = tuple(entry for entry in planned(analysis.chosen, gone, analysis) if entry.removed_sets)
    plan, removed = PruningPlan("", groups, 0.0), "; ".join(map(str, groups))
    try:
        small = remove_channels(program, analysis, analysis.walk, gone)
        with torch.no_grad():
            outputs = [fx.Interpreter(small.module).run(x) for x in inputs]
    except tolerable(FaspError) as problem:
        return lie(f"removing {removed} is refused: {str(problem).strip()}")
    except tolerable(Exception) as problem:
        return lie(f"after removing {removed} the program does not run: {first_line(problem)}")
    masked = Masked(program.module, plan)
    most = 1e-4 if torch.float32 in {tensor.dtype for tensor in call.tensors().values()} else 1e-8
    for x, after in zip(inputs, outputs, strict=True):
        expected = masked(x)
        if not all(bool(torch.isfinite(t).all()) for t in floats(expected)):
            return Outcome()
        if (wrong := error(after, expected)) > most:
            return lie(f"after removing {removed} the error against the masked program is {wrong:.1e}")
    try:
        verify(small, analysis)
    except tolerable(FaspError) as problem:
        return Outcome(True, None, f"{call}: after removing {removed}: {str(problem).strip()}")
    return Outcome(True)


def one_operator(rule: Rule, call: Call, results: list[Tensor], draw: Draw) -> Program | None:
    """A program around one call, or ``None`` if it has no result that a matrix could consume."""
    usable = [index for index, result in enumerate(results) if result.numel()]
    operands = [name for name, tensor in call.tensors().items() if _varies(tensor)]
    if not usable or not (operands or rule.creates):
        return None
    which = draw.choice(usable)
    result = results[which]
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros((), dtype=torch.float64)
    blocks = _blocks(rule, call, result.dim(), draw) if _in_blocks(rule, call) else None
    moving = set(draw.some(operands, least=1))
    nodes = {
        name: _operand(root, graph, name, tensor, draw, blocks) for name, tensor in call.tensors().items()
    }
    for name in filter(moving.__contains__, [*nodes]):
        nodes[name] = graph.call_function(_ATEN.add.Tensor, (nodes[name], x))
    arguments = {name: _argument(name, value, nodes) for name, value in call.arguments.items()}
    # as a captured graph has them: by position up to the keyword-only ones
    first = [argument.name for argument in schema_of(call.operator).arguments if not argument.kwarg_only]
    node: Any = graph.call_function(call.operator, tuple(arguments.pop(name) for name in first), arguments)
    if rule.creates:  # what is created meets an activation; what memory happens to hold is not compared
        if "empty" in str(call.operator):
            node = graph.call_function(_ATEN.zeros_like.default, (node,))
        met = _operand(root, graph, "met", draw.tensor(list(result.shape), "real"), draw, blocks)
        node = graph.call_function(_ATEN.add.Tensor, (graph.call_function(_ATEN.add.Tensor, (met, x)), node))
    if len(schema_of(call.operator).returns) > 1 or "List" in str(schema_of(call.operator).returns[0].type):
        node = graph.call_function(operators.getitem, (node, which))
    if result.is_complex():
        node = graph.call_function(_ATEN.abs.default, (node,))
    if result.dtype != torch.float64:
        node = graph.call_function(_ATEN._to_copy.default, (node,), {"dtype": torch.float64})
    if result.dim():
        dims = blocks or (draw.integer(-result.dim(), -1),)
        laid = _last(dims, result.dim())
        columns = math.prod(result.shape[dim] for dim in dims)
        node = graph.call_function(_ATEN.permute.default, (node, laid))
        if len(dims) > 1:
            shape = [*(result.shape[dim] for dim in laid[: -len(dims)]), columns]
            node = graph.call_function(_ATEN.reshape.default, (node, shape))
        root.register_parameter("consumer", nn.Parameter(draw.tensor([columns, 2], "real")))
        node = graph.call_function(_ATEN.matmul.default, (node, graph.get_attr("consumer")))
    graph.output((node,))
    example = (torch.zeros((), dtype=torch.float64),)
    return Program(fx.GraphModule(root, graph), CallSignature.of(lambda x: x, example, {}), (example, {}))


def _varies(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers of the model, rather than positions."""
    return tensor.is_floating_point() and tensor.dim() > 0


def _blocks(rule: Rule, call: Call, rank: int, draw: Draw) -> tuple[int, ...]:
    """Two dimensions of a result, counted from the right, along which the consumer has columns of its own for
    every position of the first; or none.

    The first is often one that the rule makes no claim of: what the operator does along it must not meet
    other positions of the second.
    """
    if rank < 2 or draw.flag():
        return ()
    outer, inner, *_ = draw.order(range(-rank, 0))
    values = [call.arguments.get(clause.words[0]) for clause in rule.clauses if clause.argument]
    named = [
        dim % rank - rank
        for value in values
        for dim in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(dim, int)
    ]
    if named and draw.flag(0.7):
        outer = draw.choice(named)
        inner = draw.choice([dim for dim in range(-rank, 0) if dim != outer])
    return outer, inner


def _in_blocks(rule: Rule, call: Call) -> bool:
    """Whether other positions may go in every block of what an operator is given.

    Not where the analysis is known to give up, with an error: what is repeated or stacked, of which the
    verifier does not know its numbers again, and a recurrent weight whose rows and columns are stored as one.
    """
    return (
        not rule.all("repeat")
        and not rule.all("recur")
        and not isinstance(call.arguments.get(rule.moves or ""), (list, tuple))
    )


def _last(dims: tuple[int, ...], rank: int) -> list[int]:
    """All dimensions, these (counted from the right) last."""
    last = [dim + rank for dim in dims]
    return [*(dim for dim in range(rank) if dim not in last), *last]


def _operand(
    root: nn.Module,
    graph: fx.Graph,
    name: str,
    tensor: Tensor,
    draw: Draw,
    blocks: tuple[int, ...] | None,
) -> fx.Node:
    """A tensor as a weight: as it is, with its dimensions in another order, or with two of them stored as
    one, often those of the consumer's blocks (``None``: other positions may not go in every block).

    Positions along the inner one of these are then others at each position of the outer one, and different
    ones are taken away there.
    """
    attribute = "operand_" + name.replace(".", "_")
    if not _varies(tensor):
        root.register_buffer(attribute, tensor)
        return graph.get_attr(attribute)
    stored, node, rank = tensor.clone(), graph.get_attr(attribute), tensor.dim()
    if rank > 1 and draw.flag(0.6):
        alike = bool(blocks) and -min(blocks or ()) <= rank and draw.flag(0.7)
        merged = alike or draw.flag(0.7)
        if alike and blocks:
            laid = _last(blocks, rank)
        else:
            laid = list(range(rank)) if merged and not draw.flag(0.3) else draw.order(range(rank))
        laid = sorted(laid) if merged and blocks is None else laid
        stored = stored.permute(laid).contiguous()
        if merged:
            dim, shape = rank - 2 if alike else draw.integer(0, rank - 2), list(stored.shape)
            stored = stored.flatten(dim, dim + 1)
            node = graph.call_function(_ATEN.reshape.default, (node, shape))
        if laid != sorted(laid):
            back = [laid.index(dim) for dim in range(rank)]
            node = graph.call_function(_ATEN.permute.default, (node, back))
            # some kernels take no such strides
            whole: dict[str, Any] = {"memory_format": torch.contiguous_format}
            node = graph.call_function(_ATEN.clone.default, (node,), whole)
    root.register_parameter(attribute, nn.Parameter(stored))
    return node


def _argument(name: str, value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, (list, tuple)):
        return [nodes.get(f"{name}.{index}", item) for index, item in enumerate(value)]
    return nodes.get(name, value)
