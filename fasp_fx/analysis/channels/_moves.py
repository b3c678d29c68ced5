"""Rules that say ``move``: the operator itself, applied to the channel numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.base import pytree, tolerable
from fasp_fx.capturing import Sizes, is_dynamic
from fasp_fx.capturing import arguments as arguments_of
from fasp_fx.errors import first_line
from fasp_fx.patterns import RESHAPES, Rule

from ._facts import Facts
from ._named import look_up
from ._numbering import NONE, Axis, DoesNotApplyError, Value, collapse, smallest_step
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
    others = {
        name: fx.map_arg(value, lambda n: values[n])
        for name, value in arguments_of(node).items()
        if name != "self"
    }
    if _holds_unknown(others):
        raise DoesNotApplyError(f"the indices of '{node.name}' ({node.target}) are known only at run time")
    given = arguments_of(node)
    others = {name: _some_index(value, given[name]) for name, value in others.items()}
    return _run(node.target, numbers, others)


def _holds_unknown(arguments: dict[str, Any]) -> bool:
    leaves = pytree.tree_leaves(list(arguments.values()))
    return any(isinstance(leaf, Value) and leaf.data is None for leaf in leaves)


def _outputs(moved: Any) -> list[Tensor]:
    return [moved] if isinstance(moved, Tensor) else list(moved)


def _touched_dims(rule: Rule, arguments: dict[str, Any], rank: int) -> set[int]:
    """The dimensions whose positions the operator's arguments name one by one."""
    touched: set[int] = set()
    for clause in rule.all("freeze"):
        argument = arguments.get(clause.words[0])
        if isinstance(argument, (list, tuple)) and all(isinstance(item, int) for item in argument):
            touched |= {dim % rank for dim in argument}
        elif isinstance(argument, (list, tuple)):  # index tensors, for the leading dimensions one by one
            touched |= {dim for dim, index in enumerate(argument) if index is not None}
        elif argument is not None:
            touched.add(int(argument) % rank)
    return touched


