"""The floors of the house: a room imports from lower ones only, and no file leads back to itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

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
    {"", "cli"},  # fasp_fx itself
    {"testing", "__main__"},
)


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


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports, for annotations and inside of functions as well."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    yield from (target for target in found if target in known and target != name)


def graph_of_imports() -> nx.DiGraph:
    known = files()
    assert len(known) > 100
    return nx.DiGraph(
        (name, target) for name, file in known.items() for target in imported(name, file, known)
    )


def floor_of(name: str) -> int:
    room = name.partition(".")[2].partition(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room_of(name: str) -> str:
    return name.partition(".")[2].partition(".")[0]


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
    assert graph.has_edge("fasp_fx.pruning._result", "fasp_fx.pruning.eager"), "inside of functions"
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []
