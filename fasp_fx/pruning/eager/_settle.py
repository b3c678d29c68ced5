"""What the attributes of a copy have to be, by where those of the model arrive in its graph."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ...base.compat import pytree
from ._sizes import Assignment, Size, is_within
from ._traced import Log, Traced, arrivals


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


__all__ = ["settle"]