def _unsettled(
    node: fx.Node,
    rule: Rule,
    arguments: dict[str, Any],
    shape: tuple[int, ...],
    shapes: list[tuple[int, ...]],
    sizes: Sizes,
) -> dict[int, str]:
    """The dimensions of which what is taken, or where it lies, depends on a size that varies from call to
    call; each with what happens there.
    """
    given, rank = arguments_of(node), len(shape)
    found: dict[int, str] = {}
    for clause in rule.clauses:
        if clause.keyword not in ("span", "pick", "sizes", "chunk"):
            continue
        along, *bounds = clause.words if clause.keyword in ("span", "pick") else reversed(clause.words)
        dim = int(arguments[along]) % rank
        whole = clause.keyword == "span" and shapes[0] == shape
        decided = any(
            isinstance(leaf, fx.Node) for name in bounds for leaf in pytree.tree_leaves(given[name])
        )
        if decided or (dim in _dynamic_dims(node, rule, rank, sizes) and not whole):
            found[dim] = "is cut at a length known only at run time by"
    for index, amount in enumerate(given.get("pad", ())):
        if isinstance(amount, fx.Node):
            found[rank - 1 - index // 2] = "is put behind something of a length known only at run time by"
    return found


def _dynamic_dims(node: fx.Node, rule: Rule, rank: int, sizes: Sizes) -> set[int]:
    """The dimensions of what a node moves whose sizes vary from call to call."""
    source = arguments_of(node)[str(rule.moves)]
    recorded = source.meta.get("val") if isinstance(source, fx.Node) else None
    return (
        {dim for dim, size in enumerate(recorded.shape) if sizes.varies(size)}
        if isinstance(recorded, Tensor) and recorded.dim() == rank
        else set()
    )


def _shift(
    node: fx.Node,
    shape: tuple[int, ...],
    shapes: list[tuple[int, ...]],
    others: dict[str, Any],
    facts: Facts,
    sizes: Sizes,
) -> Callable[[Tensor], list[Tensor]]:
    """What moves numbers of the source's rank, of size 1 where they do not vary, as the operator moves
    elements.
    """
    if str(node.target) not in RESHAPES or not _numel(shape):
        return lambda numbers: _outputs(_run(node.target, numbers.expand(shape), _rest(others)))
    # Most of what is reshaped holds no channels.
    found = cache(partial(_segments, node, shape, shapes[0], sizes))
    return lambda numbers: [
        regroup(
            numbers, shapes[0], found(), lambda first, all_of_them: facts.couple(first, all_of_them, node)
        )
    ]


def _settle_given(node: fx.Node, sizes: Sizes) -> None:
    """Where a reshape is given a number, the size is that number, whatever was recorded of it."""
    given, recorded = arguments_of(node), node.meta.get("val")
    wanted = given.get("size") or given.get("shape") or ()
    for size, number in (
        zip(recorded.shape, wanted) if isinstance(recorded, Tensor) and recorded.dim() == len(wanted) else ()
    ):
        if isinstance(number, int) and number != -1:
            sizes.settle(size)


def _segments(node: fx.Node, before: tuple[int, ...], after: tuple[int, ...], sizes: Sizes) -> list[Segment]:
    """How the shapes of a reshape correspond at every size; where a pass has recorded none, at those of the
    interpretation.
    """
    recorded = [item.meta.get("val") for item in (node.all_input_nodes[0], node)]
    known = [tuple(val.shape) for val in recorded if isinstance(val, Tensor)]
    symbolic = known if [len(shape) for shape in known] == [len(before), len(after)] else [before, after]
    return segments(
        *(
            [sizes.factored(*pair) for pair in zip(own, shape, strict=True)]
            for own, shape in zip(symbolic, (before, after), strict=True)
        )
    )


def _couple_strides(rule: Rule, arguments: dict[str, Any], axis: Axis, facts: Facts, node: fx.Node) -> None:
    """A slice with step k takes one position out of every k; it goes on to do so as long as each run of k
    neighbours goes as a whole.
    """
    step, rank = int(arguments.get("step", 1)), axis.numbers.dim()
    if step == 1 or not any(
        int(arguments[clause.words[0]]) % rank == axis.dim for clause in rule.all("span")
    ):
        return
    size = axis.numbers.shape[axis.dim]
    positions = torch.arange(size)
    facts.couple(axis.numbers.index_select(axis.dim, positions - positions % step), axis.numbers, node)


def move(
    node: fx.Node,
    rule: Rule,
    arguments: dict[str, Any],
    shapes: list[tuple[int, ...]],
    facts: Facts,
    sizes: Sizes,
) -> list[Value]:
    """The values of the results of a moving operator."""
    assert rule.moves is not None
    source = arguments[rule.moves]
    others = {name: value for name, value in arguments.items() if name != rule.moves}
    if isinstance(source, (list, tuple)):
        return _join(node, rule, list(source), others, shapes, facts)
    unknown = _holds_unknown(others)
    if unknown and not rule.all("freeze"):
        raise DoesNotApplyError("an argument is known only at run time")
    given = arguments_of(node)
    others = {name: _some_index(value, given[name]) for name, value in others.items()}
    others = _settled_parts(rule, others, source.shape)
    touched = _touched_dims(rule, others, len(source.shape))
    unsettled = _unsettled(node, rule, others, source.shape, shapes, sizes)
    source = _alike_along(source, (touched if unknown else set()) | unsettled.keys(), node, facts)
    if str(node.target) in RESHAPES:
        _settle_given(node, sizes)
    shift = _shift(node, source.shape, shapes, others, facts, sizes)
    axes: list[list[Axis]] = [[] for _ in shapes]
    for axis in source.axes:
        if unknown and axis.dim in touched and look_up(node, axis, _index_at(arguments, axis.dim), facts):
            if source.constant and len(source.shape) > 2:
                facts.stacked.append(axis.numbers.reshape(-1).numpy())
            continue
        if axis.dim in touched:
            facts.say(
                facts.frozen,
                axis.numbers,
                f"{node.target} names positions along this dimension one by one",
                node,
            )
            if unknown:
                continue
        if axis.dim in unsettled:
            facts.say(facts.frozen, axis.numbers, f"{unsettled[axis.dim]} {node.target}", node)
            continue  # the remaining positions are those of a sequence, not channels
        _couple_strides(rule, others, axis, facts, node)
        if "pad" in others and _border_moves(axis, others):
            facts.say(
                facts.frozen,
                axis.numbers,
                f"is cut at the border, or continued there, by {node.target}",
                node,
            )
        if "pad" in others:
            moved = [_pad(axis, others["pad"])]
        else:
            axis = _in_one_piece(axis, shift, node, facts)
            moved = shift(axis.numbers)
        why = (
            "deals these channels out by a size that varies from call to call"
            if str(node.target) in RESHAPES
            else "takes channels out one by one"
        )
        for index, numbers in enumerate(moved):
            _keep(axes[index], numbers, [axis], facts, node, axis, why)
    stacked = source.origin is not None and _takes_single(others, source.shape, shapes[0])
    if stacked:
        facts.boxes_of(source, node)  # a stack stays one tensor
    whole = (
        len(shapes) == 1
        and _numel(shapes[0]) == _numel(source.shape)
        and not {"index", "indices"} & others.keys()  # these may take an element twice
    )
    origin = source.origin if stacked or whole else None
    known = source.data is not None and len(node.all_input_nodes) == 1
    data = _outputs(_run(node.target, source.data, _rest(others))) if known else [None] * len(shapes)
    return [Value(shape, tuple(axes[i]), source.constant, origin, data[i]) for i, shape in enumerate(shapes)]


def _takes_single(arguments: dict[str, Any], shape: tuple[int, ...], result: tuple[int, ...]) -> bool:
    """Whether an operator takes single positions of a dimension."""
    dim = arguments.get("dim")
    return isinstance(dim, int) and bool(shape) and result == shape[:dim] + shape[dim % len(shape) + 1 :]


def _settled_parts(rule: Rule, arguments: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """Arguments in which the sizes of parts add up: those known only at run time, such as the tokens of each
    expert, are stood in for by numbers that need not.
    """
    for sizes, dim in (clause.words for clause in rule.all("sizes")):
        whole, parts = shape[int(arguments[dim])], len(arguments[sizes])
        if sum(arguments[sizes]) != whole:
            ends = [whole * part // parts for part in range(parts + 1)]
            arguments = {**arguments, sizes: [end - start for start, end in itertools.pairwise(ends)]}
    return arguments


def _in_one_piece(axis: Axis, run: Callable[[Tensor], list[Tensor]], node: fx.Node, facts: Facts) -> Axis:
    """Couple channels at one place of several rows where a reshape deals the rows out in turn, as a channel
    shuffle does.

    Rows may lose different channels only as long as each stays in one piece: of rows that alternate, the
    order of what is left would change.
    """
    inside = [dim for dim in axis.varying() if dim > axis.dim]
    if inside and str(node.target) in RESHAPES:
        merged = Axis.of(run(axis.numbers)[0])
        if merged is None or len(merged.varying()) < len(axis.varying()):
            return reduce(lambda own, dim: _alike(own, dim, node, facts), inside, axis)
    return axis


def _index_at(arguments: dict[str, Any], dim: int) -> Any:
    """The indices along one dimension of an operator that takes a list of them."""
    indices = arguments.get("indices")
    return indices[dim] if isinstance(indices, (list, tuple)) and dim < len(indices) else None


def _some_index(value: Any, given: Any) -> Any:
    """An argument, with indices in the place of tensors: of the right shape, where their content is not
    known.

    Raises:
        DoesNotApplyError: it is a mask, which decides the shape of the result.
    """
    if isinstance(value, (list, tuple)):
        return [_some_index(*pair) for pair in zip(value, given, strict=True)]
    if not isinstance(value, Value) or value.data is not None:
        return value.data if isinstance(value, Value) else value
    recorded = given.meta.get("val")
    if not isinstance(recorded, Tensor) or recorded.dtype in (torch.bool, torch.uint8):
        raise DoesNotApplyError("a mask is known only at run time")
    return torch.zeros(value.shape, dtype=torch.long)


def _alike_along(source: Value, dims: set[int], node: fx.Node, facts: Facts) -> Value:
    """Couple what differs along dimensions whose positions are chosen at run time."""
    axes = (
        reduce(lambda axis, dim: _alike(axis, dim, node, facts), dims - {axis.dim}, axis)
        for axis in source.axes
    )
    return replace(source, axes=tuple(axes))


def _alike(axis: Axis, dim: int, node: fx.Node, facts: Facts) -> Axis:
    """Couple the channels of an axis that lie behind one another along another dimension; what is left does
    not vary there.
    """
    leader = axis.numbers.narrow(dim, 0, 1)
    facts.couple(leader, axis.numbers, node)
    return Axis(leader, axis.dim, axis.slot)


def _border_moves(axis: Axis, others: dict[str, Any]) -> bool:
    """Whether other channels would stand at the border once some are gone: one is cut off there,
    or repeated.
    """
    rank = axis.numbers.dim()
    amounts = [
        amount for index, amount in enumerate(others["pad"]) if axis.numbers.shape[rank - 1 - index // 2] > 1
    ]
    return any(amount < 0 for amount in amounts) or (
        others.get("mode", "constant") != "constant" and any(amounts)
    )


def _pad(axis: Axis, pad: list[int]) -> Tensor:
    """What a border adds along a dimension of channels is not a channel; along any other dimension it
    continues the channels.
    """
    rank = axis.numbers.dim()
    along = [
        amount if axis.numbers.shape[rank - 1 - index // 2] > 1 else 0 for index, amount in enumerate(pad)
    ]
    return torch.nn.functional.pad(axis.numbers, along, value=NONE)


def _rest(others: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in others.items() if name != "self"}


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _keep(
    axes: list[Axis],
    moved: Tensor,
    given: Sequence[Axis],
    facts: Facts,
    node: fx.Node,
    source: Axis | None = None,
    why: str = "takes channels out one by one",
) -> None:
    """Add the axis of numbers that an operator made of those of the axes it was ``given``, or freeze them.

    Raises:
        DoesNotApplyError: it did more than move them.
    """
    moved = collapse(moved)
    whole = moved.reshape(-1).numpy()
    if not np.isin(
        whole[whole != NONE], np.concatenate([own.numbers.reshape(-1).numpy() for own in given])
    ).all():
        raise DoesNotApplyError("it computes other elements of those that it is said to move")
    axis = Axis.of(moved, source.slot if source is not None else None)
    if axis is not None and (source is None or not _one_of_each(axis, source)):
        axes.append(axis)
    elif moved.numel() and int(moved.reshape(-1)[0]) != NONE:
        facts.say(facts.frozen, moved, f"{node.target} {why}", node)
        if source is not None and len(source.varying()) > 1:
            facts.want_together(source.numbers, source.dim, node)  # one of every row: rows can go whole


def _one_of_each(axis: Axis, source: Axis) -> bool:
    """Whether a move took one channel out of every row, so that what is left varies only from row to row and
    cannot shrink.
    """
    if (
        len(axis.varying()) >= len(source.varying())
        or axis.numbers.unique().numel() == source.numbers.unique().numel()
    ):
        return False
    return smallest_step(axis.numbers.numpy(), axis.dim) > smallest_step(source.numbers.numpy(), source.dim)


def _at_run_time(node: fx.Node, rule: Rule, joined: int) -> bool:
    """Whether some of the joined tensors vary in length along the joined dimension, which decides where the
    others lie.
    """
    assert rule.moves is not None
    recorded = [part.meta.get("val") for part in arguments_of(node)[rule.moves] if isinstance(part, fx.Node)]
    shapes = [val.shape for val in recorded if isinstance(val, Tensor)]
    return any(is_dynamic(shape[joined]) for shape in shapes if joined < len(shape))  # not torch.tensor([])


def _join(
    node: fx.Node,
    rule: Rule,
    sources: list[Value],
    others: dict[str, Any],
    shapes: list[tuple[int, ...]],
    facts: Facts,
) -> list[Value]:
    """Concatenation or stacking: axes that shrink the joined dimension are joined, all others must agree."""
    given = [source for source in sources if _numel(source.shape) or len(source.shape) > 1]
    rank = len(shapes[0])
    stacked = rank > len(given[0].shape)
    # What has lost all its channels adds nothing, and has no say on the other dimensions.
    sources = given if stacked else [source for source in given if _numel(source.shape)] or given
    joined = int(others.get("dim", 0)) % rank
    axes: list[Axis] = []
    for dim in range(len(sources[0].shape)):
        per_source = [source.at(dim) for source in sources]
        if not stacked and dim == joined:
            several = itertools.chain(*(found for found in per_source if len(found) > 1))
            facts.freeze(several, f"lies with others along the dimension that {node.target} joins", node)
            per_source = [found if len(found) < 2 else [] for found in per_source]
        if not any(per_source):
            continue
        if max(map(len, per_source)) > 1 or (not all(per_source) and (stacked or dim != joined)):
            reason = f"meets a part of {node.target} that has no channels there"
            facts.freeze(itertools.chain(*per_source), reason, node)
            continue
        if (
            not stacked
            and any(joined in axis.varying() for found in per_source for axis in found)
            and _at_run_time(node, rule, joined)
        ):
            if dim == joined:
                reason = f"{node.target} puts it beside something of a length known only at run time"
                facts.freeze(itertools.chain(*per_source), reason, node)
                continue
            per_source = [[_alike(axis, joined, node, facts) for axis in found] for found in per_source]
        parts = [
            found[0].numbers.expand(s.shape) if found else torch.full(s.shape, NONE)
            for found, s in zip(per_source, sources, strict=True)
        ]
        alike = (stacked or dim != joined) and all(
            found[0].numbers.shape == per_source[0][0].numbers.shape for found in per_source
        )
        if alike and (stacked or per_source[0][0].numbers.shape[joined] == 1):
            for found in per_source[1:]:
                facts.couple(per_source[0][0].numbers, found[0].numbers, node)
            parts = [parts[0] if stacked else per_source[0][0].numbers.expand(s.shape) for s in sources]
        all_axes = [axis for found in per_source for axis in found]
        _keep(axes, _run(node.target, parts, others), all_axes, facts, node)
    return [Value(shapes[0], tuple(axes), all(source.constant for source in given))]
