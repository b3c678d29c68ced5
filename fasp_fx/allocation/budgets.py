"""Budgets: how much of a resource may stay, for :func:`fasp_fx.prune` and its kin to keep to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..analysis.resources import Resource, cache_of, parameters_of
from ..base._options import is_number
from ..errors import ArgumentError
from ._macs import macs_of

if TYPE_CHECKING:
    from ..analysis._analysis import Analysis
    from ..analysis.groups import Group


@dataclass(frozen=True)
class Cap(ABC):
    """How much of one resource may stay.

    Attributes:
        amount: a float in (0, 1]: that share of what the dense model has; an int from 2 on, or a larger
            float: so much.
        name: of the resource, as options and reports call it.

    Raises:
        ArgumentError: the amount is no positive number, or the int 1, which says neither one nor all.
    """

    amount: float
    name: ClassVar[str]
    #: what one of it is called, several of them
    unit: ClassVar[str]
    #: whether a submodule that is called several times takes it each time
    per_call: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not is_number(self.amount) or self.amount <= 0:
            raise ArgumentError(
                f"{self} is no budget; give a share in (0, 1], such as 0.8, or how much may stay, such as"
                " 100_000_000"
            )

        if self.amount == 1 and isinstance(self.amount, int):
            raise ArgumentError(
                f"{self} could be one alone or all; give 1.0 for all, a share below it, such as 0.8, or how"
                " much may stay, such as 100_000_000"
            )

    def allowed(self, dense: float) -> float:
        """How much may stay of ``dense``."""
        return self.amount * dense if isinstance(self.amount, float) and self.amount <= 1 else self.amount

    def held(self, weights: Iterable[Tensor]) -> float:
        """How much there is of it in weights that no program of a model has."""
        return 0

    @abstractmethod
    def resource(self, analysis: Analysis) -> Resource:
        """What is counted of an analysed program.

        Raises:
            BudgetError: it cannot be counted of this one.
        """


class Parameters(Cap):
    """The number of all parameters, tied ones once, as the report's line ``parameters`` has them."""

    name, unit = "parameters", "parameters"

    def resource(self, analysis: Analysis) -> Resource:
        return parameters_of(analysis)

    def held(self, weights: Iterable[Tensor]) -> float:
        return sum(tensor.numel() for tensor in weights)


class Bytes(Cap):
    """The bytes of all parameters, tied ones once, as the report's line ``bytes`` has them."""

    name, unit = "bytes", "bytes"

    def resource(self, analysis: Analysis) -> Resource:
        return parameters_of(analysis, in_bytes=True)

    def held(self, weights: Iterable[Tensor]) -> float:
        return sum(tensor.numel() * tensor.element_size() for tensor in weights)


class Macs(Cap):
    """The multiply-accumulates of one forward pass on the example inputs: of linear, convolution and
    recurrent operators, products of matrices, and the two products of attention, whole where a mask hides
    half of them, with heads padded to one width as the result has them. They are half of the operations that
    ``torch.utils.flop_counter`` counts.

    :func:`fasp_fx.hf.prune` has example inputs of its own: 2 sequences of 3 tokens that follow 5 others. Of a
    model that is pruned in parts, those of the parts are counted, as often as each is called.
    """

    name, unit, per_call = "macs", "multiply-accumulates", True

    def resource(self, analysis: Analysis) -> Resource:
        return macs_of(analysis)


class CacheBytes(Cap):
    """The bytes that the key-value cache takes per token of one sequence, as the report's line ``cache`` has
    them.
    """

    name, unit = "cache-bytes", "bytes of cache per token"

    def resource(self, analysis: Analysis) -> Resource:
        return cache_of(analysis)


