"""Which invariants of :mod:`fasp_fx.testing` a test of many models of a kind holds."""

from __future__ import annotations

from collections.abc import Iterable

from fasp_fx.testing import INVARIANTS

#: those in which it matters what a model computes
OF_OPERATORS = ("mask-exact", "nothing", "shapes", "rules", "restored")


def invariants_of(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """All invariants for the first model of a kind; for the others those of their operators, since the rest
    take longer and ask the same of all.
    """
    return tuple(INVARIANTS) if name == next(iter(names)) else OF_OPERATORS
