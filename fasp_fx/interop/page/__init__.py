"""A report to look at: one page of HTML, CSS and JavaScript that needs no network and loads from a file.

Data (here) and drawing (``page.html``, ``page.css``, ``*.js``) are apart. Names of the model reach the page
only as JSON and are shown only as text; the page's content security policy lets no script run but its own,
and no request go out.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fasp_fx.allocation import Costs
from fasp_fx.analysis import PRUNABLE, Analysis
from fasp_fx.base import __version__, check_kind, new_file
from fasp_fx.pruning import (
    COUNTED,
    Line,
    Report,
    Sweep,
    line_of,
    notes_of,
    percent,
    weight_size,
)

SCRIPTS = ("dom.js", "tips.js", "summary.js", "charts.js", "curves.js", "table.js")
#: points of a curve that are drawn, at most
_DRAWN = 64
MARK = '<meta name="generator" content="fasp_fx report">'
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def to_html(source: Any, title: str = "Model") -> str:
    """Show a report, an analysis, costs or a sweep as one page of HTML that needs nothing else: figures,
    widths by layer, curves and a table of the groups (docs/report.md).

    Args:
        source: what was pruned (a result or its report), what could be (what :func:`fasp_fx.analyze`
            returned), or what that would cost (:class:`fasp_fx.Costs`, :class:`fasp_fx.Sweep`).
        title: what the page is about, such as the name of the model.

    Returns:
        The page as text, to be written as UTF-8.

    Raises:
        ArgumentError: it is something else, or an analysis of a model in parts, which has no single page.

    Examples:
        >>> page = fasp_fx.to_html(result.report, title="A small model")
        >>> page.startswith("<!doctype html>")
        True
    """
    folder = files(__package__)
    template, style, *scripts = (
        folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)
    )
    script = "'use strict';\n" + "\n".join(scripts)
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_sum(style)}'; script-src '{_sum(script)}'; base-uri"
        " 'none'; form-action 'none'"
    )
    fields = {
        "mark": MARK,
        "policy": policy,
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": _json(page_data(source, title)),
    }
    # Text, field, text, field, ..., text: what a field holds is never searched for fields.
    parts = template.split("@@")
    return "".join(fields[part] if index % 2 else part for index, part in enumerate(parts))


def write_page(source: Any, title: str, file: Path) -> None:
    """Write the page, whole or not at all; an earlier page is replaced, and nothing else.

    Raises:
        StoreError: something else is there, or it cannot be written.
    """
    with new_file(file, replaceable=_is_page) as temporary:
        temporary.write_text(to_html(source, title), encoding="utf-8")


def _is_page(file: Path) -> bool:
    with file.open("rb") as stream:
        return MARK.encode() in stream.read(1000)


def _json(data: Any) -> str:
    """JSON that no HTML parser takes for the end of its element."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sum(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page_data(source: Any, title: str) -> dict[str, Any]:
    """The page of a pruning; of an analysis, which has no figures after; or of costs and sweeps, which are
    curves.
    """
    source = getattr(source, "report", source)
    costs = getattr(source, "costs", source)
    known = "pass a result, a report, an analysis (of a model in parts: one of its parts), costs or a sweep"
    check_kind("source", costs, Report | Analysis | Costs, known)
    data = {"title": title, "version": __version__, "pruned": isinstance(source, Report)}
    data |= dict.fromkeys(("tiles", "said", "notes", "withoutRule", "groups", "charts", "rows", "curves"), ())
    if isinstance(costs, Costs):
        swept = source if isinstance(source, Sweep) else None
        return {**data, "rows": swept.rows() if swept else (), "curves": _curves(costs, swept)}
    lines = source.lines if isinstance(source, Report) else tuple(map(line_of, source.groups))
    return data | {
        "tiles": _tiles_of_report(source) if isinstance(source, Report) else _tiles_of_analysis(source),
        "said": source.said()[1:4] if isinstance(source, Report) else (),
        "notes": source.notes if isinstance(source, Report) else notes_of(source),
        "withoutRule": [*source.without_rule.items()],
        "groups": [_group(line) for line in lines],
        "charts": _charts(lines),
    }


def _curves(costs: Costs, swept: Sweep | None) -> list[dict[str, Any]]:
    """Pictures of lines, of points with error bars, or of both: each line has a name and points ``[x, y]``,
    with what ``y`` says in words where that is known, each dot an error besides.
    """
    pictures: list[dict[str, Any]] = []
    if swept is not None:
        line = [[each.sparsity, each.cost, costs.in_words(each.cost)] for each in swept.points.values()]
        dots = [[swept.points[asked].sparsity, *each.error] for asked, each in swept.measured.items()]
        pictures.append(
            {
                "label": "Predicted cost of the whole model, the rise of its loss",
                "lines": [["predicted", line]],
            }
        )
        pictures += [{"label": "Measured: outputs differ by", "lines": [], "dots": dots}] if dots else []
    lines = [
        [name, [[place / max(last, 1), float(curve.losses[place])] for place in _places(last)]]
        for name, curve in costs.items()
        for last in [len(curve.losses) - 1]
    ]
    return [*pictures, {"label": "Predicted cost of each group alone", "lines": lines}]


def _places(last: int) -> list[int]:
    """Some of the places of a curve, its ends among them."""
    return sorted({round(part * last / _DRAWN) for part in range(_DRAWN + 1)})


def _tiles_of_report(report: Report) -> list[dict[str, str]]:
    asked = f"asked for {report.requested:.2%}" if report.requested is not None else ""
    cache = () if report.cache is None else (("Cache for a token of one sequence", report.cache),)
    return [
        {
            "label": "Sparsity",
            "value": f"{report.sparsity:.2%}",
            "more": asked,
            "help": f"Fraction removed of the weights of {COUNTED} that are counted",
        },
        _change("Parameters", *report.parameters, *(f"{count:,}" for count in report.parameters)),
        *(
            _change(label, *sizes, *map(_bytes, sizes))
            for label, sizes in (("Size of the weights", report.bytes), *cache)
        ),
        *(
            {
                "label": f"Budget of {spent.resource}",
                "value": f"{spent.used / max(spent.dense, 1):.2%}",
                "more": f"{spent.allowed / max(spent.dense, 1):.2%} allowed",
                "help": str(spent),
            }
            for spent in report.budgets
        ),
        *(
            {"label": label, "value": percent(estimate, 2), "more": f"on {agreed.rows:,} rows"}
            for agreed in ([report.agreement] if report.agreement else [])
            for label, estimate in (("Outputs differ by", agreed.error), ("First choices stay", agreed.same))
            if estimate is not None
        ),
        *(
            _change(
                figure.what[:1].upper() + figure.what[1:],
                figure.dense,
                figure.pruned,
                *(f"{value:,.{figure.digits}f}" for value in (figure.dense, figure.pruned)),
            )
            for figure in report.figures
        ),
    ]


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
        starred = ".".join("*" if part.isdecimal() else part for part in line.name.split("."))
        kinds.setdefault((starred, line.status), []).append(index)
    ordered = sorted(kinds.items(), key=lambda kind: kind[0][1] != PRUNABLE)
    several = [(*kind, indices) for kind, indices in ordered if len(indices) > 1]
    single = [indices[0] for indices in kinds.values() if len(indices) == 1]
    return [
        {
            "label": name,
            "status": status,
            "bars": [
                {"group": index, "label": (name and _numbers(lines[index].name)) or lines[index].name}
                for index in indices
            ],
        }
        for name, status, indices in (*several, *([("", "", single)] if single else []))
    ]


def _numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part.isdecimal())


__all__ = ["page_data", "to_html", "write_page"]
