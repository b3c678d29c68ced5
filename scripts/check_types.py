"""What type checkers and editors see of fasp_fx: ``mypy --strict`` and pyright on all Python of README.md,
docs/ and examples/, beside an editable install and beside a wheel; and each must see mistakes that are
seeded.

pyright is basedpyright, which brings its own node: nothing is fetched when it runs. What is not ours to mend
is passed over: functions of torch without types may be called, lm_eval has no types, packages that are not
installed here are not looked at.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: what pages take for granted, with the types that a reader's own would have
GIVEN = """
from typing import Any
import torch
from torch import Tensor, nn
import fasp_fx
args: tuple[Any, ...]
batches: list[Tensor]
chunks: Tensor
dense: nn.Module
examples: Any
ids: Tensor
tokenizer: Any
kwargs: dict[str, Any]
local_rank: int
model: Any
pruned: fasp_fx.hf.Pruned
result: fasp_fx.Result
scratch: Any
tables: dict[str, tuple[list[float], list[float]]]
class MyModel(nn.Module): ...
class YourLayer(nn.Module): ...
"""
PREAMBLE = "import numpy as np, torch, fasp_fx; from torch import Tensor, nn"
ALL_GIVEN = re.findall(r"^(?:class )?(\w+)(?::|\()", GIVEN, flags=re.MULTILINE)

#: each of these lines must be an error for both
SEEDED = """
from fasp_fx.allocation import Macz
from fasp_fx.budgets import Macs
fasp_fx.prunee(model)
fasp_fx.load("small").modul
fasp_fx.prune(model, args, granularity=("heads",))
fasp_fx.prune(model, args, granularity="head")
fasp_fx.prune(model, args, sparsty=0.2)
fasp_fx.prune(model, args, include=("dept",))
fasp_fx.prune(model, args, quality="fastest")
fasp_fx.prune(model, args, score="fsp")
fasp_fx.prune(model, args, restore="least-square")
fasp_fx.prune(model, args, allocation="globe")
fasp_fx.prune(model, args, loss="prediction")
fasp_fx.prune(model, args, calibration=batches, budget=0.5)
fasp_fx.measure(model, args, calibration=batches, granularity=("heads",))
fasp_fx.analyze(model, args, granularity=("heads",))
fasp_fx.PruningConfig(granularity=("heads",))
fasp_fx.PruningConfig(sparsty=0.2)
fasp_fx.hf.prune(model, granularity=("heads",))
fasp_fx.hf.prune(model, format="gguf-q9")
fasp_fx.hf.convert(model, "gguf-q9")
fasp_fx.training.distil(result, model, batches, loss="output")
"""


def snippets(page: Path) -> str:
    """The Python of a page, each line at its number; what the page takes for granted stands in the first."""
    lines, code = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if code and not fence else "")
        code = not code and line in ("```python", "```py") if fence else code
    names = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Name)]
    first = {
        name: min((node.lineno, isinstance(node.ctx, ast.Store)) for node in names if node.id == name)
        for name in {node.id for node in names}.intersection(ALL_GIVEN)
    }
    taken = sorted(name for name, (_, is_bound) in first.items() if not is_bound)
    given = f"; from given import {', '.join(taken)}" if taken else ""
    return "\n".join([PREAMBLE + given, *lines[1:]]) + "\n"


def write_sources(folder: Path) -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        if re.search(r"^```py", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            (folder / f"{page.stem.replace('-', '_')}_md.py").write_text(snippets(page), encoding="utf-8")
    for example in sorted((ROOT / "examples").glob("*.py")):
        shutil.copy(example, folder)
    (folder / "seeded.py").write_text(f"{PREAMBLE}; from given import *{SEEDED}", encoding="utf-8")
    (folder / "given.pyi").write_text(GIVEN, encoding="utf-8")
    for name in ("__init__", "models/__init__", "models/huggingface"):
        stub = folder / "typings" / "lm_eval" / f"{name}.pyi"
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text("from typing import Any\ndef __getattr__(name: str) -> Any: ...\n")
    (folder / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nwarn_unused_ignores = False\n"
        "disallow_untyped_calls = False\ndisallow_subclassing_any = False\n"
        f"[mypy-{','.join(f'{name}.*' for name in UNREAD)}]\n"
        "ignore_missing_imports = True\nfollow_imports = skip\n"
    )
    (folder / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "standard", "reportMissingModuleSource": False})
    )


def wheel_python(folder: Path) -> Path:
    """An interpreter whose fasp_fx is a fresh wheel, and whose other packages are those of this one."""
    source = folder / "source"
    source.mkdir()
    for name in ("fasp_fx", "passes", "patterns"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    packages = next((folder / "venv").glob("lib/python3*/site-packages"))
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(packages)
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    return folder / "venv" / "bin" / "python"


#: what mypy takes as it is: reading it takes longer than all else, and the names of fasp_fx are what matters
UNREAD = (
    *("lm_eval", "onnx", "sympy", "tokenizers", "torchao", "torchvision", "transformers"),
    *("executorch", "lightning", "nncf", "onnxruntime", "openvino", "peft", "sklearn", "tvm", "ultralytics"),
)

Problem = tuple[str, int, str]


def mypy(folder: Path, python: Path) -> list[Problem]:
    cache = folder.parent / "mypy_cache"  # of one run to the next: torch is read once
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "--cache-dir", str(cache)]
    files = sorted(path.name for path in folder.glob("*.py"))
    done = subprocess.run(
        [*command, "--no-error-summary", *files], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1):
        raise SystemExit(done.stdout + done.stderr)
    lines = re.findall(r"^(\w+\.py):(\d+): error: (.*)$", done.stdout, flags=re.MULTILINE)
    return [(name, int(number), text) for name, number, text in lines]


def pyright(folder: Path, python: Path) -> list[Problem]:
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", str(python), "--outputjson"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stdout + done.stderr)
    return [
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1, each["message"])
        for each in json.loads(done.stdout)["generalDiagnostics"]
        if each["severity"] == "error"
        and ("fasp_fx" in each["message"] or each.get("rule") != "reportMissingImports")
    ]


def problems_of(
    checker: Callable[[Path, Path], list[Problem]], folder: Path, pythons: dict[str, Path]
) -> list[str]:
    """What one checker says beside each install, and what it does not see there."""
    told = []
    for install, python in pythons.items():
        problems = checker(folder, python)
        red = {line for name, line, _ in problems if name == "seeded.py"}
        told += [f"{name}:{line}: {text}" for name, line, text in problems if name != "seeded.py"]
        told += [
            f"sees nothing wrong with: {text}"
            for line, text in enumerate(SEEDED.splitlines(), 1)
            if text and line not in red
        ]
        told = [text if text.startswith("(") else f"({install}, {checker.__name__}) {text}" for text in told]
    return told


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor() as threads:
        folder, wheel = Path(temporary, "sources"), Path(temporary, "wheel")
        folder.mkdir()
        wheel.mkdir()
        write_sources(folder)
        pythons = {"editable": Path(sys.executable), "wheel": wheel_python(wheel)}
        for install, python in pythons.items():
            where = [python, "-c", "import fasp_fx; print(fasp_fx.__file__)"]
            print(f"{install}:", subprocess.check_output(where, text=True, cwd=folder).strip(), flush=True)
        told = threads.map(lambda checker: problems_of(checker, folder, pythons), (mypy, pyright))
        problems = [text for texts in told for text in texts]
    print(*problems or ["what the documentation uses resolves in both, and what is seeded is red"], sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
