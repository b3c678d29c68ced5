"""The report as a page: its layout against the graph of groups, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fasp_fx.report import COUNTED, Figure, Line, Report

import fasp_fx
from fasp_fx.interop.page import check_page, page_data, to_html, write_page
from fasp_fx.interop.page._graph import lay_out, layer_of

pytestmark = pytest.mark.usefixtures("shared_captures")

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
        {"capture": 6.25, "calibration": 48.3},
        ("a note",),
        figures,
        {"my.op": 3},
    )


# --- layout


def _joined(lines: tuple[Line, ...]) -> set[tuple[str, str, str]]:
    return {
        (name, role, line.name)
        for line in lines
        for role, members in (("row", line.producers), ("column", line.consumers))
        for name, _ in members
    }


def _drawn(lines: tuple[Line, ...]) -> set[tuple[str, str, str]]:
    """What the layout joins: with a bias at its weight, every parameter of a node stands for what the node is
    joined to.
    """
    found = set()
    for row in lay_out(lines).rows:
        for layer in row.layers:
            for index, node in enumerate(layer.nodes):
                joined = [("column", group) for group in node.consumes] + [
                    ("row", group) for group in node.produces
                ]
                joined += [
                    ("column" if way else "row", group)
                    for at, hub, way in layer.edges
                    if at == index
                    for group in layer.hubs[hub].groups
                ]
                found |= {
                    (name, role, lines[group].name) for name in node.parameters for role, group in joined
                }
    return found


def test_every_edge_of_the_graph_is_drawn(zoo_analysis: Callable[[str], fasp_fx.Analysis]) -> None:
    analysis = zoo_analysis("llama_gqa")
    data = json.loads(re.search(r'id="data">(.*?)</script>', to_html(analysis, "Llama"), re.S)[1])  # type: ignore[index]
    assert [group["name"] for group in data["groups"]] == [group.name for group in analysis.groups]
    assert not data["pruned"]
    shown = {(row["label"], len(row["layers"])) for row in data["graph"]["rows"]}
    assert ("model.layers.0-1", 2) in shown
    names = {
        name
        for row in data["graph"]["rows"]
        for layer in row["layers"]
        for node in layer["nodes"]
        for name in node["parameters"]
    }
    graph = analysis.graph()
    assert names == {vertex[1] for vertex, kind in graph.nodes(data="kind") if kind == "weight"}
    lines = decoder(3).lines
    assert _drawn(lines) == _joined(lines)


def test_a_bias_goes_with_its_weight_and_circles_are_drawn() -> None:
    """A gate that a group feeds and that scales it, as in squeeze-and-excitation."""
    wide = Line(
        "b.0.fc1.weight",
        "prunable",
        8,
        8,
        1,
        "",
        producers=(("b.0.conv.weight", 0), ("b.0.conv.bias", 0), ("b.0.fc2.weight", 0)),
    )
    wide = replace(wide, consumers=(("b.0.fc1.weight", 1), ("b.0.out.weight", 1)))
    gate = Line(
        "b.0.fc2.weight",
        "prunable",
        2,
        2,
        1,
        "",
        producers=(("b.0.fc1.weight", 0),),
        consumers=(("b.0.fc2.weight", 1),),
    )
    graph = lay_out((wide, gate))
    (layer,) = graph.rows[0].layers
    assert not graph.shared
    assert {node.label: node.parameters for node in layer.nodes}["conv"] == [
        "b.0.conv.weight",
        "b.0.conv.bias",
    ]
    assert _drawn((wide, gate)) == _joined((wide, gate))
    places = [(item.x, item.y) for item in (*layer.nodes, *layer.hubs)]
    # Nothing lies on anything.
    assert all(a[0] != b[0] or abs(a[1] - b[1]) >= 1 for i, a in enumerate(places) for b in places[:i])


def test_layers_are_alike_only_if_all_about_them_is() -> None:
    lines = list(decoder(6).lines)
    lines[5] = replace(lines[5], status="frozen", reason="layout")
    rows = {row.label: len(row.layers) for row in lay_out(lines).rows}
    assert rows == {"model.embed": 1, "model.layers.0-1,3-5": 5, "model.layers.2": 1}


@pytest.mark.parametrize(
    ("name", "layer"),
    [("a.3.b.7.weight", "a.3"), ("0.weight", "0"), ("head.weight", ""), ("weight", ""), ("a.b.5", "")],
)
def test_layer_of(name: str, layer: str) -> None:
    assert layer_of(name) == layer


# --- files


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    report, file = decoder(1), tmp_path / "deep" / "page.html"
    check_page(file)
    assert not file.parent.exists()
    write_page(report, "one", file)
    write_page(report, "two", file)
    assert "<title>two</title>" in file.read_text(encoding="utf-8")
    other = tmp_path / "mine.html"
    other.write_text("<html>mine</html>")
    link = tmp_path / "link.html"
    link.symlink_to(file)
    for taken in (other, link, tmp_path, other / "page.html", tmp_path / ("x" * 300)):
        for refuse in (check_page, lambda path: write_page(report, "three", path)):
            with pytest.raises(fasp_fx.StoreError, match=re.escape(str(taken))):
                refuse(taken)
    assert other.read_text() == "<html>mine</html>"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "deep",
        "link.html",
        "mine.html",
        "page.html",
    ]


def test_the_page_says_of_which_weights_the_sparsity_is(
    zoo_analysis: Callable[[str], fasp_fx.Analysis],
) -> None:
    for source in (decoder(1), zoo_analysis("llama_gqa")):
        assert COUNTED in page_data(source, "")["tiles"][0]["help"]


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
    tab.click("text=30 alike")
    tab.click('[data-layer="3"] button')
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert tab.evaluate(
        "[...document.querySelectorAll('.row svg')].every(picture => picture.getBoundingClientRect().width <="
        " innerWidth)"
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
    assert "48.3 s" in tab.inner_text("#more")


def test_layers_open_one_by_one(show: Open) -> None:
    tab = show(decoder())
    assert tab.locator(".row").count() == 2  # the embedding and all layers as one
    assert tab.locator(".hub").count() == 3
    tab.focus("text=30 alike")
    tab.keyboard.press("Enter")
    assert tab.locator(".is-compact").count() == LAYERS
    assert "3×64→3×57" in tab.inner_text('[data-layer="1"]')  # 192 - 3 * 7
    tab.focus('[data-layer="7"] button')
    tab.keyboard.press("Enter")
    opened = tab.locator('[data-layer="7"]')
    assert opened.evaluate("row => row.contains(document.activeElement)")
    labels = opened.locator("[role=img]").evaluate_all(
        "marks => marks.map(mark => mark.getAttribute('aria-label'))"
    )
    for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "norm"):
        assert any(f"model.layers.7.{name}.weight" in label for label in labels)
    for button, kind, count in (("text=show as one", "row", 2), ("#open-all", "is-opened", LAYERS)):
        tab.click(button)
        assert tab.locator(f".{kind}").count() == count


@pytest.mark.slow
def test_reasons_show_on_hover_and_focus(show: Open) -> None:
    tab = show(decoder())
    tip, frozen = tab.locator("#tip"), tab.locator(".hub.st-frozen")
    frozen.hover()
    assert EMBEDDING in tip.inner_text()
    tab.mouse.move(0, 0)
    assert tip.is_hidden()
    for place, said in (
        (frozen, EMBEDDING),
        (tab.locator(".node", has_text="attn.q"), "contracted between two activations"),
        (tab.locator(".chip.st-approximate"), "mixed by aten.mean.dim"),
        (tab.locator(".hub", has_text="1536"), "on tokens held out: cut 2.00e-2, restored 5.80e-2"),
    ):
        place.focus()
        assert said in tip.inner_text()
        tab.keyboard.press("Escape")
        assert tip.is_hidden()
    assert frozen.locator(".cross").count() == 1  # a shape of its own beside the colour


@pytest.mark.slow
def test_the_table_sorts_and_filters(show: Open) -> None:
    report = decoder()
    tab, lines = show(report), report.lines
    assert _order(tab) == list(range(len(lines)))
    after = tab.locator("th", has=tab.get_by_role("button", name="After", exact=True))
    after.locator("button").click()
    for way, sign in (("ascending", 1), ("descending", -1)):
        assert _order(tab) == sorted(range(len(lines)), key=lambda index: sign * lines[index].after)
        assert after.get_attribute("aria-sort") == way
        tab.keyboard.press("Enter")
    for _ in range(2):  # what was not measured stays last in both directions
        tab.get_by_role("button", name="Error cut").click()
        known = [lines[index].error_cut for index in _order(tab)]
        assert known[LAYERS:] == [None] * (len(lines) - LAYERS)
    assert known[:LAYERS] == sorted(known[:LAYERS], reverse=True)
    tab.get_by_role("button", name="Group", exact=True).click()
    names = [lines[index].name for index in _order(tab)]
    assert names.index("model.layers.2.mlp.down.weight") < names.index("model.layers.10.mlp.down.weight")
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
    text = tab.locator("#tip").inner_text()
    assert "Layer 1" in text
    assert "1,536 → 1,360 channels (11.5 % removed)" in text


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
        {HOSTILE: 1.0},
        (HOSTILE,),
        (Figure(HOSTILE, 1.0, float("inf")),),
        {HOSTILE: 1},
    )
    file = show(replace(report, lines=(*report.lines, replace(line, name=f"a.1.{HOSTILE}"))), HOSTILE)
    file.locator(".node").first.hover()
    assert file.title().startswith("</script><img")
    assert file.inner_text("h1").startswith("</script><img")
    assert file.evaluate(
        "window.hacked === undefined && document.images.length === 0 && document.scripts.length === 2"
    )
    assert file.inner_text("#table").count("onerror='window.hacked=1'") >= 6


@pytest.mark.slow
def test_nothing_removed_and_no_groups(show: Open, zoo_analysis: Callable[[str], fasp_fx.Analysis]) -> None:
    tab = show(Report(0.0, None, (0, 0), (0, 0), ()))
    assert tab.inner_text("#count") == "0 of 0 groups"
    tab = show(zoo_analysis("llama_gqa"))
    heads = tab.eval_on_selector_all("#table thead button", "heads => heads.map(head => head.textContent)")
    assert heads == ["Status", "Group", "Lose rows", "Lose columns", "Channels", "Blocks", "Why"]
    assert tab.locator(".is, .gauge-box").count() == 0
    assert "2 alike" in tab.inner_text("#graph")
