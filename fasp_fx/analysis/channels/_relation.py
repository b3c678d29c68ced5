"""Rules with letters: pointwise operators, contractions, norms and reductions share one mechanism.

Axes that shrink the same letter are coupled; what becomes of a letter (kept, summed over, mixed, frozen)
decides what is said of its channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, fx

from fasp_fx.patterns import ORDINALS, TOLD, Dims, DoesNotApplyError, letters_of

from ._call import Call, Operand, Operands, joined
from ._choices import look_up
from ._coupling import Contraction, Meeting, alike_in_blocks, blocks_wanted, couple, stretched
from ._facts import Facts, Product
from ._numbering import Axis, Numbering, Value, recorded_shape
from ._regroup import repeating


class Relation:
    """One application of a rule with letters to one call.

    Args:
        call: the call.
        facts: what it says of channels goes there.
        numbering: of the channels.

    Raises:
        DoesNotApplyError: the call is none that the rule speaks of.
    """

    def __init__(self, call: Call, facts: Facts, numbering: Numbering) -> None:
        self.call, self.node, self.facts, self.numbering = call, call.node, facts, numbering
        self.operands = Operands(call)
        self.reading = self.operands.reading
        self.activations = [operand for operand in self.operands.each if not operand.value.constant]
        #: letters along which graphs that the operator is given tell positions apart, each with the reason
        #: why none of them can go. A graph is told the number of a position; with another position gone it
        #: would be told another number. Only where it does not read that number, and no table beside it has
        #: an entry for each position, are all positions alike.
        self.told = {
            letter: f"'{name}' of {call.node.target} tells positions along this dimension apart"
            for name, (letter, place) in TOLD.get(str(call.node.target), {}).items()
            if not _are_alike(call.arguments.get(name), place)
        }

    @cached_property
    def frozen(self) -> frozenset[str]:
        """Letters along which no position can go."""
        return self.reading.along("freeze") | self.reading.placed | frozenset(self.told)

    @cached_property
    def needed(self) -> dict[str, int]:
        """Letters along which positions compete, with how many of them are needed at once."""
        several = self.reading.arguments.get("k", 1)
        lowest = self.reading.arguments.get("largest") is False
        unknown = not isinstance(several, int) or "k" in self.call.nodes
        return {} if lowest or unknown else dict.fromkeys(self.reading.along("choose"), several)

    # --- What follows for channels.

    def run(self) -> list[list[Axis]]:
        """Say all that follows of the operands' channels; return the axes of each result."""
        for operand in self.operands.each:
            self._note(operand)
        outgoing = [(letter, numbers) for letter in self.operands.order for numbers in self._meet(letter)]
        self._consume()
        kept = self.reading.kept - self.reading.along("reduce") - self.reading.windowed
        dropped = {*self.operands.order} - kept
        return [
            [axis for item in outgoing for axis in self._laid(dims, dropped, *item)]
            for dims in self.reading.results
        ]

    def _laid(self, dims: Dims, dropped: set[str], letter: str, numbers: Tensor) -> list[Axis]:
        """The axis of a result that numbers along a letter make, if any.

        Args:
            dims: of the result.
            dropped: letters of which nothing comes out.
            numbers: with a dimension for every letter.
        """
        order, letters = self.operands.order, letters_of(dims)
        if letter not in letters or letter in dropped:
            return []
        for one in dropped:
            numbers = numbers.narrow(order.index(one), 0, 1)
        places = [order.index(one) for one in letters if one in order]
        laid = numbers.permute([*places, *(dim for dim in range(len(order)) if dim not in places)])
        if any(size > 1 for size in laid.shape[len(places) :]):
            raise DoesNotApplyError("its channels differ along a dimension that its result lacks")
        # A dimension that the operator adds has one position.
        sizes = iter(laid.shape)
        laid = laid.reshape([next(sizes) if one in order else 1 for one in letters])
        laid, reduced = joined(laid, dims, self.operands.size), self.reading.along("reduce")
        if reduced and not self.reading.arguments.get("keepdim", False):
            laid = laid.squeeze(tuple(index for index, dim in enumerate(dims) if dim in reduced))
        axis = Axis.of(laid)
        return [] if axis is None else [axis]

    def couple_heads(self) -> None:
        """Where two activations are contracted, note which channels share a position of the dimensions that
        neither sums over.
        """
        letters = [letter for operand in self.activations for letter in operand.letters]
        several = {letter for letter in letters if letters.count(letter) > 1}
        for operand in self.activations if several & self.operands.summed else ():
            shared = [letter in several & self.reading.kept for letter in operand.letters]
            for axis in operand.value.axes:
                leader = axis.numbers
                for dim in (dim for dim in axis.varying() if not shared[dim]):
                    leader = leader.narrow(dim, 0, 1)
                if leader.numel() > 1 and not shared[axis.dim]:
                    spread = leader.expand(axis.numbers.shape).reshape(-1).numpy()
                    self.facts.wishes.heads.append((spread, axis.numbers.reshape(-1).numpy(), self.node))

    def _note(self, operand: Operand) -> None:
        """Note the boxes and the weight that an operand is."""
        value, summed = operand.value, self.operands.summed & {*operand.letters}
        if operand.splits:
            self.facts.boxes_of(value, self.node)
        if value.constant and summed and not self.operands.constant:
            # A part of a weight has no origin any more, and its channels have.
            names = {axis.slot[0] for axis in value.axes if axis.slot is not None}
            self.facts.matrices |= names | ({value.origin} if value.origin is not None else set())

    def _meet(self, letter: str) -> list[Tensor]:
        """Couple all axes that shrink ``letter``; return those that survive, with a dimension for every
        letter.
        """
        holders, order = self.operands.holders(letter), self.operands.order
        meeting = [
            Meeting(operand, axis, operand.aligned(axis, order))
            for operand in holders
            for axis in operand.at(letter)
        ]
        if not meeting or self._stay_inside(letter, meeting):
            return []
        if letter in self.reading.routed:
            self._route(holders, meeting)
            return []
        self._couple_along(self.reading.along("gates") - {letter}, meeting)
        if not (meeting := self._without_lacking(letter, holders, meeting)):
            return []
        self._couple_along((self.reading.crossed | ({*order} - self.reading.kept)) - {letter}, meeting)
        surviving = numbers = [each.numbers for each in meeting]
        vanishing = any(operand.value.vanishes for operand in holders)
        self._count(letter, numbers)
        routing = letter in self.needed or (letter in self.reading.along("add") and vanishing)
        routing = routing or self._looked_up(letter, meeting)
        if len(holders) > 1:
            self._want_blocks(alike_in_blocks(meeting, order))
            surviving = couple(holders, meeting, self.facts, self.node)
        self._remark(letter, numbers, routing)
        if letter in self.operands.summed:
            self._contract(holders, numbers, vanishing)
            return []
        for each in meeting:
            if each.operand.value.constant and not self.operands.constant:
                self.facts.produced.append((each.axis.numbers.reshape(-1).numpy(), each.axis.slot))
        return surviving

    def _stay_inside(self, letter: str, meeting: list[Meeting]) -> bool:
        """Whether positions of a letter are those of a window or gates, which stay."""
        if letter in self.reading.along("gates"):
            why = f"these are gates of {self.node.target}"
            self.facts.freeze((each.axis for each in meeting), why, self.node)
        elif letter in self.reading.inside:
            why = f"these are positions of a window of {self.node.target}"
            self.facts.say(self.facts.remarks.inside, [each.numbers for each in meeting], why, self.node)
        return letter in self.reading.inside

    def _without_lacking(self, letter: str, holders: list[Operand], meeting: list[Meeting]) -> list[Meeting]:
        """What meets positions that are no channels stays; what is left to be carried on."""
        lacking = [operand for operand in holders if not operand.at(letter)]
        for operand in lacking:
            self.facts.wishes.stretched.update(stretched(operand, letter))
            why = f"meets '{operand.name}' of {self.node.target}, which has no channels there"
            self.facts.freeze((each.axis for each in meeting), why, self.node)
        # A weight's positions that are frozen here never go; carried on, they would only be taken for
        # channels that other weights share.
        ends = bool(lacking) and not self.operands.constant and letter in self.reading.kept
        return [each for each in meeting if not (ends and each.operand.value.constant)]

    def _count(self, letter: str, numbers: list[Tensor]) -> None:
        """Say how many of the positions of a letter have to stay."""
        counts = self.facts.counts
        if letter in self.needed:
            counts.chosen += [(each.reshape(-1).numpy(), self.needed[letter]) for each in numbers]
        aligned = [
            int(clause.words[1]) for clause in self.call.rule.all("align") if clause.words[0] == letter
        ]
        counts.aligned += [(each.reshape(-1).numpy(), multiple) for multiple in aligned for each in numbers]

    def _remark(self, letter: str, numbers: list[Tensor], routing: bool) -> None:
        """Say what the rule does to the positions of a letter."""
        remarks, target = self.facts.remarks, self.node.target
        if letter in self.frozen | self.reading.windowed:
            why = self.told.get(letter, f"{target} cannot lose positions along this dimension")
            self.facts.say(remarks.frozen, numbers, why, self.node, routing)
            # These can perhaps go along another dimension that they also vary along, those of a position
            # together.
            order, reading = self.operands.order, self.reading
            fixed = self.frozen | reading.windowed | reading.crossing | reading.inside
            for each in numbers:
                if any(size > 1 and one not in fixed for one, size in zip(order, each.shape, strict=True)):
                    self.facts.want_together(each, order.index(letter), self.node)
        elif letter in self.reading.crossing or letter not in self.reading.kept | self.operands.summed:
            self.facts.say(remarks.mixed, numbers, f"mixed by {target}", self.node, routing)

    def _couple_along(self, letters: frozenset[str], meeting: list[Meeting]) -> None:
        """Channels of one position go together, wherever they lie along these letters."""
        order = self.operands.order
        for dim in (order.index(letter) for letter in letters & {*order}):
            for each in meeting:
                if each.numbers.shape[dim] > 1:
                    self.facts.couple(each.numbers.narrow(dim, 0, 1), each.numbers, self.node)

    def _route(self, holders: list[Operand], meeting: list[Meeting]) -> None:
        """Blocks chosen at run time go with the numbers by which they are chosen."""
        numbers = [each.numbers for each in meeting]
        for each in numbers[1:]:
            self.facts.couple(numbers[0], each, self.node)
        followed = all(
            operand.at(letter) for operand in holders for letter in self.reading.routed & {*operand.letters}
        )
        why = f"chosen at run time by {self.node.target}"
        self.facts.say(self.facts.remarks.frozen, numbers, why, self.node, routing=followed)

    def _looked_up(self, letter: str, meeting: list[Meeting]) -> bool:
        """Whether the positions along a letter are looked up by integers that name them."""
        letters, arguments = self.operands.each[0].letters, self.reading.arguments
        index = [
            arguments[clause.words[1]]
            for clause in self.call.rule.all("index")
            if clause.words[1] not in ORDINALS and letters[int(arguments[clause.words[0]])] == letter
        ]
        return bool(index) and all(look_up(self.node, each.axis, index[0], self.facts) for each in meeting)

    def _contract(self, holders: list[Operand], numbers: list[Tensor], vanishing: bool) -> None:
        activations = [operand for operand in holders if not operand.value.constant]
        reason, remarks = f"contracted between two activations by {self.node.target}", self.facts.remarks
        several = activations if len(activations) > 1 else []
        varying = [operand.node for operand in several if not _lies_alike(operand, numbers)]
        if varying:
            reason = f"{reason}, of which '{varying[0]}' has other channels at other sizes"
            self.facts.say(remarks.frozen, numbers, reason, self.node)
        elif several:
            self.facts.say(remarks.exempt, numbers, reason, self.node, vanishing)
            distinct = np.unique(np.concatenate([each.reshape(-1).numpy() for each in numbers]))
            nodes = tuple(operand.node for operand in activations if operand.node is not None)
            self.facts.products.append(Product(self.node, nodes, distinct[distinct >= 0]))
        elif len(holders) != 2 or len(activations) != 1:
            why = f"weights, or values looked up in them, are multiplied together by {self.node.target}"
            self.facts.say(remarks.frozen, numbers, why, self.node)

    def _consume(self) -> None:
        """Record each weight that is contracted with an activation."""
        weights = [operand for operand in self.operands.each if operand.value.constant]
        pairs = itertools.product(weights, self.activations)
        contractions = [Contraction(self.node, self.operands, *pair) for pair in pairs]
        for contraction in (each for each in contractions if each.shared):
            self.facts.counts.stacked += contraction.stacked()
            if (problem := contraction.problem()) is not None:
                self.facts.freeze(contraction.axes(), problem, self.node)
            else:
                self._want_blocks(contraction.alike_in_blocks())
                self.facts.uses += contraction.uses()

    def _want_blocks(self, shared: Iterable[tuple[Operand, Axis, str]]) -> None:
        """Ask for numbers of their own for channels of every block, where blocks share them; of two
        dimensions that would divide each other, for the first.
        """
        blocks = self.facts.wishes.blocks
        for each in shared:
            for (name, dim), (divider, count) in blocks_wanted(self.numbering, *each).items():
                dividers = {(other, along) for (other, _), (along, _) in blocks.items()}
                if (name, divider) not in blocks and (name, dim) not in dividers:
                    blocks.setdefault((name, dim), (divider, count))