@dataclass(frozen=True)
class Latency(Cap):
    """The microseconds of whatever is to be fast, as a function of yours predicts them
    (``examples/latency.py`` measures one).

    Attributes:
        seconds: called with the width that is left of each block of each group that can lose channels, by the
            group's name, and returns seconds. It is asked for some hundreds of combinations in one pruning:
            look times up, rather than measure there. More width may never take less time than less of it.
    """

    seconds: Callable[[Mapping[str, int]], float] = field(compare=False, repr=False)
    name: ClassVar[str] = "latency"
    unit: ClassVar[str] = "microseconds"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.seconds):
            raise ArgumentError(
                f"seconds={self.seconds!r:.80} is no function; pass one from widths by group to seconds"
            )

    def resource(self, analysis: Analysis) -> Resource:
        return Microseconds(analysis.chosen, self.seconds)


class Microseconds(Resource):
    """The microseconds that a function of the widths predicts.

    Args:
        groups: the groups that can lose channel sets.
        seconds: as for :class:`Latency`.
    """

    def __init__(self, groups: Sequence[Group], seconds: Callable[[Mapping[str, int]], float]) -> None:
        self._seconds, self._known = seconds, dict[tuple[int, ...], float]()
        self.groups = list(groups)
        super().__init__(groups, self.used([0] * len(groups)))

    def used(self, lost: Sequence[int]) -> float:
        widths = tuple(
            group.width - gone // group.blocks for group, gone in zip(self.groups, lost, strict=True)
        )
        if widths not in self._known:
            found = self._seconds({group.name: left for group, left in zip(self.groups, widths, strict=True)})
            if not is_number(found) or found < 0:
                raise ArgumentError(
                    f"seconds= of the latency returned {found!r:.80}; it must return a number from 0 on"
                )
            self._known[widths] = found * 1e6
        return self._known[widths]


#: every kind of budget that can be stored, by its name
KINDS: dict[str, type[Cap]] = {kind.name: kind for kind in (Parameters, Macs, Bytes, CacheBytes)}


def read_budget(given: Any) -> tuple[Cap, ...]:
    """The budgets that an option was given: one or several.

    Raises:
        ArgumentError: it is something else, or two budgets are of one resource.
    """
    try:
        several = isinstance(given, Iterable) and not isinstance(given, (str, Mapping))
        caps = tuple(given) if several else (given,)
    except TypeError:  # a tensor without dimensions
        caps = (given,)
    for cap in caps:
        if not isinstance(cap, Cap):
            raise ArgumentError(
                f"budget={cap!r} is no budget; pass one of fasp_fx.budgets, such as Parameters(0.8), or a"
                " tuple of them"
            )
    names = [cap.name for cap in caps]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ArgumentError(f"budget= speaks of {twice[0]} twice; keep the smaller one")
    return caps


def budget_data(caps: Sequence[Cap]) -> list[dict[str, Any]]:
    """Budgets as the plain data that :func:`budget_from_data` reads.

    Raises:
        ArgumentError: one is of a class that is not defined here.
    """
    for cap in caps:
        if KINDS.get(cap.name) is not type(cap):
            raise ArgumentError(
                f"{cap} is a budget of your own, which cannot be stored; keep it in code and pass it again"
            )
    return [{"resource": cap.name, "amount": cap.amount} for cap in caps]


def budget_from_data(data: Any) -> tuple[Cap, ...]:
    """The budgets that :func:`budget_data` wrote.

    Raises:
        ArgumentError: these are none.
    """
    caps = []
    for item in data if isinstance(data, list) else [data]:
        known = (
            isinstance(item, dict)
            and item.keys() == {"resource", "amount"}
            and isinstance(item["resource"], str)
        )
        if not known or item["resource"] not in KINDS:
            raise ArgumentError(
                f"budget={item!r} is none; it names one of {', '.join(map(repr, KINDS))} as 'resource', and"
                " an 'amount'"
            )
        caps.append(KINDS[item["resource"]](item["amount"]))
    return read_budget(caps)


__all__ = ["Bytes", "CacheBytes", "Cap", "Latency", "Macs", "Parameters"]
