"""Remove channels: cut the weights and rewrite every size argument that spoke of what is gone."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.analysis import Analysis, Numbering, Slot, Value, Walk
from fasp_fx.base import pytree
from fasp_fx.capturing import Cut, Program, Recipe, arguments, set_argument, stamp
from fasp_fx.patterns import Clause, lookup

from ._adjust import Kept, pin_attention_scale

_NAME = "remove_channels"


def remove_channels(program: Program, analysis: Analysis, walk: Walk, gone: np.ndarray) -> Program:
    """Leave no channel that goes in any weight, nor in an input that holds state; every node executes at the
    new sizes. How each weight was cut is recorded in ``program.recipes``.

    Args:
        gone: for every channel number, whether it goes, constant within each channel set.
    """
    if not gone.any():
        return program
    old, program = program.module.graph, program.copy()
    originals = dict(zip(program.module.graph.nodes, old.nodes, strict=True))
    pin_attention_scale(originals, walk)
    _resize(originals, walk, Kept(gone))
    _cut_weights(program, analysis, gone)
    _cut_inputs(program, analysis, gone)
    return program


def recipes_of(numbering: Numbering, gone: np.ndarray, names: Container[str]) -> dict[str, Recipe]:
    """How the weights among ``names`` that lose channels are cut; no weight has to be at hand.

    Args:
        gone: for every channel number, whether it is removed.

    Raises:
        VerificationError: the blocks of a weight would keep unequal numbers of channels.
    """
    recipes: dict[str, Recipe] = {}
    # Blocks are those of the whole weight: they are cut first.
    slots = [slot for slot in _losing(numbering, gone, "weight") if slot.name in names]
    for slot in sorted(slots, key=lambda slot: slot.block_dim is None):
        cut = Cut.of(slot.name, slot.dim, _stays(slot, gone), slot.block_dim)
        recipes[slot.name] = recipes.get(slot.name, Recipe(slot.name)).then(cut)
    return recipes


def _losing(numbering: Numbering, gone: np.ndarray, kind: str) -> list[Slot]:
    """The dimensions of one kind that lose channels."""
    return [
        slot
        for slot in numbering.slots
        if slot.kind == kind and gone[slot.base : slot.base + slot.size].any()
    ]


def _stays(slot: Slot, gone: np.ndarray) -> np.ndarray:
    """Which channels of a dimension stay, shape ``[blocks, channels of each]``."""
    return ~gone[slot.base : slot.base + slot.size].reshape(slot.blocks, -1)


def _left(slot: Slot, recipe: Recipe, shape: Sequence[int]) -> Tensor:
    """The numbers of a dimension's channels that a recipe leaves (see :meth:`Slot.numbers`).

    Args:
        shape: of the tensor before.
    """
    numbers = slot.numbers()
    for cut in recipe.cuts:
        kept = torch.from_numpy(cut.kept)
        if cut.dim == slot.dim:
            numbers = numbers[kept[0]] if slot.block_dim is None else numbers.gather(1, kept)
        elif cut.dim == slot.block_dim and cut.block_dim is None and shape[cut.dim] == slot.blocks:
            numbers = numbers[kept[0]]  # blocks go as a whole
    return numbers


def _cut_weights(program: Program, analysis: Analysis, gone: np.ndarray) -> None:
    numbering, weights, aliases = analysis.numbering, program.weights(), program.aliases()
    for name, recipe in recipes_of(numbering, gone, weights).items():
        weight, names = weights[name].detach(), aliases.get(name, [name])
        program.numbers[name] = [
            None if (slot := numbering.get(name, dim)) is None else _left(slot, recipe, weight.shape)
            for dim in range(weight.dim())
        ]
        program.recipes.update(dict.fromkeys(names, program.recipe(name).then(*recipe.cuts)))
        program.replace_weight(names, recipe.apply(weight))
    for slot in _losing(numbering, gone, "created"):
        left = program.numbers.setdefault(slot.name, [])
        left.extend([None] * (slot.dim + 1 - len(left)))
        left[slot.dim] = torch.from_numpy(np.flatnonzero(_stays(slot, gone))) + slot.base


def _cut_inputs(program: Program, analysis: Analysis, gone: np.ndarray) -> None:
    """Inputs that hold state become narrower: what is recorded of them, and their examples."""
    leaves, structure = pytree.tree_flatten(program.example)
    at = {node.name: (index, node) for index, node in enumerate(program.placeholders())}
    for slot in _losing(analysis.numbering, gone, "input"):
        (index, node), recipe, stays = at[slot.name], Recipe(slot.name), _stays(slot, gone)
        if slot.block_dim is not None:  # heads of which nothing is left go first
            heads = np.flatnonzero(stays.any(1))
            recipe, stays = recipe.then(Cut(slot.block_dim, heads[None])), stays[heads]
        recipe = recipe.then(Cut.of(slot.name, slot.dim, stays, slot.block_dim))
        numbers = program.numbers.setdefault(slot.name, [None] * leaves[index].dim())
        numbers[slot.dim] = _left(slot, recipe, leaves[index].shape)
        leaves[index] = recipe.apply(leaves[index])
        node.meta["val"] = node.meta["val"].new_empty(recipe.shape(node.meta["val"].shape))
        for user in node.users:
            user.meta.pop("val", None)  # out of date
    program.example = pytree.tree_unflatten(leaves, structure)


def _resize(originals: dict[fx.Node, fx.Node], walk: Walk, kept: Kept) -> None:
    for node, old in originals.items():
        rule = lookup(node.target) if node.op == "call_function" else None
        repeat = _REPEATS.get(str(node.target))
        if rule is None or not (rule.clauses or repeat):
            continue
        results = walk.values.get(old)
        outputs = [
            value
            for value in (results if isinstance(results, tuple) else [results])
            if isinstance(value, Value)
        ]
        inputs = (walk.values.get(read) for read in old.all_input_nodes)
        sources = outputs if rule.creates or rule.tallies is not None else inputs
        source = next((value for value in sources if isinstance(value, Value)), None)
        if source is None or not any(map(kept.touches, (source, *outputs))):
            continue
        if repeat is not None and repeat(node, source, outputs, kept):
            stamp(node, _NAME)
        for clause in rule.clauses:
            rewrite = _REWRITES.get(clause.keyword)
            if rewrite is not None and rewrite(node, clause, source, outputs, kept):
                stamp(node, _NAME)


def _shape(node: fx.Node, clause: Clause, source: Value, outputs: list[Value], kept: Kept) -> bool:
    sizes = list(arguments(node)[clause.words[0]])
    value = outputs[0] if len(clause.words) == 1 else source
    first = len(value.shape) - len(sizes)
    for index, size in enumerate(sizes):
        new, old = kept.size(value, first + index), value.shape[first + index]
        if new != old and isinstance(size, fx.Node):
            sizes[index] = _scaled(node, size, new, old) if -1 in sizes else -1
        elif new != old and size != -1:
            sizes[index] = new
    return set_argument(node, clause.words[0], sizes)


def _times(node: fx.Node, source: Value, outputs: list[Value], kept: Kept) -> bool:
    times = list(arguments(node)["repeats"])
    before = len(times) - len(source.shape)
    for dim, size in enumerate(outputs[0].shape):
        new = kept.size(outputs[0], dim)
        kept_before = kept.size(source, dim - before) if dim >= before else 1
        # As often as a size says is as often as before, and of nothing nothing comes.
        if new != size and isinstance(times[dim], int) and kept_before:
            times[dim] = new // kept_before
    return set_argument(node, "repeats", times)


def _scaled(node: fx.Node, size: fx.Node, new: int, old: int) -> fx.Node:
    """A size known only at run time, of which the share ``new / old`` stays."""
    common = math.gcd(new, old)
    with node.graph.inserting_before(node):
        times = node.graph.call_function(operator.mul, (size, new // common))
        return node.graph.call_function(operator.floordiv, (times, old // common))


def _part(node: fx.Node, clause: Clause, source: Value, outputs: list[Value], kept: Kept) -> bool:
    along, *bounds = clause.words
    dim = int(arguments(node)[along]) % len(source.shape)
    if len(bounds) == 2:
        return _span(node, (bounds[0], bounds[1]), source, dim, kept)
    taken = arguments(node)[bounds[0]]
    if len(outputs[0].shape) < len(source.shape):  # one position
        length = source.shape[dim]
        is_same = isinstance(taken, fx.Node) or kept.size(source, dim) == length
        return not is_same and set_argument(node, bounds[0], kept.before(source, dim, taken % length))
    sizes: list[Any] = [kept.size(output, dim) for output in outputs]
    if all(size == output.shape[dim] for size, output in zip(sizes, outputs, strict=True)):
        return False
    if isinstance(taken, (list, tuple)):  # what only data decide is left to the graph
        sizes = [was if isinstance(was, fx.Node) else now for was, now in zip(taken, sizes, strict=True)]
    node.args, node.kwargs = (node.args[0], sizes, dim), {}
    node.target = torch.ops.aten.split_with_sizes.default
    return True


def _span(node: fx.Node, bounds: tuple[str, str], source: Value, dim: int, kept: Kept) -> bool:
    start_name, end_name = bounds
    call = arguments(node)
    step = int(call.get("step", 1))
    length, changed = source.shape[dim], False
    start, end = (
        _absolute(call[name], default, length) for name, default in ((start_name, 0), (end_name, length))
    )
    if not (0 < start < length or 0 < end < length) or kept.size(source, dim) == length:
        return False
    if 0 < start < length:  # with a step, the analysis lets runs of that many neighbours go as a whole
        changed |= set_argument(
            node, start_name, kept.before(source, dim, start - start % step) + start % step
        )
    if 0 < end < length:
        changed |= set_argument(
            node, end_name, kept.before(source, dim, min(_past(start, end, step), length))
        )
    return changed


def _absolute(position: Any, default: int, length: int) -> int:
    """A position counted from the front; one known only at run time is left to the graph, which counts as the
    default.
    """
    if position is None or isinstance(position, fx.Node):
        return default
    return min(max(int(position) + length if position < 0 else int(position), 0), length)


def _past(start: int, end: int, step: int) -> int:
    """Where the run of ``step`` neighbours ends that holds the last position taken."""
    last = start + (end - 1 - start) // step * step
    return last - last % step + step if end > start else end


def _factor(node: fx.Node, clause: Clause, source: Value, outputs: list[Value], kept: Kept) -> bool:
    (letter, name), rule = clause.words, lookup(node.target)
    factor = arguments(node)[name]
    # Known only at run time, as the groups of a convolution with one weight for each sample, it follows the
    # samples.
    if rule is None or isinstance(factor, fx.Node):
        return False
    dims = rule.alternatives[0].operands[0].dims
    pair = next(dim for dim in dims if isinstance(dim, tuple) and letter in dim)
    at = dims.index(pair) - len(dims) if dims[0] == "..." else dims.index(pair)
    parts = kept.factors(source, at % len(source.shape), int(factor), first=pair[0] == letter)
    return set_argument(node, name, parts)


def _count(node: fx.Node, clause: Clause, source: Value, outputs: list[Value], kept: Kept) -> bool:
    name, *less = clause.words
    return set_argument(node, name, kept.size(outputs[0], len(outputs[0].shape) - 1) - sum(map(int, less)))


def _length(node: fx.Node, source: Value, outputs: list[Value], kept: Kept) -> bool:
    length, along = (arguments(node)[name] for name in ("output_size", "dim"))
    dim = 0 if along is None else int(along) % len(outputs[0].shape)
    is_same = (
        length is None or isinstance(length, fx.Node) or kept.size(outputs[0], dim) == outputs[0].shape[dim]
    )
    return not is_same and set_argument(node, "output_size", kept.size(outputs[0], dim))


_REWRITES: dict[str, Callable[[fx.Node, Clause, Value, list[Value], Kept], bool]] = {
    "shape": _shape,
    "part": _part,
    "factor": _factor,
    "count": _count,
}
#: operators that repeat positions, which their rules do not say
_REPEATS: dict[str, Callable[[fx.Node, Value, list[Value], Kept], bool]] = {
    "aten.repeat.default": _times,
    "aten.repeat_interleave.self_int": _length,
}
