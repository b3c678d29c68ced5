"""Rules with letters: pointwise operators, contractions, norms and reductions share one mechanism.

Each operand's dimensions get letters; axes that shrink the same letter are coupled; what becomes of a letter
(kept, contracted, mixed, frozen) decides what is said of its channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._facts import Product
from ._lettered import Lettered, Operand, Spelled, align, join, singles
from ._meeting import Found, consume, couple, stretched
from ._named import look_up
from ._numbering import Axis, DoesNotApplyError, Value
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
        return [
            ([axis for item in outgoing for axis in self._laid(letters, order, dropped, *item)], constant)
            for letters in self.results
        ]

    def _laid(
        self, letters: Spelled, order: list[str], dropped: set[str], letter: str, numbers: Tensor
    ) -> list[Axis]:
        """The axis of a result that numbers along a letter make, if any.

        Args:
            letters: of the result.
            order: the letters that the numbers have a dimension for.
            dropped: letters of which nothing comes out.
        """
        own = singles(letters)
        if letter not in own or letter in dropped:
            return []
        for gone in dropped:
            numbers = numbers.narrow(order.index(gone), 0, 1)
        known = [order.index(other) for other in own if other in order]
        laid = numbers.permute([*known, *(dim for dim in range(len(order)) if dim not in known)])
        if any(size > 1 for size in laid.shape[len(known) :]):
            raise DoesNotApplyError("its channels differ along a dimension that its result lacks")
        # A dimension that the operator adds has one position.
        laid = laid.reshape([laid.shape[known.index(order.index(o))] if o in order else 1 for o in own])
        laid = join(laid, letters, self.size)
        if self.reduced and not self.keepdim:
            laid = laid.squeeze(tuple(i for i, other in enumerate(letters) if other in self.reduced))
        axis = Axis.of(laid)
        return [] if axis is None else [axis]

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
                own, leader = axis.numbers, axis.numbers
                for dim in (dim for dim in axis.varying() if not shared[dim]):
                    leader = leader.narrow(dim, 0, 1)
                if leader.numel() > 1 and not shared[axis.dim]:
                    spread = leader.expand(own.shape).reshape(-1).numpy()
                    self.facts.heads.append((spread, own.reshape(-1).numpy(), self.node))

    def _note_matrices(self, constant: bool) -> None:
        for operand in self.operands:
            contracted = any(self.contracted(letter) for letter in operand.letters)
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
            self.facts.freeze(
                (axis for _, axis, _ in found), f"these are gates of {self.node.target}", self.node
            )
        elif letter in self.inside:
            why = f"these are positions of a window of {self.node.target}"
            self.facts.say(self.facts.inside, [numbers for _, _, numbers in found], why, self.node)
        if not found or letter in self.inside:
            return []
        if letter in self.routes:
            self._route(holders, found)
            return []
        self._couple_along(self.gates, [numbers for _, _, numbers in found], letter, order)
        lacking = [operand for operand in holders if not operand.at(letter)]
        for operand in lacking:
            self.facts.stretched.update(stretched(operand, letter))
            why = f"meets '{operand.name}' of {self.node.target}, which has no channels there"
            self.facts.freeze((axis for _, axis, _ in found), why, self.node)
        if lacking and not constant and letter in self.kept:
            # A weight's positions that are frozen here never go; carried on, they would only be taken for
            # channels that other weights share.
            found = [item for item in found if not item[0].value.constant]
            if not found:
                return []
        everything = [numbers for _, _, numbers in found]
        self._couple_along(self.crossed | (set(order) - self.kept), everything, letter, order)
        vanishing = any(operand.value.vanishes for operand in holders)
        routing = (
            letter in self.chosen or (letter in self.added and vanishing) or self._looked_up(letter, found)
        )
        if letter in self.chosen:
            self.facts.chosen += [(numbers.reshape(-1).numpy(), self.needed) for numbers in everything]
        if letter in self.aligned:
            multiple = self.aligned[letter]
            self.facts.aligned += [(numbers.reshape(-1).numpy(), multiple) for numbers in everything]
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

    def _contract(self, holders: list[Operand], everything: list[Tensor], vanishing: bool) -> None:
        weights = [operand for operand in holders if operand.value.constant]
        activations = [operand for operand in holders if not operand.value.constant]
        reason = f"contracted between two activations by {self.node.target}"
        several = activations if len(activations) > 1 else []
        varying = [operand.node for operand in several if not _lies_alike(operand, everything)]
        if varying:
            reason = f"{reason}, of which '{varying[0]}' has other channels at other sizes"
            self.facts.say(self.facts.frozen, everything, reason, self.node)
        elif several:
            self.facts.say(self.facts.exempt, everything, reason, self.node, vanishing)
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
                problem = consume(self, weight, activation) if shared else None
                if problem is not None:
                    for operand in (weight, activation):
                        alone = (letter for letter in shared if len(self.holders(letter)) == 2)
                        self.facts.freeze(
                            (axis for letter in alone for axis in operand.at(letter)), problem, self.node
                        )


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
