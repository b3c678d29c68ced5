"""The inputs that copy and program are run on, as the program takes them and as the caller's module does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._compat import pytree
from .._exactness._inputs import Inputs, example_inputs, longer_inputs, other_inputs
from .._program import Program

#: inputs besides the example that are compared on
OTHERS = 2
#: integers that stand in for those of an example that holds a single one: any table has so many rows
_FEW = 2
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


@dataclass(frozen=True)
class Question:
    """The inputs of one call.

    Attributes:
        said: the inputs in words.
        leaves: the values of the program's placeholders.
    """

    said: str
    leaves: list[Any]

    def copied(self) -> list[Any]:
        """The values, which a call may write into."""
        return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]


def questions(program: Program, device: torch.device) -> Iterator[Question]:
    """The example inputs, then inputs of other sizes if they can vary.

    What holds a single number everywhere, as the example of a loaded result does, is drawn at random.
    """
    dull = frozenset(
        index
        for index, leaf in enumerate(pytree.tree_leaves(program.example))
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and _single(leaf)
    )
    examples = list(example_inputs(program))
    for inputs in itertools.chain(
        [Inputs("on random inputs of the example's sizes", {}, dull)] if dull else examples[-1:],
        other_inputs(program),
    ):
        leaves = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in inputs.of(program)]
        drawn = [_drawn(leaf, index) for index, leaf in enumerate(leaves)]
        if any(new is not old for new, old in zip(drawn, leaves)):
            yield Question(f"{inputs.said} with integers drawn at random", drawn)
        yield Question(inputs.said, leaves)


def longer_question(program: Program, device: torch.device, length: int) -> Iterator[Question]:
    """Inputs longer than ``length``, if there can be such."""
    for inputs in longer_inputs(program, length):
        leaves = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in inputs.of(program)]
        yield Question(inputs.said, [_drawn(leaf, index) for index, leaf in enumerate(leaves)])


def integer_questions(asked: Question, least: int, most: int, held: bool) -> Iterator[Iterator[Question]]:
    """For each input of integers, the same question with integers from ``least`` to ``most`` in it.

    Those that follow stop short of ``most``, for a program that does not run on the ones before, as where it
    looks the integers up in a table of fewer rows.

    Args:
        asked: a question that the program takes.
        least, most: the bounds.
        held: go no further than the integers in the question, where an index out of range cannot be caught.
    """
    for index, leaf in enumerate(asked.leaves):
        if not isinstance(leaf, Tensor) or leaf.dtype not in _INTEGERS or not leaf.numel():
            continue
        bound = min(torch.iinfo(leaf.dtype).max, int(leaf.max()) if held else most)
        tops = [
            most,
            *(least + (most - 1 - least >> halved) for halved in range((most - least).bit_length())),
        ]
        yield (
            Question(
                f"{asked.said} with integers from {least} to {top}",
                [*asked.leaves[:index], _between(leaf, least, top), *asked.leaves[index + 1 :]],
            )
            for top in dict.fromkeys(min(top, bound) for top in tops)
            if top >= least
        )


def _between(leaf: Tensor, least: int, most: int) -> Tensor:
    """Integers at random, the greatest among them, and the least as well where there is room."""
    generator = torch.Generator(device="cpu").manual_seed(most)
    made = torch.randint(least, most + 1, (leaf.numel(),), generator=generator, device="cpu")
    made[-1] = least
    made[0] = most
    return made.reshape(leaf.shape).to(leaf)


def call_of(program: Program, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the caller's ``forward`` that give the program these values."""
    signature = program.signature
    args, kwargs = pytree.tree_unflatten(leaves, pytree.tree_structure(program.example))
    named = {**signature.constants, **dict(zip(signature.given(), args)), **kwargs}
    named = {name: named[name] for name in signature.given() if name in named}
    return tuple(named.pop(name) for name in signature.by_position()), named


def _drawn(leaf: Any, seed: int) -> Any:
    """Integers or truth values at random in the place of a single one."""
    if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.is_complex() or not _single(leaf):
        return leaf
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(0, _FEW, leaf.shape, generator=generator, device="cpu").to(leaf)


def _single(leaf: Tensor) -> bool:
    return leaf.numel() > 1 and leaf.layout == torch.strided and bool((leaf == leaf.reshape(-1)[0]).all())


__all__ = ["OTHERS", "Question", "call_of", "integer_questions", "longer_question", "questions"]
