"""What each calibration token is for: to fit a restoration, to judge it, or, as padding, for nothing.

Nothing in a graph says which dimension holds sequences or tokens. These conventions stand for that:

=================  ===================================================================================
sequences          the first dimension of the first input that has dimensions
tokens             the second dimension of that input, where a mask goes with it
mask               the input :data:`MASK`, of 0 and 1, one for each sequence and token
along a tensor     a dimension as long as the sequences (tokens) are, in the batch and as captured
several in one     a dimension that a reshape has made of sequences and tokens, in the order it says
chosen tokens      an output of all tokens, where an input asks for their positions one after another
=================  ===================================================================================

Where they do not tell, all tokens count, which a report says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from fasp_fx.analysis import Use
from fasp_fx.capturing import Program, same_sizes
from fasp_fx.errors import CalibrationError
from fasp_fx.patterns import RESHAPES

from ._matrices import token_dims
from ._statistics import FITTED, HELD, PADDING

#: what tokenizers, and the models that they serve, call the mask of padding: 0 where a token is padding
MASK = "attention_mask"
#: one in so many sequences is held out, and where there are fewer, this part of each
_ONE_IN = 4


class Batches(list[Any]):
    """Batches, and whence they come.

    Attributes:
        sources: of several sources, the number of that of each batch; of one source, nothing.
    """

    def __init__(self, batches: Iterable[Any] = (), sources: Sequence[int] = ()) -> None:
        super().__init__(batches)
        self.sources = [*sources]

    def by_source(self) -> list[list[int]]:
        """The numbers of the batches of each source."""
        sources = self.sources or [0] * len(self)
        return [[index for index, one in enumerate(sources) if one == source] for source in {*sources}]


class TokenRoles:
    """Roles of the tokens of every batch, as tensors that broadcast to an activation.

    Tokens of one sequence resemble each other, so whole sequences are held out: every fourth, counted through
    all batches of a source. Of fewer than four, the last quarter of their tokens is. A sequence is one index
    of the first dimension of the first input.

    Args:
        program: the program that the batches are for.
        batches: its flat inputs.
        hold_out: whether to hold out any.

    Attributes:
        weights: how much a token of each batch counts, so that each source counts for as much as any other.
        unmatched: nodes whose tokens could not be matched with the mask, so that padding among them counts.

    Raises:
        CalibrationError: all of a batch is padding.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Sequence[Any]],
        hold_out: bool = True,
    ) -> None:
        self.hold_out, self._batches = hold_out, batches
        self.unmatched: dict[fx.Node, None] = {}
        nodes = program.placeholders()
        self._shapes = [_recorded(node) for node in nodes]
        self._shape: Any = next(filter(None, self._shapes), ())
        self._sizes = sequences_of(program, batches)
        self._masks = _padding(nodes, batches, reference_of(program))
        by_source = batches.by_source() if isinstance(batches, Batches) else [[*range(len(batches))]]
        self._numbers, self._firsts = [0] * len(batches), [0] * len(batches)
        for numbers in by_source:
            firsts = accumulate((self._sizes[index] for index in numbers), initial=0)
            for place, (index, first) in enumerate(zip(numbers, firsts, strict=False)):
                self._numbers[index], self._firsts[index] = place, first
        sequences = [sum(self._sizes[index] for index in numbers) for numbers in by_source]
        self._many_batches = max(map(len, by_source), default=0) >= _ONE_IN
        self._many_sequences = max(sequences, default=0) >= _ONE_IN
        self.weights = [1.0] * len(batches)
        tokens = [sum(map(self._tokens, numbers)) for numbers in by_source] if len(by_source) > 1 else []
        for numbers, count in zip(by_source, tokens, strict=False):
            for index in numbers:
                self.weights[index] = sum(tokens) / (len(tokens) * max(count, 1))

    def _tokens(self, index: int) -> int:
        """How many tokens, pixels or numbers a batch has that are no padding."""
        if self._masks is not None:
            return int((~self._masks[index]).sum())
        return numbers_in(self._batches[index])

    def of(self, index: int, node: fx.Node, activation: Tensor, dims: list[int]) -> Tensor:
        """Roles in one batch's activation, with as many dimensions, of its size or 1.

        Args:
            index: the batch.
            node: the node that the activation is the value of.
            dims: the dimensions along which tokens lie.
        """
        roles = torch.full([1] * activation.dim(), FITTED, dtype=torch.uint8, device=activation.device)
        if self.hold_out:
            dim, judges = self._judges(index, node, activation, dims)
            roles = torch.where(_along(judges.to(activation.device), dim, activation.dim()), HELD, roles)
        padding = self._padding(index, node, activation, dims)
        return roles if padding is None else torch.where(padding, PADDING, roles)

    def of_output(self, index: int, node: fx.Node, output: Tensor) -> Tensor | None:
        """Which tokens of an output are padding, ``[batch, tokens]``; ``None`` where its first two dimensions
        are not those of the mask, nor of all tokens in it that an input asks for by their positions.
        """
        if self._masks is None:
            return None
        recorded, mask, tokens = _recorded(node), self._masks[index], _symbols(self._shape[1])
        fits = output.shape[:2] == mask.shape
        if (
            fits
            and _same(recorded[0], self._shape[0])
            and (_same(recorded[1], self._shape[1]) or self._asks_for_all(index, recorded[1]))
        ):
            return mask
        if (fits and _symbols(recorded[1])) or any(tokens and tokens <= _symbols(size) for size in recorded):
            self.unmatched[node] = None  # there are tokens, and they lie otherwise
        return None

    def _asks_for_all(self, index: int, size: Any) -> bool:
        """Whether an input of that size names the positions of all tokens, in order."""
        asked = [
            leaf
            for shape, leaf in zip(self._shapes, self._batches[index], strict=True)
            if len(shape) == 1 and str(shape[0]) == str(size)
        ]
        return bool(asked) and torch.equal(asked[0].cpu().long(), torch.arange(len(asked[0])))

    def at(self, index: int, use: Use, activation: Tensor, ends: Tensor | None) -> Tensor:
        """Roles in what a use of a weight reads in one batch; of tokens that were sorted by the block they go
        to, ``[tokens]``, where of each block the last quarter is held out, or every fourth batch.

        Args:
            activation: what it reads.
            ends: for a routed use, where each block's tokens end.
        """
        if ends is None:
            dims = token_dims(activation.dim(), use.activation_layout)
            return self.of(index, use.activation, activation, dims)
        if self._masks is not None:
            self.unmatched[use.activation] = None
        parts = [
            torch.full((size,), self._batch_judges(index)) if self._many_batches else _last(size)
            for size in torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        ]
        return torch.where(torch.cat(parts).to(ends.device) & self.hold_out, HELD, FITTED).to(torch.uint8)

    def without_padding(self, index: int, node: fx.Node, output: Tensor) -> tuple[Tensor, int]:
        """What lies at an output, with zeros where it is known to be padding, and how many elements are
        not.
        """
        padding = self._padding(index, node, output, list(range(output.dim())))
        if padding is None:
            return output, output.numel()
        return output.masked_fill(padding, 0), int((~padding.expand(output.shape)).sum())

    def remark(self) -> str:
        """What to say of the nodes whose padding could not be told."""
        first, *others = self.unmatched
        more = f" and {len(others)} more" if others else ""
        return (
            f"'{MASK}' could not be matched with the tokens of '{first.name}'{more}, so that all of them"
            " count in scores and repairs, padding included"
        )

    def _batch_judges(self, index: int) -> bool:
        """Whether all of a batch judges, where its tokens cannot be told apart."""
        number = self._numbers[index]
        return number % _ONE_IN == _ONE_IN - 1 if self._many_batches else 0 < index == len(self._sizes) - 1

    def _dims_like(
        self, axis: int, length: int, node: fx.Node, activation: Tensor, dims: list[int]
    ) -> list[int]:
        """Those of some dimensions that are as long as an axis of the first input, in this batch and as
        captured.
        """
        recorded, wanted = _recorded(node), self._shape[axis]
        return [dim for dim in dims if activation.shape[dim] == length and _same(recorded[dim], wanted)]

    def _judges(self, index: int, node: fx.Node, activation: Tensor, dims: list[int]) -> tuple[int, Tensor]:
        """A dimension, and which of its positions are held out."""
        if not dims:
            return 0, torch.tensor([self._batch_judges(index)])
        size = self._sizes[index]
        batches = self._dims_like(0, size, node, activation, dims)
        batch = (batches or dims)[0]
        along = activation.shape[batch]
        if self._many_sequences:
            # Sequences, or all their tokens one after the other; of each the first, where they take turns.
            inner = False if batches or size == 1 else _takes_turns(node, batch, self._shape[0])
            if size and along % size == 0 and inner is not None:
                number = torch.arange(along)
                number = number % size if inner else number // max(along // size, 1)
                return batch, (self._firsts[index] + number) % _ONE_IN == _ONE_IN - 1
            if self._many_batches:
                return batch, torch.full((along,), self._batch_judges(index))
        dim = next((dim for dim in dims if dim != batch and activation.shape[dim] > 1), batch)
        return dim, _last(activation.shape[dim])

    def _padding(self, index: int, node: fx.Node, activation: Tensor, dims: list[int]) -> Tensor | None:
        """Which positions are padding, or ``None`` where all count."""
        if self._masks is None:
            return None
        mask = self._masks[index].to(activation.device)
        batches, tokens = (
            self._dims_like(axis, length, node, activation, dims) for axis, length in enumerate(mask.shape)
        )
        if batches:
            tokens = [dim for dim in tokens if dim != batches[0]]
            # Which is which, nobody can tell where both are as long.
            if len(tokens) == 1 and len(batches) == 1:
                both, sizes = (batches[0], tokens[0]), enumerate(activation.shape)
                padding = mask if batches[0] < tokens[0] else mask.T
                return padding.reshape([size if dim in both else 1 for dim, size in sizes])
            if len(dims) == 1:  # one token a sequence
                return None
        elif (
            len(dims) == 1
            and activation.shape[dims[0]] == mask.numel()
            and _symbols(self._shape[0]) | _symbols(self._shape[1]) <= _symbols(_recorded(node)[dims[0]])
            and (inner := _takes_turns(node, dims[0], self._shape[0])) is not None
        ):
            # All tokens one after the other, of each sequence or of each place in all of them.
            return _along((mask.T if inner else mask).reshape(-1), dims[0], activation.dim())
        self.unmatched[node] = None
        return None


