"""Rules that say ``move``: the operator itself, applied to the channel numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.base import pytree, tolerable
from fasp_fx.capturing import Sizes, arguments as arguments_of, is_dynamic
from fasp_fx.errors import first_line
from fasp_fx.patterns import RESHAPES, DoesNotApplyError

from ._call import Call
from ._choices import look_up
from ._facts import Facts
from ._numbering import NONE, Axis, Value, collapse, recorded_shape, smallest_step
from ._regroup import Segment, regroup, segments


def _run(operator: Any, numbers: Any, others: dict[str, Any]) -> Any:
    try:
        return operator(numbers, **others)
    except tolerable(Exception) as error:  # an operator raises what it likes of integers
        raise DoesNotApplyError(first_line(error)) from error


def run_on_numbers(node: fx.Node, numbers: Tensor, values: dict[fx.Node, Any]) -> Any:
    """Move a tensor of numbers the way ``node`` moves its ``self``; sizes and indices are those of the
    interpretation.

    Raises:
        DoesNotApplyError: an index is known only at run time.
    """
    written = {name: value for name, value in arguments_of(node).items() if name != "self"}
    others = {name: fx.map_arg(value, lambda n: values[n]) for name, value in written.items()}
    if _holds_unknown(others):
        raise DoesNotApplyError(f"the indices of '{node.name}' ({node.target}) are known only at run time")
    return _run(node.target, numbers, _some_indices(others, written))


def _holds_unknown(arguments: dict[str, Any]) -> bool:
    leaves = pytree.tree_leaves(list(arguments.values()))
    return any(isinstance(leaf, Value) and leaf.data is None for leaf in leaves)


class Move:
    """One call of an operator that moves the elements of an argument.

    Attributes:
        call: the call.
        facts: what it says of channels goes there.
        sizes: at which the program is interpreted.
        others: its other arguments, with indices in the place of tensors.
        unknown: whether some of these are known only at run time.
        is_reshape: whether it gives the same elements in the same order another shape.
    """

    def __init__(self, call: Call, facts: Facts, sizes: Sizes) -> None:
        self.call, self.node, self.facts, self.sizes = call, call.node, facts, sizes
        self.others = {name: value for name, value in call.arguments.items() if name != call.rule.moves}
        self.unknown = _holds_unknown(self.others)
        self.is_reshape = str(call.node.target) in RESHAPES

    def run(self) -> list[Value]:
        """Say all that follows of the channels; return the values of the results.

        Raises:
            DoesNotApplyError: the call is none that the rule speaks of.
        """
        source = self.call.arguments[str(self.call.rule.moves)]
        if isinstance(source, (list, tuple)):
            return self._join(list(source))
        if self.unknown and not self.call.rule.all("freeze"):
            raise DoesNotApplyError("an argument is known only at run time")
        shapes = self.call.shapes
        self.others = _some_indices(self.others, self.call.written)
        self._settle_parts(source.shape)
        touched, unsettled = self._touched(len(source.shape)), self._unsettled(source.shape)
        chosen = (touched if self.unknown else set()) | unsettled.keys()
        # What differs along dimensions whose positions are chosen at run time goes together.
        alike = (reduce(self._alike, chosen - {axis.dim}, axis) for axis in source.axes)
        source = replace(source, axes=tuple(alike))
        if self.is_reshape:
            self._settle_sizes()
        shift = self._shift(source.shape)
        axes: list[list[Axis]] = [[] for _ in shapes]
        for axis in (each for each in source.axes if not self._stays(source, each, touched, unsettled)):
            for index, moved in enumerate(self._moved(axis, shift)):
                axes[index] += self._axis_of(moved, [axis], axis)
        stacked = source.origin is not None and self._takes_single(source.shape)
        if stacked:
            self.facts.boxes_of(source, self.node)  # a stack stays one tensor
        whole = (
            len(shapes) == 1
            and math.prod(shapes[0]) == math.prod(source.shape)
            and not {"index", "indices"} & self.others.keys()  # these may take an element twice
        )
        origin = source.origin if stacked or whole else None
        settled = source.data is not None and len(self.node.all_input_nodes) == 1
        data = self._run(source.data) if settled else [None] * len(shapes)
        return [
            Value(shape, tuple(each), source.constant, origin, content)
            for shape, each, content in zip(shapes, axes, data, strict=True)
        ]

    def _run(self, numbers: Any) -> list[Tensor]:
        others = {name: value for name, value in self.others.items() if name != "self"}
        moved = _run(self.node.target, numbers, others)
        return [moved] if isinstance(moved, Tensor) else list(moved)

    def _say_frozen(self, numbers: Tensor, reason: str) -> None:
        self.facts.say(self.facts.remarks.frozen, numbers, reason, self.node)

    # --- Dimensions of which positions stay.

    def _touched(self, rank: int) -> set[int]:
        """The dimensions whose positions the operator's arguments name one by one."""
        touched: set[int] = set()
        for clause in self.call.rule.all("freeze"):
            argument = self.others.get(clause.words[0])
            items: Sequence[Any] = argument if isinstance(argument, (list, tuple)) else [argument]
            if all(isinstance(item, int) for item in items):
                touched |= {dim % rank for dim in items}
            else:  # index tensors, for the leading dimensions one by one
                touched |= {dim for dim, index in enumerate(items) if index is not None}
        return touched

    def _parts(self, rank: int) -> Iterator[tuple[int, list[str]]]:
        """The dimensions of which a part is taken, and the arguments that say which."""
        for along, *bounds in (clause.words for clause in self.call.rule.all("part")):
            yield int(self.others[along]) % rank, bounds

    def _unsettled(self, shape: tuple[int, ...]) -> dict[int, str]:
        """The dimensions of which what is taken, or where it lies, depends on a size that varies from call to
        call; each with what happens there.
        """
        written, rank = self.call.written, len(shape)
        reasons: dict[int, str] = {}
        recorded = recorded_shape(self.call.nodes.get(str(self.call.rule.moves)))
        sizes = recorded if len(recorded) == rank else shape
        for dim, bounds in self._parts(rank):
            whole = len(bounds) == 2 and self.call.shapes[0] == shape
            leaves = (leaf for name in bounds for leaf in pytree.tree_leaves(written[name]))
            decided = any(isinstance(leaf, fx.Node) for leaf in leaves)
            if decided or (self.sizes.varies(sizes[dim]) and not whole):
                reasons[dim] = "is cut at a length known only at run time by"
        for index, amount in enumerate(written.get("pad", ())):
            if isinstance(amount, fx.Node):
                reasons[rank - 1 - index // 2] = (
                    "is put behind something of a length known only at run time by"
                )
        return reasons

    def _stays(self, source: Value, axis: Axis, touched: set[int], unsettled: dict[int, str]) -> bool:
        """Say what stays of an axis; whether nothing of it is moved."""
        named = self.unknown and axis.dim in touched
        indices = self.call.arguments.get("indices")
        several = dict(enumerate(indices)) if isinstance(indices, (list, tuple)) else {}
        if named and look_up(self.node, axis, several.get(axis.dim), self.facts):
            if source.constant and len(source.shape) > 2:
                self.facts.counts.stacked.append(axis.numbers.reshape(-1).numpy())
            return True
        if axis.dim in touched:
            self._say_frozen(
                axis.numbers, f"{self.node.target} names positions along this dimension one by one"
            )
        if not named and axis.dim in unsettled:  # these positions are those of a sequence, not channels
            self._say_frozen(axis.numbers, f"{unsettled[axis.dim]} {self.node.target}")
        return named or axis.dim in unsettled

    # --- Numbers moved.

    def _moved(self, axis: Axis, shift: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        self._couple_strides(axis)
        if "pad" not in self.others:
            return shift(self._in_one_piece(axis, shift).numbers)
        rank, shape = axis.numbers.dim(), axis.numbers.shape
        pad = [
            amount if shape[rank - 1 - index // 2] > 1 else 0
            for index, amount in enumerate(self.others["pad"])
        ]
        continued = self.others.get("mode", "constant") != "constant" and any(pad)
        if continued or any(amount < 0 for amount in pad):
            # Other channels would stand at the border once some are gone.
            self._say_frozen(axis.numbers, f"is cut at the border, or continued there, by {self.node.target}")
        # What a border adds along a dimension of channels is not a channel; along any other dimension it
        # continues the channels.
        return [torch.nn.functional.pad(axis.numbers, pad, value=NONE)]

    def _shift(self, shape: tuple[int, ...]) -> Callable[[Tensor], list[Tensor]]:
        """What moves numbers of the source's rank, of size 1 where they do not vary, as the operator moves
        elements.
        """
        if not self.is_reshape or 0 in shape:
            return lambda numbers: self._run(numbers.expand(shape))
        # Most of what is reshaped holds no channels.
        pieces = cache(partial(_segments, self.node, shape, self.call.shapes[0], self.sizes))
        couple = partial(self.facts.couple, node=self.node)
        return lambda numbers: [regroup(numbers, self.call.shapes[0], pieces(), couple)]

    def _settle_sizes(self) -> None:
        """Where a reshape is given a number, the size is that number, whatever was recorded of it."""
        written, recorded = self.call.written, recorded_shape(self.node)
        wanted = written.get("size") or written.get("shape") or ()
        for size, number in zip(recorded, wanted) if len(recorded) == len(wanted) else ():
            if isinstance(number, int) and number != -1:
                self.sizes.settle(size)

    def _settle_parts(self, shape: tuple[int, ...]) -> None:
        """Sizes of parts that are known only at run time, such as the tokens of each expert, are stood in for
        by numbers that add up.
        """
        for dim, bounds in self._parts(len(shape)):
            sizes, whole = self.others[bounds[0]], shape[dim]
            if isinstance(sizes, (list, tuple)) and sum(sizes) != whole:
                ends = [whole * part // len(sizes) for part in range(len(sizes) + 1)]
                self.others[bounds[0]] = [end - start for start, end in itertools.pairwise(ends)]

    def _couple_strides(self, axis: Axis) -> None:
        """A slice with step k takes one position out of every k; it goes on to do so as long as each run of k
        neighbours goes as a whole.
        """
        step, rank = int(self.others.get("step", 1)), axis.numbers.dim()
        if step > 1 and any(dim == axis.dim for dim, _ in self._parts(rank)):
            positions = torch.arange(axis.numbers.shape[axis.dim])
            leaders = axis.numbers.index_select(axis.dim, positions - positions % step)
            self.facts.couple(leaders, axis.numbers, self.node)

    def _takes_single(self, shape: tuple[int, ...]) -> bool:
        """Whether the operator takes single positions of a dimension."""
        dim = self.others.get("dim")
        rest = shape[:dim] + shape[dim % len(shape) + 1 :] if isinstance(dim, int) and shape else None
        return self.call.shapes[0] == rest

    def _in_one_piece(self, axis: Axis, shift: Callable[[Tensor], list[Tensor]]) -> Axis:
        """Couple channels at one place of several rows where an operator deals the rows out in turn: a
        reshape, as a channel shuffle does, or one that makes one dimension of all.

        Rows may lose different channels only as long as each stays in one piece: of rows that alternate, the
        order of what is left would change.
        """
        inside = [dim for dim in axis.varying() if dim > axis.dim]
        merged = Axis.of(shift(axis.numbers)[0]) if inside else axis
        if merged is None or _one_of_each(merged, axis):
            is_dealt = self.is_reshape
        else:
            is_dealt = len(merged.varying()) < len(axis.varying())
        return reduce(self._alike, inside, axis) if is_dealt else axis

    def _alike(self, axis: Axis, dim: int) -> Axis:
        """Couple the channels of an axis that lie behind one another along another dimension; what is left
        does not vary there.
        """
        leader = axis.numbers.narrow(dim, 0, 1)
        self.facts.couple(leader, axis.numbers, self.node)
        return Axis(leader, axis.dim, axis.slot)

    def _axis_of(self, moved: Tensor, among: Sequence[Axis], source: Axis | None = None) -> list[Axis]:
        """The axis of numbers that the operator made of those of some axes, or nothing where it freezes them.

        Args:
            source: the only one of these axes, if one was moved alone.

        Raises:
            DoesNotApplyError: it did more than move them.
        """
        moved = collapse(moved)
        flat = moved.reshape(-1).numpy()
        before = np.concatenate([axis.numbers.reshape(-1).numpy() for axis in among])
        if not np.isin(flat[flat != NONE], before).all():
            raise DoesNotApplyError("it computes other elements of those that it is said to move")
        axis = Axis.of(moved, source.slot if source is not None else None)
        if axis is not None and (source is None or not _one_of_each(axis, source)):
            return [axis]
        if moved.numel() and int(flat[0]) != NONE:
            dealt = "deals these channels out by a size that varies from call to call"
            why = dealt if source is not None and self.is_reshape else "takes channels out one by one"
            self._say_frozen(moved, f"{self.node.target} {why}")
            if source is not None and len(source.varying()) > 1:
                # One of every row: rows can go whole.
                self.facts.want_together(source.numbers, source.dim, self.node)
        return []

    # --- Several tensors joined.

    def _join(self, sources: list[Value]) -> list[Value]:
        """Concatenation or stacking: axes that shrink the joined dimension are joined, all others must
        agree.
        """
        parts = [source for source in sources if 0 not in source.shape or len(source.shape) > 1]
        rank = len(self.call.shapes[0])
        stacked = rank > len(parts[0].shape)
        # What has lost all its channels adds nothing, and has no say on the other dimensions.
        full = parts if stacked else [source for source in parts if 0 not in source.shape] or parts
        joined = int(self.others.get("dim", 0)) % rank
        axes: list[Axis] = []
        for dim in range(len(full[0].shape)):
            per_source = [source.at(dim) for source in full]
            if not stacked and dim == joined:
                several = itertools.chain(*(each for each in per_source if len(each) > 1))
                reason = f"lies with others along the dimension that {self.node.target} joins"
                self.facts.freeze(several, reason, self.node)
                per_source = [each if len(each) < 2 else [] for each in per_source]
            elif max(map(len, per_source)) > 1 or (any(per_source) and not all(per_source)):
                reason = f"meets a part of {self.node.target} that has no channels there"
                self.facts.freeze(itertools.chain(*per_source), reason, self.node)
                continue
            if any(per_source):
                axes += self._joined(full, per_source, None if stacked else joined, dim)
        return [Value(self.call.shapes[0], tuple(axes), all(source.constant for source in parts))]

    def _joined(
        self, sources: list[Value], per_source: list[list[Axis]], joined: int | None, dim: int
    ) -> list[Axis]:
        """The axis that those of several tensors along one dimension make, at most one of each.

        Args:
            joined: the dimension that is joined; ``None`` if they are stacked.
        """
        every = [axis for each in per_source for axis in each]
        if joined is not None and any(joined in axis.varying() for axis in every) and self._varies(joined):
            if dim == joined:
                reason = f"{self.node.target} puts it beside something of a length known only at run time"
                self.facts.freeze(every, reason, self.node)
                return []
            every = [self._alike(axis, joined) for axis in every]
            per_source = [[axis] for axis in every]
        parts = [
            each[0].numbers.expand(source.shape) if each else torch.full(source.shape, NONE)
            for each, source in zip(per_source, sources, strict=True)
        ]
        first = every[0].numbers
        alike = dim != joined and all(axis.numbers.shape == first.shape for axis in every)
        if alike and (joined is None or first.shape[joined] == 1):
            for axis in every[1:]:
                self.facts.couple(first, axis.numbers, self.node)
            parts = [parts[0] if joined is None else first.expand(source.shape) for source in sources]
        return self._axis_of(_run(self.node.target, parts, self.others), every)

    def _varies(self, joined: int) -> bool:
        """Whether some of the joined tensors vary in length along the joined dimension, which decides where
        the others lie.
        """
        parts = self.call.written[str(self.call.rule.moves)]
        shapes = [recorded_shape(part) for part in parts if isinstance(part, fx.Node)]
        # One may be that of torch.tensor([]).
        return any(joined < len(shape) and is_dynamic(shape[joined]) for shape in shapes)


def _segments(node: fx.Node, before: tuple[int, ...], after: tuple[int, ...], sizes: Sizes) -> list[Segment]:
    """How the shapes of a reshape correspond at every size; where a pass has recorded none, at those of the
    interpretation.
    """
    symbolic = [recorded_shape(item) for item in (node.all_input_nodes[0], node)]
    is_recorded = [len(shape) for shape in symbolic] == [len(before), len(after)]
    pairs = zip(symbolic if is_recorded else (before, after), (before, after), strict=True)
    return segments(*([sizes.factored(*pair) for pair in zip(*both, strict=True)] for both in pairs))


def _some_indices(arguments: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """Arguments, with indices in the place of tensors."""
    return {name: _some_index(value, written[name]) for name, value in arguments.items()}


def _some_index(value: Any, written: Any) -> Any:
    """An argument, with indices in the place of tensors: of the right shape, where their content is not
    known.

    Raises:
        DoesNotApplyError: it is a mask, which decides the shape of the result.
    """
    if isinstance(value, (list, tuple)):
        return [_some_index(*pair) for pair in zip(value, written, strict=True)]
    if not isinstance(value, Value) or value.data is not None:
        return value.data if isinstance(value, Value) else value
    recorded = written.meta.get("val")
    if not isinstance(recorded, Tensor) or recorded.dtype in (torch.bool, torch.uint8):
        raise DoesNotApplyError("a mask is known only at run time")
    return torch.zeros(value.shape, dtype=torch.long)


def _one_of_each(axis: Axis, source: Axis) -> bool:
    """Whether a move took one channel out of every row, so that what is left varies only from row to row and
    cannot shrink.
    """
    return (
        len(axis.varying()) < len(source.varying())
        and axis.numbers.unique().numel() != source.numbers.unique().numel()
        and smallest_step(axis.numbers.numpy(), axis.dim) > smallest_step(source.numbers.numpy(), source.dim)
    )
