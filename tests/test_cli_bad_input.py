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
from pathlib import Path
from typing import Any

import pytest
import torch
from fasp_fx.report import Line
from safetensors.torch import load_file, save_file
from tiny_llama import make_model
from typer.testing import CliRunner, Result

from fasp_fx import Report
from fasp_fx.cli import app

pytestmark = pytest.mark.usefixtures("shared_captures")

SMALL = ["--length", "16", "--batches", "2", "--eval-batches", "1", "--round-to", "1", "--device", "cpu"]
UNDECODABLE = b"caf\xe9".decode("utf-8", "surrogateescape")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts, and things that are neither; tests must not change them."""
    made = tmp_path_factory.mktemp("bad")
    make_model(made / "model", layers=1)
    (made / "text.txt").write_text("A smaller model answers sooner. " * 12, encoding="utf-8")
    (made / "empty.txt").write_bytes(b"")
    (made / "short.txt").write_text("short")
    (made / "latin1.txt").write_bytes("Größe ".encode("latin-1") * 50)
    (made / "binary.txt").write_bytes(bytes(range(256)) * 8)
    with (made / "huge.txt").open("wb") as file:
        file.truncate(40 * 2**30)
    (made / "dangling.txt").symlink_to(made / "nowhere")
    (made / "loop").symlink_to(made / "loop")
    (made / "folder").mkdir()
    os.mkfifo(made / "pipe")
    (made / "empty.gguf").write_bytes(b"")
    (made / "garbage.gguf").write_bytes(b"not a model at all")
    (made / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 2))
    (made / "endless.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + b"\0" * 64)
    (made / "taken").mkdir()
    (made / "taken" / "precious.txt").write_text("mine")
    (made / "mine.html").write_text("mine")
    (made / "questions.jsonl").write_text("not JSON\n")
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
    assert len(said[0]) < 700
    assert not done.stdout
    return said[0]


def placed(base: Path, options: Sequence[str]) -> list[str]:
    """``@`` stands for the folder of the fixture."""
    return [option.replace("@", f"{base}/") for option in options]


# --- options

NUMBERS: dict[str, list[str]] = {
    "--sparsity": ["0", "1", "-1", "1.5", "nan", "inf", "-inf", "1e999", "-0.0"],
    "--round-to": ["0", "-8", str(-(10**30))],
    "--batches": ["0", "-1", str(10**9), str(10**30), str(-(10**30))],
    "--eval-batches": ["0", "-1", str(10**12)],
    "--length": ["0", "1", "-5", str(10**9), str(10**30)],
    "--seed": [str(2**70), str(-(2**70)), str(2**64)],
    "--device": ["toaster", "cuda:99", "meta", "", "cpu:x", "\x1b[31mcpu"],
}
FILES = [
    "@nowhere.txt",
    "",
    " ",
    "@folder",
    "/dev/zero",
    "@pipe",
    "@dangling.txt",
    "@loop",
    f"@{UNDECODABLE}",
    "x" * 5000,
    "@text.txt/below",
    "@huge.txt",
]
TEXTS = ["@empty.txt", "@short.txt", "@latin1.txt", "@binary.txt"]
OUTPUTS = [
    "",
    " ",
    "@taken",
    "@text.txt",
    "@dangling.txt",
    "@loop",
    "@pipe",
    "/dev/null",
    "/dev/null/out",
    "@text.txt/out",
    f"@{UNDECODABLE}",
    "/proc/out",
]
OUTPUTS += ["@" + "x" * 250, "@" + "x" * 300, "@" + "x/" * 3000]
PAGES = [
    "",
    "@mine.html",
    "@folder",
    "/dev/null",
    "@text.txt/page",
    "@loop",
    f"@{UNDECODABLE}",
    "@" + "x" * 300,
]

OPTIONS = [
    *([option, value] for option, values in NUMBERS.items() for value in values),
    *([option, value] for option in ("--calibration", "--text") for value in FILES),
    *(["--html", value] for value in PAGES),
    ["--plain", "--include", "exempt"],
    ["--scratch", "@folder"],
    ["--stream", "--recover", "1"],
    ["--cache-bytes", "0.8", "--dry-run"],
    *(
        ["--scratch", value, "--stream"]
        for value in ("@text.txt", "@text.txt/below", "@pipe", "@loop", f"@{UNDECODABLE}")
    ),
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
    assert options[0] in said or options[0] == "--html" or "device" in said
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


WRONG_KINDS = [
    *(
        ["prune", "@model", "--out", "out", option, value]
        for option in ("--sparsity", "--round-to", "--batches", "--length", "--seed")
        for value in ("a", "", "²")
    ),
    *(
        ["prune", "@model", "--out", "out", option, "1.5"]
        for option in ("--round-to", "--batches", "--eval-batches", "--seed")
    ),
    *(
        ["prune", "@model", "--out", "out", option, value]
        for option in ("--score", "--granularity", "--include", "--dtype")
        for value in ("tasty", "")
    ),
    ["prune", "@model"],
    ["prune", "--out", "out"],
    ["prune", "@model", "more", "--out", "out"],
    ["prune", "@model", "--out"],
    ["prune", "@model", "--out", "out", "--unheard"],
    ["inspect"],
    ["inspect", "@model", "@model"],
    ["inspect", "@model", "--granularity", "neuron"],
    ["inspect", "@model", "--sparsity", "0.2"],
    ["eval"],
    *(
        ["eval", "@model", "--text", "@text.txt", option, "a"]
        for option in ("--length", "--limit", "--batch-size", "--dtype")
    ),
    ["nonsense"],
    ["--nonsense"],
    [""],
]


@pytest.mark.parametrize("arguments", WRONG_KINDS, ids=lambda arguments: " ".join(arguments)[:50])
def test_usage(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Error" in refused(placed(base, arguments), usage=True)
    assert not list(tmp_path.iterdir())


def test_without_arguments_there_is_help() -> None:
    done = invoke()
    assert done.exit_code == 2
    assert "Usage" in done.stdout
    assert all(command in done.stdout for command in ("prune", "inspect", "eval"))


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


EVAL = [
    [],
    *(["--text", "@text.txt", "--length", value] for value in ("0", "1", "-1", str(10**30), "200")),
    *(
        ["--text", "@text.txt", "--chunks", value]
        for value in ("", "5", "a:b", "1:2:3", "9:3", f"{10**30}:", ":-99", "٠:x")
    ),
    *(["--text", value] for value in FILES),
    *(
        ["--text", "@text.txt", option, value]
        for option in ("--limit", "--batch-size")
        for value in ("0", "-1", str(-(10**30)))
    ),
    ["--text", "@text.txt", "--device", "toaster"],
    ["--task", ""],
    ["--task", "@nowhere.jsonl"],
    ["--task", f"@{UNDECODABLE}.jsonl"],
]


@pytest.mark.parametrize(
    "options", EVAL, ids=lambda options: " ".join(options)[:40].encode("unicode_escape").decode() or "nothing"
)
def test_eval(base: Path, options: list[str]) -> None:
    refused(["eval", base / "model", *placed(base, ["--length", "16", "--device", "cpu", *options])])


def test_eval_of_one_model_twice(base: Path) -> None:
    assert "twice" in refused(["eval", base / "model", base / "model", "--text", base / "text.txt"])


# --- models

NO_MODELS = [
    "",
    " ",
    "~nouser",
    "~nouser/model",
    "@nowhere",
    "@text.txt",
    "@folder",
    "@pipe",
    "@loop",
    "@dangling.txt",
    "/dev/null",
    "/dev/zero",
    "./x",
    "a/b/c",
]
NO_MODELS += [
    "x" * 5000,
    f"@{UNDECODABLE}",
    "a\0b",
    "[/]",
    "[bold",
    "no such model",
    "@empty.gguf",
    "@garbage.gguf",
    "@cut.gguf",
    "@endless.gguf",
    "\x1b]0;owned\a",
]


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


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def nested(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


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


def smaller_vocabulary(folder: Path) -> None:
    """A tokenizer with more tokens than the model, the first of a text among them."""
    data = json.loads((folder / "tokenizer.json").read_text())
    text = json.dumps(data).replace('"<s>": 0', '"<s>": 300')
    (folder / "tokenizer.json").write_text(text)
    config(bos_token_id=300, eos_token_id=300)(folder)
    (folder / "generation_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<s>"}))


def index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "../../etc/passwd"}})
    )


DOWN = "model.layers.0.mlp.down_proj.weight"
#: what only the configuration says is refused by every command
CONFIGS: dict[str, Change] = {
    "no config": without("config.json"),
    "empty config": content("config.json", b""),
    "config is not JSON": content("config.json", b"{not JSON"),
    "config is a list": content("config.json", b"[1, 2]"),
    "config is a number": content("config.json", b"7"),
    "config is not UTF-8": content("config.json", b'{"model_type": "\xff\xfe"}'),
    "config is deep": nested,
    "config is a pipe": pipe("config.json"),
    "no kind": config(model_type=None),
    "unknown kind": config(model_type="unheard"),
    "kind is a list": config(model_type=["llama"]),
    "kind with an escape sequence": config(model_type="\x1b[31mred"),
    "a model of images": config(model_type="vit"),
    "no layers": config(num_hidden_layers=0),
    "negative layers": config(num_hidden_layers=-3),
    "a billion layers": config(num_hidden_layers=10**9),
    "a number of layers with 400 digits": config(num_hidden_layers=10**400),
    "layers in words": config(num_hidden_layers="two"),
    "no heads": config(num_attention_heads=0),
    "heads that do not divide": config(num_attention_heads=3, head_dim=None, hidden_size=32),
    "no width": config(hidden_size=-1),
    "a width of 10^12": config(hidden_size=10**12),
    "an unknown activation": config(hidden_act="unheard"),
    "a negative vocabulary": config(vocab_size=-1),
}
#: and this where weights, tokens or text are needed
LOADED: dict[str, Change] = {
    "other widths": config(intermediate_size=64),
    "another vocabulary": config(vocab_size=300),
    "more weights than bytes": config(hidden_size=32_000, intermediate_size=64_000),
    "more layers than stored": config(num_hidden_layers=3),
    "bogus quantisation": config(quantization_config={"quant_method": "unheard", "bits": 3}),
    "quantisation without a method": config(quantization_config={"bits": 4}),
    "no weights": without("model.safetensors"),
    "empty weights": content("model.safetensors", b""),
    "garbage for weights": content("model.safetensors", b"garbage" * 99),
    "endless header": content("model.safetensors", struct.pack("<Q", 2**60) + b"{}"),
    "half of the weights": cut(0.5),
    "nearly all of the weights": cut(0.999),
    "weights are a pipe": pipe("model.safetensors"),
    "shards elsewhere": index,
    "a weight is missing": weights(lambda held: held.pop(DOWN)),
    "the head is missing": weights(lambda held: held.pop("lm_head.weight")),
    "a weight of another shape": weights(lambda held: held.update({DOWN: torch.zeros(3, 3)})),
    "a weight is NaN": weights(lambda held: held[DOWN].fill_(float("nan"))),
    "one value is NaN": weights(lambda held: held[DOWN][3, 4].fill_(float("nan"))),
    "a weight is infinite": weights(lambda held: held[DOWN].fill_(float("inf"))),
    "a weight is minus infinite": weights(lambda held: held[DOWN][0, 0].fill_(float("-inf"))),
    "the head is NaN": weights(lambda held: held["lm_head.weight"].fill_(float("nan"))),
    "weights of 1e30": weights(lambda held: [tensor.fill_(1e30) for tensor in held.values()]),
    "one weight of -1e30": weights(lambda held: held[DOWN][0, 0].fill_(-1e30)),
    "weights of 1e18": weights(lambda held: [tensor.fill_(1e18) for tensor in held.values()]),
    "no tokenizer": (
        lambda folder: (
            [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")] and None
        )
    ),
    "garbage for a tokenizer": content("tokenizer.json", b"\x00\xff garbage"),
    "tokenizer is a pipe": pipe("tokenizer.json"),
}
WRITES: dict[str, Change] = {"text begins with an unknown token": smaller_vocabulary}


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


@pytest.mark.parametrize("name", {**LOADED, **WRITES})
def test_damaged_models(base: Path, tmp_path: Path, name: str) -> None:
    folder = changed(base, tmp_path, {**LOADED, **WRITES}[name])
    text = str(base / "text.txt")
    refused(["prune", folder, "--out", tmp_path / "out", *SMALL])
    if name in LOADED:
        refused(["prune", folder, "--out", tmp_path / "out", *SMALL, "--calibration", text, "--text", text])
    if name in LOADED and name != "weights of 1e18":  # eval says of these that their perplexity is infinite
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


def test_the_nearest_that_is_possible_is_named(base: Path, tmp_path: Path) -> None:
    said = refused(["prune", base / "model", "--out", tmp_path / "out", *SMALL, "--batches", str(10**9)])
    most = int(said.split("use at most --batches ")[1].split(",")[0])
    from fasp_fx.cli._text import WRITTEN, check_amount

    assert (most + 1) * 16 == WRITTEN
    check_amount((most, 1), 16)
    assert str(2**64 - 1) in refused(
        ["prune", base / "model", "--out", tmp_path / "out", *SMALL, "--seed", str(2**70)]
    )


# --- folders that prune wrote

REPORT = Report(
    0.25, 0.25, (100, 80), (400, 320), (Line("a.weight", "prunable", 8, 6, 1, ""),), notes=("a note",)
)


def pruned(folder: Path, change: Callable[[dict[str, Any]], object] = lambda data: None) -> Path:
    """As much of a pruned folder as ``inspect`` reads."""
    folder.mkdir()
    data = json.loads(REPORT.to_json())
    change(data)
    (folder / "report.json").write_text(json.dumps(data))
    (folder / "manifest.json").write_text(json.dumps({"format": "fasp_fx/1", "kind": "hf"}))
    return folder


REPORTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a number of 400 digits": lambda data: data.update(sparsity=10**400),
    "a count of 400 digits": lambda data: data.update(parameters=[10**400, 1]),
    "a line of 400 digits": lambda data: data["lines"][0].update(before=10**400),
    "seconds of 400 digits": lambda data: data.update(seconds={"capture": 10**400}),
    "text for a number": lambda data: data.update(sparsity="much"),
    "a number for text": lambda data: data.update(notes=[7]),
    "a list for a report line": lambda data: data.update(lines=[[]]),
    "a missing field": lambda data: data.pop("bytes"),
    "negative counts": lambda data: data.update(bytes=[-1, 2]),
    "infinite counts": lambda data: data.update(bytes=[float("inf"), 2]),
    "three for two": lambda data: data.update(bytes=[1, 2, 3]),
    "too many digits": lambda data: data.update(
        figures=[{"what": "x", "dense": 1.0, "pruned": 1.0, "digits": 10**9}]
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_reports(tmp_path: Path, name: str) -> None:
    folder = pruned(tmp_path / "small", REPORTS[name])
    for options in ([], ["--json"], ["--html", tmp_path / "page.html"]):
        assert "report.json is damaged" in refused(["inspect", folder, *options])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"\xff", b"[" * 200_000, b'{"sparsity": ' + b"9" * 5000 + b"}"]
)
def test_reports_that_are_none(tmp_path: Path, data: bytes) -> None:
    folder = pruned(tmp_path / "small")
    (folder / "report.json").write_bytes(data)
    assert "report.json" in refused(["inspect", folder])
    (folder / "report.json").unlink()
    assert "report.json" in refused(["inspect", folder])


def test_pruned_folders_that_are_pruned_or_asked_again(base: Path, tmp_path: Path) -> None:
    folder = pruned(tmp_path / "small")
    assert "pruned already" in refused(["inspect", folder, "--granularity", "head"])
    assert "--dtype" in refused(["eval", folder, "--text", base / "text.txt", "--dtype", "float16"])
    refused(["eval", folder, "--text", base / "text.txt"])
    refused(["prune", folder, "--out", tmp_path / "out", *SMALL])
    assert [child.name for child in tmp_path.iterdir()] == ["small"]


ORDER = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egone"


def test_orders_to_the_terminal_are_shown_and_not_sent(tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["notes"] = [ORDER]
        data["lines"][0].update(name=ORDER, reason=ORDER, status=ORDER)
        data["figures"] = [{"what": ORDER, "dense": 1.0, "pruned": 2.0, "digits": 1}]

    done = invoke("inspect", pruned(tmp_path / "small", change))
    assert done.exit_code == 0, done.output
    assert r"\x1b]0;owned\a\x1b[2J\r\x9b31m\u202egone" in done.stdout
    assert not set(done.stdout) & set("\x1b\x07\r\x9b\u202e")


def test_names_in_tables_are_shown_as_they_are() -> None:
    from fasp_fx.report import Figure
    from rich.console import Console

    from fasp_fx.cli._tables import figures_table, scores_table

    console = Console(width=160)
    with console.capture() as said:
        console.print(figures_table([Figure(f"[/]{ORDER}", 1.0, 2.0)]))
        console.print(scores_table(["[red]", "[/]"], [(ORDER, ["1", "2"], "+1")]))
    shown = said.get()
    assert "[red]" in shown
    assert shown.count("[/]") == 2
    assert r"\x1b]0;owned" in shown
    assert not set(shown) & set("\x1b\x07\r\x9b\u202e")
