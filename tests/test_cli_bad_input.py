"""Whatever the command line is given, it works or says in one line what is wrong: exit code 2, no traceback,
nothing left behind.

Nothing here is pruned: every case has to be refused before or while the model is read.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from models import make_model
from safetensors.torch import load_file, save_file
from saved import GOLDEN
from typer.testing import CliRunner, Result

from fasp_fx import Report
from fasp_fx.cli._app import app
from fasp_fx.pruning import Figure, Line
from fasp_fx.storage import write_manifest

SMALL = ["--length", "16", "--batches", "2", "--eval-batches", "1", "--device", "cpu"]
PRUNE, EVAL = ["prune", "@model", "--out", "out", *SMALL], ["eval", "@model", "--length", "16"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts, and things that are neither; tests must not change them."""
    made = tmp_path_factory.mktemp("bad")
    make_model(made / "model", layers=1)
    (made / "taken").mkdir()
    for name, data in {
        "text.txt": b"A smaller model answers sooner. " * 12,
        "short.txt": b"short",
        "latin1.txt": "Größe ".encode("latin-1") * 50,
        "garbage.gguf": b"not a model at all",
        "cut.gguf": b"GGUF" + struct.pack("<IQQ", 3, 2, 2),
        "taken/precious.txt": b"mine",
        "mine.html": b"mine",
    }.items():
        (made / name).write_bytes(data)
    (made / "small").mkdir()
    for name in ("small/model.gguf", "many.gguf"):
        writer = gguf.GGUFWriter(made / name, "llama")
        writer.add_uint64("llama.block_count", 9_000_000_000)
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    write_manifest(made / "small", "plain")
    shutil.copytree(made / "model", made / "changed")
    for name in ("plan.json", "report.json"):
        shutil.copy(GOLDEN / "plain" / name, made / "changed")
    write_manifest(made / "changed", "plain")
    weights(lambda held: held[DOWN].mul_(2))(made / "changed")
    return made


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline, in an empty folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(base: Path, arguments: Sequence[str], *, usage: bool = False) -> str:
    """The error of a command, which must be one line; what the parser of the arguments refuses is drawn in a
    box. ``@`` stands for the folder of the fixture.
    """
    done = invoke(*(argument.replace("@", f"{base}/") for argument in arguments))
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


#: what the parser of the arguments says
WRONG_KINDS = [
    *([*PRUNE, option, "a"] for option in ("--sparsity", "--round-to", "--batches", "--score", "--dtype")),
    *([*PRUNE, option, "0"] for option in ("--batches", "--length")),
    *([*command, option, "nowhere.txt"] for command, option in ((PRUNE, "--text"), (EVAL, "--text"))),
    [*PRUNE, "--config", "@taken"],
    ["prune", "@model"],
    ["prune", "--out", "out"],
    [*PRUNE, "--unheard"],
    ["inspect"],
    EVAL,
    ["nonsense"],
]


@pytest.mark.parametrize("arguments", WRONG_KINDS, ids=lambda arguments: " ".join(arguments)[-50:])
def test_usage(base: Path, tmp_path: Path, arguments: list[str]) -> None:
    assert "Error" in refused(base, arguments, usage=True)
    assert not list(tmp_path.iterdir())


