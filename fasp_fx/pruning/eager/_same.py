"""Whether two programs are the same: the same operators, wired alike, with the same constants, weights and
assumptions about sizes, so that what they compute is the same on every input that they take.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...base.compare import deviation, tolerance
from ...base.compat import free_unbacked_symbols
from ...capturing._fx import arguments, attribute, results, target_name, written_by
from ...capturing._program import ExportFacts
from ...passes._pruned_module import PrunedModule
from ...patterns import RESHAPES, lookup

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
#: what is assumed of a size that does not vary
_SETTLED = re.compile(r".+\.size\(\)\[\d+\] == \d+")
_COPIES = ("aten.clone.default", "aten.contiguous.default")
#: clauses of the operators that part a dimension
_PARTS = ("chunk", "sizes")
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def first_difference(found: PrunedModule, expected: PrunedModule) -> str | None:
    """Where a program differs first from another of which it should compute the same; ``None`` if nowhere."""
    mine, its = found.fasp_fx_origin, expected.fasp_fx_origin
    own, other = _Text(mine.body()[0], found), _Text(its.body()[0], expected)
    for line, wanted in itertools.zip_longest(own.lines, other.lines):
        if line != wanted:
            return f"it computes {line} where the program computes {wanted}"
    for name, weight in own.weights.items():
        if deviation(weight, other.weights[name]) > tolerance("computed weights", weight.dtype):
            return f"'{name}' has other values than in the program"
    torn = _assumed(mine.facts) ^ _assumed(its.facts)
    return f"either it or the program alone assumes that {' and '.join(sorted(torn))}" if torn else None


def _assumed(facts: ExportFacts) -> set[str]:
    """What is assumed of the sizes that vary."""
    ranges = {f"{symbol} is in {allowed}" for symbol, allowed in facts.ranges.items()}
    return ranges | {guard for guard in facts.guards if not _SETTLED.fullmatch(guard)}


class _Text:
    """A graph in words, which are those of another graph that computes the same. Arithmetic with sizes is
    said by what comes of it.

    Attributes:
        lines: a line for each input and operator, and for what it returns.
        weights: the tensors that the graph holds, by name.
    """

    def __init__(self, graph: fx.Graph, held: nn.Module) -> None:
        self._held, self._names = held, dict[fx.Node, str]()
        self.lines, self.weights = list[str](), dict[str, Tensor]()
        writes = any(map(written_by, graph.nodes))
        for node in graph.nodes:
            if node.op == "placeholder":
                self._add(node, f"input {_made(node)}")
            elif str(node.target) in _COPIES and not writes:  # sizes of one can decide whether there is one
                self._names[node] = self._value(node.args[0])
            elif node.op == "call_function" and _size(node) is node:
                self._add(node, self._call(node))
        self.lines.append(f"output {self._value(list(results(graph)))}")

    def _add(self, node: fx.Node, text: str) -> None:
        self._names[node] = f"%{len(self.lines)}"
        self.lines.append(f"{self._names[node]} = {text}")

    def _call(self, node: fx.Node) -> str:
        """An operator with its arguments. Those that say what shape a tensor gets, or in which parts, are
        said by what is made.
        """
        given, rule = arguments(node), lookup(node.target)
        operator = "reshape" if str(node.target) in RESHAPES else str(node.target)
        if node.target is _ATTENTION and given["scale"] is None:
            given["scale"] = 1.0 / math.sqrt(given["query"].meta["val"].shape[-1])
        for clause in () if rule is None else rule.clauses:
            if clause.keyword in ("shape", *_PARTS):
                given.pop(clause.words[0])
            if clause.keyword in _PARTS:
                operator, dim = "parts", clause.words[-1]
                given[dim] %= node.all_input_nodes[0].meta["val"].dim()
        said = ", ".join(f"{name}={self._value(value)}" for name, value in sorted(given.items()))
        return f"{operator}({said}): {_made(node)}"

    def _value(self, value: Any) -> str:
        value = _size(value)
        if isinstance(value, slice):
            value = [value.start, value.stop, value.step]
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(self._value, value))}]"
        if not isinstance(value, fx.Node):
            return repr(value)
        if value.op != "get_attr":
            return self._names[value]
        name = target_name(value)
        tensor = attribute(self._held, name)
        if isinstance(tensor, fx.GraphModule):
            inner = _Text(tensor.graph, tensor)
            self.weights |= {f"{name}.{own}": weight for own, weight in inner.weights.items()}
            return f"{{{'; '.join(inner.lines)}}}"
        self.weights[name] = tensor.detach()
        return name


def _made(node: fx.Node) -> str:
    """What a node gives: types and sizes, in terms of those of the inputs."""

    def said(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(said, value))}]"
        if isinstance(value, Tensor):
            return f"{value.dtype}({', '.join(str(_size(size)) for size in value.shape)})"
        return repr(_size(value))

    return said(node.meta.get("val"))


def _size(argument: Any) -> Any:
    """What arithmetic with sizes comes to, in terms of those of the inputs; other arguments as they are, also
    numbers that data decide.
    """
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    if not isinstance(value, _SYMBOLIC) or free_unbacked_symbols(value):
        return argument
    return int(value.node.expr) if value.node.expr.is_Integer else value.node.expr


__all__ = ["first_difference"]
