"""Whether two programs are the same: the same operators, wired alike, with the same constants, weights and
assumptions about sizes, so that what they compute is the same on every input that they take.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from ...base.compare import deviation, tolerance
from ...base.compat import free_unbacked_symbols
from ...capturing._fx import arguments, attribute, results, target_name, written_by
from ...capturing._sizes import same_sizes
from ...capturing.calling._facts import ExportFacts
from ...patterns import RESHAPES, lookup

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
#: what is assumed of a size that does not vary
_SETTLED = re.compile(r".+\.size\(\)\[\d+\] == \d+")
_SIZE = re.compile(r"L\[(?:(?!size\(\)).)*\.size\(\)\[\d+\]")
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_COPIES = ("aten.clone.default", "aten.contiguous.default")
#: clauses of the operators that part a dimension, and of all that take some of it
_PARTS = ("chunk", "sizes")
_ALONG = (*_PARTS, "span", "pick")


@dataclass(frozen=True)
class Difference:
    """Where two programs differ first.

    Attributes:
        said: in words.
        path: of the submodule where that is, if it is known.
    """

    said: str
    path: str | None = None


def first_difference(
    found: fx.Graph, own: nn.Module, expected: fx.Graph, tensors: nn.Module
) -> Difference | None:
    """Where a program differs first from another of which it should compute the same; ``None`` if nowhere.

    Arithmetic with sizes is compared by what comes of it.

    Args:
        found, expected: what they compute, over the same names of weights.
        own, tensors: hold the weights of the one and of the other.
    """
    return _Comparison(own, tensors).first(found, expected)


def other_sizes(found: ExportFacts, expected: ExportFacts) -> Difference | None:
    """What one of two programs assumes of the sizes of its inputs and the other does not."""
    for one, other in zip(_assumed(found), _assumed(expected), strict=True):
        if one != other:
            mine, its = (" and ".join(sorted(only)) or "nothing" for only in (one - other, other - one))
            return Difference(f"of the sizes of inputs it assumes {mine}, and the program {its}")
    return None


def _assumed(facts: ExportFacts) -> tuple[set[str], set[str]]:
    """The sizes that vary, and what else is assumed; those that do not are compared as they are recorded."""
    ranges = {f"that {symbol} is in {allowed}" for symbol, allowed in facts.ranges.items()}
    return ranges, {_reduced(guard) for guard in facts.guards if not _SETTLED.fullmatch(guard)}


def _reduced(guard: str) -> str:
    """What is assumed, without the factors that both sides of it have, as widths are."""
    sizes: dict[str, sympy.Symbol] = {}

    def named(size: re.Match[str]) -> str:
        name = f"size{len(sizes)}"
        sizes[name] = sympy.Symbol(size[0], integer=True, positive=True)
        return name

    sides = re.split(" (==|!=) ", _SIZE.sub(named, guard))
    if len(sides) != 3:
        return guard
    left, right = (sympy.sympify(side, sizes) for side in (sides[0], sides[2]))
    return f"{(left - right).expand().primitive()[1]} {sides[1]} 0"


class _Comparison:
    """Goes through two graphs in step.

    Args:
        mine, its: hold the weights of the one and of the other.
    """

    def __init__(self, mine: nn.Module, its: nn.Module) -> None:
        self.mine, self.its = mine, its
        self.alike: dict[fx.Node, fx.Node] = {}
        #: what copies are of
        self.copies: dict[fx.Node, Any] = {}

    def first(self, found: fx.Graph, expected: fx.Graph) -> Difference | None:
        """Where the first graph differs from the second."""
        inputs = (graph.find_nodes(op="placeholder") for graph in (found, expected))
        for one, other in zip(*inputs, strict=True):
            if not _is_same(one.meta.get("val"), other.meta.get("val")):
                return Difference(f"input '{one.name}' is captured with other sizes or another type")
            self.alike[one] = other
        for one, other in itertools.zip_longest(self._computing(found), self._computing(expected)):
            if one is None or other is None or _operator(one) != _operator(other):
                return Difference(
                    f"it computes {_shown(one)} where the program computes {_shown(other)}", _path(one)
                )
            said = self._of_nodes(one, other)
            if said is not None:
                return Difference(f"in {_shown(one)}, {said}", _path(one))
            self.alike[one] = other
        said = self._of_arguments(results(found), results(expected))
        return None if said is None else Difference(f"in what it returns, {said}")

    def _computing(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """The nodes that do more than arithmetic with sizes and copies, in order."""
        writes = any(map(written_by, graph.nodes))
        for node in graph.nodes:
            if node.op != "call_function" or _size(node) is not node:
                continue
            if str(node.target) in _COPIES and not writes:  # whether there is one can depend on sizes of one
                self.copies[node] = self.copies.get(node.args[0], node.args[0])
            else:
                yield node

    def _of_nodes(self, one: fx.Node, other: fx.Node) -> str | None:
        """What is other in the arguments of one operator."""
        (mine, is_shown), (its, _) = _said(one), _said(other)
        names = sorted({*mine, *its})
        said = self._of_arguments([mine.get(name) for name in names], [its.get(name) for name in names])
        if said is None and is_shown and not _is_same(one.meta.get("val"), other.meta.get("val")):
            return f"{_shape(one)} stands where the program has {_shape(other)}"
        return said

    def _of_arguments(self, one: Any, other: Any) -> str | None:
        """What is other in an argument, or in the first of several that is."""
        if isinstance(one, slice) and isinstance(other, slice):
            one, other = ((part.start, part.stop, part.step) for part in (one, other))
        if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)) and len(one) == len(other):
            said = (self._of_arguments(*pair) for pair in zip(one, other))
            return next((text for text in said if text is not None), None)
        one, other = (
            _size(self.copies.get(value, value) if isinstance(value, fx.Node) else value)
            for value in (one, other)
        )
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            if one.op == other.op == "get_attr":
                return self._of_weights(target_name(one), target_name(other))
            same = self.alike.get(one) is other
        else:
            same = _is_same(one, other)
        return None if same else f"{one} stands where the program has {other}"

    def _of_weights(self, one: str, other: str) -> str | None:
        mine, its = attribute(self.mine, one), attribute(self.its, other)
        if isinstance(mine, fx.GraphModule) and isinstance(its, fx.GraphModule):
            inner = _Comparison(mine, its).first(mine.graph, its.graph)
            return None if inner is None else inner.said
        if one != other or deviation(mine.detach(), its.detach()) > tolerance("computed weights", its.dtype):
            return f"'{one}' stands where the program has '{other}', or has other values"
        return None


def _operator(node: fx.Node) -> str:
    """The operator; those that give a tensor another shape are one, and so are those that part it."""
    rule = lookup(node.target)
    if rule is not None and any(map(rule.all, _PARTS)):
        return _PARTS[0]
    return "reshape" if str(node.target) in RESHAPES else str(node.target)


def _said(node: fx.Node) -> tuple[dict[str, Any], bool]:
    """The arguments of an operator by name, positions counted from the front, and whether some are left out
    which say no more than what the result shows.
    """
    given, rule, is_shown = arguments(node), lookup(node.target), False
    if node.target is _ATTENTION and given["scale"] is None:
        given["scale"] = 1.0 / math.sqrt(given["query"].meta["val"].shape[-1])
    for clause in () if rule is None else rule.clauses:
        if clause.keyword in ("shape", *_PARTS):
            is_shown = given.pop(clause.words[0], None) is not None or is_shown
        if clause.keyword in _ALONG:
            dim, *names = (clause.words[-1],) if clause.keyword in _PARTS else clause.words
            shape = next(node for node in node.all_input_nodes).meta["val"].shape
            given[dim] %= len(shape)
            given |= {name: _from_front(given[name], _size(shape[given[dim]])) for name in names}
    return given, is_shown


def _from_front(position: Any, length: Any) -> Any:
    """A position along a dimension, where that does not vary, counted from its beginning."""
    if not isinstance(position, int) or not isinstance(length, int):
        return position
    return min(max(position + length if position < 0 else position, 0), length)


def _shown(node: fx.Node | None) -> str:
    return "nothing more" if node is None else f"'{node.name}' ({node.target})"


def _shape(node: fx.Node) -> str:
    made: Any = node.meta["val"]
    return ", ".join(str(tuple(part.shape)) for part in (made if isinstance(made, (tuple, list)) else [made]))


def _path(node: fx.Node | None) -> str | None:
    """The submodule that a node is of."""
    stack = {} if node is None else node.meta.get("nn_module_stack", {})
    return [path for path, _ in stack.values()][-1] if stack else None


def _size(argument: Any) -> Any:
    """What arithmetic with sizes comes to, in terms of those of the inputs; other arguments as they are, also
    numbers that data decide.
    """
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    if not isinstance(value, _SYMBOLIC) or free_unbacked_symbols(value):
        return argument
    return int(value.node.expr) if value.node.expr.is_Integer else value.node.expr


def _is_same(one: Any, other: Any) -> bool:
    """Whether two constants are equal, or two tensors have the same sizes, whatever the symbols in them stand
    for, and the same type.
    """
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and same_sizes(one.shape, other.shape)
    return type(one) is type(other) and (one == other or (one != one and other != other))


__all__ = ["Difference", "first_difference", "other_sizes"]
