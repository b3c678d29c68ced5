"""The report as a page: what it holds, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fasp_fx
from fasp_fx.interop import write_page
from fasp_fx.interop.page import to_html
from fasp_fx.pruning import COUNTED, Figure, Line, Report

LAYERS = 30
EMBEDDING = "aten.embedding.default cannot lose positions along this dimension"
HOSTILE = "</script><img src=x onerror='window.hacked=1'><b>@@data@@&lt;\u2028"


def _layer(number: int) -> tuple[Line, Line]:
    """The values and the neurons of a layer."""
    at = f"model.layers.{number}"
    values = Line(f"{at}.attn.o.weight", "prunable", 192, 192 - 3 * (number * 7 % 40), 3, "")
    errors = 0.01 * (number * 13 % 30), 0.001 * number, 0.02, 0.002 * number
    neurons = Line(f"{at}.mlp.down.weight", "prunable", 1536, 1536 - 16 * (number * 11 % 50), 1, "", *errors)
    both = (f"{at}.mlp.gate.weight", 0), (f"{at}.mlp.up.weight", 0)
    return (
        replace(values, producers=((f"{at}.attn.v.weight", 0),), consumers=((f"{at}.attn.o.weight", 1),)),
        replace(neurons, producers=both, consumers=((f"{at}.mlp.down.weight", 1),)),
    )


def decoder(layers: int = LAYERS) -> Report:
    """The report of a Llama: two prunable groups for each layer, a stream through all of them, query and key
    rows, and the vocabulary.
    """
    parts = {
        "written": ("attn.o", "mlp.down", "norm"),
        "read": ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"),
        "turned": ("attn.q", "attn.k"),
    }
    names = {
        role: [f"model.layers.{number}.{part}.weight" for number in range(layers) for part in own]
        for role, own in parts.items()
    }
    stream = Line(
        "model.embed.weight",
        "approximate",
        576,
        576,
        1,
        "mixed by aten.mean.dim",
        producers=(("model.embed.weight", 1), *((name, 0) for name in names["written"])),
        consumers=(("model.embed.weight", 1), *((name, 1) for name in names["read"])),
    )
    words = Line(
        "model.embed.weight#2", "frozen", 49152, 49152, 1, EMBEDDING, producers=(("model.embed.weight", 0),)
    )
    turned = tuple((name, 0) for name in names["turned"])
    why = "contracted between two activations"
    query = Line("model.layers.0.attn.q.weight", "exempt", 32, 32, 1, why, producers=turned)
    figures = (
        Figure("milliseconds for one chunk", 81.24, 69.06, 1),
        Figure("perplexity on chunks 4 to 6 of wiki.txt", 17.5, 22.871, 3),
    )
    own = [line for number in range(layers) for line in _layer(number)]
    return Report(
        0.2001,
        0.2,
        (134_515_008, 113_281_344),
        (269_030_016, 226_562_688),
        (stream, *own, words, query),
        ("a note",),
        figures,
        {"my.op": 3},
    )


def test_an_analysis_is_shown_as_far_as_there_is_something(
    llama: fasp_fx.Captured,
) -> None:
    analysis = fasp_fx.analyze(llama)
    data = json.loads(re.search(r'id="data">(.*?)</script>', to_html(analysis, "Llama"), re.S)[1])  # type: ignore[index]
    assert [group["name"] for group in data["groups"]] == [group.name for group in analysis.groups]
    assert not data["pruned"]
    assert COUNTED in data["tiles"][0]["help"]


# --- files


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    report, file = decoder(1), tmp_path / "deep" / "page.html"
    write_page(report, "one", file)
    write_page(report, "two", file)
    assert "<title>two</title>" in file.read_text(encoding="utf-8")
    other = tmp_path / "mine.html"
    other.write_text("<html>mine</html>")
    link = tmp_path / "link.html"
    link.symlink_to(file)
    for taken in (other, link, tmp_path, other / "page.html", tmp_path / ("x" * 300)):
        with pytest.raises(fasp_fx.StoreError, match=re.escape(str(taken))):
            write_page(report, "three", taken)
    assert other.read_text() == "<html>mine</html>"
    assert {path.name for path in tmp_path.rglob("*")} == {"deep", "link.html", "mine.html", "page.html"}


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    with api.sync_playwright() as playwright:
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        started = playwright.chromium.launch(executable_path=found, args=flags)
        yield started
        started.close()


Open = Callable[..., Any]


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a report from a file; afterwards nothing may have gone wrong or have been asked for."""
    contexts, wrong = [], []

    def opened(report: Any, title: str = "A model", width: int = 1280, scheme: str = "light") -> Any:
        file = tmp_path / "page.html"
        file.write_text(to_html(report, title), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(10_000)
        tab.on("console", lambda message: wrong.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        tab.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
        tab.goto(file.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def _order(tab: Any) -> list[int]:
    return [
        int(index)
        for index in tab.eval_on_selector_all("#table tbody tr", "rows => rows.map(row => row.dataset.index)")
    ]


@pytest.mark.parametrize(("width", "scheme", "dark"), [(1280, "light", False), (400, "dark", True)])
def test_thirty_layers_fit_the_window(show: Open, width: int, scheme: str, dark: bool) -> None:
    tab = show(decoder(), width=width, scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert tab.evaluate(
        "[...document.querySelectorAll('.plot svg')]"
        ".every(picture => picture.getBoundingClientRect().width <= innerWidth)"
    )
    colour = [
        int(part)
        for part in re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    ]
    assert (sum(colour) < 300) == dark
    tiles = tab.inner_text("#tiles")
    for text in ("20.01%", "113,281,344", "216.1 MiB", "from 256.6 MiB", "69.1", "22.871", "−15.8%"):
        assert text in tiles
    assert "my.op" in tab.inner_text("#more")


@pytest.mark.slow
def test_the_table_sorts_and_filters(show: Open) -> None:
    report = decoder()
    tab, lines = show(report), report.lines
    assert _order(tab) == list(range(len(lines)))
    for sign in (1, -1):
        tab.get_by_role("button", name="After", exact=True).click()
        assert _order(tab) == sorted(range(len(lines)), key=lambda index: sign * lines[index].after)
    for _ in range(2):  # what was not measured stays last in both directions
        tab.get_by_role("button", name="Error cut").click()
        known = [lines[index].error_cut for index in _order(tab)]
        assert known[LAYERS:] == [None] * (len(lines) - LAYERS)
    assert known[:LAYERS] == sorted(known[:LAYERS], reverse=True)
    for text, found in (
        ("Layers.4. DOWN", ["model.embed.weight", "model.layers.4.mlp.down.weight"]),
        ("frozen", ["model.embed.weight#2"]),
        ("nothing like it", []),
    ):
        tab.fill("#filter", text)
        assert [lines[index].name for index in _order(tab)] == found
        assert tab.inner_text("#count") == f"{len(found)} of {len(lines)} groups"


@pytest.mark.slow
def test_the_chart_has_a_bar_for_each_layer(show: Open) -> None:
    report = decoder()
    tab = show(report)
    bars = tab.eval_on_selector_all(
        ".plot svg[role=group] .bar",
        """bars => bars.map(bar => [
            Number(bar.dataset.bar), Number(bar.querySelector('.was').getAttribute('height')),
            Number(bar.querySelector('.is').getAttribute('height'))])""",
    )
    assert len(bars) == 2 * LAYERS
    for index, was, now in bars:
        assert now / was == pytest.approx(report.lines[index].after / report.lines[index].before)
    tab.locator('.bar[data-bar="2"]').focus()
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.dataset.bar") == "4"
    assert "1,536 → 1,360 channels (11.5 % removed)" in tab.locator("#tip").inner_text()


def test_hostile_names_stay_text(show: Open) -> None:
    line = Line(
        f"a.0.{HOSTILE}",
        HOSTILE,
        8,
        4,
        1,
        HOSTILE,
        producers=((f"a.0.{HOSTILE}.w", 0),),
        consumers=((f"a.1.{HOSTILE}", 1), ("__proto__", 0)),
    )
    plain = Line("constructor", "toString", 2, 2, 1, "", producers=(("toString.weight", 0),))
    report = Report(
        0.5,
        None,
        (2, 1),
        (8, 4),
        (line, plain),
        (HOSTILE,),
        (Figure(HOSTILE, 1.0, float("inf")),),
        {HOSTILE: 1},
    )
    file = show(replace(report, lines=(*report.lines, replace(line, name=f"a.1.{HOSTILE}"))), HOSTILE)
    file.locator(".bar").first.hover()
    assert file.title().startswith("</script><img")
    assert file.inner_text("h1").startswith("</script><img")
    assert file.evaluate(
        "window.hacked === undefined && document.images.length === 0 && document.scripts.length === 2"
    )
    assert file.inner_text("#table").count("onerror='window.hacked=1'") >= 6


@pytest.mark.slow
def test_nothing_removed_and_no_groups(show: Open, llama: fasp_fx.Captured) -> None:
    tab = show(Report(0.0, None, (0, 0), (0, 0), ()))
    assert tab.inner_text("#count") == "0 of 0 groups"
    tab = show(fasp_fx.analyze(llama))
    assert tab.locator(".is, .gauge-box").count() == 0
