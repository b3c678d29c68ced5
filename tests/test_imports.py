"""The house: rooms import from lower floors, by their doors, and no file leads back to itself."""

import ast
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
#: where the packages lie; those inside of fasp_fx are links
PACKAGES = {
    "fasp_fx": ROOT / "fasp_fx",
    "fasp_fx.passes": ROOT / "passes",
    "fasp_fx.patterns": ROOT / "patterns",
}
#: rooms of one floor do not know each other
FLOORS = (
    {"errors"},
    {"base"},
    {"patterns"},
    {"capturing"},
    {"analysis"},
    {"allocation", "storage"},
    {"calibration", "passes"},
    {"pruning"},
    {"hf", "interop"},
    {"training"},
    {"", "_load", "cli"},  # fasp_fx itself
    {"testing", "__main__"},
)


#: what a door defines itself
DEFINED = {("fasp_fx.cli", "main"), ("fasp_fx.base", "__version__")}


def files() -> dict[str, Path]:
    """Every module of the library by its name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            if package == "fasp_fx" and parts[0] in ("passes", "patterns"):
                continue
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


def statements_of(name: str, file: Path) -> Iterator[tuple[str, str]]:
    """What a file imports, for annotations and inside of functions as well: source and name."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((source, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                (importlib.util.resolve_name(target.value, package), "")
                for target in node.args[:1]
                if isinstance(target, ast.Constant)
            )


@functools.cache
def doors() -> dict[str, dict[str, str]]:
    """What each room lends: the module of each name, by the room."""
    lent = {}
    for name, file in files().items():
        if name.count(".") == 1 and file.name == "__init__.py":
            stub = file.with_suffix(".pyi")
            lent[name] = {
                what: source for source, what in statements_of(name, stub if stub.exists() else file)
            }
    return lent


def promised(room: str) -> set[str]:
    """The public names of a room."""
    stub = files()[room].with_suffix(".pyi")
    body = ast.parse(stub.read_text(encoding="utf-8")).body if stub.exists() else []
    return {name for each in body if isinstance(each, ast.Assign) for name in ast.literal_eval(each.value)}


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports, those behind doors too."""
    lent = doors()
    targets = set()
    for source, what in statements_of(name, file):
        behind = lent.get(source, {}).get(what, source) if source != name else source
        targets.add(f"{source}.{what}" if f"{source}.{what}" in known else behind)
    yield from (target for target in targets if target in known and target != name)


def graph_of_imports() -> nx.DiGraph:
    known = files()
    assert len(known) > 100
    return nx.DiGraph(
        (name, target) for name, file in known.items() for target in imported(name, file, known)
    )


def room_of(name: str) -> str:
    return name.partition(".")[2].partition(".")[0]


def floor_of(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room_of(name) in rooms)


def test_rooms_are_entered_by_their_doors() -> None:
    lent = doors()
    assert len(lent["fasp_fx.calibration"]) > 20
    inside = [
        f"{name} imports {what} of {source}"
        for name, file in files().items()
        for source, what in statements_of(name, file)
        if source.startswith("fasp_fx.") and source != "fasp_fx.errors" and room_of(source) != room_of(name)
        if what not in lent.get(source, {}) and (source, what) not in DEFINED
    ]
    assert inside == []


def test_what_a_room_lends_somebody_uses() -> None:
    """What is not promised to users (``__all__``) is wanted by another room, or by a test."""
    readers = {**files(), **{file.stem: file for file in ROOT.glob("tests/**/*.py")}}
    taken = {each for name, file in readers.items() for each in statements_of(name, file)}
    used_by_name = {
        ("fasp_fx.pruning", name) for name in ("Constraint", "apply", "measure", "prune")
    }  # in hf
    stubs = {name for name, file in files().items() if file.with_suffix(".pyi").exists()}
    lent = {(room, name) for room in stubs & doors().keys() for name in doors()[room].keys() - promised(room)}
    assert lent - taken - used_by_name == set()


def test_rooms_import_from_lower_floors_only() -> None:
    upward = [
        f"{name} imports {target}"
        for name, target in graph_of_imports().edges
        if room_of(name) != room_of(target) and floor_of(name) <= floor_of(target)
    ]
    assert upward == []


def test_no_file_leads_back_to_itself() -> None:
    graph = graph_of_imports()
    assert graph.has_edge("fasp_fx.passes._run", "fasp_fx.passes._verify")
    assert graph.has_edge("fasp_fx.pruning._result", "fasp_fx.pruning._eager"), "inside of functions"
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


# --- the wheel holds every module, at the right place, and nothing is imported from where only a checkout has


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


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed, so no wheel can be built offline")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("fasp_fx", "passes", "patterns"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        wheel = archive.namelist()
    page = ROOT / "fasp_fx" / "interop" / "page"
    parts = {path.name for path in page.iterdir() if path.suffix in (".html", ".css", ".js")}
    assert len(parts) >= 3
    others = {"fasp_fx/py.typed", *(f"fasp_fx/interop/page/{name}" for name in parts)}
    found = {name for name in wheel if ".dist-info/" not in name and not name.endswith("/README.md")}
    assert found == {*_sources(), *others}
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)


def test_an_editable_install_is_a_path() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
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
    required, extras = _named(project["dependencies"]), project["optional-dependencies"]
    optional = _named([*extras["quantise"], *extras["lightning"]])
    comes_with = {"sympy": "torch", "huggingface_hub": "transformers", "tokenizers": "transformers"}
    for name, path in _sources().items():
        if name.startswith("fasp_fx/testing/"):
            continue  # used with the test extra
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for found, allowed in ((_imported(tree), required | optional), (_imported_at_once(tree), required)):
            outside = found - set(sys.stdlib_module_names) - {"fasp_fx"}
            assert {comes_with.get(module, module) for module in outside} <= allowed, name
