"""What imports what: no file imports another that leads back to it, be it inside of a function."""

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
    """The modules that a file imports when it runs; those for type checkers are none."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from (
        target
        for target in visit(ast.parse(file.read_text(encoding="utf-8")))
        if target in known and target != name
    )


def test_no_file_leads_back_to_itself() -> None:
    known = files()
    assert len(known) > 200
    graph = nx.DiGraph(
        (name, target) for name, file in known.items() for target in imported(name, file, known)
    )
    assert graph.has_edge("fasp_fx.passes._run", "fasp_fx.passes._verify")
    assert graph.has_edge("fasp_fx._result", "fasp_fx._store._folder"), "imports inside of functions count"
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []
