"""The examples run, offline and on tiny models where a real one would take long; they stay short, and the
README lists them.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import make_model

import fasp_fx

Run = Callable[..., str]
TEXT = "A smaller model answers sooner, and says much the same. " * 30

ROOT = Path(__file__).resolve().parents[1]
#: chunks.py is what two of them share
EXAMPLES = sorted(file for file in (ROOT / "examples").glob("*.py") if file.name != "chunks.py")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example in this process, which has everything imported, in an empty folder; returns what it
    printed.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as for a script that is run

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in a program: a warning does not end it
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_short_and_listed(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 95
    assert f"examples/{example.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "fasp_fx._" not in example.read_text(encoding="utf-8"), "an example shows the public surface"
    assert "import _" not in example.read_text(encoding="utf-8"), "an example shows the public surface"


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert not [path.name for path in EXAMPLES if f'"{path.name}"' not in source]


def test_deploy(run: Run, tmp_path: Path) -> None:
    # The compiler itself takes long, and test_invariants compiles.
    out = run("deploy.py", "--backend", "eager")
    assert "logits of three images: (3, 10)" in out
    report = fasp_fx.load(tmp_path / "smaller").report
    assert report.parameters[1] < 0.7 * report.parameters[0]
    assert str(report) in out


def test_rule_writer(run: Run) -> None:
    try:
        out = run("rule_writer.py")
    finally:
        fasp_fx.patterns.unregister(torch.ops.mylib.scaled_silu.default)
    assert "no rule for mylib.scaled_silu.default" in out
    assert "is right" in out
    assert "scale[0], up.weight[0], up.bias[0] -> down.weight[1]" in out
    assert "mask-exact, signature, rules hold" in out
    assert "48 -> 36" in out


@pytest.fixture
def language_model(tmp_path: Path) -> None:
    """A model and a text in the folder where examples run."""
    make_model(tmp_path / "model", layers=2)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")


@pytest.mark.usefixtures("language_model")
def test_peers(run: Run) -> None:
    sizes = ("model", "text.txt", "--length", 32, "--chunks", 8, "--after", 8, "--measure", 4)
    for name, out in {"FLAP": run("flap.py", *sizes), "SlimLLM": run("slimllm.py", *sizes)}.items():
        lines = {line.partition(":")[0]: line for line in out.splitlines()}
        assert list(lines) == [name, f"{name}, repaired"]
        reached = [float(line.split(": ")[1].split("%")[0]) for line in lines.values()]
        assert all(abs(part - 20) < (6 if name == "SlimLLM" else 2) for part in reached), (
            "whole heads of so small a model are coarse"
        )


def test_compiler(run: Run) -> None:
    out = run("compiler.py", "--package", "", "--inner", "eager")  # packaging is tested with the integrations
    assert out.index("3 linear operators") < out.index("2 linear operators")
    assert "'up.weight': (58, 16)" in out
    assert float(out.split()[-1]) < 1e-5


def test_language_model(run: Run, language_model: None, tmp_path: Path) -> None:
    out = run(
        "language_model.py",
        "model",
        "text.txt",
        "--length",
        32,
        "--round",
        1,
        "--tokens",
        8,
        "--prompt",
        TEXT[:20],
    )
    assert "parameters" in out
    assert TEXT[:20] in out
    assert (tmp_path / "small" / "tokenizer.json").is_file()


def test_finetune(run: Run, language_model: None) -> None:
    sizes = {"--steps": 20, "--length": 32, "--calibrate": 16, "--measure": 4, "--round": 1, "--rate": 0.01}
    out = run("finetune.py", "model", "text.txt", *(str(part) for option in sizes.items() for part in option))
    found = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}
    assert list(found) == ["dense", "pruned", "recovered"]
    assert found["recovered"] < 0.5 * found["pruned"]


def test_latency(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts multiplications, which no other work disturbs."""
    threads, spent, forward = torch.get_num_threads(), [0.0], torch.nn.Linear.forward

    def counted(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        spent[0] += layer.in_features * layer.out_features * 1e-9
        return forward(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    monkeypatch.setattr("time.perf_counter", lambda: spent[0])
    try:
        (predicted,) = (line for line in run("latency.py").splitlines() if line.startswith("predicted"))
    finally:
        torch.set_num_threads(threads)
    dense, pruned = (float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", predicted))
    assert 0.6 * dense < pruned <= 0.7 * dense


def test_llama_cpp(run: Run, language_model: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a llama.cpp that takes as long as its file is large."""
    monkeypatch.setattr(
        "subprocess.run",
        lambda command, **_: subprocess.CompletedProcess(
            command, 0, "\n".join(f'{{"token": {Path(file).stat().st_size}e-9}}' for file in command[2:])
        ),
    )
    found = re.findall(
        r"predicted: ([\d.]+) .* then ([\d.]+)\n",
        run("llama_cpp.py", "model", "text.txt", "--node", tmp_path, "--format", "gguf", "--length", 32),
    )
    assert [float(dense) <= 0.85 * float(pruned) for dense, pruned in found] == [True]
