"""Forgeries at random: saved results of every format, changed by a seed, sealed again, and what becomes of
loading them.

As a script it tries slices, which are the same wherever they run, and prints what they came to::

    python tests/forging.py FORMAT FIRST COUNT FOLDER
"""

from __future__ import annotations

import collections
import contextlib
import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from refusal import BATCH, X
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.errors import FaspError, PlanError, StoreError

#: seconds that a load may compute, and a call of what was loaded
LIMIT = 10.0
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
    "os.remove",
    "os.rename",
    "os.rmdir",
)


class Tiny(nn.Module):
    """Two linear layers, and what else a save may hold, in a few nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.register_buffer("shift", torch.arange(6.0) / 7)

    def forward(self, x: Tensor, *, scale: float = 2.0, flag: bool = True) -> dict[str, Any]:
        return {"out": self.down(F.relu(self.up(x))) * scale + self.shift, "rest": [x.sum(-1)]}


class Forked(nn.Module):
    """Cannot be captured as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = Tiny(), Tiny(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)["out"]
        if x.sum() < 1e6:
            x = x + self.second(x)["out"]
        found: Tensor = self.out(x)
        return found


IDS = torch.arange(3, 11)[None]


def _whole(folder: Path) -> None:
    torch.manual_seed(0)
    fasp_fx.prune(
        Tiny().eval(), (X,), {"scale": 2.0}, calibration=[BATCH], score="random", restore=None, sparsity=0.3
    ).save(folder)


def _rich(folder: Path) -> None:
    from saved import small_result

    torch.manual_seed(0)
    small_result().save(folder)


@cache
def _forked() -> nn.Module:
    torch.manual_seed(0)
    return Forked().eval()


def _parts(folder: Path) -> None:
    fasp_fx.prune(_forked(), (X,), calibration=[BATCH], score="random", restore=None, sparsity=0.3).save(
        folder
    )


def _hf(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32)).eval()
    fasp_fx.hf.prune(model, sparsity=0.3, score="random", restore=None).save_pretrained(folder)


def _plain(folder: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from fasp_fx.hf._plain_folder import save_plain

    sizes = {
        "hidden_size": 8,
        "ffn_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 16,
        "max_position_embeddings": 8,
    }
    plan = fasp_fx.PruningPlan("0" * 64, (), 0.25)
    save_plain(
        OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=8)),
        None,
        plan,
        fasp_fx.Report(0.25, 0.25, (100, 80), (400, 320), ()),
        folder,
    )


def _load(folder: Path, model: nn.Module | None = None) -> Callable[[], Any]:
    module = fasp_fx.load(folder, model=model).module
    return lambda: module(X)


def _load_rich(folder: Path) -> Callable[[], Any]:
    module = fasp_fx.load(folder).module
    return lambda: module(torch.arange(10).reshape(2, 5))


def _load_hf(folder: Path) -> Callable[[], Any]:
    from transformers import AutoModelForCausalLM

    from fasp_fx.hf import PrunedForCausalLM

    model = PrunedForCausalLM.from_pretrained(folder)
    if int.from_bytes(hashlib.sha256(str(folder).encode()).digest()[:1], "little") % 8 == 0:
        AutoModelForCausalLM.from_pretrained(folder)
    return lambda: model(input_ids=IDS, use_cache=False).logits


def _load_plain(folder: Path) -> Callable[[], Any]:
    """What is ours in such a folder; the rest is read by transformers."""
    from fasp_fx.hf._plain_folder import is_plain
    from fasp_fx.pruning.saving._folder import read_plan

    found = is_plain(folder), read_plan(folder)
    return lambda: torch.tensor(float(found[0])) + 0 * found[1].sparsity


@dataclass(frozen=True)
class Format:
    """How results of a format are made and loaded, and the names of the files with tensors."""

    make: Callable[[Path], None]
    load: Callable[[Path], Callable[[], Any]]
    manifest: str = "manifest.json"