def numbers_in(batch: Sequence[Any]) -> int:
    """How many numbers the inputs of a batch hold."""
    return sum(leaf.numel() for leaf in batch if isinstance(leaf, Tensor))


def reference_of(program: Program) -> int | None:
    """The number of the first input that has dimensions, of which the first counts sequences."""
    return next((number for number, node in enumerate(program.placeholders()) if _recorded(node)), None)


def sequences_of(program: Program, batches: Sequence[Sequence[Any]]) -> list[int]:
    """How many sequences each batch has."""
    reference = reference_of(program)
    return [1 if reference is None else batch[reference].shape[0] for batch in batches]


def _padding(
    nodes: list[fx.Node], batches: Sequence[Sequence[Any]], reference: int | None
) -> list[Tensor] | None:
    """Where each batch is padding, ``[batch, tokens]``; ``None`` where no input says it, by 0 and 1 for each
    token of the first input.
    """
    at = next((index for index, node in enumerate(nodes) if node.name == MASK), None)
    if at is None or reference is None:
        return None
    padding = []
    for index, batch in enumerate(batches):
        mask, first = batch[at], batch[reference]
        if mask.dim() != 2 or mask.shape != first.shape[:2] or not bool(((mask == 0) | (mask == 1)).all()):
            return None
        if not bool(mask.any()):
            raise CalibrationError(
                f"calibration batch {index}: '{MASK}' marks every token as padding; leave the batch out, or"
                " give it tokens"
            )
        padding.append(mask == 0)
    return padding


