"""Whether what is left can be of the model's own class: an eager copy against the masked dense model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from fasp_fx.errors import EagerError, NothingPrunableError, SparsityError

#: what goes together where nothing else is asked for
CHANNELS = ("channel",)
HEADS = ("channel", "head")
#: the ways that are tried in turn, as tables call them
WAYS = ("channels", "whole heads", "groups kept")
#: kinds of groups that are kept at most
KEPT = 6

Record = dict[str, Any]


def copies(
    model: nn.Module,
    prune: Callable[[tuple[str, ...], tuple[str, ...]], Any],
    compare: Callable[[nn.Module, Any], float],
) -> list[Record]:
    """What became of a copy by each way of :data:`WAYS`, up to the first that there is: its error, or why
    there is none. The last is what the refusal advises: one kind of group after the other is kept.

    Args:
        prune: gives the result by a granularity and what to exclude, or ``None`` if there is nothing to
            prune.
        compare: the error of a module against the model masked by a plan.
    """
    found: list[Record] = []

    def attempt(name: str, granularity: tuple[str, ...], kept: tuple[str, ...] = ()) -> str | None:
        """The group to be kept for another attempt to make sense."""
        entry: Record = {"way": name, **({"kept": kept} if kept else {})}
        found.append(entry)
        try:
            result = prune(granularity, kept)
            if result is None:
                entry["refused"] = "nothing to prune"
                return None
            entry["sparsity"] = result.plan.sparsity
            copy = result.eager(model)
        except (EagerError, NothingPrunableError, SparsityError) as refusal:
            entry["refused"] = f"{type(refusal).__name__}: {refusal}"[:1000]
            return refusal.group if isinstance(refusal, EagerError) else None
        entry["error"] = compare(copy, result.plan)
        return None

    attempt(WAYS[0], CHANNELS)
    if "error" in found[-1]:
        return found
    group, kept = attempt(WAYS[1], HEADS), ()
    while group is not None and len(kept) < KEPT:
        kept = (*kept, re.sub(r"\d+", "*", group))
        group = attempt(WAYS[2], HEADS, kept)
    return found


def way(record: Record) -> str:
    """By which pruning a model has a copy, for a table."""
    found = record.get("copies", [])
    return next((entry["way"] for entry in found if "error" in entry), "none" if found else "")


def why_none(record: Record) -> str:
    """Why the last way that was tried gives no copy."""
    return str(record["copies"][-1].get("refused", ""))


def wrong(record: Record) -> bool:
    """Whether a copy was given that does not compute what it should."""
    return any(entry.get("error", 0.0) > record["tolerance"] for entry in record.get("copies", []))


__all__ = ["CHANNELS", "WAYS", "copies", "way", "why_none", "wrong"]
