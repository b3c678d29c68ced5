"""Sizes that are symbols, and what a capture assumes of them."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from unittest import mock

import torch
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.utils._sympy.numbers import int_oo

from ...errors import VerificationError


@contextlib.contextmanager
def refuse_new_guards(environment: ShapeEnv) -> Iterator[None]:
    """Raise where anything new would be assumed of the sizes.

    Frozen, an environment drops such an assumption, says so in its log alone, and remembers the answer that
    depends on it; an error it does not remember.

    Raises:
        VerificationError: names the assumption.
    """

    def refuse(expression: object, value: object) -> None:
        raise VerificationError(f"the sizes would have to fulfil {expression} == {value}")

    frozen = environment.frozen
    with mock.patch.object(environment, "_check_frozen", refuse):
        environment.frozen = True
        try:
            yield
        finally:
            environment.frozen = frozen


def take_guards(program: ExportedProgram, other: ExportedProgram) -> None:
    """Give a program the guards on its sizes that another has; by itself it has those that its symbols came
    with when it was made.
    """
    program._guards_code = other._guards_code


def guards_of(program: ExportedProgram) -> tuple[str, ...]:
    """What a program assumes of the sizes of its inputs, in Python."""
    return tuple(program._guards_code)


def settled_by(size: torch.SymInt) -> traceback.FrameSummary | None:
    """The line of Python, in a model or in torch, that settled what a size is, if one did."""
    place = size.node.shape_env.replacements_slocs.get(size.node._expr)
    found = None if place is None else place.framework_loc
    return found if isinstance(found, traceback.FrameSummary) else None


__all__ = [
    "ShapeEnv",
    "free_unbacked_symbols",
    "guards_of",
    "int_oo",
    "refuse_new_guards",
    "settled_by",
    "take_guards",
]