FORMATS = {
    "whole": Format(_whole, _load),
    "rich": Format(_rich, _load_rich),
    "parts": Format(_parts, lambda folder: _load(folder, _forked())),
    "hf": Format(_hf, _load_hf),
    "plain": Format(_plain, _load_plain, "fasp_fx.json"),
}

# --- what is put in the place of something

HUGE = [10**9, 2**31, 2**63, 10**30, -1, -(2**63), 10**400, 0, 1, 2, 7]
WORDS = [
    *(
        "",
        " ",
        "a",
        "x.y",
        "training",
        "forward",
        "graph",
        "_modules",
        "__class__",
        "__class__.x",
        "__dict__",
        "self",
        "class",
        "None",
        "torch",
        "..",
        ".",
    ),
    *(
        "a\nb",
        "a'b",
        'a"b',
        "a\\",
        "\x00",
        "\ud800",
        "é",
        "𝔸",
        "s0",
        "u999999999",
        "cpu",
        "meta",
        "cuda:0",
        "cuda:99999999999",
        "mkldnn",
        "float32",
        "load",
    ),
    *(
        CODE,
        f"x = {CODE}",
        f"Symbol({CODE!r})",
        "2**2**2**2**2**2**2",
        "L['x'].size()[0] == 2**2**2**2**2**2",
        "os.system",
        "torch.hub.load",
        "builtins.eval",
    ),
    *(
        "torch.ops.aten.relu.default",
        "torch.ops.aten.mm.default",
        "torch.ops.aten.sum.default",
        "torch.ops.aten.empty.memory_format",
        "_operator.mul",
    ),
    *(
        "Pow(Integer(2), Pow(Integer(9), Integer(9)))",
        "Max(" + ", ".join(f"Symbol('s{i}', integer=True)" for i in range(300)) + ")",
        "Symbol('s0')",
        "Integer(3)",
    ),
    *(
        "Add(" + ", ".join(f"Symbol('s{i}', integer=True)" for i in range(20_000)) + ")",
        "Integer(" * 3000 + "1" + ")" * 3000,
        "x" * 10_000,
        "[" * 3000,
        "-" * 5000 + "1",
    ),
    *(
        "collections.OrderedDict",
        "builtins.dict",
        "transformers.cache_utils:DynamicCache",
        "transformers.models.llama.modeling_llama.LlamaModel",
        "\x1b[31m",
    ),
]


def _value(draw: random.Random) -> Any:
    kind = draw.randrange(9)
    if kind < 3:
        return draw.choice(WORDS)
    if kind < 5:
        return draw.choice(HUGE)
    if kind == 5:
        return draw.choice(
            [None, True, False, [], {}, [[]], {"": None}, 0.5, float("nan"), float("inf"), 1e308, -0.0]
        )
    if kind == 6:
        return [draw.choice(WORDS)] * draw.choice([1, 3, 300])
    if kind == 7:
        return {draw.choice(WORDS): draw.choice(HUGE)}
    made: Any = 1
    for _ in range(draw.choice([5, 60, 900])):
        made = [made] if draw.random() < 0.5 else {"a": made}
    return made


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    found, waiting = [], [data]
    while waiting:
        item = waiting.pop()
        keys: Any = (
            list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        )
        for key in keys:
            found.append((item, key))
            waiting.append(item[key])
    return found


def _everywhere(data: Any, old: str, new: str) -> Any:
    """The data with one text in the place of another, keys and texts that hold JSON included."""
    if isinstance(data, dict):
        return {_everywhere(key, old, new): _everywhere(value, old, new) for key, value in data.items()}
    if isinstance(data, list):
        return [_everywhere(item, old, new) for item in data]
    if isinstance(data, str):
        return (
            new
            if data == old
            else data.replace(json.dumps(old), json.dumps(new))
            if data[:1] in "[{"
            else data
        )
    return data


