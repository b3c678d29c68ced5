"""A report to look at: one page of HTML, CSS and JavaScript that needs no network and loads from a file.

Data (:mod:`._model`), layout (:mod:`._graph`, :mod:`._layer`) and drawing (``page.html``, ``page.css``,
``*.js``) are apart. Names of the model reach the page only as JSON and are shown only as text; the page's
content security policy lets no script run but its own, and no request go out.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...analysis._analysis import Analysis
from ...base._atomic import new_file
from ...pruning.report import Report
from ._model import page_data

SCRIPTS = ("dom.js", "tips.js", "summary.js", "graph.js", "charts.js", "table.js")
MARK = '<meta name="generator" content="fasp_fx report">'


def to_html(source: Report | Analysis, title: str = "Model") -> str:
    """Show a report or an analysis as one page of HTML that needs nothing else: graph of the groups, widths,
    table and figures (docs/report.md).

    Args:
        source: what was pruned (``result.report``), or what could be (what :func:`fasp_fx.analyze` returned).
        title: what the page is about, such as the name of the model.

    Returns:
        The page as text, to be written as UTF-8.

    Raises:
        CaptureError: an analysis of several parts has no single page.
    """
    folder = files(__package__)
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    script = "'use strict';\n" + "\n".join(
        folder.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS
    )
    template = folder.joinpath("page.html").read_text(encoding="utf-8")
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


def check_page(file: Path) -> None:
    """Refuse a file that :func:`write_page` would refuse, before any work is done.

    Raises:
        StoreError: something else is there, or it cannot be written.
    """
    with new_file(file, replaceable=_is_page, keep=False):
        pass


def write_page(source: Report | Analysis, title: str, file: Path) -> None:
    """Write the page, whole or not at all; an earlier page is replaced, and nothing else.

    Raises:
        StoreError: something else is there, or it cannot be written.
    """
    text = to_html(source, title)
    with new_file(file, replaceable=_is_page) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_page(file: Path) -> bool:
    with file.open("rb") as stream:
        return MARK.encode() in stream.read(1000)


def _json(data: Any) -> str:
    """JSON that no HTML parser takes for the end of its element."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sum(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


__all__ = ["check_page", "to_html", "write_page"]
