"""What is counted of a model, as a function of what its groups lose."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx

from fasp_fx.capturing import attribute, results, target_name
from fasp_fx.errors import BudgetError

from ._groups import EXEMPT, PRUNABLE, Coupling, Group
from .channels import Value


class Resource(ABC):
    """Something that is counted of a model, as a function of how many channel sets each group loses.

    Args:
        groups: the groups that can lose channel sets.
        whole: how much the dense model has of it.

    Examples:
        >>> from fasp_fx.allocation import Macs
        >>> resource = Macs(0.5).resource(analysis)
        >>> [resource.used([lost, 0]) for lost in (0, 16)]  # channel sets that the two groups lose
        [53248, 28672]
    """

    def __init__(self, groups: Sequence[Group], whole: float) -> None:
        self.groups, self.whole = list(groups), whole

    @abstractmethod
    def used(self, lost: Sequence[int]) -> float:
        """How much is left when group ``i`` loses ``lost[i]`` channel sets in all its blocks together."""

    def removed(self, lost: Sequence[int]) -> float:
        """The fraction of the dense model's that goes."""
        return 1 - self.used(lost) / self.whole if self.whole else 0.0

    def reach(self, round_to: int | None) -> float:
        """The largest fraction that can go."""
        return self.removed([group.most_lost(round_to) * group.blocks for group in self.groups])


class Counted(Resource):
    """A sum of products of sizes, in whole numbers; those that many products share are worked out once.

    Args:
        analysis: the analysis of a program.
        whole: how much the dense model has of it.

    Attributes:
        terms: of each product, how often it counts, and the places of its sizes.
    """

    def __init__(self, analysis: Coupling, whole: int = 0) -> None:
        super().__init__(analysis.chosen, whole)
        self._places: dict[tuple[ShrinkingSize, ...], int] = {}
        self.terms: list[tuple[float, tuple[int, ...]]] = []

    def add(self, sizes: Iterable[ShrinkingSize | tuple[ShrinkingSize, ...]], factor: float = 1) -> None:
        """Add a product of sizes, so many times; of several in one place the largest, to which the others are
        padded.
        """
        each = (size if isinstance(size, tuple) else (size,) for size in sizes)
        self.terms.append((factor, tuple(self._places.setdefault(one, len(self._places)) for one in each)))

    def add_weights(self, analysis: Coupling, units: Mapping[str, float]) -> None:
        """Add the elements of weights, each so many units."""
        program, sizes = analysis.program, ShrinkingSizes(analysis)
        names, read = program.canonical(), program.module.graph.find_nodes(op="get_attr")
        nodes = {names.get(target_name(node)): node for node in read}
        for name, unit in units.items():
            node, shape = nodes.get(names.get(name, name)), attribute(program.module, name).shape
            self.add([sizes.of(node, shape, dim) for dim in range(len(shape))], unit)

    def used(self, lost: Sequence[int]) -> float:
        # Losses are alike in all blocks of a group: sizes are whole then, but for what rounding took from
        # shares.
        left = [round(max(size.left(lost) for size in several)) for several in self._places]
        return round(
            sum(factor * math.prod([left[place] for place in places]) for factor, places in self.terms)
        )


class Sparsity(Counted):
    """The weights of linear, convolution and recurrent operators that a prunable, exempt or included group
    touches, each counted once and whole.

    The fraction of them that goes is the sparsity.

    Args:
        analysis: the analysis of a program.
    """

    def __init__(self, analysis: Coupling) -> None:
        counted, matrices = {PRUNABLE, EXEMPT} | analysis.include, analysis.walk.facts.matrices
        touched = {slot.name for group in analysis.groups if group.status in counted for slot in group.slots}
        weights = {name: attribute(analysis.program.module, name) for name in sorted(touched & matrices)}
        super().__init__(analysis, sum(weight.numel() for weight in weights.values()))
        self.add_weights(analysis, dict.fromkeys(weights, 1))