def _rename(data: Any, draw: random.Random) -> str:
    """Give one text another form wherever it stands, so that what refers to it still does."""
    texts = sorted(
        {item[key] for item, key in _places(data) if isinstance(item[key], str)}
        | {key for _, key in _places(data) if isinstance(key, str)}
    )
    old = draw.choice(texts)
    new = draw.choice([*WORDS, *texts])
    try:
        held = _everywhere(data, old, new)
    except RecursionError:  # an earlier change nested it too deep
        return "nothing"
    data.clear()
    data.update(held)
    return f"{old:.60} is called {new:.60} everywhere"


def _express(data: Any, draw: random.Random) -> str:
    """Put an expression in the place of a size."""
    sizes = [
        (item, key)
        for item, key in _places(data)
        if isinstance(item[key], dict) and item[key].keys() & {"as_int", "as_expr"}
    ]
    if not sizes:
        return "nothing"
    item, key = draw.choice(sizes)
    text = draw.choice([word for word in WORDS if "(" in word] + [_expression(draw, 3) for _ in range(20)])
    item[key] = {"as_expr": {"expr_str": text, "hint": draw.choice([None, {"as_int": draw.choice(HUGE)}])}}
    return f"{key}: {text:.60}"


def _expression(draw: random.Random, depth: int) -> str:
    if depth == 0 or draw.random() < 0.2:
        return draw.choice(
            [
                "Symbol('s77', positive=True, integer=True)",
                "Symbol('u0', integer=True)",
                f"Integer({draw.choice(HUGE[:6])})",
                "Float('1e300', precision=53)",
            ]
        )
    names = (
        "Add",
        "Mul",
        "Pow",
        "Max",
        "Min",
        "Mod",
        "FloorDiv",
        "CleanDiv",
        "ModularIndexing",
        "Rational",
        "Where",
        "LShift",
        "PowByNatural",
        "Abs",
        "And",
        "Not",
    )
    name = draw.choice(names)
    arguments = [_expression(draw, depth - 1) for _ in range(draw.choice([1, 2, 2, 3]))]
    return f"{name}({', '.join(arguments)})"


def _change_json(data: Any, draw: random.Random) -> str:
    """Change parsed JSON in one place; returns what was done."""
    places = _places(data)
    if not places:
        return "nothing"
    if isinstance(data, dict) and draw.random() < 0.3:
        return draw.choice([_rename, _rename, _express])(data, draw)
    if draw.random() < 0.5:  # deep inside there are many places of one kind; here each name counts alike
        names = sorted({str(key) for _, key in places if isinstance(key, str)})
        name = draw.choice(names) if names else ""
        places = [place for place in places if place[1] == name] or places
    item, key = draw.choice(places)
    kind = draw.randrange(10)
    if kind < 3:
        item[key] = _value(draw)
        return f"{key}: a value"
    if kind == 3:
        del item[key]
        return f"{key}: deleted"
    if kind == 4 and isinstance(item, dict):
        item[draw.choice([*WORDS, *map(str, item)])] = item.pop(key)
        return f"{key}: renamed"
    if kind == 5:
        other, place = draw.choice(_places(data))
        item[key] = copy.deepcopy(other[place])
        return f"{key}: a copy of {place}"
    if kind == 6 and isinstance(item, list):
        count = draw.choice([1, 2, 50, 2000])
        item[key:key] = (
            [copy.deepcopy(item[key]) for _ in range(count)] if len(json.dumps(item[key])) < 20_000 else []
        )
        return f"{key}: {count} times"
    if kind == 7 and isinstance(item[key], (int, float)) and not isinstance(item[key], bool):
        item[key] = item[key] + draw.choice([1, -1, 0.5, 100, 2**31])
        return f"{key}: another number"
    if kind == 8 and isinstance(item[key], str) and item[key]:
        at = draw.randrange(len(item[key]))
        item[key] = (
            item[key][:at]
            + draw.choice(["", "x", ".", "(", "'", "\n", "9", "é", draw.choice(WORDS)])
            + item[key][at + draw.randrange(3) :]
        )
        return f"{key}: a character"
    item[key] = draw.choice([[item[key]], {"a": item[key]}, str(item[key])[:5000]])
    return f"{key}: wrapped"


