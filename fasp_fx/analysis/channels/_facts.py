"""What one walk over a program finds out about its channels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, fx

from fasp_fx.patterns import DoesNotApplyError

from ._numbering import NONE, Axis, Value

#: channel numbers that are coupled, entry by entry, and the node that couples them
Pairs = list[tuple[np.ndarray, np.ndarray, fx.Node]]


@dataclass(frozen=True)
class Window:
    """A window of ``size`` positions that slides over dimension ``dim``; ``padding`` is what stands before
    and after.
    """

    dim: int
    size: int
    stride: int
    padding: tuple[int, int]
    dilation: int


@dataclass(frozen=True)
class Layout:
    """How one operand of a contraction is read as ``[blocks, tokens or rows, columns]``.

    ``splits`` divides dimensions in two, each ``(dimension, size of the first part)``; the other fields count
    dimensions after that.
    """

    splits: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...]
    columns: tuple[int, ...]
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class Recurrence:
    """What an operator takes from its own step before: of the first step ``start``, ``[1, batch, channels]``;
    steps lie along dimension ``steps``.
    """

    start: fx.Node
    steps: int


@dataclass(frozen=True)
class Use:
    """One use of a weight that contracts its columns with an activation.

    Attributes:
        node: the contracting node.
        weight: name of the weight.
        operand: the node whose value is the weight, perhaps moved.
        activation: the node whose value is contracted with it.
        columns: channel numbers, shape ``[blocks, columns, axes]``, in the order of both layouts; a column
            goes with any of its numbers.
        slots: the weight and dimensions that its columns lie along.
        weight_layout, activation_layout: how either is read as matrices.
        route: the node that tells where in the tokens each block ends, if blocks are chosen at run time.
        block_numbers: channel numbers of the blocks, shape ``[blocks]``, where these are channels along one
            dimension of the weight.
        recurrence: where the activation is the first result of ``node`` itself, one step before.
    """

    node: fx.Node
    weight: str
    operand: fx.Node
    activation: fx.Node
    columns: np.ndarray
    slots: frozenset[tuple[str, int]]
    weight_layout: Layout
    activation_layout: Layout
    route: fx.Node | None = None
    block_numbers: np.ndarray | None = None
    recurrence: Recurrence | None = None


@dataclass(frozen=True, eq=False)
class Product:
    """Activations contracted with each other along a dimension that holds the channels ``numbers``."""

    node: fx.Node
    operands: tuple[fx.Node, ...]
    numbers: np.ndarray


@dataclass(frozen=True)
class Remark:
    """Something said of a set of channel numbers, by a node; ``routing`` remarks do not hold for experts,
    which the router never chooses once gone.
    """

    numbers: np.ndarray
    reason: str
    node: fx.Node | None
    routing: bool = False


@dataclass
class Remarks:
    """What is said of channels, in the order in which nodes say it.

    ``inside`` are positions of windows, which stay, and of which nothing is to be said where they are nothing
    else.
    """

    frozen: list[Remark] = field(default_factory=list)
    inside: list[Remark] = field(default_factory=list)
    mixed: list[Remark] = field(default_factory=list)
    exempt: list[Remark] = field(default_factory=list)


@dataclass
class Wishes:
    """What another walk would number otherwise: ``blocks`` are the weights' dimensions that would better be
    numbered block by block, with the dimension that divides them and into how many; ``stretched`` dimensions
    of expanded tensors that meet channels; ``heads`` pairs the channels that belong to one head, ``together``
    those that would be free if they went together.
    """

    blocks: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    stretched: set[tuple[str, int]] = field(default_factory=set)
    heads: Pairs = field(default_factory=list)
    together: Pairs = field(default_factory=list)


@dataclass
class Counts:
    """Of which channels how many must stay: ``chosen`` are numbers of positions that compete in a softmax or
    top-k, with how many of them are needed, ``stacked`` numbers of matrices in a stacked weight, ``aligned``
    those that stay in multiples of a number.
    """

    chosen: list[tuple[np.ndarray, int]] = field(default_factory=list)
    stacked: list[np.ndarray] = field(default_factory=list)
    aligned: list[tuple[np.ndarray, int]] = field(default_factory=list)


@dataclass
class Facts:
    """Couplings, and remarks on channel numbers, in the order found.

    ``produced`` are numbers of rows of weights, with the dimension that they lie along where that is known;
    ``matrices`` names the weights of linear, convolution and recurrent operators; ``boxes`` are tensors that
    must keep equal counts in each row.
    """

    pairs: Pairs = field(default_factory=list)
    produced: list[tuple[np.ndarray, tuple[str, int] | None]] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    matrices: set[str] = field(default_factory=set)
    boxes: dict[bytes, tuple[np.ndarray, fx.Node]] = field(default_factory=dict)
    remarks: Remarks = field(default_factory=Remarks)
    wishes: Wishes = field(default_factory=Wishes)
    counts: Counts = field(default_factory=Counts)

    def couple(self, a: Tensor, b: Tensor, node: fx.Node) -> None:
        """Channels at equal positions of two broadcastable tensors of numbers go together; one that meets a
        non-channel stays.
        """
        try:
            shape = np.broadcast_shapes(tuple(a.shape), tuple(b.shape))
        except ValueError as error:
            raise DoesNotApplyError("the operands have other positions along one dimension") from error
        first, second = a.expand(shape).reshape(-1).numpy(), b.expand(shape).reshape(-1).numpy()
        both = (first != NONE) & (second != NONE)
        alone = np.concatenate([first[~both & (first != NONE)], second[~both & (second != NONE)]])
        if alone.size:
            self.remarks.frozen.append(
                Remark(np.unique(alone), "meets a position that is not a channel", node)
            )
        if (differ := both & (first != second)).any():
            self.pairs.append((first[differ], second[differ], node))

    def say(
        self,
        remarks: list[Remark],
        numbers: Tensor | Iterable[Tensor],
        reason: str,
        node: fx.Node | None,
        routing: bool = False,
    ) -> None:
        """Append a remark on these numbers, or on each of several."""
        each = [numbers] if isinstance(numbers, Tensor) else numbers
        remarks += [Remark(np.unique(one[one != NONE].numpy()), reason, node, routing) for one in each]

    def freeze(self, axes: Iterable[Axis], reason: str, node: fx.Node) -> None:
        """Say of each of some axes that its channels stay."""
        self.say(self.remarks.frozen, [axis.numbers for axis in axes], reason, node)

    def want_together(self, numbers: Tensor, dim: int, node: fx.Node) -> None:
        """Note that channels would be free if those that lie behind one another along a dimension went as
        one.
        """
        leader = numbers.narrow(dim, 0, 1).expand(numbers.shape)
        self.wishes.together.append((leader.reshape(-1).numpy(), numbers.reshape(-1).numpy(), node))

    def boxes_of(self, value: Value, node: fx.Node) -> None:
        """Record for each axis that varies along several dimensions that removing channels must leave equal
        counts in every row of its numbers.
        """
        for axis in (axis for axis in value.axes if len(axis.varying()) > 1):
            numbers = axis.numbers.movedim(axis.dim, -1)
            rows = numbers.reshape(-1, numbers.shape[-1]).numpy()
            self.boxes.setdefault(rows.tobytes() + rows.shape[0].to_bytes(8, "little"), (rows, node))
