"""Groups and figures as tables, and groups as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from ..analysis._analysis import Analysis
from ..analysis.groups import PRUNABLE, Group, Member
from ..pruning.report import Figure
from ._console import printable

SHOWN = 6
_COLOURS = {"prunable": "green", "approximate": "yellow", "exempt": "cyan", "frozen": "red"}
#: the part of a weight's name that says which layer it is: from the last part on that is no number
_LAYER = re.compile(r"[^.]*[^.\d][^.]*(\.\d+)*(\.bias)?$")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", left: int = 1) -> Table:
    """A table of text as it is.

    Args:
        left: so many columns hold words; the others hold numbers.
    """
    made = Table(title=title or None, title_justify="left")
    for index, heading in enumerate(headings):
        made.add_column(printable(heading), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        style = next((_COLOURS[cell] for cell in row if cell in _COLOURS), None)
        made.add_row(*(printable(cell, keep="\n") for cell in row), style=style)
    return made


def kinds(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups that differ only in the numbers in their names, such as the same group of every layer, together;
    what can be pruned first.
    """
    found: dict[Any, list[Group]] = {}
    for group in sorted(groups, key=lambda group: group.status != PRUNABLE):
        shapes = (
            {(re.sub(r"\d+", "*", m.name), m.dim, len(m.indices), m.size): None for m in members}
            for members in (group.producers, group.consumers)
        )
        reason = re.sub(r"\d+", "*", group.reason)
        key = (group.status, reason, group.size, group.blocks, *map(tuple, shapes))
        found.setdefault(key, []).append(group)
    return list(found.values())


def short(members: Sequence[Member]) -> str:
    """The layers of these weights by their last name: ``gate_proj, up_proj``."""
    weights = (member.name.removesuffix(".weight") for member in members)
    names = dict.fromkeys(found[0] if (found := _LAYER.search(name)) else name for name in weights)
    return _listed([name for name in names if name.removesuffix(".bias") not in names.keys() - {name}], ", ")


def _listed(names: Sequence[str], between: str) -> str:
    rest = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return between.join([*names[:SHOWN], *rest]) or "-"


def channels(group: Group) -> str:
    """The size of a group, with its blocks if it has several: ``3 x 64``."""
    return f"{group.blocks} x {group.width}" if group.blocks > 1 else str(group.size)


def summary(analysis: Analysis) -> list[str]:
    """One line per kind of group, as in ``30 x prunable 1536 gate_proj, up_proj -> down_proj``."""
    alike = kinds(analysis.groups)
    rows = [(str(len(groups)), groups[0].status, channels(groups[0])) for groups in alike]
    count, status, size = (max(map(len, column), default=0) for column in zip(*rows)) if rows else (0, 0, 0)
    return [
        f"{row[0]:>{count}} x {row[1]:<{status}} {row[2]:>{size}}  {short(one.producers)} ->"
        f" {short(one.consumers)}" + (f"  ({one.reason})" if one.reason else "")
        for row, (one, *_) in zip(rows, alike)
    ]


def groups_table(analysis: Analysis, *, every: bool) -> Table:
    """All groups; those of the same kind in one row unless ``every`` is set."""

    def row(group: Group) -> list[str]:
        shown = [
            _listed([*map(str, members)], "\n") if every else short(members)
            for members in (group.producers, group.consumers)
        ]
        return [group.status, channels(group), *shown, group.reason]

    headings = ["status", "channels", "lose rows", "lose columns", "why"]
    title = f"{len(analysis.groups)} coupled groups"
    if every:
        return table(headings, map(row, analysis.groups), title=title, left=5)
    rows = ([str(len(groups)), *row(groups[0])] for groups in kinds(analysis.groups))
    return table(["groups", *headings], rows, title=title, left=6)


def groups_json(model: str, analysis: Analysis) -> dict[str, Any]:
    """Everything about the groups as plain data; index ranges are ``[first, last + 1]``."""
    plain = ("name", "status", "granularity", "reason", "size", "blocks")
    return {
        "model": model,
        "max_sparsity": analysis.max_sparsity,
        "groups": [
            {name: getattr(group, name) for name in plain}
            | {
                role: [_member(member) for member in getattr(group, role)]
                for role in ("producers", "consumers")
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
    return table(
        ["", "dense", "pruned", "change"],
        [
            [
                row.what,
                *(f"{value:,.{row.digits}f}" for value in (row.dense, row.pruned)),
                f"{row.pruned / row.dense - 1:+.1%}" if row.dense else "",
            ]
            for row in rows
        ],
    )

