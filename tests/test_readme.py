"""The Python in the README and on pages of docs/ runs as printed."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO, make_model
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainingArguments

import fasp_fx

ROOT = Path(__file__).resolve().parents[1]


def _blocks(page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _run(blocks: list[str], names: dict[str, Any]) -> dict[str, Any]:
    for text in blocks:
        exec(compile(text, "page", "exec"), names)
    return names


def test_python_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has everything imported, but in a namespace of their own."""
    blocks = _blocks()
    assert blocks
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(action="ignore"):  # as in a program: a warning does not end it
        runpy.run_path(str(program), run_name="__main__")
    out = capsys.readouterr().out
    assert "torch.Size([3, 4])" in out
    assert "can be removed" in out
    assert (tmp_path / "smaller" / "manifest.json").is_file()


def test_commands_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in ("scripts/prune-smollm2", "scripts/test", ".ci/run"):
        assert script in text
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"


def test_quick_start_is_short() -> None:
    assert len([line for line in _blocks()[0].splitlines() if line.strip()]) <= 15


#: those that import what they use; the others are lines for a reader's own file
SNIPPETS = [text for text in _blocks("docs/testing.md") if text.startswith(("import", "from"))]


@pytest.mark.parametrize("text", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_of_the_page_on_testing(text: str) -> None:
    _run([text], {"__name__": "snippet"})


def test_integration_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippets of docs/integration.md run from top to bottom, and the passes between two foreign ones
    take eight lines.
    """
    monkeypatch.chdir(tmp_path)
    snippets = _blocks("docs/integration.md")
    (between,) = (text for text in snippets if "Pipeline" in text)
    assert len([line for line in between.splitlines() if line.strip()]) == 8
    names = _run(snippets, {"__name__": "snippet"})
    expected = fasp_fx.apply(names["model"], names["result"].plan, (names["x"],)).module
    other = torch.randn(3, 16)
    for module in (names["smaller"].module(), names["quick"]):
        assert torch.allclose(module(other), expected(other), atol=1e-5)
    assert "unfold_linear" in {node.meta.get("fasp_fx_pass") for node in names["smaller"].graph.nodes}


def test_training_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(action="ignore"):
        names = _run(_blocks("docs/training.md"), {"__name__": "page"})
    assert names["average"].module[0].weight.shape == names["model"][0].weight.shape
    assert names["smallest"][0].weight.shape[0] < names["small"][0].weight.shape[0] < 128


@pytest.mark.slow
def test_generation_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = _run(_blocks("docs/generation.md"), {"__name__": "page"})
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(names["loaded"](input_ids=ids).logits, names["pruned"].model(input_ids=ids).logits)


# --- fine-tuning


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def test_documentation_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _, trainer = _blocks("docs/fine-tuning.md")
    entry = ZOO["llama_mha"]  # of tied embeddings
    example, ids = entry.example(4, 10), entry.inputs(4, 10)["input_ids"]
    result = fasp_fx.prune(entry.build(), (), example, score="random", restore=None, sparsity=0.3)
    names = {
        "torch": torch,
        "Tensor": Tensor,
        "result": result,
        "batches": [ids] * 3,
        "examples": [{"input_ids": row[:-1], "labels": row[1:]} for row in ids],
        "Trainer": Trainer,
        "TrainingArguments": partial(TrainingArguments, use_cpu=True, report_to=[]),
    }
    before = _loss(result.module(input_ids=ids).logits, ids)
    for part in (loop, trainer):
        folder = tmp_path / ("loop" if part is loop else "trainer")
        folder.mkdir()
        monkeypatch.chdir(folder)
        _run([part], dict(names))
        after = _loss(fasp_fx.load(folder / "tuned").module(input_ids=ids).logits, ids)
        assert after < before
        before = after


# --- what pages of the documentation name is there


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")]
PAGES += ROOT.glob("fasp_fx/**/README.md")
#: pages that name files of the past
PAST = {"benchmarks.md", "CHANGELOG.md"}


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def is_there(name: str, page: Path) -> bool:
    """A path is below the repository, below fasp_fx, or beside the page; a bare name anywhere in the code."""
    if "/" in name:
        return any((base / name).is_file() for base in (ROOT, ROOT / "fasp_fx", page.parent))
    tops = ("fasp_fx", "passes", "patterns", "tests", "benchmarks", "examples")
    return any(True for top in tops for _ in (ROOT / top).rglob(name))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in PAST], ids=ids)
def test_files_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([\w./]+\.pyi?)\b", text))
    assert sorted(name for name in named if not is_there(name, page)) == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


# --- every public function and class has an example in its docstring, which runs as a test


REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
#: the rooms that the reference shows, and the names of those that have no stub
ROOMS = re.findall(r"^:::room ([\w.]+)(?:: (.+))?$", REFERENCE, flags=re.MULTILINE)


def promised(room: str) -> list[str]:
    """``__all__`` of a room's stub, without rooms."""
    body = ast.parse((ROOT / room.replace(".", "/") / "__init__.pyi").read_text(encoding="utf-8")).body
    (names,) = (ast.literal_eval(each.value) for each in body if isinstance(each, ast.Assign))
    return [name for name in names if not (ROOT / "fasp_fx" / name).is_dir()]


def test_public_rooms_are_shown() -> None:
    body = ast.parse((ROOT / "fasp_fx" / "__init__.pyi").read_text(encoding="utf-8")).body
    (names,) = (ast.literal_eval(each.value) for each in body if isinstance(each, ast.Assign))
    rooms = {f"fasp_fx.{name}" for name in names if (ROOT / "fasp_fx" / name).is_dir()}
    shown = {room for room, _ in ROOMS} - {"fasp_fx"}
    assert rooms - shown == {"fasp_fx.interop"}  # fasp_fx itself lends all of that


def is_example_needed(value: Any) -> bool:
    is_error = inspect.isclass(value) and issubclass(value, BaseException)
    return not is_error and (inspect.isclass(value) or inspect.isfunction(value))


def examples() -> Iterator[Any]:
    """Each public function or class once."""
    seen: set[int] = set()
    for room, names in ROOMS:
        for name in names.split() or promised(room):
            value = getattr(importlib.import_module(room), name)
            if is_example_needed(value) and id(value) not in seen:
                seen.add(id(value))
                yield pytest.param(room, value, id=f"{room}.{name}")


@cache
def given(block: int) -> dict[str, Any]:
    """What a block of Python of the reference, and those before it, leave."""
    return _run([_blocks("docs/reference.md")[block]], dict(given(block - 1)) if block else {})


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Nothing here is worth the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("room", "value"), examples())
def test_example(room: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{value.__module__}.{value.__qualname__}"
    text = inspect.getdoc(value) or ""
    test = doctest.DocTestParser().get_doctest(text, dict(given(room == "fasp_fx.hf")), name, None, None)
    assert test.examples, f"{name} is public and has no example"
    torch.manual_seed(0)
    told: list[str] = []
    with warnings.catch_warnings(action="ignore"):  # as in a program: a warning does not end it
        outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append)
    assert not outcome.failed, "".join(told)


