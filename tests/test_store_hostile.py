"""A forged save, checksums and all, is refused before anything in it is evaluated, imported, called or made
as large as it says. The forged folders are copies of the golden ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import GOLDEN, IDS, forge, outputs, seal
from test_store_fuzz import CODE, limited

import fasp_fx
from fasp_fx.storage._untrusted import (
    check_expression,
    check_guard,
    operator_called,
)

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
