"""What the attributes of a copy have to be, by where those of the model arrive in its graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from ...base.compat import pytree
from ._sizes import Assignment, Size, rescaled
from ._traced import Log, Traced, arrivals


@dataclass(frozen=True)
class Settled:
    """What is known of the attributes of a copy.

    Attributes:
        known: the values of those of which the pruned program tells what they have to be.
        likely: of those of which only the weights around them do.
        dense: of all, as the model has them.
        torn: what an attribute cannot be at the same time, in words.
    """

    known: Assignment
    likely: Assignment
    dense: Assignment
    torn: str | None

    def assignments(self) -> Iterator[Assignment]:
        """What the attributes may have to be: of the names in doubt all, one, or none; each that is not what
        the model has.
        """
        sure = {**{size: self.dense[size] for size in self.likely}, **self.known}
        names = sorted({size.name for size in self.likely})
        for chosen in dict.fromkeys([tuple(names), *((name,) for name in names), ()]):
            found = {**sure, **{size: value for size, value in self.likely.items() if size.name in chosen}}
            if any(value != self.dense[size] for size, value in found.items()):
                yield found


@dataclass(frozen=True)
class _Wanted:
    """What an integer has to be where it arrives."""

    integer: Traced
    value: int
    node: str


def settle(
    dense: fx.Graph, pruned: fx.Graph, log: Log, cuts: Mapping[str, Iterable[tuple[int, int]]]
) -> Settled:
    """What the attributes of a model have to be for its graph to become the pruned one: each integer that is
    traced into an argument of a node has to be what stands there in the pruned graph.

    Args:
        dense: the graph of the model, whose attributes are traced.
        log: what was seen of them.
        cuts: as for :func:`rescaled`.
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
    likely = {size: rescaled(size, log.dense[size], cuts) for size in lost - known.keys()}
    return Settled(
        known,
        {size: value for size, value in likely.items() if value is not None},
        log.dense,
        _torn(wanted, {**log.dense, **known}),
    )


def _torn(wanted: list[_Wanted], known: Assignment) -> str | None:
    """What an attribute cannot be at the same time, in words."""
    torn = next((one for one in wanted if one.integer.under(known) != one.value), None)
    if torn is None:
        return None
    names = " and ".join(f"'{size}'" for size in sorted(map(str, torn.integer.sources)))
    places = [torn.node, *(one.node for one in wanted if one.integer.sources & torn.integer.sources)]
    first, *others = dict.fromkeys(places)
    if not others:
        return f"{names} has to be two numbers in '{first}', which no attribute can be"
    where = f"'{first}' and another in '{others[0]}'"
    return f"{names} has to be one number in {where}, which takes two attributes"


def _integers(node: fx.Node) -> list[int | None]:
    """The integers among the arguments of a node; ``None`` in the places of others."""
    return [leaf if type(leaf) is int else None for leaf in pytree.tree_leaves((node.args, node.kwargs))]


def _solved(wanted: list[_Wanted], log: Log) -> dict[Size, int]:
    """The values with which integers are what is wanted, attribute by attribute, those first that arrive as
    they are.
    """
    known: dict[Size, int] = {}
    pending = sorted(wanted, key=lambda one: len(one.integer.sources))
    for _ in range(len(log.dense)):
        before = len(known)
        for one in pending:
            unknown = one.integer.sources - known.keys()
            if len(unknown) == 1:
                (size,) = unknown
                found = _inverse(one, size, {**log.dense, **known})
                if found is not None:
                    known[size] = found
        if len(known) == before:
            break
    return known


def _inverse(wanted: _Wanted, size: Size, others: Assignment) -> int | None:
    """The value of one attribute with which an integer is what it has to be: where several do, the one that
    it has, or the one in proportion.
    """
    dense = others[size]
    exact, rest = divmod(dense * wanted.value, int(wanted.integer) or 1)
    tried = itertools.chain([dense], [] if rest else [exact], range(1, dense + 1))
    return next((new for new in tried if wanted.integer.under({**others, size: new}) == wanted.value), None)


__all__ = ["Settled", "settle"]