def _change_bytes(content: bytes, draw: random.Random) -> bytes:
    if not content:
        return b"x"
    at = draw.randrange(min(len(content), draw.choice([8, 300, 10**9])))
    kind = draw.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + draw.randbytes(draw.choice([1, 8, 100])) + content[at:]
    if kind == 3:
        return content[:at] + content[at + draw.choice([1, 8, 100]) :]
    return content + draw.randbytes(8)


def _change_tensors(content: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    if draw.random() < 0.5:
        header = json.loads(content[8 : 8 + length])
        _change_json(header, draw)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + content[8 + length :]
    if draw.random() < 0.5:
        return _change_bytes(content, draw)
    data = bytearray(content)
    for _ in range(draw.choice([1, 4, 50])):
        if len(data) > 8 + length:
            data[draw.randrange(8 + length, len(data))] = draw.randrange(256)
    return bytes(data)


def _special(file: Path, draw: random.Random) -> str:
    """Put something that is no file in the place of one."""
    kind = draw.choice(["pipe", "zero", "folder", "loop", "sparse", "gone", "empty"])
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "zero":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file)
    elif kind == "sparse":
        with file.open("wb") as stream:
            stream.write(b"{")
            stream.truncate(40 * 2**30)
    elif kind == "empty":
        file.touch()
    return kind


def forge(folder: Path, manifest: str, draw: random.Random) -> tuple[str, str]:
    """Change a folder and make every manifest agree; returns the file and what was done."""
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and file.suffix in (".json", ".safetensors")
    )
    weights = [
        6.0 if file.name in ("graph.json", "programs.json") else 0.7 if file.name == manifest else 1.0
        for file in files
    ]
    (file,) = draw.choices(files, weights)
    name = str(file.relative_to(folder))
    if draw.random() < 0.02:
        return name, _special(file, draw)
    done = []
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            try:
                content, what = _change_tensors(content, draw), "tensors"
            except ValueError:
                content, what = _change_bytes(content, draw), "bytes"
        elif draw.random() < 0.1:
            content, what = _change_bytes(content, draw), "bytes"
        else:
            try:
                data = json.loads(content)
                what = _change_json(data, draw)
                content = json.dumps(data).encode("utf-8", "surrogatepass")
            except (ValueError, RecursionError):
                content, what = _change_bytes(content, draw), "bytes"
        file.write_bytes(content)
        done.append(what)
    if file.name != manifest or draw.random() < 0.5:
        seal(folder, manifest)
    return name, "; ".join(done)


