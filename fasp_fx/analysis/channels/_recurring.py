"""Operators that take their own result of one step before: a weight's columns that meet no tensor of the
graph.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ._consume import make_use, why_no_consumer
from ._facts import Recurrence
from ._lettered import Lettered
from ._operands import Operand


def meet_recurring(
    relation: Lettered,
    letter: str,
    columns: list[tuple[Operand, Tensor]],
    channels: list[Tensor],
    turn: tuple[int, int],
) -> None:
    """Couple a weight's columns with the channels of the result that they meet; columns that meet none stay.

    Args:
        columns: the weights with the numbers of their columns, ``channels`` those along the result's letter,
            all aligned.
        turn: the places of the two letters in that alignment.
    """
    state = relation.before(letter)
    for weight, numbers in columns:
        problem = (
            why_no_consumer(relation, weight, state)
            if channels and state is not None
            else f"'{weight.name}' of {relation.node.target} meets no channels"
        )
        if problem is not None:
            relation.facts.say(relation.facts.frozen, numbers, problem, relation.node)
        for own in channels:
            relation.facts.couple(numbers.transpose(*turn), own, relation.node)


def consume_recurring(relation: Lettered) -> None:
    """Record each weight that is contracted with the result one step before."""
    for letter, recurring in relation.recurs.items():
        state = relation.before(letter)
        for weight in relation.operands:
            if (
                state is None
                or recurring.start is None
                or letter not in weight.letters
                or not weight.at(letter)
            ):
                continue
            if weight.value.constant and why_no_consumer(relation, weight, state) is None:
                use = make_use(relation, weight, state)
                relation.facts.uses.append(
                    replace(use, recurrence=Recurrence(recurring.start, recurring.steps))
                )