def _lies_alike(operand: Operand, among: list[Tensor]) -> bool:
    """Whether those of some channels that an activation holds repeat along dimensions whose sizes vary, if
    they lie along any.
    """
    recorded = recorded_shape(operand.node)
    concerned = [
        axis.numbers
        for axis in operand.value.axes
        if any(np.isin(axis.numbers.numpy(), numbers.numpy()).any() for numbers in among)
    ]
    return all(repeating(numbers, recorded) is not None for numbers in concerned)


def fits(values: list[Value], shapes: list[tuple[int, ...]]) -> bool:
    """Whether every axis fits the executed shape of its result."""
    return all(
        len(axis.numbers.shape) == len(shape)
        and all(n in (1, s) for n, s in zip(axis.numbers.shape, shape, strict=True))
        for value, shape in zip(values, shapes, strict=True)
        for axis in value.axes
    )


def _are_alike(argument: Any, place: int) -> bool:
    """Whether nothing depends on the positions that graphs are told, as their input of that number."""
    parts = argument if isinstance(argument, (list, tuple)) else [argument]
    tables = [part for part in parts if isinstance(part, Value) and len(part.shape) > place]
    graphs = [part.graph for part in parts if isinstance(part, fx.GraphModule)]
    read = any(graph.find_nodes(op="placeholder")[place].users for graph in graphs)
    return bool(graphs) and not read and all(table.shape[place] == 1 for table in tables)
