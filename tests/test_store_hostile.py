"""Saved results of every kind changed at random and sealed again are refused in words, or load as what they
say: no code runs, nothing takes long, and no size makes memory of nothing.

Some forgeries of each kind, of the golden saves; more in the slow profile.
"""

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROFILE
from saved import GOLDEN, IDS, forge, loaded, outputs, seal

import fasp_fx
from fasp_fx.errors import FaspError
from fasp_fx.storage._untrusted import check_expression, check_guard, operator_called

pytestmark = [pytest.mark.filterwarnings("ignore")]


COUNT = 2000 if PROFILE == "slow" else 25
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
        other, place = draw.choice(found or [([0], 0)])
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


# --- forged by hand


Change = Callable[[Any], object]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(GOLDEN / "whole", tmp_path / "out"))


def refused(folder: Path, says: str | None = None) -> None:
    with limited(), pytest.raises(fasp_fx.StoreError, match=says):
        fasp_fx.load(folder)
    assert not Path("ran").exists()


#: what a node of a graph is written as
NODE = ("name", "op", "target", "args", "kwargs", "recorded", "about")


def set_in_first(kind: str, /, **fields: Any) -> Change:
    """Change the first node of a kind."""

    def change(data: Any) -> None:
        node = next(node for node in data["program"]["nodes"] if node[1] == kind)
        for name, value in fields.items():
            node[NODE.index(name)] = value

    return change


node = partial(set_in_first, "call_function")


def recorded(shape: Any, strides: Any = (1,)) -> Change:
    return node(recorded={"tensor": ["float32", shape, list(strides), "cpu", False]})


def program(**fields: Any) -> Change:
    return lambda data: data["program"].update(fields)


def size(text: Any) -> Change:
    return recorded([text])


def hints(size: int) -> Change:
    """Sizes of the example."""

    def change(data: Any) -> None:
        for symbol in data["program"]["symbols"].values():
            symbol[-1] = size

    return change


def guard(text: str) -> Change:
    return program(guards=[text])


def everywhere(old: str, new: str) -> Change:
    def change(data: Any) -> None:
        data["program"] = json.loads(json.dumps(data["program"]).replace(json.dumps(old), json.dumps(new)))

    return change


def structure(part: str, kind: str, context: Any) -> Change:
    def change(data: Any) -> None:
        trees = data["program"]["structures"]
        inner = trees[0][2][1] if part == "in_spec" else trees[1]
        inner[:2] = [kind, context]

    return change


def entry(**fields: Any) -> Change:
    return lambda entries: entries["up.weight"].update(fields)


def entry_called(name: str) -> Change:
    return lambda entries: entries.update({name: entries.pop("up.weight")})


def parameter(index: int, **fields: Any) -> Change:
    return lambda data: data["parameters"][index].update(fields)


