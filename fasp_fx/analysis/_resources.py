"""What is counted of a model, as a function of what its groups lose."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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

    def reach(self, round_to: int) -> float:
        """The largest fraction that can go."""
        return self.removed([group.most_lost(round_to) * group.blocks for group in self.groups])


class Counted(Resource):
    """A sum of products of sizes, in whole numbers.

    Args:
        analysis: the analysis of a program.
        left: what is counted.
        whole: how much the dense model has of it; ``None``: what is left when nothing goes.
    """

    def __init__(self, analysis: Coupling, left: Products, whole: int | None = None) -> None:
        groups = analysis.chosen
        super().__init__(groups, left.count([0] * len(groups)) if whole is None else whole)
        self._left = left

    def used(self, lost: Sequence[int]) -> float:
        return self._left.count(lost)


class Sparsity(Counted):
    """The weights of linear, convolution and recurrent operators that a prunable, exempt or included group
    touches, each counted once and whole.

    The fraction of them that goes is the sparsity.

    Args:
        analysis: the analysis of a program.
    """

    def __init__(self, analysis: Coupling) -> None:
        counted = {PRUNABLE, EXEMPT} | analysis.include
        touched = {
            slot.name for group in analysis.groups if group.status in counted for slot in group.slots
        } & analysis.walk.facts.matrices
        weights = {name: attribute(analysis.program.module, name) for name in sorted(touched)}
        left = _sizes_of_weights(analysis, weights, dict.fromkeys(weights, 1))
        super().__init__(analysis, left, sum(weight.numel() for weight in weights.values()))


def parameters_of(analysis: Coupling, each: Callable[[Tensor], float] = lambda weight: 1) -> Counted:
    """All parameters of a program, tied ones once, or how much their numbers are, ``each`` of a weight.

    What the dense model has are the parameters of the caller, also where the capture has folded some into
    others.
    """
    parameters = analysis.program.parameters()
    first = {id(tensor): name for name, tensor in reversed(parameters.items())}
    whole = {name: parameters[name] for name in first.values()}
    kept = dict(analysis.program.module.named_parameters())
    units = {name: each(tensor) for name, tensor in {**whole, **kept}.items()}
    left = _sizes_of_weights(analysis, kept, units)
    return Counted(analysis, left, round(sum(tensor.numel() * units[name] for name, tensor in whole.items())))


def cache_of(analysis: Coupling) -> Counted:
    """Bytes per token of one sequence that the caches among the outputs take: ``[batch, heads, length,
    width]``, the outputs that hold state.

    Raises:
        BudgetError: the program holds no cache.
    """
    program, left, sizes = analysis.program, Products(), ShrinkingSizes(analysis)
    returned = results(program.module.graph)
    for node in (returned[index] for index in sorted(program.state_outputs)):
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(value, Tensor) and value.dim() == 4:
            heads, width = value.shape[1], value.shape[3]
            if isinstance(heads, int) and isinstance(width, int):
                left.add([sizes.of(node, value.shape, dim) for dim in (1, 3)], value.element_size())
    if not left.terms:
        raise BudgetError(
            "the program that is pruned holds no cache of keys and values; give another budget, or prune a"
            " decoder by fasp_fx.hf.prune"
        )
    return Counted(analysis, left)


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
        cuts: list[tuple[tuple[int, float], ...]] = []
        distinct: list[np.ndarray] = []
        for axis in axes:
            labels = self._labels[axis.numbers.movedim(dim, -1).numpy()]
            if any(bool((labels == other).all()) for other in distinct):
                continue  # coupled with what another axis says of the same positions
            distinct.append(labels)
            cut = tuple(self._cut(labels, int(shape[dim])))
            if {group for group, _ in cut} & {group for other in cuts for group, _ in other}:
                raise BudgetError(
                    f"what is left of dimension {dim} of '{node}' depends on which channels go, so it"
                    " cannot be counted beforehand"
                )
            if cut:
                cuts.append(cut)
        return ShrinkingSize(int(shape[dim]), tuple(cuts))

    def _cut(self, labels: np.ndarray, size: int) -> Iterator[tuple[int, float]]:
        owners = self._group[labels.reshape(-1)]
        counts = np.bincount(owners[owners >= 0], minlength=len(self._widths))
        for index in np.flatnonzero(counts):
            yield int(index), float(counts[index] / self._widths[index] * size / labels.size)


def _sizes_of_weights(
    analysis: Coupling, weights: Mapping[str, Tensor], units: Mapping[str, float]
) -> Products:
    """The elements of weights, each so many units."""
    names, left, sizes = analysis.program.canonical(), Products(), ShrinkingSizes(analysis)
    read = analysis.program.module.graph.find_nodes(op="get_attr")
    nodes = {names.get(target_name(node)): node for node in read}
    for name, weight in weights.items():
        node = nodes.get(names.get(name, name))
        left.add([sizes.of(node, weight.shape, dim) for dim in range(weight.dim())], units[name])
    return left


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


class Products:
    """A sum of products of sizes; those that many products share are worked out once.

    Attributes:
        terms: of each product, how often it counts, and the places of its sizes.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[ShrinkingSize, ...], int] = {}
        self.terms: list[tuple[float, tuple[int, ...]]] = []

    def add(self, sizes: Iterable[ShrinkingSize | tuple[ShrinkingSize, ...]], factor: float = 1) -> None:
        """Add a product of sizes, so many times; of several in one place the largest, to which the others are
        padded.
        """
        each = (size if isinstance(size, tuple) else (size,) for size in sizes)
        self.terms.append((factor, tuple(self._places.setdefault(one, len(self._places)) for one in each)))

    def count(self, lost: Sequence[int]) -> int:
        """The sum in whole numbers, for losses that are alike in all blocks of a group: sizes are whole then,
        but for what rounding took from shares.
        """
        left = [round(max(size.left(lost) for size in several)) for several in self._places]
        return round(
            sum(factor * math.prod([left[place] for place in places]) for factor, places in self.terms)
        )
