"""Rules with letters: pointwise operators, contractions, norms and reductions share one mechanism.

Each operand's dimensions get letters; axes that shrink the same letter are coupled; what becomes of a letter (kept, contracted,
mixed, frozen) decides what is said of its channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.patterns import Alternative, Dims, Rule

from ._consume import make_use, note_stacked, slides, want_blocks, why_no_consumer
from ._factors import divide, fixed_rank, join, singles, spell
from ._facts import Facts, Product, Remark
from ._fx import arguments as arguments_of
from ._named import look_up
from ._numbering import Numbering
from ._recurring import consume_recurring, meet_recurring, recurring
from ._value import Axis, Value


@dataclass(frozen=True)
class Operand:
    """An operand with a letter for every dimension; ``splits`` made them so (see :mod:`._factors`)."""

    name: str
    value: Value
    letters: tuple[str, ...]
    node: fx.Node | None
    splits: tuple[tuple[int, int], ...] = ()

    def at(self, letter: str) -> list[Axis]:
        """The axes that shrink this letter."""
        return self.value.at(self.letters.index(letter))

    def size(self, letter: str) -> int:
        """The size of a letter's dimension."""
        return self.value.shape[self.letters.index(letter)]


def choose(rule: Rule, arguments: dict[str, Any]) -> Alternative:
    """The first alternative whose condition holds and whose operands have enough dimensions; else the last."""
    for alternative in rule.alternatives[:-1]:
        if alternative.condition and not arguments.get(alternative.condition):
            continue
        given = [(operand, arguments.get(operand.name)) for operand in alternative.operands]
        if alternative.condition or all(value is None or _fits(operand.dims, len(value.shape)) for operand, value in given):
            return alternative
    return rule.alternatives[-1]


def _fits(dims: Dims, rank: int) -> bool:
    if any(isinstance(token, str) and token.endswith("*") for token in dims):
        return rank >= len(dims) - 1
    return rank == len(dims) or (dims[:1] == ("...",) and rank >= len(dims) - 1)


def _runs(alternative: Alternative, rule: Rule, arguments: dict[str, Any]) -> dict[str, int]:
    """The length of every run, from the operands that leave it no choice, or from an argument that holds its sizes."""
    names = {token for operand in alternative.operands for token in operand.dims if isinstance(token, str) and token.endswith("*")}
    runs: dict[str, int] = {}
    for clause in rule.all("shape"):
        if len(clause.words) == 2:
            runs[clause.words[1]] = len(arguments[clause.words[0]])
    for _ in names:
        for operand in alternative.operands:
            value = arguments.get(operand.name)
            open_runs = [token for token in operand.dims if token in names and token not in runs]
            if isinstance(value, Value) and len(open_runs) == 1 and "..." not in operand.dims:
                runs[str(open_runs[0])] = len(value.shape) - fixed_rank(operand.dims, {**runs, str(open_runs[0]): 0})
    return {name: runs.get(name, 1) for name in names}


def _align(axis: Axis, letters: tuple[str, ...], order: list[str]) -> Tensor:
    """The axis's numbers with one dimension per letter of ``order``."""
    present = [letter for letter in order if letter in letters]
    numbers = axis.numbers.permute([letters.index(letter) for letter in present])
    return numbers.reshape([numbers.shape[present.index(letter)] if letter in present else 1 for letter in order])


def _dims_argument(value: Any, rank: int) -> list[int]:
    if value is None or value == []:
        return list(range(rank))
    return [int(dim) % rank for dim in (value if isinstance(value, (list, tuple)) else [value])]


