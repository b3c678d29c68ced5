"""How much code each room has, and what is public: ceilings that only fall, in files of their own.

Whoever raises one, or changes what is public, does so in a commit that says why:
``FASP_FX_REGENERATE=1 pytest tests/test_ceilings.py``.
"""

import ast
import importlib
import inspect
import json
import os
import re
from collections import Counter
from pathlib import Path

import fasp_fx

ROOT = Path(__file__).parent.parent
CEILINGS = Path(__file__).parent / "golden" / "ceilings.json"
PUBLIC = Path(__file__).parent / "golden" / "public-names"
PAGE = ROOT / "docs" / "architecture.md"
REGENERATE = os.environ.get("FASP_FX_REGENERATE") == "1"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def statements(file: Path) -> int:
    """What has to be understood of a file: its statements but docstrings."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    documented = [node for node in nodes if isinstance(node, _DOCUMENTED)]
    docstrings = sum(ast.get_docstring(node, clean=False) is not None for node in documented)
    return sum(isinstance(node, ast.stmt) for node in nodes) - docstrings


def rooms() -> dict[str, int]:
    """Statements by room."""
    found: Counter[str] = Counter()
    for top in ("fasp_fx", "passes", "patterns", "tests", "benchmarks"):
        for file in (ROOT / top).rglob("*.py"):
            parts = file.relative_to(ROOT).parts
            if top == "fasp_fx" and len(parts) > 2:
                if parts[1] not in ("passes", "patterns"):
                    found[f"fasp_fx/{parts[1]}"] += statements(file)
            else:
                found[top] += statements(file)
    return dict(sorted(found.items()))


def public() -> list[str]:
    """What doors promise: the names in ``__all__`` of their stubs, functions and options with signatures."""
    names = []
    for stub in sorted([*ROOT.glob("fasp_fx/**/__init__.pyi"), ROOT / "passes" / "__init__.pyi"]):
        parts = stub.relative_to(ROOT).parent.parts
        room = ".".join(parts if parts[0] == "fasp_fx" else ("fasp_fx", *parts))
        body = ast.parse(stub.read_text(encoding="utf-8")).body
        promised = next((ast.literal_eval(each.value) for each in body if isinstance(each, ast.Assign)), ())
        for name in promised:
            value = getattr(importlib.import_module(room), name)
            signature = ""
            if inspect.isfunction(value) or value is fasp_fx.PruningConfig:
                parameters = inspect.signature(value).parameters.values()
                signature = f"({', '.join(str(each.replace(annotation=each.empty)) for each in parameters)})"
            names.append(re.sub(r" at 0x\w+", "", f"{room}.{name}{signature}"))
    return sorted(names)


def test_no_room_grows() -> None:
    now = rooms()
    if REGENERATE:
        CEILINGS.write_text(json.dumps(now, indent=1) + "\n")
    held = json.loads(CEILINGS.read_text())
    assert now.keys() == held.keys()
    assert {name: count for name, count in now.items() if count > held[name]} == {}


def test_what_is_public_stays() -> None:
    now = "\n".join(public()) + "\n"
    if REGENERATE:
        PUBLIC.write_text(now)
    assert now == PUBLIC.read_text()


def test_what_takes_turns_is_there() -> None:
    for test in (Path(__file__).parent / "turns.txt").read_text("utf-8").splitlines():
        file, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text("utf-8"), test


def purposes() -> str:
    """What each file of the library says of itself in its first sentence, as a list."""
    said = []
    for file in [each for top in ("fasp_fx", "passes", "patterns") for each in (ROOT / top).rglob("*.py")]:
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        sentence = re.split(r"\.(?=\s|$)", " ".join((text or "").split()))[0]
        said.append(f"* `{file.relative_to(ROOT).as_posix().removeprefix('fasp_fx/')}`: {sentence}")
    return "\n".join(sorted({*said})) + "\n"


def test_the_page_lists_every_file() -> None:
    title = "\n## Every file\n\nWhat each says of itself in its first sentence.\n\n"
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(title)
    if REGENERATE:
        PAGE.write_text(head + title + purposes(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == head + title + purposes()
