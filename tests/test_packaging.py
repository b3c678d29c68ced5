"""The wheel holds every module, at the right place, and nothing is imported from where only a checkout has
it.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = {"passes": "fasp_fx/passes", "patterns": "fasp_fx/patterns"}


def _sources() -> dict[str, Path]:
    """Every Python file and stub of the package by its path in a wheel."""
    found = {}
    for folder, inside in {"fasp_fx": "fasp_fx", **TOP}.items():
        for directory, names, files in os.walk(ROOT / folder):  # does not follow the symbolic links
            names[:] = [name for name in names if name != "__pycache__"]
            for file in files:
                if file.endswith((".py", ".pyi")):
                    path = Path(directory) / file
                    found[f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in a freshly built wheel."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed, so no wheel can be built offline")
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in ("fasp_fx", "passes", "patterns"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(work)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(work.glob("*.whl"))) as archive:
        return archive.namelist()


def test_wheel_holds_the_package_and_nothing_else(wheel: list[str]) -> None:
    page = ROOT / "fasp_fx" / "interop" / "page"
    parts = {path.name for path in page.iterdir() if path.suffix in (".html", ".css", ".js")}
    assert len(parts) >= 3
    others = {"fasp_fx/py.typed", *(f"fasp_fx/interop/page/{name}" for name in parts)}
    found = {name for name in wheel if ".dist-info/" not in name and not name.endswith("/README.md")}
    assert found == {*_sources(), *others}
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)


def test_every_subpackage_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name.rpartition("/")[0] for name in _sources()}
    assert {folder.replace("/", ".") for folder in folders} == set(settings["packages"])
    assert not {folder for folder in folders if f"{folder}/__init__.py" not in _sources()}
    # Else an editable install is a hook, which no type checker runs.
    assert settings["package-dir"] == {"": "."}
    for top, inside in TOP.items():
        assert (ROOT / inside).is_symlink()
        assert (ROOT / inside).resolve() == ROOT / top


def _imported(tree: ast.AST) -> set[str]:
    """Top-level names of absolute imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_top_level_folders_are_never_imported_bare() -> None:
    others = [path for folder in ("tests", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")]
    guilty = {
        str(path.relative_to(ROOT))
        for path in [*_sources().values(), *others]
        if _imported(ast.parse(path.read_text(encoding="utf-8"))) & set(TOP)
    }
    assert not guilty


def _named(dependencies: list[str]) -> set[str]:
    """The modules of requirements."""
    return {
        dependency.split(">")[0].split("=")[0].split("<")[0].replace("-", "_") for dependency in dependencies
    }


def _imported_at_once(tree: ast.Module) -> set[str]:
    """Top-level names of absolute imports outside functions, which run when the module is imported."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return _imported(ast.Module([node for node in imports if id(node) not in inside], []))


def test_what_is_imported_is_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = _named(project["dependencies"])
    optional = _named(project["optional-dependencies"]["quantise"])
    comes_with = {"sympy": "torch", "huggingface_hub": "transformers", "tokenizers": "transformers"}
    for name, path in _sources().items():
        if name.startswith("fasp_fx/testing/"):
            continue  # used with the test extra
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for found, allowed in ((_imported(tree), required | optional), (_imported_at_once(tree), required)):
            outside = found - set(sys.stdlib_module_names) - {"fasp_fx"}
            assert {comes_with.get(module, module) for module in outside} <= allowed, name
