"""Integers that carry which attributes of a model they come from, and where they arrive in its graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import SymInt, fx, nn
from torch.overrides import TorchFunctionMode

from ...base.compat import annotated_nodes, annotating, pytree
from ._sizes import Assignment, Size, sizes, write

#: key of ``node.meta["custom"]``: the number of the call that a node was recorded in
_CALL = "fasp_fx_call"


class Traced(int):
    """An integer attribute, or what Python has computed of some.

    Attributes:
        of: what it is for other values of the attributes.
        sources: the attributes.
        log: is told of every use that no graph shows.
    """

    of: Callable[[Assignment], int]
    sources: frozenset[Size]
    log: Log

    def under(self, assignment: Assignment) -> int | None:
        """What it is for other values; ``None`` where it would divide by zero."""
        try:
            return self.of(assignment)
        except ZeroDivisionError:
            return None

    @staticmethod
    def made(value: int, of: Callable[[Assignment], int], sources: frozenset[Size], log: Log) -> Traced:
        """The integer with what is known of it."""
        found = Traced(value)
        found.of, found.sources, found.log = of, sources, log
        return found


@dataclass
class Log:
    """What was seen of traced integers.

    Attributes:
        dense: the attributes that are traced, and what they are.
        calls: of each call of a function of torch with traced integers, all integers among its arguments, in
            order.
        unseen: the attributes that were used where no graph shows their value: compared for equality with a
            size, or multiplied with one that varies.
    """

    dense: dict[Size, int] = field(default_factory=dict)
    calls: list[list[int]] = field(default_factory=list)
    unseen: set[Size] = field(default_factory=set)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, Traced) else value


def _of(value: Any, assignment: Assignment) -> Any:
    return value.of(assignment) if isinstance(value, Traced) else value


def _computing(compute: Callable[..., Any], is_equality: bool = False) -> Callable[..., Any]:
    """A method of :class:`Traced` that computes what ``int`` does, and keeps where an integer comes from."""

    def method(*given: Any) -> Any:
        found = compute(*map(_plain, given))
        traced = [value for value in given if isinstance(value, Traced)]
        sources = frozenset().union(*(value.sources for value in traced))
        varies = any(isinstance(value, SymInt) for value in given)
        if varies or (is_equality and _plain(given[0]) == _plain(given[1])):
            traced[0].log.unseen |= sources
        if type(found) is not int:
            return found
        return Traced.made(
            found,
            lambda assignment: compute(*(_of(value, assignment) for value in given)),
            sources,
            traced[0].log,
        )

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow", "truediv", "neg"):
    _compute = getattr(operator, _name)
    setattr(Traced, f"__{_name}__", _computing(_compute))
    setattr(Traced, f"__r{_name}__", _computing(lambda one, other, _compute=_compute: _compute(other, one)))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Traced, f"__{_name}__", _computing(getattr(operator, _name), _name in ("eq", "ne")))
Traced.__hash__ = int.__hash__  # type: ignore[method-assign]  # which a class that compares has to say


class _Arrivals(TorchFunctionMode):
    """Notes which integers arrive at each function of torch, and has nodes say which call they are of."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arrived = [
            leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, int) and type(leaf) is not bool
        ]
        if not any(isinstance(integer, Traced) for integer in arrived):
            return func(*args, **(kwargs or {}))
        self.log.calls.append(arrived)
        args, kwargs = pytree.tree_map_only(Traced, int, (args, kwargs or {}))
        with annotating({_CALL: len(self.log.calls) - 1}):
            return func(*args, **kwargs)


def _leaves(value: Any) -> Iterator[Any]:
    """What arguments hold, the bounds of slices among it."""
    for leaf in pytree.tree_leaves(value):
        yield from (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,)


@contextmanager
def traced(module: nn.Module, shared: Set[int]) -> Iterator[Log]:
    """Trace the integers among the attributes of a module and its submodules, which stay traced.

    Args:
        shared: the ids of plain objects that must not be changed.
    """
    log = Log()
    for path, inner in module.named_modules():
        log.dense |= sizes(inner, path, shared)
    write(
        module,
        {
            size: Traced.made(value, operator.itemgetter(size), frozenset({size}), log)
            for size, value in log.dense.items()
        },
    )
    with _Arrivals(log), annotated_nodes():
        yield log


def arrivals(node: fx.Node, log: Log) -> list[int]:
    """The integers that arrived at the call that a node was recorded in, if some of them are traced."""
    call = node.meta.get("custom", {}).get(_CALL)
    return [] if call is None else log.calls[call]


__all__ = ["Log", "Traced", "arrivals", "traced"]
