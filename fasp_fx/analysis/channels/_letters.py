"""Rules with letters: pointwise operators, contractions, norms and reductions share one mechanism.

Each operand's dimensions get letters; axes that shrink the same letter are coupled; what becomes of a letter
(kept, contracted, mixed, frozen) decides what is said of its channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._facts import Product
from ._lettered import Lettered
from ._meeting import (
    Found,
    consume_recurring,
    couple,
    make_use,
    meet_recurring,
    note_stacked,
    part_blocks,
    stretched,
    why_no_consumer,
)
from ._named import look_up
from ._operands import Axis, DoesNotApplyError, Operand, Value, align, join, singles
from ._regroup import repeating


class Relation(Lettered):
    """One application of a lettered rule to one node."""

    def run(self) -> list[tuple[list[Axis], bool]]:
        """Say all that follows of the operands' channels; return the axes of each result and whether it is
        constant.
        """
        constant = all(operand.value.constant for operand in self.operands)
        order = list(dict.fromkeys(letter for operand in self.operands for letter in operand.letters))
        outgoing: list[tuple[str, Tensor]] = []
        self._note_matrices(constant)
        for letter in order:
            outgoing += [(letter, numbers) for numbers in self._meet(letter, order, constant)]
        self._consume()
        dropped = {
            letter
            for letter in order
            if letter not in self.kept or letter in self.reduced or letter in self.windowed
        }
        outcome = []
        for letters in self.results:
            own = singles(letters)
            axes = []
            for letter, numbers in outgoing:
                if letter not in own or letter in dropped:
                    continue
                for gone in dropped & set(order):
                    numbers = numbers.narrow(order.index(gone), 0, 1)
                known = [other for other in own if other in order]
                laid = numbers.permute(
                    [order.index(other) for other in known]
                    + [order.index(other) for other in order if other not in own]
                )
                if any(size > 1 for size in laid.shape[len(known) :]):
                    raise DoesNotApplyError("its channels differ along a dimension that its result lacks")
                laid = laid.reshape(laid.shape[: len(known)])
                for at in (at for at, other in enumerate(own) if other not in order):
                    laid = laid.unsqueeze(at)  # a dimension that the operator adds
                laid = join(laid, letters, self.size)
                if self.reduced and not self.keepdim:
                    laid = laid.squeeze(tuple(i for i, other in enumerate(letters) if other in self.reduced))
                axis = Axis.of(laid)
                if axis is not None:
                    axes.append(axis)
            outcome.append((axes, constant))
        return outcome

    def couple_heads(self) -> None:
        """Where two activations are contracted, note which channels share a position of the dimensions that
        neither sums over.
        """
        activations = [operand for operand in self.operands if not operand.value.constant]
        if not any(
            self.contracted(letter) and sum(letter in operand.letters for operand in activations) > 1
            for letter in self.size
        ):
            return
        for operand in activations:
            shared = [
                sum(letter in other.letters for other in activations) > 1 and letter in self.kept
                for letter in operand.letters
            ]
            for axis in operand.value.axes:
                if shared[axis.dim] or not any(shared[dim] for dim in axis.varying()):
                    continue
                leader = axis.numbers
                for dim in axis.varying():
                    leader = leader if shared[dim] else leader.narrow(dim, 0, 1)
                spread = leader.expand(axis.numbers.shape)
                self.facts.heads.append(
                    (spread.reshape(-1).numpy(), axis.numbers.reshape(-1).numpy(), self.node)
                )

    def _note_matrices(self, constant: bool) -> None:
        for operand in self.operands:
            contracted = any(self.contracted(letter) or letter in self.recurs for letter in operand.letters)
            if contracted and operand.value.constant and not constant:
                # A part of a weight has no origin any more, and its channels have.
                self.facts.matrices |= {axis.slot[0] for axis in operand.value.axes if axis.slot is not None}
                if operand.value.origin is not None:
                    self.facts.matrices.add(operand.value.origin)

    def _meet(self, letter: str, order: list[str], constant: bool) -> list[Tensor]:
        """Couple all axes that shrink ``letter``; return those that survive, aligned to ``order``."""
        holders = self.holders(letter)
        found = [
            (operand, axis, align(axis, operand.letters, order))
            for operand in holders
            for axis in operand.at(letter)
        ]
        if letter in self.gates:
            self.facts.say(
                self.facts.frozen,
                [numbers for _, _, numbers in found],
                f"these are gates of {self.node.target}",
                self.node,
            )
        if not found:
            return []
        if letter in self.inside:
            if letter not in self.gates:
                why = f"these are positions of a window of {self.node.target}"
                self.facts.say(self.facts.inside, [numbers for _, _, numbers in found], why, self.node)
            return []
        if letter in self.recurs:
            of = self.recurs[letter].of
            channels = [
                align(axis, operand.letters, order) for operand in self.holders(of) for axis in operand.at(of)
            ]
            columns = [(operand, numbers) for operand, _, numbers in found]
            meet_recurring(self, letter, columns, channels, (order.index(letter), order.index(of)))
            return []
        if letter in self.routes:
            self._route(holders, found)
            return []
        self._couple_along(self.gates, [numbers for _, _, numbers in found], letter, order)
        for operand in holders:
            if not operand.at(letter):
                self._want_stretched(operand, letter)
                self.facts.say(
                    self.facts.frozen,
                    [numbers for _, _, numbers in found],
                    f"meets '{operand.name}' of {self.node.target}, which has no channels there",
                    self.node,
                )
        if not all(operand.at(letter) for operand in holders) and not constant and letter in self.kept:
            # A weight's positions that are frozen here never go; carried on, they would only be taken for
            # channels that other weights share.
            found = [item for item in found if not item[0].value.constant]
            if not found:
                return []
        everything = [numbers for _, _, numbers in found]
        self._couple_along(self.crossed | (set(order) - self.kept), everything, letter, order)
        for numbers in everything if self.crossed else ():
            self.facts.need(numbers)  # pools, resamplers and transforms refuse to work on nothing
        vanishing = any(operand.value.vanishes for operand in holders)
        routing = (
            letter in self.chosen or (letter in self.added and vanishing) or self._looked_up(letter, found)
        )
        if letter in self.chosen:
            self.facts.chosen += [(numbers.reshape(-1).numpy(), self.needed) for numbers in everything]
        surviving = everything if len(holders) == 1 else couple(self, holders, found, order)
        if letter in self.frozen | self.windowed:
            why = self.index_dependent.get(
                letter, f"{self.node.target} cannot lose positions along this dimension"
            )
            self.facts.say(self.facts.frozen, everything, why, self.node, routing)
            for numbers in everything:
                self._want_together(letter, numbers, order)
        elif letter in self.mixed | self.reduced or (letter not in self.kept and not self.contracted(letter)):
            self.facts.say(self.facts.mixed, everything, f"mixed by {self.node.target}", self.node, routing)
        if self.contracted(letter):
            self._contract(holders, everything, vanishing)
            return []
        if not constant:
            for operand, axis, _ in found:
                if operand.value.constant:
                    self.facts.produced.append((axis.numbers.reshape(-1).numpy(), axis.slot))
        return surviving

    def _couple_along(
        self, letters: set[str], everything: list[Tensor], besides: str, order: list[str]
    ) -> None:
        """Channels of one position go together, wherever they are found along these letters."""
        for dim in [order.index(letter) for letter in letters if letter != besides and letter in order]:
            for numbers in everything:
                if numbers.shape[dim] > 1:
                    self.facts.couple(numbers.narrow(dim, 0, 1), numbers, self.node)

    def _want_together(self, letter: str, numbers: Tensor, order: list[str]) -> None:
        """Channels that cannot go along this dimension can perhaps go along another one that they also vary
        along, those of a position together.
        """
        fixed = self.frozen | self.windowed | self.mixed | self.reduced
        if any(
            size > 1 and other not in fixed | self.inside
            for other, size in zip(order, numbers.shape, strict=True)
        ):
            self.facts.want_together(numbers, order.index(letter), self.node)

    def _route(self, holders: list[Operand], found: list[Found]) -> None:
        """Blocks chosen at run time go with the numbers by which they are chosen."""
        everything = [numbers for _, _, numbers in found]
        for numbers in everything[1:]:
            self.facts.couple(everything[0], numbers, self.node)
        known = all(
            operand.at(letter) for operand in holders for letter in self.routes if letter in operand.letters
        )
        self.facts.say(
            self.facts.frozen,
            everything,
            f"chosen at run time by {self.node.target}",
            self.node,
            routing=known,
        )

    def _looked_up(self, letter: str, found: list[Found]) -> bool:
        """Whether the positions along a letter are looked up by integers that name them."""
        operand = self.operands[0]
        along = [index for dim, index in self.looks if operand.letters[dim % len(operand.letters)] == letter]
        return bool(along) and all(look_up(self.node, axis, along[0], self.facts) for _, axis, _ in found)

    def _want_stretched(self, operand: Operand, letter: str) -> None:
        """What an expansion repeats can be repeated less often: it gets channels of its own along that
        dimension.
        """
        if operand.node is not None and not operand.splits:
            dim = operand.letters.index(letter) - len(operand.letters)
            self.facts.stretched.update(stretched(operand.node, dim))

    def _contract(self, holders: list[Operand], everything: list[Tensor], vanishing: bool) -> None:
        weights = [operand for operand in holders if operand.value.constant]
        activations = [operand for operand in holders if not operand.value.constant]
        varying = next(
            (
                operand
                for operand in activations
                if len(activations) > 1 and not _lies_alike(operand, everything)
            ),
            None,
        )
        if varying is not None:
            reason = (
                f"contracted between two activations by {self.node.target}, of which '{varying.node}' has"
                " other channels at other sizes"
            )
            self.facts.say(self.facts.frozen, everything, reason, self.node)
        elif len(activations) > 1:
            self.facts.say(
                self.facts.exempt,
                everything,
                f"contracted between two activations by {self.node.target}",
                self.node,
                vanishing,
            )
            numbers = np.unique(np.concatenate([n.reshape(-1).numpy() for n in everything]))
            operands = tuple(operand.node for operand in activations if operand.node is not None)
            self.facts.products.append(Product(self.node, operands, numbers[numbers >= 0]))
        elif len(weights) != 1 or len(activations) != 1:
            self.facts.say(
                self.facts.frozen,
                everything,
                f"weights, or values looked up in them, are multiplied together by {self.node.target}",
                self.node,
            )
        else:
            problem = why_no_consumer(self, weights[0], activations[0])
            if problem is not None:
                self.facts.say(self.facts.frozen, everything, problem, self.node)

    def _consume(self) -> None:
        """Record each weight that is contracted with an activation."""
        for weight in self.operands:
            for activation in self.operands:
                if not weight.value.constant or activation.value.constant:
                    continue
                shared = [
                    letter
                    for letter in weight.letters
                    if letter in activation.letters and self.contracted(letter)
                ]
                if not shared:
                    continue
                note_stacked(self, weight, activation)
                if why_no_consumer(self, weight, activation) is not None:
                    continue
                part_blocks(self, weight, activation)
                if any(weight.at(letter) for letter in shared):
                    self.facts.uses.append(make_use(self, weight, activation))
        consume_recurring(self)


def _lies_alike(operand: Operand, among: list[Tensor]) -> bool:
    """Whether those of some channels that an activation holds repeat along dimensions whose sizes vary, if
    they lie along any.
    """
    recorded = None if operand.node is None else operand.node.meta.get("val")
    if not isinstance(recorded, Tensor):
        return True
    own = [
        axis.numbers
        for axis in operand.value.axes
        if any(bool(torch.isin(axis.numbers, numbers).any()) for numbers in among)
    ]
    return all(repeating(numbers, recorded.shape) is not None for numbers in own)


def result_shapes_ok(values: list[Value], shapes: list[torch.Size]) -> bool:
    """Whether every axis fits the executed shape of its result."""
    return all(
        len(axis.numbers.shape) == len(shape)
        and all(n in (1, s) for n, s in zip(axis.numbers.shape, shape, strict=True))
        for value, shape in zip(values, shapes, strict=True)
        for axis in value.axes
    )
