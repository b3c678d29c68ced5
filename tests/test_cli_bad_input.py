"""Whatever the command line is given, it works or says in one line what is wrong: exit code 2, no traceback,
nothing left behind.

Nothing here is pruned: every case has to be refused before or while the model is read.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fasp_fx.report import Figure, Line
from safetensors.torch import load_file, save_file
from tiny_llama import make_model
from typer.testing import CliRunner, Result

from fasp_fx import Report
from fasp_fx.cli._app import app

pytestmark = pytest.mark.usefixtures("shared_captures")

SMALL = ["--length", "16", "--batches", "2", "--eval-batches", "1", "--device", "cpu"]
UNDECODABLE = b"caf\xe9".decode("utf-8", "surrogateescape")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts, and things that are neither; tests must not change them."""
    made = tmp_path_factory.mktemp("bad")
    make_model(made / "model", layers=1)
    (made / "folder").mkdir()
    (made / "taken").mkdir()
    for name, data in {
        "text.txt": b"A smaller model answers sooner. " * 12,
        "empty.txt": b"",
        "short.txt": b"short",
        "latin1.txt": "Größe ".encode("latin-1") * 50,
        "binary.txt": bytes(range(256)) * 8,
        "empty.gguf": b"",
        "garbage.gguf": b"not a model at all",
        "cut.gguf": b"GGUF" + struct.pack("<IQQ", 3, 2, 2),
        "endless.gguf": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + b"\0" * 64,
        "taken/precious.txt": b"mine",
        "mine.html": b"mine",
    }.items():
        (made / name).write_bytes(data)
    with (made / "huge.txt").open("wb") as file:
        file.truncate(40 * 2**30)
    (made / "dangling.txt").symlink_to(made / "nowhere")
    (made / "loop").symlink_to(made / "loop")
    os.mkfifo(made / "pipe")
    return made


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(arguments: Sequence[str | Path], *, usage: bool = False) -> str:
    """The error of a command, which must be one line; what the parser of the arguments refuses is drawn in a
    box.
    """
    done = invoke(*arguments)
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    assert "\x1b" not in done.output
    if usage:
        return done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("fasp-fx: error: ")]
    assert len(said) == 1, done.output
    assert done.stderr.rstrip().endswith(said[0])
    assert len(said[0]) < 800
    assert not done.stdout
    return said[0]


def placed(base: Path, options: Sequence[str]) -> list[str]:
    """``@`` stands for the folder of the fixture."""
    return [option.replace("@", f"{base}/") for option in options]


# --- options

#: below what makes sense, which the parser of the arguments says, as it says of what is no number
SMALL_NUMBERS = {
    "prune": {"--batches": 0, "--eval-batches": -1, "--length": 1, "--seed": 2**64, "--recover": -1},
    "eval": {"--length": 1, "--limit": 0, "--batch-size": 0},
}
NUMBERS: dict[str, list[str]] = {
    "--sparsity": ["0", "1", "-1", "nan", "inf", "1e999", "-0.0"],
    "--round-to": ["0", "-8", str(-(10**30))],
    "--drift": ["2"],
    "--device": ["toaster", "cuda:99", "meta", "", "\x1b[31mcpu"],
}
FILES = ["@nowhere.txt", "", " ", "@folder", "/dev/zero", "@pipe", "@dangling.txt", "@loop"]
FILES += [f"@{UNDECODABLE}", "x" * 5000, "@text.txt/below", "@huge.txt"]
TEXTS = ["@empty.txt", "@short.txt", "@latin1.txt", "@binary.txt"]
OUTPUTS = ["", " ", "@taken", "@text.txt", "@dangling.txt", "@loop", "@pipe", "/dev/null", "/dev/null/out"]
OUTPUTS += ["@text.txt/out", f"@{UNDECODABLE}", "/proc/out", "@" + "x" * 250, "@" + "x/" * 3000]
PAGES = ["", "@mine.html", "@folder", "/dev/null", "@text.txt/page", "@loop", f"@{UNDECODABLE}"]