class Relation:
    """One application of a lettered rule to one node.

    Raises:
        NotDivisible: a dimension in brackets is no multiple of its factor.
    """

    def __init__(
        self,
        node: fx.Node,
        rule: Rule,
        arguments: dict[str, Any],
        nodes: dict[str, fx.Node | None],
        facts: Facts,
        numbering: Numbering,
        experts: bool = False,
    ) -> None:
        self.node, self.rule, self.facts, self.numbering = node, rule, facts, numbering
        alternative = choose(rule, arguments)
        runs = _runs(alternative, rule, arguments)
        factors = {clause.words[0]: int(arguments[clause.words[1]]) for clause in rule.all("factor")}
        factors |= {clause.words[0]: int(clause.words[1]) for clause in rule.all("gates")}
        self.operands: list[Operand] = []
        for declared in alternative.operands:
            value = arguments.get(declared.name)
            if isinstance(value, Value):
                value, letters, splits = divide(value, spell(declared.dims, len(value.shape), runs), factors)
                self.operands.append(Operand(declared.name, value, letters, nodes.get(declared.name), splits))
                if splits:
                    facts.boxes_of(value, node)
        self._repeat()
        self.size: dict[str, int] = {}
        for operand in self.operands:
            for letter, size in zip(operand.letters, operand.value.shape, strict=True):
                self.size[letter] = max(self.size.get(letter, 1), size)
        dots = max((sum(letter.startswith(".") for letter in operand.letters) for operand in self.operands), default=0)
        self.results = [spell(dims, (dots if "..." in dims else 0) + fixed_rank(dims, runs), runs) for dims in alternative.results]
        self.kept = {letter for letters in self.results for letter in singles(letters)}
        self.mixed = self._where("mix", arguments, runs)
        self.reduced = self._where("reduce", arguments, runs)
        self.frozen = self._where("freeze", arguments, runs)
        self.windowed = self._where("window", arguments, runs)
        self.slides = slides(rule.all("slide"), arguments)
        self.windowed |= {slide.over for slide in self.slides}
        #: letters of a weight's window: part of its columns where the window slides, of its rows where it is laid out
        self.inside = {slide.within for slide in self.slides} | {letter for letter in self.windowed if letter not in self.kept}
        #: letters along which rows do other things: the same channels in each
        self.gates = {clause.words[0] for clause in rule.all("gates")}
        self.inside |= self.gates
        #: letters of a weight that are contracted with a letter of the first result, one step before
        self.recurs = recurring(rule, arguments, nodes)
        self.routes = {clause.words[1] for clause in rule.all("route")}
        fixed = isinstance(arguments.get("k", 1), int) and nodes.get("k") is None and arguments.get("largest") is not False
        self.chosen = self._where("choose", arguments, runs) if fixed else set()
        self.added = self._where("add", arguments, runs)
        self.needed = int(arguments.get("k", 1)) if fixed else 1
        self.looks = [(int(arguments[dim]), arguments[index]) for dim, index in (clause.words for clause in rule.all("look"))]
        self.experts = experts
        self.keepdim = bool(arguments.get("keepdim", False))
        self._lift()
        self._activate()

    def _activate(self) -> None:
        """What no weight had a part in (a state of zeros before the first step) meets a weight as an activation does."""
        for index, operand in enumerate(self.operands):
            if operand.value.created and any(self._contracted(letter) for letter in operand.letters):
                self.operands[index] = replace(operand, value=replace(operand.value, constant=False))

    def _lift(self) -> None:
        """Where one operand shrinks a factor that another holds only together with its partner, the partner's positions go as one."""
        for index, operand in enumerate(self.operands):
            for dim, _ in operand.splits:
                first, second = operand.letters[dim], operand.letters[dim + 1]
                leaders = [other for other in self.operands if other is not operand and first in other.letters and other.at(first)]
                if operand.at(first) or not any(self._alone(other.letters[other.letters.index(first) + 1]) for other in leaders):
                    continue
                axes = []
                for axis in operand.value.axes:
                    if axis.dim == dim + 1 and axis.numbers.shape[dim] > 1 and second in self.kept:
                        leader = axis.numbers.narrow(dim + 1, 0, 1)
                        self.facts.couple(leader, axis.numbers, self.node)
                        axis = Axis(leader, dim, axis.slot)
                    axes.append(axis)
                value = Value(operand.value.shape, tuple(axes), operand.value.constant, operand.value.origin)
                self.operands[index] = replace(operand, value=value)

    def _alone(self, partner: str) -> bool:
        """Whether a factor's partner never had more than one position, as in a depthwise convolution."""
        for operand in self.operands:
            if partner in operand.letters and operand.value.origin is not None:
                dim = operand.letters.index(partner)
                return self.numbering.get(operand.value.origin, dim - sum(at < dim for at, _ in operand.splits)) is None
        return True

    def _repeat(self) -> None:
        for clause in self.rule.all("repeat"):
            few, many = clause.words
            target = next((o.value.shape[o.letters.index(many)] for o in self.operands if many in o.letters), None)
            if target is None:
                continue
            for index, operand in enumerate(self.operands):
                if few not in operand.letters:
                    continue
                dim = operand.letters.index(few)
                times = target // operand.value.shape[dim]
                shape = tuple(target if d == dim else s for d, s in enumerate(operand.value.shape))
                axes = tuple(
                    Axis(axis.numbers.repeat_interleave(times, dim) if axis.numbers.shape[dim] > 1 else axis.numbers, axis.dim) for axis in operand.value.axes
                )
                value = Value(shape, axes, operand.value.constant)
                letters = tuple(many if letter == few else letter for letter in operand.letters)
                self.operands[index] = replace(operand, value=value, letters=letters)

    def _where(self, keyword: str, arguments: dict[str, Any], runs: dict[str, int]) -> set[str]:
        found: set[str] = set()
        for clause in self.rule.all(keyword):
            word = clause.words[0]
            if clause.argument:
                letters = self.operands[0].letters
                found |= {letters[dim] for dim in _dims_argument(arguments.get(word), len(letters))}
            elif word == "...":
                found |= {letter for operand in self.operands for letter in operand.letters if letter.startswith(".")}
            elif word in runs:
                found |= {f"{word}{index}" for index in range(runs[word])}
            else:
                found.add(word)
        return found

    def _holders(self, letter: str) -> list[Operand]:
        return [o for o in self.operands if letter in o.letters and (o.size(letter) > 1 or self.size[letter] == 1)]

    def run(self) -> list[tuple[list[Axis], bool]]:
        """Say all that follows of the operands' channels; return the axes of each result and whether it is constant."""
        constant = all(operand.value.constant for operand in self.operands)
        order = list(dict.fromkeys(letter for operand in self.operands for letter in operand.letters))
        outgoing: list[tuple[str, Tensor]] = []
        self._note_matrices(constant)
        for letter in order:
            outgoing += [(letter, numbers) for numbers in self._meet(letter, order, constant)]
        self._consume()
        dropped = {letter for letter in order if letter not in self.kept or letter in self.reduced or letter in self.windowed}
        outcome = []
        for letters in self.results:
            own = singles(letters)
            axes = []
            for letter, numbers in outgoing:
                if letter not in own or letter in dropped:
                    continue
                for gone in dropped & set(order):
                    numbers = numbers.narrow(order.index(gone), 0, 1)
                laid = numbers.permute([order.index(other) for other in own] + [order.index(other) for other in order if other not in own])
                laid = join(laid.reshape(laid.shape[: len(own)]), letters, self.size)
                if self.reduced and not self.keepdim:
                    laid = laid.squeeze(tuple(i for i, other in enumerate(letters) if other in self.reduced))
                axis = Axis.of(laid)
                if axis is not None:
                    axes.append(axis)
            outcome.append((axes, constant))
        return outcome

    def couple_heads(self) -> None:
        """Where two activations are contracted, note which channels share a position of the dimensions that neither sums over."""
        activations = [operand for operand in self.operands if not operand.value.constant]
        if not any(self._contracted(letter) and sum(letter in operand.letters for operand in activations) > 1 for letter in self.size):
            return
        for operand in activations:
            shared = [sum(letter in other.letters for other in activations) > 1 and letter in self.kept for letter in operand.letters]
            for axis in operand.value.axes:
                if shared[axis.dim] or not any(shared[dim] for dim in axis.varying()):
                    continue
                leader = axis.numbers
                for dim in axis.varying():
                    leader = leader if shared[dim] else leader.narrow(dim, 0, 1)
                spread = leader.expand(axis.numbers.shape)
                self.facts.heads.append((spread.reshape(-1).numpy(), axis.numbers.reshape(-1).numpy(), self.node))

    def _note_matrices(self, constant: bool) -> None:
        for operand in self.operands:
            contracted = any(self._contracted(letter) or letter in self.recurs for letter in operand.letters)
            if contracted and operand.value.constant and operand.value.origin is not None and not constant:
                self.facts.matrices.add(operand.value.origin)

    def before(self, letter: str) -> Operand | None:
        """The first result one step before, as a weight's recurring letter meets it; ``None`` if nothing is known of the first step."""
        of, start = self.recurs[letter].of, self.recurs[letter].start
        return None if start is None else Operand("state", Value(()), tuple(letter if own == of else str(own) for own in self.results[0]), self.node)

    def _contracted(self, letter: str) -> bool:
        return letter not in self.kept | self.routes | self.gates and sum(letter in operand.letters for operand in self.operands) > 1

    def _meet(self, letter: str, order: list[str], constant: bool) -> list[Tensor]:
        """Couple all axes that shrink ``letter``; return those that survive, aligned to ``order``."""
        holders = self._holders(letter)
        found = [(operand, axis, _align(axis, operand.letters, order)) for operand in holders for axis in operand.at(letter)]
        if letter in self.gates:
            self._say(self.facts.frozen, [numbers for _, _, numbers in found], f"these are gates of {self.node.target}")
        if not found or letter in self.inside:
            return []
        if letter in self.recurs:
            of = self.recurs[letter].of
            channels = [_align(axis, operand.letters, order) for operand in self._holders(of) for axis in operand.at(of)]
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
                for _, _, numbers in found:
                    self.facts.say(self.facts.frozen, numbers, f"meets '{operand.name}' of {self.node.target}, which has no channels there", self.node)
        if not all(operand.at(letter) for operand in holders) and not constant and letter in self.kept:
            # A weight's positions that are frozen here never go; carried on, they would only be taken for channels that other weights share.
            found = [item for item in found if not item[0].value.constant]
            if not found:
                return []
        everything = [numbers for _, _, numbers in found]
        self._couple_along(self.mixed | self.reduced | self.windowed | (set(order) - self.kept), everything, letter, order)
        vanishing = any(operand.value.vanishes for operand in holders)
        routing = letter in self.chosen or (letter in self.added and vanishing) or self._looked_up(letter, found)
        if letter in self.chosen:
            self.facts.chosen += [(numbers.reshape(-1).numpy(), self.needed) for numbers in everything]
        surviving = everything if len(holders) == 1 else self._couple(holders, found, order)
        if letter in self.frozen | self.windowed:
            self._say(self.facts.frozen, everything, f"{self.node.target} cannot lose positions along this dimension", routing)
            for numbers in everything:
                self._want_together(letter, numbers, order)
        elif letter in self.mixed | self.reduced or (letter not in self.kept and not self._contracted(letter)):
            self._say(self.facts.mixed, everything, f"mixed by {self.node.target}", routing)
        if self._contracted(letter):
            self._contract(holders, everything, vanishing)
            return []
        if not constant:
            for operand, axis, _ in found:
                if operand.value.constant:
                    self.facts.produced.append((axis.numbers.reshape(-1).numpy(), axis.slot))
        return surviving

    def _couple_along(self, letters: set[str], everything: list[Tensor], besides: str, order: list[str]) -> None:
        """Channels of one position go together, wherever they are found along these letters."""
        for dim in [order.index(letter) for letter in letters if letter != besides and letter in order]:
            for numbers in everything:
                if numbers.shape[dim] > 1:
                    self.facts.couple(numbers.narrow(dim, 0, 1), numbers, self.node)

    def _couple(self, holders: list[Operand], found: list[tuple[Operand, Axis, Tensor]], order: list[str]) -> list[Tensor]:
        """Couple the axes of different operands, each with the one that divides the positions alike; return one of each."""
        per_holder = [[numbers for operand, _, numbers in found if operand is holder] for holder in holders]
        per_holder = sorted((axes for axes in per_holder if axes), key=len, reverse=True)
        self._want_blocks(found, order)
        leaders = list(per_holder[0])
        for axes in per_holder[1:]:
            matches = [0] * len(axes) if len(leaders) == 1 else [_alike(numbers, leaders) for numbers in axes]
            if len(leaders) > 1 and (None in matches or len(set(matches)) < len(matches)):
                for numbers in (*leaders[1:], *axes):
                    self.facts.couple(leaders[0], numbers, self.node)
                leaders = [max((*leaders, *axes), key=_freedom)]
                continue
            for numbers, match in zip(axes, matches, strict=True):
                self.facts.couple(leaders[int(match or 0)], numbers, self.node)
                leaders[int(match or 0)] = max(leaders[int(match or 0)], numbers, key=_freedom)
        return leaders

    def _want_together(self, letter: str, numbers: Tensor, order: list[str]) -> None:
        """Channels that cannot go along this dimension can perhaps go along another one that they also vary along, those of a position together."""
        fixed = self.frozen | self.windowed | self.mixed | self.reduced
        if any(size > 1 and other not in fixed | self.inside for other, size in zip(order, numbers.shape, strict=True)):
            leader = numbers.narrow(order.index(letter), 0, 1).expand(numbers.shape)
            self.facts.together.append((leader.reshape(-1).numpy(), numbers.reshape(-1).numpy(), self.node))

    def _want_blocks(self, found: list[tuple[Operand, Axis, Tensor]], order: list[str]) -> None:
        """A weight met by channels that differ from block to block had better be numbered block by block."""
        for operand, axis, numbers in found:
            for letter in operand.letters if operand.value.constant and operand.value.origin is not None else ():
                dim = order.index(letter)
                if operand.size(letter) > 1 and numbers.shape[dim] == 1 and any(other.shape[dim] > 1 for _, _, other in found):
                    want_blocks(self.facts, self.numbering, operand, axis, letter)

    def _say(self, remarks: list[Remark], everything: list[Tensor], reason: str, routing: bool = False) -> None:
        for numbers in everything:
            self.facts.say(remarks, numbers, reason, self.node, routing)

    def _route(self, holders: list[Operand], found: list[tuple[Operand, Axis, Tensor]]) -> None:
        """Blocks chosen at run time go with the numbers by which they are chosen."""
        everything = [numbers for _, _, numbers in found]
        for numbers in everything[1:]:
            self.facts.couple(everything[0], numbers, self.node)
        known = all(operand.at(letter) for operand in holders for letter in self.routes if letter in operand.letters)
        self._say(self.facts.frozen, everything, f"chosen at run time by {self.node.target}", routing=known)

    def _looked_up(self, letter: str, found: list[tuple[Operand, Axis, Tensor]]) -> bool:
        """Whether the positions along a letter are looked up by integers that name them."""
        operand = self.operands[0]
        along = [index for dim, index in self.looks if operand.letters[dim % len(operand.letters)] == letter]
        return bool(along) and all(look_up(self.node, axis, along[0], self.facts) for _, axis, _ in found)

    def _want_stretched(self, operand: Operand, letter: str) -> None:
        """What an expansion repeats can be repeated less often: it gets channels of its own along that dimension."""
        node, dim = operand.node, operand.letters.index(letter)
        if not self.experts or node is None or node.target is not torch.ops.aten.expand.default or operand.splits:
            return
        recorded, size = node.all_input_nodes[0].meta.get("val"), arguments_of(node)["size"][dim]
        if not isinstance(recorded, Tensor) or not isinstance(size, int) or size < 2:
            return
        before = dim - (len(operand.letters) - recorded.dim())
        if before < 0 or recorded.shape[before] == 1:
            self.facts.stretched.add((node.name, dim))

    def _contract(self, holders: list[Operand], everything: list[Tensor], vanishing: bool) -> None:
        weights = [operand for operand in holders if operand.value.constant]
        activations = [operand for operand in holders if not operand.value.constant]
        if len(activations) > 1:
            self._say(self.facts.exempt, everything, f"contracted between two activations by {self.node.target}", vanishing)
            numbers = np.unique(np.concatenate([n.reshape(-1).numpy() for n in everything]))
            operands = tuple(operand.node for operand in activations if operand.node is not None)
            self.facts.products.append(Product(self.node, operands, numbers[numbers >= 0]))
        elif len(weights) != 1 or len(activations) != 1:
            self._say(self.facts.frozen, everything, f"weights are multiplied with each other by {self.node.target}")
        else:
            problem = why_no_consumer(self, weights[0], activations[0])
            if problem is not None:
                self._say(self.facts.frozen, everything, problem)

    def _consume(self) -> None:
        """Record each weight that is contracted with an activation."""
        for weight in self.operands:
            for activation in self.operands:
                if not weight.value.constant or activation.value.constant:
                    continue
                shared = [letter for letter in weight.letters if letter in activation.letters and self._contracted(letter)]
                if shared:
                    note_stacked(self, weight, activation)
                if any(weight.at(letter) for letter in shared) and why_no_consumer(self, weight, activation) is None:
                    self.facts.uses.append(make_use(self, weight, activation))
        consume_recurring(self)


def _freedom(numbers: Tensor) -> int:
    return sum(size > 1 for size in numbers.shape)


def _alike(numbers: Tensor, leaders: list[Tensor]) -> int | None:
    """The leader that puts the same positions together as ``numbers`` does."""
    for index, leader in enumerate(leaders):
        shape = torch.broadcast_shapes(numbers.shape, leader.shape)
        parts = [torch.unique(part.expand(shape), return_inverse=True)[1].reshape(-1) for part in (numbers, leader)]
        together = torch.unique(torch.stack(parts), dim=1).shape[1]
        if together == int(parts[0].max()) + 1 == int(parts[1].max()) + 1:
            return index
    return None


def result_shapes_ok(values: list[Value], shapes: list[torch.Size]) -> bool:
    """Whether every axis fits the executed shape of its result."""
    return all(
        len(axis.numbers.shape) == len(shape) and all(n in (1, s) for n, s in zip(axis.numbers.shape, shape, strict=True))
        for value, shape in zip(values, shapes, strict=True)
        for axis in value.axes
    )