def nested(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


CLASS = json.dumps({"_t": "obj", "p": "subprocess:Popen", "s": {}})
ENUM = json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "y"}])
FACTORY = {"default_factory_module": "os", "default_factory_name": "abort", "dict_context": []}
FORGERIES: dict[str, tuple[str, Change]] = {
    # what would run, import or reach out
    **{
        f"size {text!s:.30}": ("graph", size(text))
        for text in (
            CODE,
            f"Symbol({CODE!r})",
            "s99",
            "",
            None,
            {"size": "s23"},
            ["eval", CODE],
            ["Add"],
            ["__class__", 1],
            ["Pow", 10, 10**9],
            ["Pow", ["Pow", 10, 60], 60],
            ["Pow", ["Pow", ["Pow", "s23", 60], 60], 60],
            ["Pow", 10, "s23"],
            ["LShift", 1, ["Mul", 10, 10]],
            ["LShift", 1, 10**9],
            [["Add", 1, 2], 3],
            10**30,
            float("nan"),
        )
    },
    "a size of 20,000 parts": ("graph", size(["Add", *[1] * 20_000])),
    "a shape of 20,000 sizes": ("graph", recorded([1] * 20_000, [1] * 20_000)),
    "a shape without strides": ("graph", recorded([3, 4], [1])),
    **{
        f"guard {text:.30}": ("graph", guard(text))
        for text in (
            f"{CODE} or True",
            f"True, 'x')\n  {CODE}\n  torch._assert(True",
            "L['ids'].__class__ == 1",
            "torch.load('x') == 1",
            "L['x'] @ L['x'] == 1",
            "-" * 5000 + "1 == 1",
            " + ".join(["L['x'].size()[0]"] * 20_000),
        )
    },
    **{
        f"operator {target}": ("graph", node(target=target))
        for target in (
            "builtins.eval",
            "torch.hub.load",
            "torch.ops.load_library",
            "torch.ops.aten.from_file.default",
            "torch.ops.aten.save.default",
            "torch.ops.mine.unheard.default",
            "#mine:unheard",
        )
    },
    "operator as an argument": ("graph", node(args=[{"operator": "torch.hub.load"}])),
    "code in a keyword of an operator": ("graph", node(kwargs={f"x = {CODE}, y": 2})),
    "a method": ("graph", node(op="call_method", target="__reduce__")),
    "a module": ("graph", node(op="call_module", target="training")),
    "a function that is code": ("graph", node(op="get_attr", target=[f"x, {CODE}", []])),
    "a function in the place of an attribute": ("graph", node(op="get_attr", target=["forward", []])),
    "an input called as code": ("graph", set_in_first("placeholder", target=f"x={CODE}")),
    "a node that comes later": ("graph", node(args=[{"node": "linear_2"}])),
    "a node twice": ("graph", lambda data: data["program"]["nodes"].insert(0, data["program"]["nodes"][0])),
    "code for a module": ("graph", node(about={"modules": [["a", "b", f'"\n{CODE}']]})),
    "a type of no kind": ("graph", node(recorded={"tensor": ["load", [], [], "cpu", False]})),
    "an input that is no kind": ("graph", program(inputs=[["CUSTOM_OBJ", None, None]])),
    "an output that is no kind": ("graph", program(outputs=[["OTHER", None]])),
    **{
        f"node called {name:.20}": ("graph", everywhere("relu", name))
        for name in (f"x = {CODE}; y", "class", "self", "__import__", "x y", "", "1x", "x" * 5000)
    },
    "code in an input's name": ("graph", everywhere("ids", f"ids = {CODE}")),
    "argument names": ("graph", program(arguments=[f"ids={CODE}"])),
    "keyword": ("graph", structure("in_spec", "builtins.dict", json.dumps([f"ids'] + [{CODE}"]))),
    "unknown type": ("graph", structure("out_spec", "os.path.Thing", "null")),
    "no output of transformers": ("graph", structure("out_spec", "transformers.cache_utils.ABC", "null")),
    "module of transformers": (
        "graph",
        structure("out_spec", "transformers.commands.env.EnvironmentCommand", "null"),
    ),
    "enum": ("graph", structure("out_spec", "builtins.dict", ENUM)),
    "class in a cache": ("graph", structure("out_spec", "transformers.cache_utils:DynamicCache", CLASS)),
    "factory": ("graph", structure("out_spec", "collections.defaultdict", FACTORY)),
    "dtype in a cache that is none": (
        "graph",
        structure(
            "out_spec", "transformers.cache_utils:DynamicCache", json.dumps({"_t": "dtype", "n": "load"})
        ),
    ),
    "a deep structure": ("graph", program(structures=[nested(900)])),
    "no structure": ("graph", program(structures=[])),
    "no nodes": ("graph", program(nodes=[])),
    "schema of the future": ("graph", program(version=99)),
    # what would be as large as it says
    "a large example": ("graph", hints(10**6)),
    "a negative example": ("graph", hints(-1)),
    "a large symbol": ("graph", program(symbols={"u999999999": [["integer"], 0, 9, None]})),
    "a deep graph": ("graph", lambda data: data.update(more=nested(900))),
    "a deep default": ("signature", parameter(1, default=nested(900))),
    "digits": (
        "report",
        lambda data: data.update(figures=[{"what": "x", "dense": 1, "pruned": 1, "digits": 10**9}]),
    ),
    "an index of 400 digits": (
        "plan",
        lambda data: data["groups"][0]["producers"][0].update(removed=[10**400]),
    ),
    "a deep plan": ("plan", lambda data: data.update(groups=nested(900))),
    # tensors
    **{
        f"weight called {name:.20}": ("weights", entry_called(name))
        for name in (
            f'up", {CODE}) or getattr(self, "up.weight',
            "__class__.x",
            "training",
            "forward",
            "_parameters",
            "a..b",
            "x.",
            "a.forward.b",
            "x" * 5000,
            ".".join("x" * 500),
        )
    },
    "weight called as an attribute of graphs": ("graph", everywhere("up.weight", "graph")),
    "a tensor that is not stored": ("weights", entry(stored_as="other")),
    "another tensor": ("weights", entry(stored_as="up.bias")),
    "order of dimensions": ("weights", entry(order=[0])),
    **{
        f"device {device!s:.20}": ("weights", entry(device=device))
        for device in ("", "meta", "nowhere", "cuda:99999999999999", "cpu\0", 7, None, "x" * 5000)
    },
    # signatures
    "code in an argument's name": ("signature", parameter(0, name=f"ids={CODE}")),
    "an argument of generated code": ("signature", parameter(0, name="_call")),
    "an argument of another kind": ("signature", parameter(0, kind="OTHER")),
    "code for a default": ("signature", parameter(1, default={"call": CODE})),
    "a dtype for a default": ("signature", parameter(1, default={"dtype": "load"})),
    "the same argument twice": ("signature", lambda data: data["parameters"].append(data["parameters"][0])),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_saves_are_refused(folder: Path, name: str) -> None:
    part, change = FORGERIES[name]
    forge(folder, part + (".safetensors" if part == "weights" else ".json"), change)
    refused(folder)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b"[" * 100_000, b"", b"null", b"9" * 5000, b"{}", b"\0nonsense"]
)
def test_files_that_do_not_parse(folder: Path, content: bytes) -> None:
    for file in folder.iterdir():
        if file.name != "manifest.json":
            before = file.read_bytes()
            file.write_bytes(content)
            seal(folder, file.name)
            refused(folder, file.stem)
            file.write_bytes(before)
            seal(folder, file.name)