def _last(size: int) -> Tensor:
    """The last quarter of so many positions, but never all."""
    return torch.arange(size) >= max(size - max(size // _ONE_IN, 1), 1)


def _along(values: Tensor, dim: int, rank: int) -> Tensor:
    return values.reshape([-1 if other == dim else 1 for other in range(rank)])


def _same(size: Any, wanted: Any) -> bool:
    """Whether a recorded size is that of the tokens: the same number, or one that grows with it (a cache may
    stand before them).
    """
    fixed = isinstance(wanted, int), isinstance(size, int)
    return bool(size == wanted) if all(fixed) else not any(fixed) and _symbols(wanted) <= _symbols(size)


def _takes_turns(node: fx.Node, dim: int, batch: Any) -> bool | None:
    """Whether positions that lie one after the other along a dimension are of one sequence after another,
    ``True``, or all of one sequence first, ``False``. ``None`` where that is not known.

    A reshape has made one dimension of several, of which the batch was the last or the first; what lies
    between it and the node leaves the dimension as long as it is.

    Args:
        batch: how many sequences there are, as captured.
    """
    reached = [node] if dim == 0 else []
    for node in reached:
        for source in node.all_input_nodes if node.op == "call_function" else ():
            shape, size = _recorded(source), _recorded(node)[0]
            if source in reached or source.op == "get_attr" or not shape:
                continue
            if same_sizes(shape[:1], [size]):
                reached.append(source)
            elif str(node.target) in RESHAPES:
                ends = (n for n in range(2, len(shape) + 1) if same_sizes([math.prod(shape[:n])], [size]))
                merged = next(ends, 0)
                places = [place for place in range(merged) if _same(shape[place], batch)]
                return places == [merged - 1] if places in ([0], [merged - 1]) else None
    return None


def _recorded(node: fx.Node) -> Any:
    """The shape that was captured of what a node gives, or of the first of several tensors."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value.shape if isinstance(value, Tensor) else ()


def _symbols(size: Any) -> set[Any]:
    return set() if isinstance(size, int) else set(size.node.expr.free_symbols)
