"""Every public function and class has an example in its docstring, which runs as a test.

Examples begin where the Python of docs/reference.md leaves off. Errors and warnings need none: they are
raised, not called.
"""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
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
    if inspect.isclass(value):
        return not issubclass(value, BaseException)
    return inspect.isfunction(value)


def examples() -> Iterator[Any]:
    """Each public function or class once."""
    seen: set[int] = set()
    for room, names in ROOMS:
        for name in names.split() or promised(room):
            value = getattr(importlib.import_module(room), name)
            if is_example_needed(value) and id(value) not in seen:
                seen.add(id(value))
                yield pytest.param(room, value, id=f"{room}.{name}")


@functools.cache
def given(block: int) -> dict[str, Any]:
    """What a block of Python of the reference, and those before it, leave."""
    code = re.findall(r"^```python\n(.*?)^```$", REFERENCE, flags=re.MULTILINE | re.DOTALL)[block]
    names = dict(given(block - 1)) if block else {}
    exec(compile(code, "reference", "exec"), names)
    return names


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a program: a warning does not end it
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
