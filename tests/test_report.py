"""What a report says in words, and that a failing capture says nothing else."""

import dataclasses
import io
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Vectors, X, block, made, randomise, wide
from rich.console import Console
from torch import Tensor, nn

import fasp_fx
from fasp_fx.base import _progress
from fasp_fx.interop import write_page
from fasp_fx.interop.page import to_html
from fasp_fx.pruning import COUNTED, Figure, Line, Report
from fasp_fx.pruning._report import COLUMNS, Prediction


def _normed() -> nn.Module:
    """A stream through a norm, and neurons beside it."""
    return wide(
        lambda self, x: self.out((stream := self.into(x)) + block(self, self.norm(stream))),
        size=16,
        hidden=20,
        into=nn.Linear(4, 16),
        norm=nn.LayerNorm(16),
        out=nn.Linear(16, 3),
    )


@pytest.mark.parametrize(
    ("include", "says", "counted"),
    [
        ((), "prunable and exempt groups", ("up", "down")),
        (("approximate",), "prunable, exempt and approximate groups", ("into", "up", "down", "out")),
    ],
)
def test_sparsity_is_a_fraction_of_what_the_report_says(
    include: tuple[str, ...], says: str, counted: tuple[str, ...]
) -> None:
    model = randomise(_normed())
    result = fasp_fx.prune(
        model, (torch.randn(3, 4),), score="random", restore=None, sparsity=0.3, include=include
    )
    line = str(result.report).splitlines()[0]
    assert f"of the weights of linear, convolution and recurrent operators in {says}: " in line
    before, after = (
        sum(dict(module.named_parameters())[f"{name}.weight"].numel() for name in counted)
        for module in (model, result.module)
    )
    assert f"{1 - after / before:.2%} " in line
    assert str(Report.from_json(result.report.to_json())) == str(result.report)


REPORT = Report(
    0.25,
    0.25,
    (100, 80),
    (400, 320),
    (Line("a.weight", "prunable", 8, 6, 1, "", 0.1, 0.01, 0.2, 0.02, (("b.weight", 0),), (("a", 1),)),),
    ("a note",),
    (Figure("perplexity", 17.5, 22.9, 3),),
    {"my.op": 3},
)


def test_what_a_file_leaves_out_is_unknown() -> None:
    line = dataclasses.replace(REPORT.lines[0], error_cut=None, error_restored=None)
    shown = str(Report.from_json(dataclasses.replace(REPORT, lines=(line,)).to_json())).splitlines()
    assert all("unknown" in line for line in shown[1:3])
    predicted = dataclasses.replace(REPORT, lines=(line,), prediction=Prediction("it", 1.0, "much"))
    assert "cost        predicted rise of it: 1 (much)" in str(predicted).splitlines()


def test_the_columns_are_explained_where_they_hold_something() -> None:
    for line in COLUMNS:
        assert line in str(REPORT)
        assert line not in str(replace(REPORT, lines=()))


def test_a_report_comes_back_from_json() -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT


CONFIG = {"format": "fasp_fx.document/1", "kind": "config"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("sparsity", value) for value in ("0.2", None)),
        *(("bytes", value) for value in (None, [1], [1, 2, 3], [-1, 2], [float("inf"), 2], [10**400, 1])),
        *(("lines", value) for value in ("text", [{}], [[]], [{"name": "a", "before": 10**400}])),
        *(("notes", value) for value in ([3], "text")),
        ("without_rule", {"a": 0.5}),
        ("figures", [{"what": "x", "dense": 1.0, "pruned": 1.0, "digits": 10**9}]),
        *(
            ("config", value)
            for value in (3, {}, [], {**CONFIG, "sparsity": 7}, {**CONFIG, "format": "other"})
        ),
    ],
)
def test_a_damaged_report_is_refused(field: str, value: Any) -> None:
    says = rf"the report is damaged: {'config: ' if field == 'config' else ''}.*save the result again"
    with pytest.raises(fasp_fx.StoreError, match=says):
        Report.from_json(json.dumps({**json.loads(REPORT.to_json()), field: value}))


def test_a_capture_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = made(lambda self, x: x.sin() if bool(x.sum() > 0) else x)
    with pytest.raises(fasp_fx.CaptureError):
        fasp_fx.analyze(model, (torch.ones(3, 4),))
    assert capfd.readouterr() == ("", "")