#: commands, and a part of what is said
REFUSED = {
    "is not in (0, 1)": [
        *([*PRUNE, "--sparsity", value] for value in ("0", "1", "-1", "nan", "1e999")),
    ],
    "round_to": [[*PRUNE, "--round-to", "0"]],
    "drift": [[*PRUNE, "--drift", "2"]],
    "granularity": [[*PRUNE, "--granularity", "neuron"]],
    "device": [[*PRUNE, "--device", value] for value in ("toaster", "cuda:99", "meta", "")],
    "JSON": [[*PRUNE, "--config", "@text.txt"]],
    "no amount": [[*PRUNE, "--parameters", "much"]],
    "--recover trains": [[*PRUNE, "--stream", "--recover", "1"]],
    "nowhere.txt": [[*PRUNE, "--calibration", "@nowhere.txt"]],
    "short.txt": [
        [*PRUNE, "--calibration", "@short.txt"],
        [*EVAL, "--text", "@short.txt"],
    ],
    "not UTF-8": [[*PRUNE, "--calibration", "@latin1.txt"], [*EVAL, "--text", "@latin1.txt"]],
    "did not write": [["inspect", "@model", "--html", "@mine.html"]],
    "exists; choose another path, or pass --overwrite to": [[*PRUNE, "--out", "@taken"]],
    "was written for llama.cpp": [
        ["eval", "@small/model.gguf", *EVAL[2:], "--text", "@text.txt"],
        ["prune", "@small/model.gguf", *PRUNE[2:]],
        ["inspect", "@small/model.gguf"],
    ],
    "holds weights of 1 layers, and its configuration says [9000000000]": [
        ["eval", "@many.gguf", *EVAL[2:], "--text", "@text.txt"],
        ["prune", "@many.gguf", *PRUNE[2:]],
        ["inspect", "@many.gguf"],
    ],
    "model.safetensors was changed": [
        ["eval", "@changed", *EVAL[2:], "--text", "@text.txt"],
        ["prune", "@changed", *PRUNE[2:]],
        ["prune", "@changed", *PRUNE[2:], "--stream"],
        ["convert", "@changed", "--out", "out", "--format", "per-layer"],
        ["recover", "@changed", "--dense", "@model", "--out", "out"],
    ],
    "is not replaced": [
        [*PRUNE, "--out", value, "--overwrite", *plain]
        for value in ("@taken", "@text.txt", "/dev/null")
        for plain in ([], ["--format", "plain"])
    ],
    "cannot be": [[*PRUNE, "--out", value] for value in ("@text.txt/out", "/proc/out", "@" + "x" * 250)],
    "positions": [[*EVAL, "--length", "200", "--text", "@text.txt"]],
    "is not a range": [[*EVAL, "--text", "@text.txt", "--chunks", value] for value in ("", "5", "a:b")],
    "holds none": [[*EVAL, "--text", "@text.txt", "--chunks", "9:3"]],
    "cannot be loaded": [
        command
        for model in (
            "@nowhere",
            "@taken",
            "@text.txt",
            "@garbage.gguf",
            "@cut.gguf",
            "a/b/c",
            "\x1b]0;owned",
        )
        for command in (
            ["inspect", model],
            ["prune", model, *PRUNE[2:]],
            ["eval", model, *EVAL[2:], "--text", "@text.txt"],
        )
    ],
}


@pytest.mark.parametrize(
    ("says", "arguments"),
    [(says, arguments) for says, cases in REFUSED.items() for arguments in cases],
    ids=lambda value: (
        (value if isinstance(value, str) else " ".join(value)[-40:]).encode("unicode_escape").decode()
    ),
)
def test_requests_that_cannot_be_met(base: Path, tmp_path: Path, says: str, arguments: list[str]) -> None:
    before = sorted(base.rglob("*"))
    assert says in refused(base, arguments)
    assert not list(tmp_path.iterdir())
    assert sorted(base.rglob("*")) == before
    assert (base / "mine.html").read_text() == "mine"


# --- models

Change = Callable[[Path], object]