OPTIONS = [
    *([option, value] for option, values in NUMBERS.items() for value in values),
    *([option, value] for option in ("--calibration", "--text") for value in FILES),
    *(["--html", value] for value in PAGES),
    ["--plain", "--include", "exempt"],
    ["--granularity", "neuron"],
    ["--config", "@text.txt"],
    ["--parameters", "much"],
    ["--scratch", "@folder"],
    ["--stream", "--recover", "1"],
    ["--cache-bytes", "0.8", "--dry-run"],
    ["--scratch", f"@{UNDECODABLE}", "--stream"],
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: " ".join(options)[:40].encode("unicode_escape").decode()
)
def test_options_are_refused_before_anything_is_loaded(
    base: Path, tmp_path: Path, options: list[str]
) -> None:
    said = refused(
        ["prune", base / "model", "--out", tmp_path / "deep" / "out", *SMALL, *placed(base, options)]
    )
    assert options[0] in said or options[0] in ("--html", "--config") or "device" in said
    assert not list(tmp_path.iterdir())
    assert (base / "mine.html").read_text() == "mine"


@pytest.mark.parametrize("out", OUTPUTS, ids=lambda out: out[:30].encode("unicode_escape").decode())
@pytest.mark.parametrize(
    "how", [[], ["--overwrite"], ["--plain", "--overwrite"]], ids=["new", "overwrite", "plain"]
)
def test_folders_that_cannot_be_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, how: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(base.rglob("*"))
    refused(["prune", base / "model", "--out", *placed(base, [out]), *SMALL, *how])
    assert not list(tmp_path.iterdir())
    assert sorted(base.rglob("*")) == before


PRUNE, EVAL = ["prune", "@model", "--out", "out"], ["eval", "@model", "--text", "@text.txt"]
WRONG_KINDS = [
    *([*PRUNE, option, "a"] for option in ("--sparsity", "--round-to", "--batches", "--score", "--dtype")),
    *([*PRUNE, "--batches", value] for value in ("1.5", "", "²")),
    *([*PRUNE, option, str(value)] for option, value in SMALL_NUMBERS["prune"].items()),
    *([*EVAL, option, str(value)] for option, value in SMALL_NUMBERS["eval"].items()),
    ["prune", "@model"],
    ["prune", "--out", "out"],
    ["prune", "@model", "more", "--out", "out"],
    [*PRUNE, "--unheard"],
    ["inspect"],
    ["inspect", "@model", "--sparsity", "0.2"],
    ["eval"],
    ["nonsense"],
    [""],
]


@pytest.mark.parametrize("arguments", WRONG_KINDS, ids=lambda arguments: " ".join(arguments)[:50])
def test_usage(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Error" in refused(placed(base, arguments), usage=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "command",
    [
        ["prune", "--out", "out", *SMALL, "--calibration"],
        ["eval", "--device", "cpu", "--length", "16", "--text"],
    ],
)
def test_texts_that_hold_nothing_to_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(text[1:]).name in refused([command[0], base / "model", *command[1:], *placed(base, [text])])
    assert not list(tmp_path.iterdir())


EVALUATIONS = [
    [],
    ["--text", "@text.txt", "--length", "200"],
    *(["--text", "@text.txt", "--chunks", v] for v in ("", "5", "a:b", "1:2:3", "9:3", f"{10**30}:", ":-99")),
    *(["--text", value] for value in FILES),
    ["--text", "@text.txt", "--device", "toaster"],
    ["--text", "@text.txt", "@model"],
    ["--task", ""],
    ["--task", f"@{UNDECODABLE}.yaml"],
]


@pytest.mark.parametrize(
    "options", EVALUATIONS, ids=lambda options: " ".join(options)[:40].encode("unicode_escape").decode()
)
def test_eval(base: Path, options: list[str]) -> None:
    refused(["eval", base / "model", *placed(base, ["--length", "16", "--device", "cpu", *options])])


# --- models

NO_MODELS = ["", " ", "~nouser/model", "@nowhere", "@text.txt", "@folder", "@pipe", "@loop", "@dangling.txt"]
NO_MODELS += ["/dev/null", "./x", "a/b/c", "x" * 5000, f"@{UNDECODABLE}", "a\0b", "[/]", "no such model"]
NO_MODELS += ["@empty.gguf", "@garbage.gguf", "@cut.gguf", "@endless.gguf", "\x1b]0;owned\a"]


