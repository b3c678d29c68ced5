"""Groups and figures as tables, and groups as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from ..analysis._analysis import Analysis
from ..analysis.groups import PRUNABLE, Group, Member
from ..pruning.report import Figure
from ._plain_text import printable

SHOWN = 6


@dataclass
class Kind:
    """Groups that differ only in the numbers in their names, such as the same group of every layer."""

    groups: list[Group]

    @property
    def one(self) -> Group:
        return self.groups[0]


def kinds(groups: Iterable[Group]) -> list[Kind]:
    """Groups gathered by kind, in the order of their first."""
    found: dict[Any, Kind] = {}
    for group in groups:
        key = (
            group.status,
            re.sub(r"\d+", "*", group.reason),
            group.size,
            group.blocks,
            _shape(group.producers),
            _shape(group.consumers),
        )
        found.setdefault(key, Kind([])).groups.append(group)
    return list(found.values())


def _shape(members: Sequence[Member]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys((re.sub(r"\d+", "*", m.name), m.dim, len(m.indices), m.size) for m in members))


def short(members: Sequence[Member]) -> str:
    """The layers of these weights by their last name: ``gate_proj, up_proj``."""
    names = list(dict.fromkeys(_last_name(member.name) for member in members))
    names = [name for name in names if not (name.endswith(".bias") and name.removesuffix(".bias") in names)]
    rest = len(names) - SHOWN
    return (", ".join(names[:SHOWN]) + (f", and {rest} more" if rest > 0 else "")) if names else "-"


def _last_name(name: str) -> str:
    parts = name.split(".")
    kept = parts[:-1] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts
    last = len(kept) - 1
    while last > 0 and kept[last].isdigit():
        last -= 1
    return ".".join(kept[last:]) + (".bias" if parts[-1] == "bias" else "")


def channels(group: Group) -> str:
    """The size of a group, with its blocks if it has several: ``3 x 64``."""
    return f"{group.blocks} x {group.width}" if group.blocks > 1 else str(group.size)


def summary(analysis: Analysis) -> list[str]:
    """One line per kind of group, as in ``30 x prunable 1536 gate_proj, up_proj -> down_proj``."""
    ordered = sorted(kinds(analysis.groups), key=lambda kind: kind.one.status != PRUNABLE)
    rows = [(str(len(kind.groups)), kind.one.status, channels(kind.one)) for kind in ordered]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = []
    for kind, (count, status, size) in zip(ordered, rows):
        reason = f"  ({kind.one.reason})" if kind.one.reason else ""
        lines.append(
            f"{count:>{widths[0]}} x {status:<{widths[1]}} {size:>{widths[2]}}  {short(kind.one.producers)}"
            f" -> {short(kind.one.consumers)}{reason}"
        )
    return lines


def groups_table(analysis: Analysis, *, every: bool) -> Table:
    """All groups; those of the same kind in one row unless ``every`` is set."""
    table = Table(title=f"{len(analysis.groups)} coupled groups", title_justify="left")
    if not every:
        table.add_column("groups", justify="right")
    table.add_column("status", no_wrap=True)
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("lose rows", ratio=2, overflow="fold")
    table.add_column("lose columns", ratio=2, overflow="fold")
    table.add_column("why", ratio=1, overflow="fold")
    if every:
        for group in analysis.groups:
            table.add_row(
                _coloured(group.status),
                channels(group),
                _full(group.producers),
                _full(group.consumers),
                _shown(group.reason),
            )
    else:
        for kind in kinds(analysis.groups):
            one = kind.one
            table.add_row(
                str(len(kind.groups)),
                _coloured(one.status),
                channels(one),
                _shown(short(one.producers)),
                _shown(short(one.consumers)),
                _shown(one.reason),
            )
    return table


def _full(members: Sequence[Member]) -> str:
    shown = "\n".join(_shown(str(member)) for member in members[:SHOWN])
    rest = len(members) - SHOWN
    return shown + (f"\nand {rest} more" if rest > 0 else "") if members else "-"


def _shown(text: str) -> str:
    """A name or a reason as it is: no markup, and nothing that a terminal would obey."""
    return escape(printable(text))


_COLOURS = {"prunable": "green", "approximate": "yellow", "exempt": "cyan", "frozen": "red"}


def _coloured(status: str) -> str:
    return f"[{_COLOURS.get(status, 'default')}]{_shown(status)}[/]"


def groups_json(model: str, analysis: Analysis) -> dict[str, Any]:
    """Everything about the groups as plain data; index ranges are ``[first, last + 1]``."""
    return {
        "model": model,
        "max_sparsity": analysis.max_sparsity,
        "groups": [
            {
                "name": group.name,
                "status": group.status,
                "granularity": group.granularity,
                "reason": group.reason,
                "size": group.size,
                "blocks": group.blocks,
                "producers": [_member(member) for member in group.producers],
                "consumers": [_member(member) for member in group.consumers],
            }
            for group in analysis.groups
        ],
        "operators_without_rule": dict(analysis.without_rule),
        "notes": list(analysis.program.notes),
    }


def _member(member: Member) -> dict[str, Any]:
    values = np.array(sorted(member.indices), dtype=np.int64)
    runs = np.split(values, np.nonzero(np.diff(values) != 1)[0] + 1) if len(values) else []
    return {
        "name": member.name,
        "dim": member.dim,
        "size": member.size,
        "ranges": [[int(run[0]), int(run[-1]) + 1] for run in runs],
    }


def figures_table(rows: Sequence[Figure]) -> Table:
    """Before and after."""
    table = Table()
    table.add_column("")
    for heading in ("dense", "pruned", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shown = [f"{value:,.{row.digits}f}" for value in (row.dense, row.pruned)]
        table.add_row(_shown(row.what), *shown, f"{row.pruned / row.dense - 1:+.1%}" if row.dense else "")
    return table


def scores_table(models: Sequence[str], rows: Sequence[tuple[str, Sequence[str], str]]) -> Table:
    """Models side by side.

    Args:
        rows: what, its value for each model, and how the last differs from the first.
    """
    table = Table()
    table.add_column("", overflow="fold")
    for model in models:
        table.add_column(_shown(model), justify="right", overflow="fold")
    if len(models) > 1:
        table.add_column("change" if len(models) == 2 else "first to last", justify="right", no_wrap=True)
    for what, values, change in rows:
        table.add_row(_shown(what), *values, *([change] if len(models) > 1 else []))
    return table


__all__ = ["figures_table", "groups_json", "groups_table", "kinds", "scores_table", "summary"]
