"""The command line on a tiny Llama with a byte-level tokenizer."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import questions
import torch
from fasp_fx.evaluation import TaskScore
from tiny_llama import make_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import fasp_fx
from fasp_fx.cli import _models, _prune_command, app
from fasp_fx.cli._saved import load_saved
from fasp_fx.cli._texts import Texts, Wanted
from fasp_fx.errors import ArgumentError
from fasp_fx.hf._plain_folder import read_plain

pytestmark = pytest.mark.usefixtures("shared_captures")

LENGTH = 32
SMALL = [
    "--length",
    str(LENGTH),
    "--batches",
    "4",
    "--eval-batches",
    "3",
    "--round-to",
    "1",
    "--device",
    "cpu",
]


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    make_model(made / "model")
    (made / "text.txt").write_text("Größe matters: a smaller model answers sooner. " * 12, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def from_file(folder: Path) -> tuple[Path, Result]:
    """A model pruned with a calibration file, and what the command printed."""
    out = folder / "from_file"
    page = folder / "pages" / "pruned.html"
    return out, _invoke(
        "prune",
        folder / "model",
        "--calibration",
        folder / "text.txt",
        "--text",
        folder / "text.txt",
        "--out",
        out,
        "--html",
        page,
        *SMALL,
    )


def _chunks(folder: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder / "model")(
        (folder / "text.txt").read_text(encoding="utf-8"), add_special_tokens=False
    )["input_ids"]
    count = len(tokens) // LENGTH
    return torch.tensor(tokens[: count * LENGTH]).reshape(count, LENGTH)


def _perplexity(model: Callable[..., Any], chunks: torch.Tensor) -> float:
    with torch.no_grad():
        losses = [
            functional.cross_entropy(
                model(input_ids=chunk[None], use_cache=False).logits[0, :-1], chunk[1:]
            ).item()
            for chunk in chunks
        ]
    return math.exp(sum(losses) / len(losses))


def _refused(done: Result) -> str:
    """The message of a command that was refused: exit code 2, one line, nothing else on the error stream but
    finished stages.
    """
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert done.stderr.rstrip().endswith(lines[0])
    return lines[0]


# --- prune


def test_prune_from_file(from_file: tuple[Path, Result], folder: Path) -> None:
    out, done = from_file
    assert done.exit_code == 0, done.output
    assert "2 x prunable" in done.stdout
    assert "gate_proj, up_proj -> down_proj" in done.stdout
    for row in ("parameters", "bytes", "milliseconds", "perplexity on chunks 4 to 6 of text.txt"):
        assert row in done.stdout
    assert f'AutoModelForCausalLM.from_pretrained("{out}")' in done.stdout
    assert "bytes of cache per token" in done.stdout
    dense = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    pruned = AutoModelForCausalLM.from_pretrained(out)
    assert pruned.report.parameters == (dense.num_parameters(), sum(p.numel() for p in pruned.parameters()))
    assert abs(pruned.report.sparsity - 0.2) < 0.02
    row = next(line for line in done.stdout.splitlines() if "perplexity on" in line)
    shown = [float(cell) for cell in row.replace("│", "|").split("|")[2:4]]
    held_out = _chunks(folder)[4:7]
    expected = [_perplexity(dense, held_out), _perplexity(pruned, held_out)]
    assert shown == pytest.approx(expected, rel=1e-3, abs=1e-3)
    milliseconds, measured = pruned.report.figures
    assert "milliseconds" in milliseconds.what
    assert [measured.dense, measured.pruned] == pytest.approx(expected, rel=1e-4)


def test_prune_with_the_weights_in_files(
    from_file: tuple[Path, Result], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasp_fx.base.offload._scratch.SMALLEST", 1)
    text = ("--calibration", folder / "text.txt", "--text", folder / "text.txt")
    done = _invoke(
        "prune",
        folder / "model",
        *text,
        "--out",
        tmp_path / "out",
        *SMALL,
        "--stream",
        "--scratch",
        tmp_path / "scratch",
    )
    assert done.exit_code == 0, done.output
    found, expected = (
        AutoModelForCausalLM.from_pretrained(where) for where in (tmp_path / "out", from_file[0])
    )
    assert found.plan == expected.plan
    assert all(
        torch.equal(found.get_parameter(name), parameter) for name, parameter in expected.named_parameters()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"], (
        "the folder that was made for the files goes when it is empty"
    )


def test_a_model_that_does_not_fit_is_kept_in_files_by_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = psutil.virtual_memory()._replace(available=100_000)
    monkeypatch.setattr("fasp_fx.cli._prune_command.psutil.virtual_memory", lambda: there)
    kept: list[bool] = []

    def noted(source: Any, **options: Any) -> Any:
        kept.append(options["scratch"] is not None)
        raise ArgumentError("enough")

    monkeypatch.setattr(_models, "load_model", noted)
    for option, is_kept in (([], True), (["--recover", "1"], False)):
        done = _invoke("prune", folder / "model", "--out", tmp_path / "out", *SMALL, *option)
        assert done.exit_code == 2
        assert ("weights are kept in files" in " ".join(done.stderr.split())) is is_kept
    assert kept == [True, False]


def test_prune_by_itself(folder: Path, tmp_path: Path) -> None:
    first = _invoke("prune", folder / "model", "--out", tmp_path / "out", *SMALL)
    assert first.exit_code == 0, first.output
    assert (
        "perplexity on text that the model wrote itself, not seen by this calibration (3 x 32 tokens)"
        in first.stdout
    )
    again = _invoke("prune", folder / "model", "--out", tmp_path / "out", *SMALL, "--overwrite")
    assert again.exit_code == 0, again.output
    # The width of a column follows the measured latencies, so only the words are compared.
    rows = [
        [line.split() for line in done.stdout.splitlines() if "perplexity" in line] for done in (first, again)
    ]
    assert rows[0] == rows[1]  # the same seed writes the same text
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_prune_without_repair_by_magnitude(folder: Path, tmp_path: Path) -> None:
    done = _invoke(
        "prune",
        folder / "model",
        "--out",
        tmp_path / "out",
        *SMALL,
        "--score",
        "magnitude",
        "--no-restore",
        "--sparsity",
        "0.3",
    )
    assert done.exit_code == 0, done.output
    assert all(
        line.error_restored is None
        for line in AutoModelForCausalLM.from_pretrained(tmp_path / "out").report.lines
    )


def test_prune_to_a_plain_checkpoint(folder: Path, from_file: tuple[Path, Result], tmp_path: Path) -> None:
    text = folder / "text.txt"
    command = ("prune", folder / "model", "--plain", "--calibration", text, "--text", text, *SMALL)
    done = _invoke(*command, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path / "out"}")' in "".join(
        done.stdout.splitlines()[-2:]
    )
    assert "the config says it with intermediate_size 48 ->" in " ".join(done.stdout.split())
    stages = ["trying out what the config can say", "capturing and analysing", "calibrating on", "rewriting"]
    assert [
        next(line for line in done.stderr.splitlines() if line.startswith(stage)) for stage in stages
    ] == [line for line in done.stderr.splitlines() if line.startswith(tuple(stages))]
    _, report = read_plain(tmp_path / "out")
    assert str(report) in _invoke("inspect", tmp_path / "out").stdout
    assert "groups" in json.loads(
        _invoke("inspect", tmp_path / "out", "--granularity", "channel", "--json").stdout
    )
    plain, dense = (
        AutoModelForCausalLM.from_pretrained(where).eval() for where in (tmp_path / "out", folder / "model")
    )
    assert type(plain) is type(dense)
    assert plain.config.intermediate_size < 48
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"]
        == AutoTokenizer.from_pretrained(folder / "model")("a")["input_ids"]
    )
    row = next(line for line in done.stdout.splitlines() if "perplexity on" in line)
    shown = float(row.replace("│", "|").split("|")[3])
    assert shown == pytest.approx(_perplexity(plain, _chunks(folder)[4:7]), rel=1e-3, abs=1e-3)
    measured = _invoke(
        "eval",
        tmp_path / "out",
        "--text",
        text,
        "--length",
        str(LENGTH),
        "--chunks",
        "4:7",
        "--device",
        "cpu",
    )
    assert float(measured.stdout.split()[1]) == pytest.approx(
        _perplexity(plain, _chunks(folder)[4:7]), rel=1e-4
    )
    assert "never replaces" in _refused(_invoke(*command, "--out", from_file[0], "--overwrite"))
    assert "never replaces" in _refused(
        _invoke("prune", folder / "model", *SMALL, "--out", tmp_path / "out", "--overwrite")
    )


def test_prune_heads_and_what_crosses_a_norm(folder: Path, tmp_path: Path) -> None:
    chosen = (
        "--granularity",
        "head",
        "--granularity",
        "channel",
        "--include",
        "approximate",
        "--include",
        "approximate",
        "--quality",
        "fast",
    )
    text = folder / "text.txt"
    done = _invoke(
        "prune",
        folder / "model",
        "--out",
        tmp_path / "out",
        *SMALL,
        "--calibration",
        text,
        "--text",
        text,
        "--sparsity",
        "0.5",
        *chosen,
    )
    assert done.exit_code == 0, done.output
    assert "prunable, exempt and approximate groups" in " ".join(done.stdout.split())
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (set(pruned.plan.granularity), set(pruned.plan.include)) == ({"channel", "head"}, {"approximate"})
    own = dict(pruned.named_parameters())
    # One of two key-value heads, with its two query heads of 8.
    assert own["model.layers.0.self_attn.q_proj.weight"].shape[0] == 16
    assert own["model.layers.0.mlp.down_proj.weight"].shape[0] < 32  # the residual stream


# --- inspect


def test_inspect_json(folder: Path) -> None:
    done = _invoke("inspect", folder / "model", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    neurons = next(
        group for group in found["groups"] if group["name"] == "model.layers.0.mlp.down_proj.weight"
    )
    assert neurons["status"] == "prunable"
    assert neurons["size"] == 48
    assert {member["name"] for member in neurons["producers"]} == {
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    }
    assert neurons["consumers"] == [
        {"name": "model.layers.0.mlp.down_proj.weight", "dim": 1, "size": 48, "ranges": [[0, 48]]}
    ]
    assert all(group["reason"] for group in found["groups"] if group["status"] != "prunable")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    analysis = fasp_fx.analyze(
        model, (), {"input_ids": torch.zeros(1, 16, dtype=torch.long), "use_cache": False}
    )
    assert [(group["name"], group["status"]) for group in found["groups"]] == [
        (group.name, group.status) for group in analysis.groups
    ]
    assert found["max_sparsity"] == pytest.approx(analysis.max_sparsity)


def test_inspect_table(folder: Path) -> None:
    done = _invoke("inspect", folder / "model")
    assert done.exit_code == 0, done.output
    for word in ("prunable", "exempt", "approximate", "frozen", "gate_proj, up_proj", "reaches output 0"):
        assert word in done.stdout
    assert "model.layers.1" not in done.stdout
    every = _invoke("inspect", folder / "model", "--all")
    assert every.exit_code == 0, every.output
    assert "model.layers.1.mlp.down_proj" in every.stdout


def test_inspect_as_it_would_be_pruned(folder: Path) -> None:
    chosen = (
        "--granularity",
        "head",
        "--granularity",
        "channel",
        "--include",
        "exempt",
        "--include",
        "approximate",
    )
    done = _invoke("inspect", folder / "model", "--json", *chosen)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    example = {"input_ids": torch.zeros(1, 16, dtype=torch.long), "use_cache": False}
    analysis = fasp_fx.analyze(
        model, (), example, granularity=("head", "channel"), include=("exempt", "approximate")
    )
    assert [(group["name"], group["granularity"]) for group in found["groups"]] == [
        (group.name, group.granularity) for group in analysis.groups
    ]
    assert {group["granularity"] for group in found["groups"]} == {"head", "channel"}
    assert found["max_sparsity"] == pytest.approx(analysis.max_sparsity)
    assert (
        found["max_sparsity"]
        > json.loads(_invoke("inspect", folder / "model", "--json").stdout)["max_sparsity"]
    )
    experts = _invoke("inspect", folder / "model", "--granularity", "expert")
    assert "at most 0.0% of the linear weights of prunable and exempt groups" in " ".join(
        experts.stdout.split()
    )


def _on_page(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


def test_inspect_page(folder: Path, tmp_path: Path) -> None:
    done = _invoke("inspect", folder / "model", "--html", tmp_path / "dense.html")
    assert done.exit_code == 0, done.output
    assert "prunable" in done.stdout
    data = _on_page(tmp_path / "dense.html")
    assert data["title"] == str(folder / "model")
    assert not data["pruned"]
    assert {group["name"] for group in data["groups"]} >= {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }


def test_inspect_a_pruned_folder(from_file: tuple[Path, Result], folder: Path, tmp_path: Path) -> None:
    out, _ = from_file
    done = _invoke("inspect", out, "--html", tmp_path / "pruned.html")
    assert done.exit_code == 0, done.output
    report = AutoModelForCausalLM.from_pretrained(out).report
    assert str(report) in done.stdout
    assert json.loads(_invoke("inspect", out, "--json").stdout)["parameters"] == list(report.parameters)
    data = _on_page(tmp_path / "pruned.html")
    assert data["groups"] == _on_page(folder / "pages" / "pruned.html")["groups"]
    shown = [(group["name"], group["before"], group["after"]) for group in data["groups"]]
    assert shown == [(line.name, line.before, line.after) for line in report.lines]
    assert any("Perplexity on chunks 4 to 6 of text.txt" in tile["label"] for tile in data["tiles"])
    assert "pruned already" in _refused(_invoke("inspect", out, "--granularity", "head"))
    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    for model in (out, folder / "model"):
        assert "did not write" in _refused(_invoke("inspect", model, "--html", taken))
    assert taken.read_text() == "mine"


# --- eval


def test_eval_dense_and_pruned(from_file: tuple[Path, Result], folder: Path) -> None:
    chunks = _chunks(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    for name, model in (
        (folder / "model", dense),
        (from_file[0], AutoModelForCausalLM.from_pretrained(from_file[0])),
    ):
        whole = _invoke(
            "eval", name, "--text", folder / "text.txt", "--length", str(LENGTH), "--device", "cpu"
        )
        assert whole.exit_code == 0, whole.output
        assert float(whole.stdout.split()[1]) == pytest.approx(_perplexity(model, chunks), rel=1e-4)
        part = _invoke(
            "eval",
            name,
            "--text",
            folder / "text.txt",
            "--length",
            str(LENGTH),
            "--chunks",
            "2:5",
            "--device",
            "cpu",
        )
        assert "on chunks 2 to 4 of text.txt (3 x 32 tokens)" in part.stdout
        assert float(part.stdout.split()[1]) == pytest.approx(_perplexity(model, chunks[2:5]), rel=1e-4)


def test_eval_compares_dense_and_pruned(from_file: tuple[Path, Result], folder: Path) -> None:
    pytest.importorskip("lm_eval")
    questions.write(folder / "own.jsonl")
    arguments = [
        "eval",
        folder / "model",
        from_file[0],
        "--task",
        folder / "own.jsonl",
        "--text",
        folder / "text.txt",
        "--length",
        str(LENGTH),
    ]
    done = _invoke(*arguments, "--device", "cpu", "--limit", "4", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [entry["model"] for entry in found["models"]] == [str(folder / "model"), str(from_file[0])]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    dense, small = (
        AutoModelForCausalLM.from_pretrained(folder / "model").eval(),
        load_saved(from_file[0], torch.device("cpu"))[0],
    )
    for entry, model in zip(found["models"], (dense, small)):
        right = questions.by_hand(
            lambda ids, model=model: model(input_ids=ids, use_cache=False).logits, tokenizer
        )
        questions.check([TaskScore(**score) for score in entry["tasks"]], right, 4)
        assert entry["perplexity"] == pytest.approx(_perplexity(model, _chunks(folder)), rel=1e-4)
    table = _invoke(*arguments, "--device", "cpu", "--chunks", "0:2", "--limit", "2")
    assert table.exit_code == 0, table.output
    for words in (
        "model",
        "from_file",
        "change",
        "perplexity on chunks 0 to 1",
        "own.jsonl: acc_bytes of 2 examples",
        " ± ",
    ):
        assert words in table.stdout


@pytest.mark.parametrize("chunks", ["5", "a:b", "900:901", "3:3"])
def test_eval_refuses_a_bad_range(folder: Path, chunks: str) -> None:
    done = _invoke(
        "eval", folder / "model", "--text", folder / "text.txt", "--length", str(LENGTH), "--chunks", chunks
    )
    assert "chunks" in _refused(done)
    # What cannot be a range is refused before any work.
    assert ("loading" in done.stderr) == (chunks in ("900:901", "3:3"))


# --- refusals


def test_what_was_pruned_is_not_pruned_again(from_file: tuple[Path, Result], tmp_path: Path) -> None:
    said = _refused(_invoke("prune", from_file[0], "--out", tmp_path / "out", *SMALL))
    assert "was pruned already" in said
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    command = ("prune", folder / "model", "--out", tmp_path / "out", "--checkpoint", folder / "text.txt")
    done = _invoke(*command, *SMALL)
    assert "is no folder; choose another --checkpoint" in " ".join(_refused(done).split())
    assert "loading" not in done.stderr, "it is refused before any work"


@pytest.mark.parametrize(
    "command", [("inspect",), ("prune", "--out", "small"), ("eval", "--text", "text.txt")]
)
def test_a_folder_without_a_model_is_refused(
    tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("some text", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    said = _refused(_invoke(command[0], "empty", *command[1:]))
    assert re.search("'empty' cannot be loaded: [^;]*[^;:]; give a ", said), said
    assert sorted(child.name for child in tmp_path.iterdir()) == ["empty", "text.txt"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sparsity", "0.99"], "out of reach"),
        (["--sparsity", "1.5"], "--sparsity 1.5"),
        (["--round-to", "0"], "--round-to 0"),
        (["--round-to", "64"], "out of reach"),
        (["--batches", "0"], "--batches 0"),
        (["--length", "1"], "--length 1"),
        (["--length", "0"], "--length 0"),
        (["--length", "4096"], "4096"),
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--device", "toaster"], "toaster"),
        (["--plain", "--include", "exempt"], "--include exempt"),
    ],
)
def test_prune_refuses_bad_options(folder: Path, tmp_path: Path, options: list[str], says: str) -> None:
    assert says in _refused(
        _invoke("prune", folder / "model", "--out", tmp_path / "deep" / "out", *SMALL, *options)
    )
    assert not list(tmp_path.iterdir())


def test_prune_refuses_text_that_calibration_used_up(folder: Path, tmp_path: Path) -> None:
    text = folder / "text.txt"
    done = _invoke(
        "prune",
        folder / "model",
        "--out",
        tmp_path / "out",
        *SMALL,
        "--calibration",
        text,
        "--text",
        text,
        "--batches",
        "999",
    )
    assert "leaving none" in _refused(done)
    assert "less than one chunk" in _refused(
        _invoke("prune", folder / "model", "--out", tmp_path / "out", "--calibration", text)
    )
    assert not list(tmp_path.iterdir())


def test_prune_refuses_a_taken_folder_before_any_work(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        done = _invoke("prune", folder / "model", "--out", tmp_path / "out", *SMALL, *options)
        assert "exists" in _refused(done) or "never replaces" in _refused(done)
        assert len(done.stderr.splitlines()) == 1
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["precious.txt"]


@pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")
def test_a_result_is_kept_when_measuring_is_interrupted(
    from_file: tuple[Path, Result], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    model = AutoModelForCausalLM.from_pretrained(from_file[0])
    pruned = fasp_fx.hf.Pruned(model, model.plan, model.report)
    monkeypatch.setattr("fasp_fx.cli._prune_command.Job.prune", lambda job: pruned)
    monkeypatch.setattr("fasp_fx.cli._results.latency", interrupt)
    text = folder / "text.txt"
    done = _invoke(
        "prune",
        folder / "model",
        "--calibration",
        text,
        "--text",
        text,
        "--out",
        tmp_path / "out",
        "--html",
        tmp_path / "page.html",
        *SMALL,
    )
    assert done.exit_code == 130
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").report == pruned.report
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["prune", "inspect", "eval"])
def test_unknown_models_are_refused(folder: Path, tmp_path: Path, command: str) -> None:
    options = {"prune": ["--out", tmp_path / "out"], "inspect": [], "eval": ["--text", folder / "text.txt"]}[
        command
    ]
    assert "no model" in _refused(_invoke(command, tmp_path / "nowhere", *options))
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in _refused(_invoke(command, tmp_path / "empty", *options))
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    assert "cannot be loaded" in _refused(_invoke(command, tmp_path / "broken.gguf", *options))
    assert not (tmp_path / "out").exists()


def test_damaged_results_are_refused(from_file: tuple[Path, Result], folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_bytes((from_file[0] / "manifest.json").read_bytes())
    assert "missing" in _refused(_invoke("eval", broken, "--text", folder / "text.txt"))
    without = tmp_path / "without"
    shutil.copytree(from_file[0], without)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (without / name).unlink()
    assert "tokenizer" in _refused(_invoke("eval", without, "--text", folder / "text.txt"))


def test_ctrl_c_exits_with_130_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fasp_fx.cli._text.sample", interrupt)
    done = _invoke("prune", folder / "model", "--out", tmp_path / "out", *SMALL)
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1].startswith("fasp-fx: interrupted")
    assert not list(tmp_path.iterdir())


# --- help


@pytest.mark.parametrize("command", ["prune", "inspect", "eval"])
def test_help_has_an_example(command: str) -> None:
    done = _invoke(command, "--help")
    assert done.exit_code == 0
    assert "Example:" in done.stdout


def test_usage_errors_exit_with_2() -> None:
    assert _invoke("prune").exit_code == 2
    assert _invoke("nonsense").exit_code == 2
    assert _invoke("inspect", "model", "--granularity", "neuron").exit_code == 2


def test_installed_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fasp_fx.cli", "--version"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"fasp-fx {fasp_fx.__version__}"


def test_what_is_not_asked_for_is_as_in_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[_prune_command.Request] = []
    monkeypatch.setattr(_prune_command, "run", lambda request, *_: asked.append(request))
    for options in ([], ["--round-to", "16"]):
        assert _invoke("prune", "model", "--out", tmp_path / "out", *options).exit_code == 0
    assert [request.config for request in asked] == [
        fasp_fx.PruningConfig(),
        fasp_fx.PruningConfig(round_to=16),
    ]


@pytest.mark.parametrize(("there", "used", "measured"), [(40, 6, 5), (8, 6, 2), (7, 6, 1), (3, 3, 0)])
def test_a_file_is_measured_on_where_no_other_is_given(
    there: int, used: int, measured: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model would write, token by token, takes longer than all else."""
    file, chunks = tmp_path / "data.txt", torch.arange(there)[:, None].expand(-1, 4)
    monkeypatch.setattr("fasp_fx.cli._text.read_chunks", lambda *given: chunks)
    texts = Texts(Wanted(file, 6, None, 5, 4, 0), None)
    assert texts.used is not None
    assert texts.used[:, 0].tolist() == list(range(used))
    if measured:
        assert texts.evaluation is not None
        assert texts.evaluation[:, 0].tolist() == list(range(used, used + measured))
        assert f"chunks {used} to {used + measured - 1} of data.txt ({measured} x 4 tokens)" in texts.label
    else:
        assert texts.evaluation is None