def test_one_short_line() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)).eval()
    data = [torch.randn(64, 16) for _ in range(4)]
    captured = fasp_fx.capture(model, (data[0],))
    costs = fasp_fx.measure(captured, calibration=data)
    result = fasp_fx.prune(captured, calibration=data, sparsity=0.5)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result.module))
    sparsity = f"{result.report.sparsity:.4f}"
    shown = captured, fasp_fx.analyze(captured), costs, result, result.report, result.plan
    assert list(map(repr, shown)) == [
        "Captured(programs={'': Program(6 weights, inputs=['input'])})",
        "Analysis(2 frozen, 2 prunable)",
        f"Costs(2 curves, score={costs.score!r})",
        f"Result(sparsity={sparsity}, parameters={before:,} -> {after:,})",
        f"Report(sparsity={sparsity}, parameters={before:,} -> {after:,})",
        f"PruningPlan(2 groups, sparsity={sparsity})",
    ]


# --- the report as a page


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
    report = Report(
        0.5,
        None,
        (2, 1),
        (8, 4),
        (line, Line("constructor", "toString", 2, 2, 1, "", producers=(("toString.weight", 0),))),
        (HOSTILE,),
        (Figure(HOSTILE, 1.0, float("inf")),),
        {HOSTILE: 1},
    )
    file = show(replace(report, lines=(*report.lines, replace(line, name=f"a.1.{HOSTILE}"))), HOSTILE)
    file.locator(".bar").first.hover()
    assert all(shown.startswith("</script><img") for shown in (file.title(), file.inner_text("h1")))
    assert file.evaluate(
        "window.hacked === undefined && document.images.length === 0 && document.scripts.length === 2"
    )
    assert file.inner_text("#table").count("onerror='window.hacked=1'") >= 6


# --- progress


@pytest.mark.parametrize("width", [10, 80])
@pytest.mark.parametrize("given", [{}, {"progress": None}, {"progress": False}, {"progress": [].append}])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_drawn_in_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], width: int, is_terminal: bool
) -> None:
    @_progress.shows("pruning")
    def work(progress: _progress.Shown = None) -> None:
        _progress.advance_of(progress)(0.5)

    drawn = io.StringIO()
    console = partial(Console, file=drawn, width=width, force_terminal=is_terminal)
    monkeypatch.setattr(_progress, "Console", lambda stderr, quiet: console(quiet=quiet))
    work(**given)
    assert ("pruning" in drawn.getvalue()) == (is_terminal and given.get("progress") is None)


# --- warnings point at the caller's line


def _ending(end: Callable[[Tensor], Tensor]) -> nn.Module:
    return made(lambda self, x: end(self.inner(x)), inner=Vectors())


def _traced() -> nn.Module:
    """Does something else while it is traced."""
    return _ending(lambda found: found if torch.compiler.is_exporting() else found + 1)


def _forked() -> nn.Module:
    """Is taken in parts."""
    return _ending(lambda found: found if found.sum() > 1e6 else found + 1)


def places(call: Any, *args: Any, **options: Any) -> set[str]:
    """The files that the library's warnings name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args, **options)
    return {
        warning.filename
        for warning in caught
        if issubclass(warning.category, (fasp_fx.CaptureWarning, fasp_fx.CalibrationWarning))
    }


@pytest.mark.parametrize("call", [fasp_fx.capture, fasp_fx.prune], ids=lambda call: call.__name__)
def test_a_capture_that_differs(call: Any) -> None:
    options = {"score": "magnitude", "restore": None} if call is fasp_fx.prune else {}
    assert places(call, _traced(), (X,), **options) == {__file__}


@pytest.mark.parametrize("model", [Vectors(), _forked()], ids=["whole", "in parts"])
def test_too_little_data(model: nn.Module) -> None:
    assert places(fasp_fx.prune, model.eval(), (X,), calibration=[X[:1]], sparsity=0.3) == {__file__}


def test_options_of_a_whole_model_are_refused_where_it_is_taken_in_parts() -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=r"loss=.* needs a model that is captured as a whole"):
        fasp_fx.prune(_forked(), (X,), score="magnitude", restore=None, loss="next-token")
    with pytest.raises(fasp_fx.ExportError):
        fasp_fx.analyze(_forked(), (X,), state=("past",))
    with pytest.raises(fasp_fx.CaptureError, match="captured in parts has no single program"):
        _ = fasp_fx.capture(_forked(), (X,)).program
    with pytest.raises(fasp_fx.CaptureError, match="training mode") as caught:
        fasp_fx.analyze(_forked().train(), (X,), state=("past",))
    assert not isinstance(caught.value, fasp_fx.ExportError)
