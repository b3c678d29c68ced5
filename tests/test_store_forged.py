"""A forged save, checksums and all, is refused before anything in it is evaluated, imported or called."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import forge

import fasp_fx
from fasp_fx.base.compat import _serde
from fasp_fx.base.compat._serde import schema
from fasp_fx.storage._expressions import check_expression, check_guard
from fasp_fx.storage._untrusted import check_operator, check_program, check_structure

pytestmark = pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")

CODE = "__import__('pathlib').Path('ran').touch()"


@pytest.fixture
def saved(result: fasp_fx.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return result.save("out")


def graph(data: dict[str, Any]) -> Any:
    return data["program"]["graph_module"]["graph"]


def call(data: dict[str, Any]) -> Any:
    return data["program"]["graph_module"]["module_call_graph"][0]["signature"]


def size(text: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        value = next(
            v for v in graph(data)["tensor_values"].values() if any("as_expr" in s for s in v["sizes"])
        )
        value["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}

    return change


def target(text: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: graph(data)["nodes"][0].update(target=text)


def structure(part: str, kind: str, context: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        protocol, tree = json.loads(call(data)[part])
        inner = tree["children_spec"][1] if part == "in_spec" else tree
        inner.update(type=kind, context=context)
        call(data)[part] = json.dumps([protocol, tree])

    return change


def node_name(data: dict[str, Any]) -> None:
    graph(data)["nodes"][0]["name"] = f"x = {CODE}; y"


def tensor_name(data: dict[str, Any]) -> None:
    text = json.dumps(data["program"]).replace('"ids"', json.dumps(f"ids = {CODE}"))
    data["program"] = json.loads(text)


def weight_name(data: dict[str, Any]) -> None:
    name = f'up", {CODE}) or getattr(self, "up.weight'
    data["program"] = json.loads(json.dumps(data["program"]).replace('"up.weight"', json.dumps(name)))
    data["tensors"]["weights"][name] = data["tensors"]["weights"].pop("up.weight")


def higher_order(data: dict[str, Any]) -> None:
    node = graph(data)["nodes"][0]
    node["target"] = "torch.ops.higher_order.wrap_with_set_grad_enabled"
    node["inputs"][0]["arg"] = {"as_operator": "torch.hub.load"}


def keyword(data: dict[str, Any]) -> None:
    node = graph(data)["nodes"][0]
    node["target"] = "torch.ops.higher_order.wrap_with_set_grad_enabled"
    node["inputs"] = [{**node["inputs"][0], "name": f"x = {CODE}, y", "kind": 2}]


FORGERIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "size expression": size(CODE),
    "size expression in a symbol": size(f"Symbol({CODE!r})"),
    "size attribute": size("Symbol('s0').__class__"),
    "size lambda": size("(lambda: 1)()"),
    "guard": lambda data: data["program"].update(guards_code=[f"{CODE} or True"]),
    "guard of two statements": (
        lambda data: data["program"].update(guards_code=[f"True, 'x')\n  {CODE}\n  torch._assert(True"])
    ),
    "guard attribute": lambda data: data["program"].update(guards_code=["L['ids'].__class__ == 1"]),
    "guard on torch": lambda data: data["program"].update(guards_code=["torch.load('x') == 1"]),
    "function of python": target("builtins.eval"),
    "function of torch": target("torch.hub.load"),
    "method of an operator": target("torch.ops.load_library"),
    "operator that reads files": target("torch.ops.aten.from_file.default"),
    "operator that writes files": target("torch.ops.aten.save.default"),
    "operator that is not there": target("torch.ops.mine.unheard.default"),
    "extension": target("#mine:unheard"),
    "operator as an argument": higher_order,
    "code in a keyword of an operator": keyword,
    "code for a number": lambda data: next(iter(graph(data)["tensor_values"].values())).update(
        sizes=[{"as_int": CODE}]
    ),
    "code in a node's name": node_name,
    "code in an input's name": tensor_name,
    "code in a weight's name": weight_name,
    "argument names": lambda data: call(data).update(forward_arg_names=[f"ids={CODE}"]),
    "keyword in the structure": structure("in_spec", "builtins.dict", json.dumps([f"ids'] + [{CODE}"])),
    "unknown type": structure("out_spec", "os.path.Thing", "null"),
    "type of transformers that is no output": structure("out_spec", "transformers.cache_utils.ABC", "null"),
    "module of transformers": structure("out_spec", "transformers.commands.env.EnvironmentCommand", "null"),
    "enum": structure(
        "out_spec", "builtins.dict", json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "y"}])
    ),
    "class in a cache": structure(
        "out_spec",
        "transformers.cache_utils:DynamicCache",
        json.dumps({"_t": "obj", "p": "subprocess:Popen", "s": {}}),
    ),
    "factory": structure(
        "out_spec",
        "collections.defaultdict",
        {"default_factory_module": "os", "default_factory_name": "abort", "dict_context": []},
    ),
    "dtype": lambda data: data["example"][0].update(dtype="load"),
    "tensor that is not stored": (
        lambda data: data["tensors"]["weights"]["up.weight"].update(stored_as="other")
    ),
    "order of dimensions": lambda data: data["tensors"]["weights"]["up.weight"].update(order=[0, 0]),
    "name of the model": (
        lambda data: data["program"]["graph_module"]["module_call_graph"][0].update(fqn="__class__.x")
    ),
    "no call of the model": lambda data: data["program"]["graph_module"].update(module_call_graph=[]),
    "call without a signature": (
        lambda data: data["program"]["graph_module"]["module_call_graph"][0].update(signature=None)
    ),
    "verifier": lambda data: data["program"].update(verifiers=["MINE"]),
    "schema of the future": lambda data: data["program"]["schema_version"].update(major=99),
}


def test_an_unchanged_graph_loads(saved: Path) -> None:
    forge(saved, "graph.json", lambda data: None)
    fasp_fx.load("out")


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_graphs(saved: Path, name: str) -> None:
    forge(saved, "graph.json", FORGERIES[name])
    with pytest.raises(fasp_fx.StoreError):
        fasp_fx.load("out")
    assert not Path("ran").exists()


@dataclasses.dataclass
class Novel:
    """What another torch might write."""

    code: str


@dataclasses.dataclass
class Node(schema.Node):
    codes: dict[str, list[str]] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize("where", ["Novel.code", "Node.codes", "Node.codes key"])
def test_texts_of_classes_and_fields_that_nobody_knows_are_refused(saved: Path, where: str) -> None:
    data = json.loads((saved / "graph.json").read_text())["program"]
    check_program(_serde.from_fields(data), 8)
    program = _serde.from_fields(data)
    nodes = program.graph_module.graph.nodes
    held = {field.name: getattr(nodes[0], field.name) for field in dataclasses.fields(schema.Node)}
    codes = {"Node.codes": {"": [CODE]}, "Node.codes key": {CODE: []}}
    nodes[0] = Node(**held, codes=codes[where]) if where in codes else nodes[0]
    nodes.extend([Novel(CODE)] if where == "Novel.code" else [])
    with pytest.raises(fasp_fx.StoreError, match=f"holds the {where}"):
        check_program(program, 8)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["parameters"][0].update(name=f"ids={CODE}"),
        lambda data: data["parameters"][0].update(kind="OTHER"),
        lambda data: data["parameters"][1].update(default={"call": CODE}),
        lambda data: data["parameters"][1].update(default={"dtype": "load"}),
        lambda data: data.pop("captured"),
    ],
)
def test_forged_signatures(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    forge(saved, "signature.json", change)
    with pytest.raises(fasp_fx.StoreError, match=r"signature\.json is damaged"):
        fasp_fx.load("out")
    assert not Path("ran").exists()


def test_names_in_the_signature_never_become_code(saved: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["captured"] = [f"ids or {CODE}"]
        data["constants"] = {f"x') or {CODE} or ('": 1}

    forge(saved, "signature.json", change)
    with contextlib.suppress(fasp_fx.FaspError, TypeError, NameError):
        fasp_fx.load("out").module(torch.zeros(2, 5, dtype=torch.long))
    assert not Path("ran").exists()


def test_stack_traces_and_other_remarks_are_dropped(saved: Path) -> None:
    remarks = {"source_fn_stack": "a,torch.hub.load", "custom": "{}", "stack_trace": "x"}
    forge(saved, "graph.json", lambda data: graph(data)["nodes"][0].update(metadata=remarks))
    loaded = fasp_fx.load("out")
    assert not any(
        {"source_fn_stack", "custom", "stack_trace"} & node.meta.keys() for node in loaded.program.graph.nodes
    )


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(-1), Symbol('s0', integer=True), Pow(Symbol('s1', integer=True), Integer(2)))",
        "FloorDiv(Add(Symbol('u0', integer=True), Integer(1)), Integer(2))",
        "Max(Float('1.5', precision=53), Rational(1, 2))",
        "And(Equality(Symbol('s0'), Integer(1)), true)",
    ],
)
def test_expressions_of_sizes_pass(text: str) -> None:
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].size()[1] == 8",
        "L['a']['b'][0].size()[0] + L['c'].size()[1] <= 2*L['d'].stride()[0]",
        "max(1, L['x'].size()[0]) % 8 == 0",
        "not (L['x'].size()[0] == 1)",
    ],
)
def test_guards_on_sizes_pass(text: str) -> None:
    check_guard(text)


def test_operators_of_models_pass() -> None:
    for target_name in (
        "torch.ops.aten.linear.default",
        "torch.ops.aten.gelu.default",
        "torch.ops.aten.sym_size.int",
        "_operator.mul",
        "torch.sym_max",
    ):
        check_operator(target_name)


def test_very_deep_input_is_refused() -> None:
    with pytest.raises(fasp_fx.StoreError):
        check_expression("(" * 5000 + "1" + ")" * 5000)
    with pytest.raises(fasp_fx.StoreError):
        check_structure("[" * 100_000)
