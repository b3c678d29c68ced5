"""Integers that carry which attributes of a model they come from, and where they arrive in its graph."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import SymInt, fx, nn
from torch.overrides import TorchFunctionMode

from ...base.compat import annotated_nodes, annotating, pytree
from ._sizes import Assignment, Size, is_within, sizes, write

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


@dataclass(frozen=True)
class _Wanted:
    """What an integer has to be where it arrives."""

    integer: Traced
    value: int
    node: str


def settle(
    dense: fx.Graph, pruned: fx.Graph, log: Log, cuts: Mapping[str, Sequence[tuple[int, int]]]
) -> tuple[list[Assignment], str | None]:
    """What the attributes of a model have to be for its graph to become the pruned one: each integer that is
    traced into an argument of a node has to be what stands there in the pruned graph. Of those that are used
    where no graph shows it, the weights around them may tell.

    Args:
        dense: the graph of the model, whose attributes are traced.
        log: what was seen of them.
        cuts: for each module that holds weights that have become smaller, how long their dimensions were and
            are.

    Returns:
        What the attributes may have to be, the more likely first; and what one of them cannot be at the same
        time, in words.
    """
    after = {node.name: _integers(node) for node in pruned.nodes}
    wanted: list[_Wanted] = []
    lost = set(log.unseen)
    for node in dense.nodes:
        own, its = _integers(node), after.get(node.name, [])
        for integer in arrivals(node, log):
            at = next((at for at, value in enumerate(own) if value == int(integer)), None)
            if at is None:
                continue
            own[at] = None  # the next one of this value stands elsewhere
            value = its[at] if len(its) == len(own) else None
            if isinstance(integer, Traced) and value is not None:
                wanted.append(_Wanted(integer, value, node.name))
            elif isinstance(integer, Traced):
                lost |= integer.sources
    known = _solved(wanted, log)
    unseen = {size: _rescaled(size, log.dense[size], cuts) for size in lost - known.keys()}
    likely = {size: value for size, value in unseen.items() if value is not None}
    names = sorted({size.name for size in likely})
    tried: list[Assignment] = [  # of the names in doubt all change, one, or none
        {
            **{size: value if size.name in chosen else log.dense[size] for size, value in likely.items()},
            **known,
        }
        for chosen in dict.fromkeys([tuple(names), *((name,) for name in names), ()])
    ]
    assignments = [one for one in tried if any(log.dense[size] != value for size, value in one.items())]
    return assignments, _torn(wanted, {**log.dense, **known})


def _torn(wanted: list[_Wanted], known: Assignment) -> str | None:
    """What an attribute cannot be at the same time, in words."""
    torn = next((one for one in wanted if one.integer.under(known) != one.value), None)
    if torn is None:
        return None
    names = " and ".join(f"'{size}'" for size in sorted(map(str, torn.integer.sources)))
    places = [torn.node, *(one.node for one in wanted if one.integer.sources & torn.integer.sources)]
    first, *others = dict.fromkeys(places)
    another = f" and another in '{others[0]}'" if others else ""
    return f"{names} has to be one number in '{first}'{another}, which takes two attributes"


def _integers(node: fx.Node) -> list[int | None]:
    """The integers among the arguments of a node; ``None`` in the places of others."""
    return [leaf if type(leaf) is int else None for leaf in pytree.tree_leaves((node.args, node.kwargs))]


def _solved(wanted: list[_Wanted], log: Log) -> dict[Size, int]:
    """The values with which integers are what is wanted, attribute by attribute, those first that arrive as
    they are.
    """
    known: dict[Size, int] = {}
    pending = sorted(wanted, key=lambda one: len(one.integer.sources))
    before = -1
    while len(known) > before:
        before = len(known)
        for one in pending:
            unknown = one.integer.sources - known.keys()
            if len(unknown) == 1:
                (size,) = unknown
                found = _inverse(one, size, {**log.dense, **known})
                known |= {} if found is None else {size: found}
    return known


def _inverse(wanted: _Wanted, size: Size, others: Assignment) -> int | None:
    """The value of one attribute with which an integer is what it has to be: where several do, the one that
    it has, or the one in proportion.
    """
    dense = others[size]
    exact, rest = divmod(dense * wanted.value, int(wanted.integer) or 1)
    tried = itertools.chain([dense], [] if rest else [exact], range(1, dense + 1))
    return next((new for new in tried if wanted.integer.under({**others, size: new}) == wanted.value), None)


def _rescaled(size: Size, value: int, cuts: Mapping[str, Sequence[tuple[int, int]]]) -> int | None:
    """What becomes of an attribute of which no more is known than that it is the size of something, where the
    weights of the nearest module around it that have become smaller leave no doubt.
    """
    steps = size.path.split(".") if size.path else []
    scopes = [".".join(steps[:count]) for count in range(len(steps), -1, -1)]
    around = (
        [cut for path, own in cuts.items() if is_within(path, scope) for cut in own] for scope in scopes
    )
    near = next(filter(None, around), [])
    same = {after for before, after in near if before == value}
    found = same or {value * after // before for before, after in near if value * after % before == 0}
    return found.pop() if len(found) == 1 else None


__all__ = ["Log", "Traced", "arrivals", "settle", "traced"]