def test_what_docstrings_refer_to_is_there() -> None:
    files = [path for top in ("fasp_fx", "passes", "patterns") for path in (ROOT / top).rglob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    named = {name for text in texts for name in re.findall(r":\w+:`~?(fasp_fx\.[\w.]+)`", text)}
    assert named
    assert sorted(name for name in named if not is_reachable(name)) == []


def is_reachable(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


# --- the examples run, offline and on tiny models where a real one would take long; they stay short, and the


Run = Callable[..., str]
TEXT = "A smaller model answers sooner, and says much the same. " * 30

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
        with warnings.catch_warnings(action="ignore"):  # as in a program: a warning does not end it
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_short_and_listed(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 100
    assert f"examples/{example.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "fasp_fx._" not in example.read_text(encoding="utf-8"), "an example shows the public surface"
    assert "import _" not in example.read_text(encoding="utf-8"), "an example shows the public surface"


def test_every_example_is_run_here() -> None:
    files = (Path(__file__), Path(__file__).with_name("runtimes") / "test_detectors.py")
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    assert not [path.name for path in EXAMPLES if f'"{path.name}"' not in source]


def test_rule_writer(run: Run) -> None:
    try:
        out = run("rule_writer.py")
    finally:
        fasp_fx.patterns.unregister(torch.ops.mylib.scaled_silu.default)
    for words in (
        "no rule for mylib.scaled_silu.default",
        "is right",
        "scale[0], up.weight[0], up.bias[0] -> down.weight[1]",
        "mask-exact, signature, rules hold",
        "48 -> 36",
    ):
        assert words in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_loop.py", "train_trainer.py", "train_lightning.py", "train_ddp.py"])
def test_a_training_that_is_stopped_goes_on_to_the_same_end(tmp_path: Path, name: str) -> None:
    if name == "train_lightning.py":
        pytest.importorskip("lightning")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if name == "train_ddp.py" else []
    command = [sys.executable, "-W", "ignore", *torchrun, str(ROOT / "examples" / name)]

    def printed(kept: str) -> list[str]:
        done = subprocess.run([*command, kept], cwd=tmp_path, check=True, text=True, stdout=subprocess.PIPE)
        return [line for line in done.stdout.splitlines() if "left" in line or line[:1].isdigit()]

    whole = printed("whole")
    with subprocess.Popen([*command, "stopped"], cwd=tmp_path, stdout=subprocess.DEVNULL) as stopped:
        while not (tmp_path / "stopped").is_file() and not any(tmp_path.glob("stopped/*")):
            time.sleep(0.05)
        stopped.terminate()
    again = printed("stopped")
    assert again
    assert set(again) <= set(whole)


@pytest.fixture
def language_model(tmp_path: Path) -> None:
    """A model and a text in the folder where examples run."""
    make_model(tmp_path / "model", layers=2)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")


@pytest.mark.slow
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
    assert "'up.weight': (56, 16)" in out
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


@pytest.mark.slow
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