def seal(folder: Path, manifest: str) -> None:
    """Put the checksums right, those of inner folders first."""
    for file in sorted(folder.rglob(manifest), key=lambda file: -len(file.parts)):
        try:
            data = json.loads(file.read_text())
            listed = data["files"]
            for name in listed:
                content = (file.parent / name).read_bytes()
                listed[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            file.write_text(json.dumps(data))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue


# --- what becomes of it


class TooLong(BaseException):
    """The time is up; no ``except Exception`` may take it for something else."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise :class:`TooLong` in the block once it has computed for so long, or waited for a dozen times that:
    other processes may be busy.
    """

    def stop(*args: object) -> None:
        raise TooLong

    timers = [
        (signal.SIGPROF, signal.ITIMER_PROF, seconds),
        (signal.SIGALRM, signal.ITIMER_REAL, 12 * seconds),
    ]
    before = [signal.signal(number, stop) for number, _, _ in timers]
    for _, timer, amount in timers:
        signal.setitimer(timer, amount)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


_watching: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is not None and event.startswith(FORBIDDEN):
        _watching.append(f"{event} {arguments!r:.200}")


@cache
def _listen() -> None:
    sys.addaudithook(_audit)


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """What the block did that loading a model must not do."""
    global _watching
    _listen()
    _watching = found = []
    try:
        yield found
    finally:
        _watching = None


@dataclass
class Tried:
    """The outcomes of some forgeries, and those that must not be."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    slowest_what: str = ""


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and found.shape == expected.shape and torch.equal(found, expected)
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_same(found[key], expected[key]) for key in expected)
        )
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(found, (list, tuple))
            and len(found) == len(expected)
            and all(map(_same, found, expected))
        )
    return bool(found == expected)


class Forger:
    """Tries forgeries of one saved result."""

    def __init__(self, name: str, original: Path, work: Path) -> None:
        self.name, self.format, self.original, self.work = name, FORMATS[name], original, work
        if not original.exists():
            self.format.make(original)
        with torch.no_grad():
            self.expected = self.format.load(original)()

    def try_one(self, seed: int, tried: Tried) -> None:
        """Forge with this seed, load, and call what was loaded."""
        draw = random.Random(f"{self.name} {seed}")
        folder = self.work / f"{self.name}{seed % 16}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.original, folder)
        file, what = forge(folder, self.format.manifest, draw)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        with watched() as events:
            outcome = self._outcome(folder, file)
        spent = time.perf_counter() - began
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
        if spent > tried.slowest:
            tried.slowest, tried.slowest_what = spent, f"{self.name} {seed}: {file} ({what})"
        faults = [f"did {event}" for event in events]
        if outcome.startswith("WRONG"):
            faults.append(outcome)
        if more > MEMORY:
            faults.append(f"took {more:,} bytes more")
        if Path("ran").exists():
            Path("ran").unlink()
            faults.append("ran code")
        tried.outcomes[outcome.split(":")[0]] += 1
        tried.wrong += [f"{self.name} {seed}: {file} ({what}): {fault}" for fault in faults]
        shutil.rmtree(folder, ignore_errors=True)

    def _outcome(self, folder: Path, file: str) -> str:
        try:
            with limited(LIMIT), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = self.format.load(folder)
        except (StoreError, PlanError) as error:
            return "refused" if str(error) else "WRONG: an error without a word"
        except FaspError as error:
            return f"refused as {type(error).__name__}"
        except TooLong:
            return "WRONG: loading takes too long"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            if (
                self.name == "hf"
                and isinstance(error, (OSError, ValueError))
                and file == "config.json"
                and "transformers" in _origin(error)
            ):
                return "refused by transformers, which reads config.json first"
            return f"WRONG: {type(error).__name__}: {str(error)[:200]!r}"
        try:
            with limited(LIMIT), torch.no_grad():
                found = call()
        except TooLong:
            return "called: does not end"
        except Exception as error:
            return "call refused" if isinstance(error, FaspError) else f"call fails as {type(error).__name__}"
        if _same(found, self.expected):
            return "equal"
        if file.endswith(".safetensors"):
            return "another weight"
        if file.endswith(("graph.json", "programs.json", "signature.json", "config.json", "parts.json")):
            return "another program"  # it says so itself: operators run as they are named
        return "another plain folder" if self.name == "plain" else f"WRONG: other outputs by {file}"


def _origin(error: BaseException) -> str:
    """The file that an error was raised in."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_code.co_filename


def main(name: str, first: int, count: int, folder: Path) -> None:
    """Try a slice and print what it came to."""
    import logging

    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    work = folder / f"work-{os.getpid()}"
    work.mkdir(parents=True)
    os.chdir(work)
    forger, tried = Forger(name, folder / name, work), Tried()
    for seed in range(first, first + count):
        (folder / f"last-{name}-{first}").write_text(str(seed))  # what a crash was tried with
        forger.try_one(seed, tried)
    print(
        json.dumps(
            {
                "format": name,
                "first": first,
                "count": count,
                "outcomes": tried.outcomes,
                "wrong": tried.wrong,
                "slowest": tried.slowest,
            }
        )
    )
    print(tried.slowest_what, file=sys.stderr)
    os.chdir(folder)
    shutil.rmtree(work)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]).absolute())