@pytest.mark.parametrize(
    "put",
    [
        os.mkfifo,
        partial(os.symlink, "/dev/zero"),
        os.mkdir,
        lambda file: file.symlink_to(file),
        lambda file: file.symlink_to("nowhere"),
        lambda file: file.write_bytes(b"{}" + b" " * 2**27),
    ],
    ids=["pipe", "device", "folder", "loop", "nowhere", "too long"],
)
@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_files_that_are_none(folder: Path, name: str, put: Callable[[Path], object]) -> None:
    (folder / name).unlink()
    put(folder / name)
    refused(folder, name)


def test_links_to_files_are_followed(folder: Path) -> None:
    """The hub's cache is made of them."""
    for file in folder.iterdir():
        file.unlink()
        file.symlink_to(GOLDEN / "whole" / file.name)
    assert torch.equal(outputs(folder), outputs(GOLDEN / "whole"))


def test_names_in_the_signature_never_become_code(folder: Path) -> None:
    names = {"captured": [f"ids or {CODE}"], "constants": {f"x') or {CODE} or ('": 1}}
    forge(folder, "signature.json", lambda data: data.update(names))
    with contextlib.suppress(fasp_fx.FaspError, TypeError, NameError):
        fasp_fx.load(folder).module(IDS)
    assert not Path("ran").exists()


def test_stack_traces_and_other_remarks_are_dropped(folder: Path) -> None:
    remarks = {"source_fn_stack": "a,torch.hub.load", "custom": "{}", "stack_trace": "x"}
    forge(folder, "graph.json", node(about=remarks))
    assert not any(remarks.keys() & found.meta.keys() for found in fasp_fx.load(folder).program.graph.nodes)


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (check_expression, "s77"),
        (check_expression, ["Mul", -1, "s0", ["Pow", "s1", 2]]),
        (check_expression, ["Max", 1.5, ["Rational", 1, 2], ["FloorDiv", "u0", 2]]),
        (check_expression, ["And", ["Equality", "s0", 1], True]),
        (check_guard, "L['a']['b'][0].size()[0] + L['c'].size()[1] <= 2*L['d'].stride()[0]"),
        (check_guard, "max(1, L['x'].size()[0]) % 8 == 0 and L['x'].size()[0]**2 <= 2**31"),
        (check_guard, "not (L['x'].size()[0] - 1 == -1)"),
        (operator_called, "torch.ops.aten.linear.default"),
        (operator_called, "torch.ops.aten.sym_size.int"),
        (operator_called, "_operator.mul"),
        (operator_called, "torch.sym_max"),
    ],
)
def test_what_models_hold_passes(check: Callable[[Any], None], text: Any) -> None:
    check(text)


# --- models of transformers


def original(**fields: Any) -> Change:
    return lambda data: data["original"].update(fields)


def top(**fields: Any) -> Change:
    return lambda data: data.update(fields)


LANGUAGE: dict[str, tuple[str, Change]] = {
    "no original": ("config", top(original=None)),
    "a list for the original": ("config", top(original=[1])),
    "an original of no known kind": ("config", original(model_type=["llama"])),
    "an original that transformers refuses": ("config", original(num_attention_heads="many")),
    "a billion layers": ("config", original(model_type="qwen2", num_hidden_layers=10**9)),
    "positions in words": ("config", top(positions="by heart")),
    "a dtype of no kind": ("config", top(dtype="float99")),
    "a generated field": ("config", top(id2label=7)),
    "another program": ("programs", lambda data: data.update(other=data.pop("decode"))),
    "no program": ("programs", lambda data: data.clear()),
    "constants that are none": ("programs", lambda data: data["decode"].update(constants={"x": "y"})),
    "an operator": ("programs", lambda data: node(target="torch.ops.os.system.default")(data["decode"])),
    "a weight called as an attribute": ("model", lambda data: data.update(config=data.pop("lm_head.weight"))),
    "a weight called as a method": (
        "model",
        lambda data: data.update({"generate.weight": data.pop("lm_head.weight")}),
    ),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_forged_language_models_are_refused(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / "hf", tmp_path / "out"))
    part, change = LANGUAGE[name]
    forge(folder, part + (".safetensors" if part == "model" else ".json"), change)
    with limited(), pytest.raises((fasp_fx.StoreError, fasp_fx.ArgumentError)):
        fasp_fx.hf.PrunedForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"[" * 100_000])
def test_generation_settings(tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(GOLDEN / "hf", tmp_path / "out"))
    (folder / "generation_config.json").write_bytes(content)
    with limited(), pytest.raises(fasp_fx.StoreError, match="generation_config"):
        fasp_fx.hf.PrunedForCausalLM.from_pretrained(folder)