@pytest.mark.parametrize("model", NO_MODELS, ids=lambda model: model[:30].encode("unicode_escape").decode())
def test_what_is_no_model(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    (given,) = placed(base, [model])
    for command in (
        ["inspect", given],
        ["prune", given, "--out", "out", *SMALL],
        ["eval", given, "--text", str(base / "text.txt"), "--length", "16"],
    ):
        refused(command)
    assert not list(tmp_path.iterdir())


Change = Callable[[Path], None]


def config(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **fields}))

    return change


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def content(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data) and None


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def write(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return write


def cut(share: float) -> Change:
    def change(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: int(len(data) * share)])

    return change


DOWN = "model.layers.0.mlp.down_proj.weight"
#: what only the configuration says is refused by every command
CONFIGS: dict[str, Change] = {
    "no config": without("config.json"),
    "config is not JSON": content("config.json", b"{not JSON"),
    "config is a list": content("config.json", b"[1, 2]"),
    "config is deep": content("config.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "unknown kind": config(model_type="unheard"),
    "kind with an escape sequence": config(model_type="\x1b[31mred"),
    "a model of images": config(model_type="vit"),
    "no layers": config(num_hidden_layers=0),
    "negative layers": config(num_hidden_layers=-3),
    "a billion layers": config(num_hidden_layers=10**9),
    "a number of layers with 400 digits": config(num_hidden_layers=10**400),
    "no heads": config(num_attention_heads=0),
    "no width": config(hidden_size=-1),
    "a width of 10^12": config(hidden_size=10**12),
}
#: and this where weights, tokens or text are needed
LOADED: dict[str, Change] = {
    "other widths": config(intermediate_size=64),
    "another vocabulary": config(vocab_size=300),
    "more weights than bytes": config(hidden_size=32_000, intermediate_size=64_000),
    "more layers than stored": config(num_hidden_layers=3),
    "bogus quantisation": config(quantization_config={"quant_method": "unheard", "bits": 3}),
    "no weights": without("model.safetensors"),
    "endless header": content("model.safetensors", struct.pack("<Q", 2**60) + b"{}"),
    "half of the weights": cut(0.5),
    "a weight is missing": weights(lambda held: held.pop(DOWN)),
    "a weight of another shape": weights(lambda held: held.update({DOWN: torch.zeros(3, 3)})),
    "one value is NaN": weights(lambda held: held[DOWN][3, 4].fill_(float("nan"))),
    "a weight is infinite": weights(lambda held: held[DOWN].fill_(float("inf"))),
    "weights of 1e30": weights(lambda held: [tensor.fill_(1e30) for tensor in held.values()]),
    "weights of 1e18": weights(lambda held: [tensor.fill_(1e18) for tensor in held.values()]),
    "no tokenizer": (
        lambda folder: (
            [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")] and None
        )
    ),
    "garbage for a tokenizer": content("tokenizer.json", b"\x00\xff garbage"),
}


def changed(base: Path, tmp_path: Path, change: Change) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(base / "model", folder)
    change(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(base: Path, tmp_path: Path, name: str) -> None:
    folder = changed(base, tmp_path, CONFIGS[name])
    text = str(base / "text.txt")
    for command in (
        ["inspect"],
        ["prune", "--out", str(tmp_path / "out"), *SMALL],
        ["eval", "--text", text, "--length", "16"],
    ):
        refused([command[0], folder, *command[1:]])
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", LOADED)
def test_damaged_models(base: Path, tmp_path: Path, name: str) -> None:
    folder = changed(base, tmp_path, LOADED[name])
    text = str(base / "text.txt")
    refused(["prune", folder, "--out", tmp_path / "out", *SMALL])
    refused(["prune", folder, "--out", tmp_path / "out", *SMALL, "--calibration", text, "--text", text])
    if name != "weights of 1e18":  # eval says of these that their perplexity is infinite
        refused(["eval", folder, "--text", text, "--length", "16", "--device", "cpu"])
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_missing_weights_are_named(base: Path, tmp_path: Path) -> None:
    folder = changed(base, tmp_path, LOADED["a weight is missing"])
    assert DOWN in refused(["prune", folder, "--out", tmp_path / "out", *SMALL])
    again = changed(base, tmp_path / "nan", LOADED["one value is NaN"])
    assert f"'{DOWN}'" in refused(["prune", again, "--out", tmp_path / "out", *SMALL])


def test_weights_of_more_layers_than_the_configuration_says(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model(folder, layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    for options in ([], ["--stream"]):
        said = refused(["prune", folder, "--out", tmp_path / "out", *SMALL, *options])
        assert "weights of more layers than its configuration says (model.layers.1." in said


@pytest.mark.parametrize("option", ["--html", "--checkpoint"])
def test_paths_inside_of_the_output(base: Path, tmp_path: Path, option: str) -> None:
    out = tmp_path / "out"
    for path in (out, out / "inside"):
        assert "lies in --out" in refused(["prune", base / "model", "--out", out, *SMALL, option, path])
    assert not list(tmp_path.iterdir())


def test_a_text_too_short_to_hold_some_out_is_refused_before_anything_is_pruned(
    base: Path, tmp_path: Path
) -> None:
    text = tmp_path / "one.txt"
    text.write_text("A smaller model answers")
    said = refused(
        ["prune", base / "model", "--out", tmp_path / "out", *SMALL, "--calibration", text, "--recover", "1"]
    )
    assert "holds a single chunk" in said
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


# --- folders that prune wrote

REPORT = Report(
    0.25, 0.25, (100, 80), (400, 320), (Line("a.weight", "prunable", 8, 6, 1, ""),), notes=("a note",)
)


def pruned(folder: Path, report: Report = REPORT) -> Path:
    """As much of a pruned folder as ``inspect`` reads."""
    folder.mkdir()
    (folder / "report.json").write_text(report.to_json())
    (folder / "manifest.json").write_text(json.dumps({"format": "fasp_fx/1", "kind": "hf"}))
    return folder


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 200_000, b'{"sparsity": "much"}', None])
def test_reports_that_are_none(tmp_path: Path, data: bytes | None) -> None:
    file = pruned(tmp_path / "small") / "report.json"
    file.unlink()
    if data is not None:
        file.write_bytes(data)
    for options in ([], ["--json"], ["--html", tmp_path / "page.html"]):
        assert "report" in refused(["inspect", file.parent, *options])
    assert not (tmp_path / "page.html").exists()


def test_pruned_folders_that_are_pruned_or_asked_again(base: Path, tmp_path: Path) -> None:
    folder = pruned(tmp_path / "small")
    assert "pruned already" in refused(["inspect", folder, "--granularity", "head"])
    assert "--dtype" in refused(["eval", folder, "--text", base / "text.txt", "--dtype", "float16"])
    refused(["eval", folder, "--text", base / "text.txt"])
    refused(["prune", folder, "--out", tmp_path / "out", *SMALL])
    assert [child.name for child in tmp_path.iterdir()] == ["small"]


ORDER = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egone"


def test_orders_to_the_terminal_are_shown_and_not_sent(tmp_path: Path) -> None:
    line, figure = Line(ORDER, ORDER, 8, 6, 1, ORDER), Figure(ORDER, 1.0, 2.0)
    report = replace(REPORT, notes=(ORDER,), lines=(line,), figures=(figure,))
    done = invoke("inspect", pruned(tmp_path / "small", report))
    assert done.exit_code == 0, done.output
    assert r"\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egone" in done.stdout
    assert not set(done.stdout) & set("\x1b\x07\r\x9b\u202e")


def test_names_in_tables_are_shown_as_they_are() -> None:
    from fasp_fx.cli._console import console, table

    shown_on = console()
    with shown_on.capture() as said:
        shown_on.print(table(["[red]", "[/]"], [(f"[/]{ORDER}", "2")]))
    shown = said.get()
    assert "[red]" in shown
    assert shown.count("[/]") == 2
    assert r"\x1b]0;owned" in shown
    assert not set(shown) & set("\x1b\x07\r\x9b\u202e")
