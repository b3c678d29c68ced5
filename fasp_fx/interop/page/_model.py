"""What the page shows, as plain data: figures, groups, their graph and their charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...analysis._analysis import Analysis
from ...analysis.groups import PRUNABLE
from ...base._version import __version__
from ...pruning.report import COUNTED, Line, Report, line_of, notes_of, weight_size
from ._graph import lay_out
from ._layer import star

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def page_data(source: Report | Analysis, title: str) -> dict[str, Any]:
    """The page of a pruning, or of an analysis, which has no figures after."""
    if isinstance(source, Report):
        lines, notes, seconds, without_rule = source.lines, source.notes, source.seconds, source.without_rule
        tiles = _tiles_of_report(source)
    else:
        lines, notes, seconds, without_rule = (
            tuple(map(line_of, source.groups)),
            notes_of(source),
            {},
            source.without_rule,
        )
        tiles = _tiles_of_analysis(source)
    pruned = isinstance(source, Report)
    return {
        "title": title,
        "version": __version__,
        "pruned": pruned,
        "tiles": tiles,
        "seconds": [[stage, _number(spent)] for stage, spent in seconds.items()],
        "notes": list(notes),
        "withoutRule": [[name, count] for name, count in without_rule.items()],
        "groups": [_group(line) for line in lines],
        "graph": asdict(lay_out(lines)),
        "charts": _charts(lines),
    }


def _tiles_of_report(report: Report) -> list[dict[str, str]]:
    asked = f"asked for {report.requested:.2%}" if report.requested is not None else ""
    tiles = [
        {
            "label": "Sparsity",
            "value": f"{report.sparsity:.2%}",
            "more": asked,
            "help": f"Fraction removed of the weights of {COUNTED} that are counted",
        },
        _change("Parameters", *report.parameters, f"{report.parameters[0]:,}", f"{report.parameters[1]:,}"),
        _change("Size of the weights", *report.bytes, _bytes(report.bytes[0]), _bytes(report.bytes[1])),
    ]
    if report.cache is not None:
        tiles.append(
            _change(
                "Cache for a token of one sequence",
                *report.cache,
                _bytes(report.cache[0]),
                _bytes(report.cache[1]),
            )
        )
    for spent in report.budgets:
        used, allowed = (f"{amount / max(spent.dense, 1):.2%}" for amount in (spent.used, spent.allowed))
        tiles.append(
            {
                "label": f"Budget of {spent.resource}",
                "value": used,
                "more": f"{allowed} allowed",
                "help": str(spent),
            }
        )
    for figure in report.figures:
        shown = [f"{value:,.{figure.digits}f}" for value in (figure.dense, figure.pruned)]
        tiles.append(_change(figure.what[:1].upper() + figure.what[1:], figure.dense, figure.pruned, *shown))
    return tiles


def _tiles_of_analysis(analysis: Analysis) -> list[dict[str, str]]:
    count, size = weight_size(analysis.program.weights())
    return [
        {
            "label": "Can be removed",
            "value": f"{analysis.max_sparsity:.1%}",
            "more": "at most",
            "help": f"Of the weights of {COUNTED} that are counted",
        },
        {"label": "Parameters", "value": f"{count:,}", "more": ""},
        {"label": "Size of the weights", "value": _bytes(size), "more": ""},
        {
            "label": "Coupled groups",
            "value": f"{len(analysis.groups):,}",
            "more": f"{len(analysis.select(PRUNABLE)):,} prunable",
        },
    ]


def _change(label: str, before: float, after: float, shown_before: str, shown_after: str) -> dict[str, str]:
    change = (
        f"{after / before - 1:+.1%}".replace("-", "−") if before and math.isfinite(after / before) else ""
    )
    return {"label": label, "value": shown_after, "before": shown_before, "more": change}


def _bytes(count: float) -> str:
    """Bytes for people: ``256.6 MiB``."""
    power = min(int(math.log2(count) // 10), len(UNITS) - 1) if count >= 1 else 0
    return f"{count / 1024**power:,.1f} {UNITS[power]}" if power else f"{count:,.0f} B"


def _group(line: Line) -> dict[str, Any]:
    return {
        "name": line.name,
        "status": line.status,
        "reason": line.reason,
        "before": line.before,
        "after": line.after,
        "blocks": line.blocks,
        "cut": _number(line.error_cut),
        "restored": _number(line.error_restored),
        "heldCut": _number(line.held_cut),
        "heldRestored": _number(line.held_restored),
        "producers": [f"{name}[{dim}]" for name, dim in line.producers],
        "consumers": [f"{name}[{dim}]" for name, dim in line.consumers],
    }


def _number(value: float | None) -> float | str | None:
    """A number as JSON can say it: what is not finite as text."""
    return value if value is None or math.isfinite(value) else str(value)


def _charts(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One chart for the groups of equal name and status but for their numbers, a bar each; what can be pruned
    first, single groups last.
    """
    kinds: dict[tuple[str, str], list[int]] = {}
    for index, line in enumerate(lines):
        kinds.setdefault((star(line.name), line.status), []).append(index)
    charts = [
        {
            "label": name,
            "status": status,
            "bars": [
                {"group": index, "label": _numbers(lines[index].name) or lines[index].name} for index in found
            ],
        }
        for (name, status), found in sorted(kinds.items(), key=lambda kind: kind[0][1] != PRUNABLE)
        if len(found) > 1
    ]
    single = [found[0] for found in kinds.values() if len(found) == 1]
    if single:
        charts.append(
            {
                "label": "",
                "status": "",
                "bars": [{"group": index, "label": lines[index].name} for index in single],
            }
        )
    return charts


def _numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part.isdecimal())


__all__ = ["page_data"]
