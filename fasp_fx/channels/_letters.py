"""Rules with letters: pointwise operators, contractions, norms and reductions share one mechanism.

Each operand's dimensions get letters; axes that shrink the same letter are coupled; what becomes of a letter (kept, contracted,
mixed, frozen) decides what is said of its channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fasp_fx.patterns import Alternative, Rule

from ._facts import Facts, Use
from ._value import Axis, Value


@dataclass(frozen=True)
class _Operand:
    name: str
    value: Value
    letters: tuple[str, ...]
    node: fx.Node | None

    def at(self, letter: str) -> list[Axis]:
        return self.value.at(self.letters.index(letter))


def choose(rule: Rule, arguments: dict[str, Any]) -> Alternative:
    """The first alternative whose condition holds and whose operands have enough dimensions; else the last."""
    for alternative in rule.alternatives[:-1]:
        if alternative.condition and not arguments.get(alternative.condition):
            continue
        given = [(operand, arguments.get(operand.name)) for operand in alternative.operands]
        if all(
            value is None or len(value.shape) == len(operand.dims) or (operand.dims[0] == "..." and len(value.shape) >= len(operand.dims) - 1)
            for operand, value in given
        ):
            return alternative
    return rule.alternatives[-1]


def _run_length(alternative: Alternative, rule: Rule, arguments: dict[str, Any], letter: str) -> int:
    for operand in alternative.operands:
        value = arguments.get(operand.name)
        if operand.dims == (letter,) and value is not None:
            return len(value.shape)
    for clause in rule.all("shape"):
        if len(clause.words) == 2 and clause.words[1] == letter:
            return len(arguments[clause.words[0]])
    return 1


def _spell(dims: tuple[str, ...], rank: int, runs: dict[str, int]) -> tuple[str, ...]:
    """One letter per dimension: runs and the ellipsis written out, the ellipsis numbered from the right."""
    letters: list[str] = []
    fixed = sum(runs.get(token, 1) for token in dims if token != "...")
    for token in dims:
        if token == "...":
            letters += [f".{index}" for index in reversed(range(rank - fixed))]
        elif token in runs:
            letters += [f"{token}{index}" for index in range(runs[token])]
        else:
            letters.append(token)
    return tuple(letters[len(letters) - rank :]) if len(letters) > rank else tuple(letters)


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
    """One application of a lettered rule to one node."""

    def __init__(self, node: fx.Node, rule: Rule, arguments: dict[str, Any], nodes: dict[str, fx.Node | None], facts: Facts) -> None:
        self.node, self.rule, self.facts = node, rule, facts
        alternative = choose(rule, arguments)
        present = [operand for operand in alternative.operands if isinstance(arguments.get(operand.name), Value)]
        runs = {
            letter: _run_length(alternative, rule, arguments, letter) for operand in alternative.operands for letter in operand.dims if letter.endswith("*")
        }
        self.operands: list[_Operand] = []
        for declared in present:
            value = arguments[declared.name]
            self.operands.append(_Operand(declared.name, value, _spell(declared.dims, len(value.shape), runs), nodes.get(declared.name)))
        self._repeat()
        self.size: dict[str, int] = {}
        for operand in self.operands:
            for letter, size in zip(operand.letters, operand.value.shape, strict=True):
                self.size[letter] = max(self.size.get(letter, 1), size)
        dots = max((sum(letter.startswith(".") for letter in operand.letters) for operand in self.operands), default=0)
        self.results = [
            _spell(dims, dots + sum(runs.get(token, 1) for token in dims if token != "..."), runs)
            if "..." in dims
            else _spell(dims, sum(runs.get(token, 1) for token in dims), runs)
            for dims in alternative.results
        ]
        self.kept = {letter for letters in self.results for letter in letters}
        self.mixed = self._where("mix", arguments, runs)
        self.reduced = self._where("reduce", arguments, runs)
        self.frozen = self._where("freeze", arguments, runs)
        self.keepdim = bool(arguments.get("keepdim", False))

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
                self.operands[index] = _Operand(operand.name, value, letters, operand.node)

    def _where(self, keyword: str, arguments: dict[str, Any], runs: dict[str, int]) -> set[str]:
        found: set[str] = set()
        for clause in self.rule.all(keyword):
            word = clause.words[0]
            if clause.argument:
                letters = self.operands[0].letters
                found |= {letters[dim] for dim in _dims_argument(arguments.get(word), len(letters))}
            elif word in runs:
                found |= {f"{word}{index}" for index in range(runs[word])}
            else:
                found.add(word)
        return found

    def _holders(self, letter: str) -> list[_Operand]:
        return [o for o in self.operands if letter in o.letters and (o.value.shape[o.letters.index(letter)] > 1 or self.size[letter] == 1)]

    def run(self) -> list[tuple[list[Axis], bool]]:
        """Say all that follows of the operands' channels; return the axes of each result and whether it is constant."""
        constant = all(operand.value.constant for operand in self.operands)
        order = list(dict.fromkeys(letter for operand in self.operands for letter in operand.letters))
        outgoing: list[tuple[str, Tensor]] = []
        for letter in order:
            outgoing += [(letter, numbers) for numbers in self._meet(letter, order, constant)]
        dropped = {letter for letter in order if letter not in self.kept or letter in self.reduced}
        outcome = []
        for letters in self.results:
            axes = []
            for letter, numbers in outgoing:
                if letter not in letters or letter in self.reduced:
                    continue
                for gone in dropped & set(order):
                    numbers = numbers.narrow(order.index(gone), 0, 1)
                laid = numbers.permute([order.index(other) for other in letters] + [order.index(other) for other in order if other not in letters])
                laid = laid.reshape(laid.shape[: len(letters)])
                if self.reduced and not self.keepdim:
                    laid = laid.squeeze(tuple(i for i, other in enumerate(letters) if other in self.reduced))
                axis = Axis.of(laid)
                if axis is not None:
                    axes.append(axis)
            outcome.append((axes, constant))
        return outcome

    def _meet(self, letter: str, order: list[str], constant: bool) -> list[Tensor]:
        """Couple all axes that shrink ``letter``; return those that survive, aligned to ``order``."""
        holders = self._holders(letter)
        found = [(operand, axis, _align(axis, operand.letters, order)) for operand in holders for axis in operand.at(letter)]
        if not found:
            return []
        for operand in holders:
            if not operand.at(letter):
                for _, _, numbers in found:
                    self.facts.say(self.facts.frozen, numbers, f"meets '{operand.name}' of {self.node.target}, which has no channels there", self.node)
        if not all(operand.at(letter) for operand in holders) and not constant and letter in self.kept:
            # A weight's positions that are frozen here never go; carried on, they would only be taken for channels that other weights share.
            found = [item for item in found if not item[0].value.constant]
            if not found:
                return []
        for influenced in self.mixed | self.reduced | (set(order) - self.kept):
            if influenced != letter:
                for _, _, numbers in found:
                    dim = order.index(influenced)
                    if numbers.shape[dim] > 1:
                        self.facts.couple(numbers.narrow(dim, 0, 1), numbers, self.node)
        contracted = letter not in self.kept and sum(letter in operand.letters for operand in self.operands) > 1
        if len(holders) > 1:
            for _, _, numbers in found[1:]:
                self.facts.couple(found[0][2], numbers, self.node)
        everything = [numbers for _, _, numbers in found]
        if letter in self.frozen:
            self._say(self.facts.frozen, everything, f"{self.node.target} cannot lose positions along this dimension")
        elif letter in self.mixed | self.reduced or (letter not in self.kept and not contracted):
            self._say(self.facts.mixed, everything, f"mixed by {self.node.target}")
        if contracted:
            self._contract(letter, holders, everything)
            return []
        if not constant:
            for operand, axis, _ in found:
                if operand.value.constant:
                    self.facts.produced.append(axis.numbers.reshape(-1).numpy())
        if len(holders) == 1:
            return everything
        return [max(everything, key=lambda numbers: sum(size > 1 for size in numbers.shape))]

    def _say(self, remarks: list, everything: list[Tensor], reason: str) -> None:
        for numbers in everything:
            self.facts.say(remarks, numbers, reason, self.node)

    def _contract(self, letter: str, holders: list[_Operand], everything: list[Tensor]) -> None:
        weights = [operand for operand in holders if operand.value.constant]
        activations = [operand for operand in holders if not operand.value.constant]
        if len(activations) > 1:
            self._say(self.facts.exempt, everything, f"contracted between two activations by {self.node.target}")
        elif len(weights) == 1 and len(activations) == 1:
            problem = self._consume(letter, weights[0], activations[0])
            if problem:
                self._say(self.facts.frozen, everything, problem)
        else:
            self._say(self.facts.frozen, everything, f"weights are multiplied with each other by {self.node.target}")

    def _consume(self, letter: str, weight: _Operand, activation: _Operand) -> str | None:
        shared = set(weight.letters) & set(activation.letters)
        axes = weight.at(letter)
        if weight.value.origin is None:
            return f"'{weight.name}' of {self.node.target} is computed from weights, not a weight itself"
        if len(weight.letters) != 2 or shared != {letter} or activation.node is None:
            return f"{self.node.target} contracts a weight of {len(weight.letters)} dimensions over {len(shared)}: only matrices over one are consumers so far"
        if len(axes) != 1 or axes[0].varying() != [axes[0].dim]:
            return f"the columns of '{weight.name}' of {self.node.target} do not lie along one dimension of a weight"
        columns = axes[0].numbers.reshape(-1).numpy()
        self.facts.uses.append(Use(self.node, weight.value.origin, activation.node, activation.letters.index(letter), columns))
        return None


def result_shapes_ok(values: list[Value], shapes: list[torch.Size]) -> bool:
    """Whether every axis fits the executed shape of its result."""
    return all(
        len(axis.numbers.shape) == len(shape) and all(n in (1, s) for n, s in zip(axis.numbers.shape, shape, strict=True))
        for value, shape in zip(values, shapes, strict=True)
        for axis in value.axes
    )
