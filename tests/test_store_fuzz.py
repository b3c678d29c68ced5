"""Saved results of every kind changed at random and sealed again are refused in words, or load as what they
say: no code runs, nothing takes long, and no size makes memory of nothing.

Forty forgeries of each kind, of the golden saves; more in the slow profile.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROFILE
from saved import GOLDEN, loaded, outputs, seal

from fasp_fx.errors import FaspError

pytestmark = pytest.mark.filterwarnings("ignore")

COUNT = 2000 if PROFILE == "slow" else 40
#: seconds that a load may compute
LIMIT = 10
#: bytes that a load of a folder of some ten thousand bytes may take more than any before it
MEMORY = 2**29
CODE = "__import__('pathlib').Path('ran').touch()"
#: events of the interpreter that loading a model has no business with
FORBIDDEN = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "socket.connect",
)
FORBIDDEN += ("os.remove", "os.rename", "os.rmdir")
VALUES = [
    *(10**9, 2**31, 2**63, 10**30, 10**400, -1, 0, 1, 7, 0.5, float("nan"), float("inf"), 1e308),
    *(None, True, [], {}, [[]], {"": None}, [[[[[[1]]]]]], ["a"] * 300),
    *(
        "",
        " ",
        "a",
        "x.y",
        "training",
        "forward",
        "_modules",
        "__class__.x",
        "__dict__",
        "self",
        "class",
        "torch",
        "..",
    ),
    *(
        "a\nb",
        "a'b",
        'a"b',
        "a\\",
        "\x00",
        "é",
        "s0",
        "u999999999",
        "cpu",
        "meta",
        "cuda:0",
        "float32",
        "load",
    ),
    *(
        CODE,
        f"x = {CODE}",
        f"Symbol({CODE!r})",
        "os.system",
        "torch.hub.load",
        "builtins.eval",
        "Integer(3)",
        "Symbol('s0')",
    ),
    *(
        "torch.ops.aten.relu.default",
        "torch.ops.aten.mm.default",
        "torch.ops.aten.empty.memory_format",
        "_operator.mul",
    ),
    *(
        "collections.OrderedDict",
        "builtins.dict",
        "transformers.cache_utils:DynamicCache",
        "x" * 10_000,
        "[" * 3000,
    ),
]


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    found, waiting = [], [data]
    while waiting:
        item = waiting.pop()
        keys: Any = (
            list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        )
        found += [(item, key) for key in keys]
        waiting += [item[key] for key in keys]
    return found


def change_json(data: Any, draw: random.Random) -> None:
    """Change parsed JSON in one place; there are many of some names, and each name counts alike."""
    found = places(data)
    name = draw.choice(sorted({str(key) for _, key in found}) or [""])
    item, key = draw.choice([place for place in found if str(place[1]) == name] or [([0], 0)])
    kind = draw.randrange(7)
    if kind < 3:
        item[key] = draw.choice(VALUES)
    elif kind == 3:
        del item[key]
    elif kind == 4:
        other, place = draw.choice(found)
        item[key] = copy.deepcopy(other[place])
    elif isinstance(item, list):
        item[key:key] = [item[key]] * draw.choice([1, 50, 2000])
    elif kind == 5:
        item[str(draw.choice(VALUES))[:99]] = item.pop(key)
    elif isinstance(item[key], str):  # a weight, a node or a symbol called otherwise, wherever it stands
        new = json.dumps(draw.choice([value for value in VALUES if isinstance(value, str)]))
        held = json.loads(json.dumps(data).replace(json.dumps(item[key]), new))
        data.clear() if isinstance(data, (dict, list)) else None
        data.update(held) if isinstance(data, dict) else data.extend(held)


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(min(len(content), draw.choice([8, 300, 10**9])) or 1)
    return (
        content[:at] + draw.choice([b"", b"\xff", draw.randbytes(9)]) + content[at + draw.choice([0, 1, 8]) :]
    )


def forge_at_random(folder: Path, draw: random.Random) -> str:
    """Change one file and make the manifest agree; returns its name."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors"))
    file = draw.choices(files, [4 if file.name in ("graph.json", "programs.json") else 1 for file in files])[
        0
    ]
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else 0
    if draw.random() < 0.15:
        file.write_bytes(change_bytes(content, draw))
    else:
        data = json.loads(content[8 : 8 + length] if length else content)
        for _ in range(draw.choice([1, 1, 1, 2])):
            change_json(data, draw)
        text = json.dumps(data).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] if length else text)
    name = file.relative_to(folder).as_posix()
    if name != "manifest.json":
        seal(folder, name)
    return name


class TooLong(BaseException):
    """The time is up; no ``except Exception`` may take it for something else."""


@contextlib.contextmanager
def limited(seconds: float = LIMIT) -> Iterator[None]:
    """Raise :class:`TooLong` in the block once it has computed for so long; other processes may be busy."""

    def stop(*args: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


_events: list[str] | None = None


@cache
def listen() -> None:
    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if _events is not None and event.startswith(FORBIDDEN):
            _events.append(f"did {event} {arguments!r:.200}")

    sys.addaudithook(audit)


def faults_of(folder: Path, name: str, expected: torch.Tensor, tried: Counter[str]) -> list[str]:
    """What went wrong in loading a forgery."""
    global _events
    listen()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _events = found = []
    try:
        with limited():
            call = loaded(folder)
        try:
            with limited(), torch.no_grad():
                same = torch.equal(call(), expected)
            tried["equal" if same else "another model"] += 1
            found += ["another model"] if not same and name.endswith(("plan.json", "report.json")) else []
        except Exception:  # it says so itself: operators run as they are named
            tried["the call fails"] += 1
    except FaspError as error:
        tried["refused"] += 1
        found += [] if str(error) else ["an error without a word"]
    except (Exception, TooLong) as error:
        found.append(f"{type(error).__name__}: {error}"[:300])
    finally:
        _events = None
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    found += [f"took {more:,} bytes more"] if more > MEMORY else []
    found += ["ran code"] if Path("ran").exists() else []
    return [f"{name}: {fault}" for fault in found]


@pytest.mark.parametrize("kind", ["whole", "parts", "plain", pytest.param("hf", marks=pytest.mark.slow)])
def test_forgeries_at_random(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected, tried, wrong = outputs(GOLDEN / kind), Counter[str](), []
    for seed in range(COUNT):
        folder = tmp_path / f"{kind}{seed}"
        shutil.copytree(GOLDEN / kind, folder)
        name = forge_at_random(folder, random.Random(f"{kind} {seed}"))
        wrong += [f"{seed}: {fault}" for fault in faults_of(folder, name, expected, tried)]
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert tried["refused"]
    assert tried["equal"]