def parameters_of(analysis: Coupling, each: Callable[[Tensor], float] = lambda weight: 1) -> Counted:
    """All parameters of a program, tied ones once, or how much their numbers are, ``each`` of a weight.

    What the dense model has are the parameters of the caller, also where the capture has folded some into
    others.
    """
    parameters = reversed(analysis.program.parameters().items())
    whole = dict(
        {id(tensor): (name, tensor) for name, tensor in parameters}.values()
    )  # the first of tied ones
    kept = dict(analysis.program.module.named_parameters())
    units = {name: each(tensor) for name, tensor in {**whole, **kept}.items()}
    left = Counted(analysis, round(sum(tensor.numel() * units[name] for name, tensor in whole.items())))
    left.add_weights(analysis, {name: units[name] for name in kept})
    return left


def cache_of(analysis: Coupling) -> Counted:
    """Bytes per token of one sequence that the caches among the outputs take: ``[batch, heads, length,
    width]``, the outputs that hold state.

    Raises:
        BudgetError: the program holds no cache.
    """
    program, left, sizes = analysis.program, Counted(analysis), ShrinkingSizes(analysis)
    for node in (results(program.module.graph)[index] for index in sorted(program.state_outputs)):
        value: Any = node.meta.get("val") if isinstance(node, fx.Node) else None
        is_cache = isinstance(value, Tensor) and value.dim() == 4
        if is_cache and all(isinstance(value.shape[dim], int) for dim in (1, 3)):
            left.add([sizes.of(node, value.shape, dim) for dim in (1, 3)], value.element_size())
    if not left.terms:
        raise BudgetError(
            "the program that is pruned holds no cache of keys and values; give another budget, or prune a"
            " decoder by fasp_fx.hf.prune"
        )
    left.whole = left.used([0] * len(left.groups))
    return left


class ShrinkingSizes:
    """The sizes of a program's tensors as functions of what its groups lose, from the channel numbers that
    the analysis found along them.

    Args:
        analysis: the analysis of the program.
    """

    def __init__(self, analysis: Coupling) -> None:
        self.values = analysis.walk.values
        self._labels = np.append(analysis.labels, -1)  # the last entry serves positions that are no channels
        self._widths = np.array([group.size for group in analysis.chosen], dtype=np.int64)
        self._group = np.full(int(analysis.labels.max(initial=-1)) + 2, -1, dtype=np.int64)
        for index, group in enumerate(analysis.chosen):
            self._group[group.sets] = index

    def of(self, node: fx.Node | None, shape: Sequence[int], dim: int) -> ShrinkingSize:
        """The size of one dimension of what a node makes; of a weight that no node reads nothing goes.

        Args:
            shape: the sizes to count with; those that vary from call to call are not those of the analysis.
        """
        dim %= len(shape)
        value = None if node is None else self.values.get(node)
        axes = value.at(dim) if isinstance(value, Value) else []
        several = [self._labels[axis.numbers.movedim(dim, -1).numpy()] for axis in axes]
        # Some are coupled with what another axis says of the same positions.
        distinct = [
            each
            for place, each in enumerate(several)
            if not any(bool((each == other).all()) for other in several[:place])
        ]
        cuts = tuple(cut for labels in distinct if (cut := self._cut(labels, int(shape[dim]))))
        if max(Counter(group for cut in cuts for group, _ in cut).values(), default=0) > 1:
            raise BudgetError(
                f"what is left of dimension {dim} of '{node}' depends on which channels go, so it cannot be"
                " counted beforehand"
            )
        return ShrinkingSize(int(shape[dim]), cuts)

    def _cut(self, labels: np.ndarray, size: int) -> tuple[tuple[int, float], ...]:
        owners = self._group[labels.reshape(-1)]
        counts = np.bincount(owners[owners >= 0], minlength=len(self._widths))
        shares = counts / self._widths * size / labels.size
        return tuple((int(index), float(shares[index])) for index in np.flatnonzero(counts))


@dataclass(frozen=True)
class ShrinkingSize:
    """The size of one dimension of a tensor, as a function of what groups lose.

    Attributes:
        whole: of the dense model.
        cuts: for each independent axis of channels along the dimension, the groups that shrink it by their
            places, with the positions that go for each channel set that the group loses in all its blocks
            together.
    """

    whole: int
    cuts: tuple[tuple[tuple[int, float], ...], ...] = ()

    def left(self, lost: Sequence[int]) -> float:
        """What is left of it."""
        left: float = self.whole
        for cut in self.cuts:
            gone = sum(per_set * lost[group] for group, per_set in cut)
            left = self.whole - gone if left == self.whole else left * (self.whole - gone) / self.whole
        return left
