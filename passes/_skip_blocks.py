"""Leave out residual blocks of which all channels go."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from fasp_fx.analysis import Analysis, Walk, beside, goes_with_a_block, laid_out, serving
from fasp_fx.base import stamp
from fasp_fx.capturing import Program, arguments, results, viewed
from fasp_fx.errors import VerificationError
from fasp_fx.patterns import affine, lookup

_ATEN = torch.ops.aten
_NAME = "skip_blocks"


def skip_blocks(program: Program, analysis: Analysis, walk: Walk, gone: np.ndarray) -> Program:
    """Where all channels of a group go that is all there is to a residual block (``include=("depth",)``),
    what reads them gives its bias, and nothing where it has none: the sum becomes what the block was added
    to. No node computes anything of such a block then; its weights are cut as others are.
    """
    kept = np.unique(analysis.labels[~gone])
    skipped = [group for group in analysis.groups if not group.needed and not np.isin(group.sets, kept).any()]
    if not skipped:
        return program
    program = program.copy()
    graph = program.module.graph
    nodes = {node.name: node for node in graph.nodes}
    ends = [nodes[use.node.name] for group in skipped for use in group.uses]
    unused = serving(ends, graph)
    for end in ends:
        if (other := beside(laid_out(end))) is None:
            raise VerificationError(f"'{end.name}' ends in no sum any more, so that it cannot be left out")
        _replace_by_bias(end, other)
    for node in unused:
        # Weights stay, to be cut; what draws random numbers, since those after it would be others; and what
        # a bias is computed of.
        if node.op == "call_function" and not node.users and goes_with_a_block(node):
            graph.erase_node(node)
    return program


def _replace_by_bias(node: fx.Node, other: fx.Node) -> None:
    """Put the bias of a contraction in its place, in the shape of the value that it ends in a sum with; where
    there is none, and nothing stands between it and the sum, that value in the place of the sum.
    """
    graph, form, end = node.graph, affine(node.target), laid_out(node)
    bias = None if form is None or form.bias is None else arguments(node)[form.bias]
    total = next(iter(end.users))
    is_sum = total.target is _ATEN.add.Tensor and other in total.all_input_nodes
    # A value can stand for a sum if its memory is that of no input and no weight, and the sum is no output,
    # that the caller may write into.
    returned = [viewed(result) for result in results(graph) if isinstance(result, fx.Node)]
    is_own = viewed(other).op == "call_function" and total not in returned
    if bias is None and len(end.users) == 1 and is_sum and is_own:
        total.replace_all_uses_with(other)
        graph.erase_node(total)
    else:
        with graph.inserting_before(end):
            stand_in = stamp(graph.call_function(_ATEN.zeros_like.default, (other,)), _NAME, node)
            if bias is not None and form is not None:
                spread = _spread(node, str(form.bias), bias)
                stand_in = stamp(graph.call_function(_ATEN.add.Tensor, (stand_in, spread)), _NAME, node)
        end.replace_all_uses_with(stand_in)
    while end is not node:  # views of it
        view, end = end, end.all_input_nodes[0]
        graph.erase_node(view)


def _spread(node: fx.Node, name: str, bias: fx.Node) -> fx.Node:
    """A bias as it is added to the output of a contraction; that of a convolution is along its channels."""
    rule = lookup(node.target)
    assert rule is not None
    form = rule.alternatives[0]
    dims = next(operand.dims for operand in form.operands if operand.name == name)
    if not (beyond := form.results[0][::-1].index(dims[-1])):
        return bias
    shape = [-1] + [1] * beyond
    return stamp(node.graph.call_function(_ATEN.reshape.default, (bias, shape)), _NAME, node)
