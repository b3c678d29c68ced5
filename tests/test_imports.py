"""The house: rooms import from lower floors, by their doors, and no file leads back to itself."""

from __future__ import annotations

import ast
import functools
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
    """What a file imports with ``from``, for annotations and inside of functions as well: source and name."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((source, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


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


def floor_of(name: str) -> int:
    room = name.partition(".")[2].partition(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room_of(name: str) -> str:
    return name.partition(".")[2].partition(".")[0]


def test_rooms_are_entered_by_their_doors() -> None:
    lent = doors()
    assert len(lent["fasp_fx.calibration"]) > 20
    inside = [
        f"{name} imports {what} of {source}"
        for name, file in files().items()
        for source, what in statements_of(name, file)
        if source.startswith("fasp_fx.") and source != "fasp_fx.errors" and room_of(source) != room_of(name)
        if what not in lent.get(source, {})
        and (source, what)
        not in (
            ("fasp_fx.cli", "main"),
            ("fasp_fx.base", "__version__"),
        )
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
