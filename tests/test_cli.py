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

import pytest
import torch
from tiny_llama import make_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import fasp_fx
from fasp_fx import PruningConfig
from fasp_fx.cli import _prune
from fasp_fx.cli._app import app
from fasp_fx.cli._models import Texts
from fasp_fx.pruning import read_told

pytestmark = pytest.mark.usefixtures("shared_captures")

LENGTH = 32
SMALL = f"--length {LENGTH} --batches 4 --eval-batches 3 --device cpu".split()


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _done(*arguments: object) -> str:
    """What a command prints that does what it was asked for, in one line."""
    done = _invoke(*arguments)
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split())


def _refused(*arguments: object) -> str:
    """The message of a command that was refused: exit code 2, one line, nothing else on the error stream but
    finished stages.
    """
    done = _invoke(*arguments)
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert done.stderr.rstrip().endswith(lines[0])
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    make_model(made / "model", layers=1)
    (made / "text.txt").write_text("Größe matters: a smaller model answers sooner. " * 12, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def prune(folder: Path) -> list[str | Path]:
    """A command that prunes the model, calibrated and measured on a file; its output is still to be named."""
    text = folder / "text.txt"
    return ["prune", folder / "model", "--calibration", text, "--text", text, *SMALL]


@pytest.mark.parametrize("form", ["fasp-fx", "gguf"])
def test_room_for_the_result_is_looked_for_before_the_work(
    form: str, prune: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr("fasp_fx.calibration.Visit.run", pytest.fail)
    said = _refused(*prune, "--out", tmp_path / "small", "--format", form, "--sparsity", 0.2)
    assert re.search(r"small' will take .* GiB at least, and 9.31e-07 GiB are free there", said)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def from_file(folder: Path, prune: list[str | Path]) -> tuple[Path, Result]:
    """What that gives, and what the command printed."""
    out = folder / "from_file"
    return out, _invoke(*prune, "--out", out)


def _chunks(folder: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder / "model")(
        (folder / "text.txt").read_text(encoding="utf-8"), add_special_tokens=False
    )["input_ids"]
    return torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def _perplexity(model: Callable[..., Any], chunks: torch.Tensor) -> float:
    with torch.no_grad():
        losses = [
            functional.cross_entropy(
                model(input_ids=chunk[None], use_cache=False).logits[0, :-1], chunk[1:]
            ).item()
            for chunk in chunks
        ]
    return math.exp(sum(losses) / len(losses))


def _figures(shown: str) -> list[float]:
    """The perplexities in a table, of a model each."""
    return [
        float(cell)
        for cell in re.findall(r"│ *([\d.]+) ", shown.split("perplexity on")[1].split("next tokens")[0])
    ]


def _dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


# --- prune


def test_prune_from_file(from_file: tuple[Path, Result], folder: Path) -> None:
    out, done = from_file
    assert done.exit_code == 0, done.output
    for words in (
        "prunable",
        "gate_proj, up_proj",
        "parameters",
        "bytes of cache per token",
        "milliseconds",
        "perplexity on chunks 4 to 6 of text.txt",
        f'AutoModelForCausalLM.from_pretrained("{out}")',
    ):
        assert words in done.stdout
    dense, pruned = _dense(folder), AutoModelForCausalLM.from_pretrained(out)
    assert pruned.report.parameters == (dense.num_parameters(), sum(p.numel() for p in pruned.parameters()))
    assert abs(pruned.report.sparsity - 0.2) < 0.02
    assert pruned.report.config == PruningConfig(), "as in Python"
    held_out = _chunks(folder)[4:7]
    expected = [_perplexity(dense, held_out), _perplexity(pruned, held_out)]
    assert _figures(done.stdout)[:2] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    milliseconds, measured, divergence, same = pruned.report.figures
    assert "milliseconds" in milliseconds.what
    assert [measured.dense, measured.pruned] == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        p, q = (model(held_out).logits[:, :-1].double().softmax(-1) for model in (dense, pruned))
    lost = (p * (p / q).log()).sum(-1).mean(1)
    assert divergence.pruned == pytest.approx(float(lost.mean()), rel=1e-3)
    assert f"(± {float(lost.std() / 3**0.5):.3f})" in divergence.what
    assert same.pruned == pytest.approx(100 * float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_prune_by_itself(folder: Path, tmp_path: Path) -> None:
    """Also what only other options reach: the same seed writes the same text."""
    command = ["prune", folder / "model", "--out", tmp_path / "out", *SMALL]
    options = ["--score", "magnitude", "--no-restore", "--sparsity", "0.1", "--exclude", "model.layers.0.mlp"]
    first = _done(*command, *options)
    assert "text that the model wrote itself, not seen by this calibration (3 x 32 tokens)" in first
    assert _figures(first) == _figures(_done(*command, *options, "--overwrite"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert [child.name for child in tmp_path.iterdir()] == ["out"]
    report = AutoModelForCausalLM.from_pretrained(tmp_path / "out").report
    assert all(line.error_restored is None for line in report.lines)
    whole = [line.name for line in report.lines if line.status == "prunable" and line.before == line.after]
    assert "model.layers.0.mlp.down_proj.weight" in whole


def test_prune_to_a_plain_checkpoint(
    folder: Path, from_file: tuple[Path, Result], prune: list[str | Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = _invoke(*prune, "--format", "plain", "--out", out)
    assert done.exit_code == 0, done.output
    assert f'AutoModelForCausalLM.from_pretrained("{out}")' in "".join(done.stdout.splitlines()[-2:])
    assert "the config says it with intermediate_size 48 ->" in " ".join(done.stdout.split())
    _, report = read_told(out)
    assert str(report) in _invoke("inspect", out).stdout
    plain, dense = AutoModelForCausalLM.from_pretrained(out).eval(), _dense(folder)
    assert type(plain) is type(dense)
    assert plain.config.intermediate_size < 48
    held_out = _perplexity(plain, _chunks(folder)[4:7])
    assert _figures(done.stdout)[1] == pytest.approx(held_out, rel=1e-3, abs=1e-3)
    made = tmp_path / "made"
    assert f"llama-cli -m {made}/model.gguf" in _done("convert", out, "--format", "gguf-f16", "--out", made)
    shown = _done("eval", made, "--text", folder / "text.txt", "--length", str(LENGTH), "--chunks", "4:7")
    found = re.search(r"([\d.]+) *│ *\+0\.0%", shown)
    assert found is not None
    assert float(found[1]) == pytest.approx(held_out, rel=1e-4)
    assert "is not replaced" in _refused(*prune, "--format", "plain", "--out", from_file[0], "--overwrite")
    assert "is not replaced" in _refused(*prune, "--out", out, "--overwrite")


FILE = PruningConfig(granularity=("head", "channel"), sparsity=0.1, quality="fast")
#: options beside a file stand in the place of its own
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "--round-to 16": {"round_to": 16},
    "--exclude lm_head --exclude layers.0.*": {"exclude": ("lm_head", "layers.0.*")},
    "--loss outputs --drift 0.5": {"loss": "outputs", "drift": 0.5},
    "--no-restore": {"restore": None},
    "--macs 70% --bytes 1MB": {
        "budget": (fasp_fx.allocation.Macs(0.7), fasp_fx.allocation.Bytes(1_000_000)),
    },
    "--sparsity 0.5 --include approximate --config config.json": {
        "granularity": ("head", "channel"),
        "sparsity": 0.5,
        "quality": "fast",
        "include": ("approximate",),
    },
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_those_of_python(options: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[PruningConfig] = []

    def run(model: str, out: Path, config: PruningConfig, *rest: Any, **more: Any) -> None:
        asked.append(config)

    monkeypatch.setattr(_prune, "run", run)
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(FILE.to_json())
    _done("prune", "model", "--out", tmp_path / "out", *options.split())
    assert asked == [PruningConfig(**OPTIONS[options])]


# --- inspect


def _on_page(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


def test_inspect_table_and_page(folder: Path, tmp_path: Path) -> None:
    shown = _done("inspect", folder / "model", "--html", tmp_path / "dense.html")
    for word in ("prunable", "exempt", "approximate", "frozen", "gate_proj, up_proj", "reaches output 0"):
        assert word in shown
    data = _on_page(tmp_path / "dense.html")
    assert (data["title"], data["pruned"]) == (str(folder / "model"), False)
    assert "model.layers.0.mlp.down_proj.weight" in {group["name"] for group in data["groups"]}
    experts = _done("inspect", folder / "model", "--granularity", "expert", "--include", "exempt")
    assert "at most 0.0% of the linear weights of" in experts


def test_inspect_a_pruned_folder(from_file: tuple[Path, Result], folder: Path, tmp_path: Path) -> None:
    out, _ = from_file
    report = AutoModelForCausalLM.from_pretrained(out).report
    assert str(report) in _invoke("inspect", out, "--html", tmp_path / "pruned.html").stdout
    data = _on_page(tmp_path / "pruned.html")
    assert any("Perplexity on chunks 4 to 6 of text.txt" in tile["label"] for tile in data["tiles"])


# --- eval


def test_eval_dense_and_pruned(from_file: tuple[Path, Result], folder: Path) -> None:
    arguments = ["--text", folder / "text.txt", "--length", str(LENGTH), "--device", "cpu"]
    names = [folder / "model", from_file[0]]
    models = (_dense(folder), AutoModelForCausalLM.from_pretrained(names[1]))
    for option, chosen in ((), slice(None)), (("--chunks", "2:5"), slice(2, 5)):
        expected = [_perplexity(model, _chunks(folder)[chosen]) for model in models]
        assert _figures(_done("eval", *names, *arguments, *option)) == pytest.approx(expected, rel=1e-4)
    assert "--dtype" in _refused("eval", names[1], *arguments, "--dtype", "float16")


# --- what is refused, and what is kept


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--sparsity 0.99", "out of reach"),
        ("--round-to 64", "out of reach"),
        ("--length 4096", "4096"),
        ("--batches 999", "leaving none"),
        ("--length 1000", "less than one chunk"),
        ("--format plain --parameters 0.8", "at least 19,776 of 24,288 parameters stay"),
    ],
)
def test_prune_refuses_what_cannot_be(
    prune: list[str | Path], tmp_path: Path, options: str, says: str
) -> None:
    assert says in _refused(*prune, "--out", tmp_path / "out", *options.split())
    assert not list(tmp_path.iterdir())


def test_damaged_recover_and_taken_places(
    from_file: tuple[Path, Result], folder: Path, tmp_path: Path
) -> None:
    broken, taken = tmp_path / "broken", tmp_path / "taken.html"
    broken.mkdir()
    (broken / "manifest.json").write_bytes((from_file[0] / "manifest.json").read_bytes())
    assert "missing" in _refused("eval", broken, "--text", folder / "text.txt")
    taken.write_text("mine")
    for model in (from_file[0], folder / "model"):
        assert "did not write" in _refused("inspect", model, "--html", taken)
    assert taken.read_text() == "mine"
    command = ("prune", folder / "model", "--out", tmp_path / "out", "--checkpoint", taken)
    assert "; choose another --checkpoint" in _refused(*command, *SMALL)
    inside = ("prune", folder / "model", "--out", tmp_path / "out", "--checkpoint", tmp_path / "out" / "run")
    assert "lies in --out" in _refused(*inside, *SMALL)
    assert "was pruned already" in _refused("prune", from_file[0], "--out", tmp_path / "out", *SMALL)


def _interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_a_result_is_kept_when_measuring_is_interrupted(
    from_file: tuple[Path, Result], prune: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(from_file[0])
    pruned = fasp_fx.hf.Pruned(model, model.plan, model.report)
    monkeypatch.setattr("fasp_fx.cli._prune.prune", lambda *args, **options: pruned)
    monkeypatch.setattr("fasp_fx.cli._prune.latency", _interrupt)
    done = _invoke(*prune, "--out", tmp_path / "out")
    assert done.exit_code == 130
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").report == pruned.report
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_exits_with_130_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasp_fx.cli._models.sample", _interrupt)
    done = _invoke("prune", folder / "model", "--out", tmp_path / "out", *SMALL)
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1].startswith("fasp-fx: interrupted")
    assert not list(tmp_path.iterdir())


# --- help


@pytest.mark.parametrize("arguments", ["--help", "prune --help", "prune model --out small --sparsity 1.5"])
def test_help_and_bad_options_do_not_wait_for_torch(arguments: str) -> None:
    code = f"""
import sys
from fasp_fx.cli import main
sys.argv = {["fasp-fx", *arguments.split()]}
try:
    main()
finally:
    print("\\n", sorted({{"torch", "numpy", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 * ("1.5" in arguments), done.stderr
    assert done.stdout.splitlines()[-1].strip() == "[]"


def test_help_has_an_example_and_nine_options_come_first() -> None:
    assert _done("--version") == f"fasp-fx {fasp_fx.__version__}"
    for command in ("prune", "recover", "inspect", "eval"):
        assert "Example:" in _done(command, "--help")
    common, _ = _done("prune", "--help").split("─ Options ─")[1].split("─ More ─")
    options = set(re.findall(r"│ (?:\* )?(--[a-z-]+) ", common))
    assert len(options) == 9 + len(["--help"])


@pytest.mark.parametrize(("there", "used", "measured"), [(40, 6, 5), (8, 6, 2), (7, 6, 1), (3, 3, 0)])
def test_a_file_is_measured_on_where_no_other_is_given(
    there: int, used: int, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model would write, token by token, takes longer than all else."""
    chunks = torch.arange(there)[:, None].expand(-1, 4)
    monkeypatch.setattr("fasp_fx.cli._models.read_chunks", lambda *given: chunks)
    texts = Texts(Path("data.txt"), 6, None, 5, 4, 0)
    texts.read(None)
    assert texts.used is not None
    assert texts.used[:, 0].tolist() == list(range(used))
    found = [] if texts.evaluation is None else texts.evaluation[:, 0].tolist()
    assert found == list(range(used, used + measured))