def config(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **fields}))

    return change


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def content(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def write(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return write


DOWN = "model.layers.0.mlp.down_proj.weight"
#: a part of what is said, and what is changed of a model, which every command refuses
CONFIGS: dict[str, tuple[str, Change]] = {
    "no config": ("cannot be loaded", without("config.json")),
    "config is not JSON": ("cannot be loaded", content("config.json", b"{not JSON")),
    "unknown kind": ("unheard", config(model_type="unheard")),
    "a model of images": ("cannot be loaded", config(model_type="vit")),
    "no heads": ("cannot be loaded", config(num_attention_heads=0)),
    "a size that none has": ('"hidden_size": 1099511627776', config(hidden_size=2**40)),
    "endless layers": ('"num_hidden_layers": 9000000000', config(num_hidden_layers=9_000_000_000)),
}
#: and this where weights, tokens or text are needed
LOADED: dict[str, tuple[str, Change]] = {
    "other widths": ("lacks the weights", config(intermediate_size=64)),
    "another vocabulary": ("lacks the weights", config(vocab_size=300)),
    "more layers than stored": ("lacks the weights", config(num_hidden_layers=3)),
    "bogus quantisation": (
        "quantisation",
        config(quantization_config={"quant_method": "unheard", "bits": 3}),
    ),
    "no weights": ("cannot be loaded", without("model.safetensors")),
    "endless header": ("", content("model.safetensors", struct.pack("<Q", 2**60) + b"{}")),
    "a weight is missing": (DOWN, weights(lambda held: held.pop(DOWN))),
    "one value is NaN": ("not finite", weights(lambda held: held[DOWN][3, 4].fill_(float("nan")))),
    "no tokenizer": ("the tokenizer of", without("tokenizer.json", "tokenizer_config.json")),
}


@pytest.mark.parametrize("name", [*CONFIGS, *LOADED])
def test_damaged_models(base: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(base / "model", tmp_path / "model")
    says, change = {**CONFIGS, **LOADED}[name]
    change(tmp_path / "model")
    commands = [["prune", "model", *PRUNE[2:]], ["prune", "model", *PRUNE[2:], "--calibration", "@text.txt"]]
    if name in CONFIGS:
        commands = [commands[0], ["inspect", "model"], ["eval", "model", *EVAL[2:], "--text", "@text.txt"]]
    for command in commands:
        assert says in refused(base, command)
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_weights_of_more_layers_than_the_configuration_says(base: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model", layers=2)
    config(num_hidden_layers=1)(tmp_path / "model")
    for options in ([], ["--stream"]):
        said = refused(base, ["prune", "model", *PRUNE[2:], *options])
        assert "weights of more layers than its configuration says (model.layers.1." in said


# --- folders that prune wrote

REPORT = Report(
    0.25, 0.25, (100, 80), (400, 320), (Line("a.weight", "prunable", 8, 6, 1, ""),), notes=("a note",)
)


def pruned(folder: Path, report: Report = REPORT) -> Path:
    """As much of a pruned folder as ``inspect`` reads."""
    folder.mkdir()
    (folder / "report.json").write_text(report.to_json())
    write_manifest(folder, "hf")
    return folder


@pytest.mark.parametrize("data", [b"{", None])
def test_reports_that_are_none(base: Path, tmp_path: Path, data: bytes | None) -> None:
    file = pruned(tmp_path / "small") / "report.json"
    file.unlink()
    if data is not None:
        file.write_bytes(data)
    assert "report" in refused(base, ["inspect", "small", "--html", "page.html"])
    assert not (tmp_path / "page.html").exists()


ORDER = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egone"


def test_orders_to_the_terminal_are_shown_and_not_sent(tmp_path: Path) -> None:
    from fasp_fx.cli._console import console, table

    line, figure = Line(ORDER, ORDER, 8, 6, 1, ORDER), Figure(ORDER, 1.0, 2.0)
    report = replace(REPORT, notes=(ORDER,), lines=(line,), figures=(figure,))
    done = invoke("inspect", pruned(tmp_path / "small", report))
    assert done.exit_code == 0, done.output
    assert r"\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egone" in done.stdout
    shown_on = console()
    with shown_on.capture() as said:
        shown_on.print(table(["[red]", "[/]"], [(f"[/]{ORDER}", "2")]))
    assert "[red]" in said.get()
    assert not set(done.stdout + said.get()) & set("\x1b\x07\r\x9b\u202e")
