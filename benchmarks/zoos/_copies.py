"""Whether what is left can be of the model's own class: an eager copy against the masked dense model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fasp_fx.errors import EagerError, NothingPrunableError, SparsityError

#: what goes together where nothing else is asked for
CHANNELS = ("channel",)
#: what goes together, in the order in which it is tried, and what tables call it
GRANULARITIES = {CHANNELS: "channels", ("channel", "head"): "whole heads"}

Record = dict[str, Any]


def copies(
    model: nn.Module,
    prune: Callable[[tuple[str, ...]], Any],
    compare: Callable[[nn.Module, Any], float],
) -> list[Record]:
    """What became of a copy by each way of :data:`GRANULARITIES`, up to the first that there is: its error,
    or why there is none.

    Args:
        prune: gives the result by a granularity, or ``None`` if there is nothing to prune.
        compare: the error of a module against the model masked by a plan.
    """
    found: list[Record] = []
    for granularity, name in GRANULARITIES.items():
        entry: Record = {"way": name}
        found.append(entry)
        try:
            result = prune(granularity)
            if result is None:
                entry["refused"] = "nothing to prune"
                continue
            entry["sparsity"] = result.plan.sparsity
            copy = result.eager(model)
        except (EagerError, NothingPrunableError, SparsityError) as refusal:
            entry["refused"] = f"{type(refusal).__name__}: {refusal}"[:1000]
            continue
        entry["error"] = compare(copy, result.plan)
        break
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


__all__ = ["CHANNELS", "GRANULARITIES", "copies", "way", "why_none", "wrong"]
