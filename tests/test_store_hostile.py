"""Folders made to keep a loader busy, to fill the memory, or to make torch and transformers stumble: refused
in words, in time.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import FORMATS, LIMIT, limited
from refusal import X
from safetensors.torch import load_file, save_file
from saved import forge, seal

import fasp_fx
from fasp_fx.storage._expressions import check_expression, check_guard

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small result on disk; tests must not change it."""
    folder = tmp_path_factory.mktemp("hostile") / "whole"
    FORMATS["whole"].make(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


def refused(folder: Path, says: str | None = None) -> None:
    with limited(LIMIT), pytest.raises(fasp_fx.StoreError, match=says):
        fasp_fx.load(folder)


# --- files that are none


def pipe(file: Path) -> None:
    os.mkfifo(file)


def holes(file: Path) -> None:
    """40 GB that take no room, with a header that fits them."""
    header = json.dumps(
        {"up.weight": {"dtype": "F32", "shape": [10 * 2**30], "data_offsets": [0, 40 * 2**30]}}
    ).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + 40 * 2**30)


PLACES: dict[str, Change] = {
    "pipe": pipe,
    "endless device": lambda file: file.symlink_to("/dev/zero"),
    "terminal": lambda file: file.symlink_to("/dev/tty"),
    "folder": lambda file: file.mkdir(),
    "link to itself": lambda file: file.symlink_to(file),
    "link to nowhere": lambda file: file.symlink_to(file.parent / "nowhere"),
    "link to a folder": lambda file: file.symlink_to(file.parent),
    "holes": holes,
    "nothing": lambda file: None,
    "empty": lambda file: file.touch(),
}


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "graph.json",
        "weights.safetensors",
        "constants.safetensors",
        "plan.json",
        "report.json",
        "signature.json",
    ],
)
@pytest.mark.parametrize("kind", PLACES)
def test_files_that_are_none(folder: Path, name: str, kind: str) -> None:
    file = folder / name
    file.unlink()
    PLACES[kind](file)
    if name != "manifest.json" and kind in ("holes", "empty"):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name]["size"] = file.stat().st_size
        (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(folder, name.replace(".", r"\."))


def test_links_to_files_are_followed(folder: Path, original: Path) -> None:
    """The hub's cache is made of them."""
    for file in folder.iterdir():
        file.unlink()
        file.symlink_to(original / file.name)
    fasp_fx.load(folder)


# --- much of something


def graph(data: dict[str, Any]) -> Any:
    return data["program"]["graph_module"]["graph"]


def chain(count: int) -> Callable[[dict[str, Any]], None]:
    """So many more nodes, one after the other, all of them used."""

    def change(data: dict[str, Any]) -> None:
        inside = graph(data)
        node = next(node for node in inside["nodes"] if node["target"] == "torch.ops.aten.relu.default")
        last = source = node["outputs"][0]["as_tensor"]["name"]
        nodes, values = [], inside["tensor_values"]
        for index in range(count):
            nodes.append(
                {
                    **node,
                    "name": f"more{index}",
                    "inputs": [{**node["inputs"][0], "arg": {"as_tensor": {"name": last}}}],
                }
            )
            last = f"more{index}"
            nodes[-1]["outputs"] = [{"as_tensor": {"name": last}}]
            values[last] = values[source]
        after = inside["nodes"].index(node) + 1
        for user in inside["nodes"][after:]:
            for given in user["inputs"]:
                if given["arg"] == {"as_tensor": {"name": source}}:
                    given["arg"] = {"as_tensor": {"name": last}}
        inside["nodes"][after:after] = nodes

    return change


def expression(text: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        value = next(
            value
            for value in graph(data)["tensor_values"].values()
            if any("as_expr" in size for size in value["sizes"])
        )
        value["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}

    return change


def symbols(count: int, function: str) -> str:
    arguments = [f"Symbol('s{index}', integer=True)" for index in range(count)]
    return f"{function}({', '.join(arguments)})"


TOWER = "Integer(9)"
for _ in range(6):
    TOWER = f"Pow(Integer(9), {TOWER})"
SQUARES = "Symbol('s77', positive=True, integer=True)"
for _ in range(30):
    SQUARES = f"Pow({SQUARES}, Integer(8))"
EXPRESSIONS = {
    "a tower of powers": TOWER,
    "powers of powers": SQUARES,
    "a power of a symbol": "Pow(Integer(2), Symbol('s77', positive=True, integer=True))",
    "a large power": "Pow(Integer(10), Integer(1000000000))",
    "a large shift": "LShift(Integer(1), Integer(1000000000))",
    "a sum of 20,000": symbols(20_000, "Add"),
    "a product of 20,000": symbols(20_000, "Mul"),
    "deep": "Add(" * 5000 + "Integer(1)" + ")" * 5000,
    "many signs": "-" * 50_000 + "1",
    "many digits": f"Integer({'9' * 4000})",
    "many digits as text": f"Float('{'9' * 4000}', precision=53)",
    "a great precision": "Float('1', precision=1000000000)",
    "an assumption of one's own": "Symbol('s77', mine=True)",
    "a value that is no assumption": "Symbol('s77', integer=Integer(1))",
    "numbers for a name": "Symbol(77)",
    "no text": 7,
    "nothing": "",
    "a null": "Symbol('s\0')",
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_without_end(folder: Path, name: str) -> None:
    forge(folder, "graph.json", expression(EXPRESSIONS[name]))  # type: ignore[arg-type]
    refused(folder, "expression")


GUARDS = {
    "a tower of powers": "L['x'].size()[0] == 2**2**2**2**2**2**2",
    "a large power": "L['x'].size()[0] == 10**1000000000",
    "a large shift": "L['x'].size()[0] == 1 << 1000000000",
    "powers of powers": "((L['x'].size()[0]**60)**60)**60 == 1",
    "a power of a size": "2**L['x'].size()[0] == 1",
    "many": " + ".join(["L['x'].size()[0]"] * 20_000) + " == 1",
    "deep": "(" * 5000 + "1" + ")" * 5000,
    "many signs": "-" * 50_000 + "1 == 1",
    "many negations": "not " * 50_000 + "True",
    "many digits": "9" * 4000 + " == 1",
    "a matrix product": "L['x'] @ L['x'] == 1",
}


@pytest.mark.parametrize("name", GUARDS)
def test_guards_without_end(folder: Path, name: str) -> None:
    forge(folder, "graph.json", lambda data: data["program"].update(guards_code=[GUARDS[name]]))
    refused(folder, "guard")


def test_what_is_written_passes() -> None:
    check_expression("Add(Mul(Integer(2), Symbol('s77', positive=True, integer=True)), Integer(-1))")
    check_expression(
        "Max(Integer(1), Pow(Symbol('s0', integer=True), Integer(2)), FloorDiv(Symbol('s1', integer=True),"
        " Integer(8)))"
    )
    check_guard("L['x'].size()[0]**2 <= 2**31")


def parameters(count: int) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["parameters"].extend(
        {"name": f"more{index}", "kind": "KEYWORD_ONLY", "default": None} for index in range(count)
    )


AMOUNTS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "20,000 nodes": ("graph.json", chain(20_000)),
    "a million guards": (
        "graph.json",
        lambda data: data["program"].update(guards_code=["L['x'].size()[0] == 3"] * 1_000_000),
    ),
    "a million items": (
        "graph.json",
        lambda data: data.update(program={**data["program"], "verifiers": [[]] * 1_000_000}),
    ),
    "a size named by a large number": (
        "graph.json",
        lambda data: data["program"]["range_constraints"].update(u999999999={"min_val": 0, "max_val": 9}),
    ),
    "a range of 400 digits": (
        "graph.json",
        lambda data: data["program"]["range_constraints"].update(s1={"min_val": 0, "max_val": 10**400}),
    ),
    "a tensor of 1,000 dimensions": (
        "graph.json",
        lambda data: next(iter(graph(data)["tensor_values"].values())).update(sizes=[{"as_int": 1}] * 1000),
    ),
    "a large example": ("graph.json", lambda data: data["example"][0].update(shape=[10**5, 10**5])),
    "an example of many dimensions": (
        "graph.json",
        lambda data: data["example"][0].update(shape=[1] * 10_000),
    ),
    "a negative example": ("graph.json", lambda data: data["example"][0].update(shape=[-1])),
    "a million parameters": ("signature.json", parameters(1_000_000)),
    "a million captured": (
        "signature.json",
        lambda data: data["captured"].extend(f"more{index}" for index in range(1_000_000)),
    ),
    "a deep default": ("signature.json", lambda data: data["parameters"][1].update(default=nested(900))),
    "a deep plan": ("plan.json", lambda data: data.update(groups=nested(900))),
    "an index of 400 digits": (
        "plan.json",
        lambda data: data["groups"][0]["producers"][0].update(removed=[10**400]),
    ),
    "a sparsity of 400 digits": ("plan.json", lambda data: data.update(sparsity=10**400)),
    "groups in words": ("plan.json", lambda data: data.update(groups=["words"])),
}


def nested(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


@pytest.mark.parametrize("name", AMOUNTS)
def test_too_much(folder: Path, name: str) -> None:
    file, change = AMOUNTS[name]
    forge(folder, file, change)
    refused(folder)


def test_a_few_more_nodes_load(folder: Path) -> None:
    before = fasp_fx.load(folder).module(X)["out"]
    forge(folder, "graph.json", chain(40))
    assert torch.equal(fasp_fx.load(folder).module(X)["out"], before)


def test_two_hundred_thousand_tensors(folder: Path) -> None:
    header = {f"t{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(200_000)}
    text = json.dumps(header).encode()
    (folder / "weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    seal(folder, "weights.safetensors")
    refused(folder, r"weights\.safetensors")


def test_files_longer_than_any_that_is_written(folder: Path) -> None:
    with (folder / "report.json").open("wb") as stream:
        stream.write(b"{}" + b" " * 2**27)
    seal(folder, "report.json")
    refused(folder, r"report\.json has 134,217,730 bytes")


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe{}", b"[" * 100_000, b'{"format": ' + b"[" * 100_000, b"", b"null", b"9" * 5000, b"{}"],
)
@pytest.mark.parametrize("name", ["plan.json", "graph.json", "report.json", "signature.json"])
def test_files_that_do_not_parse(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    seal(folder, name)
    refused(folder, name.replace(".json", r"(\.json)?"))


# --- names


NAMES = [
    "__class__.x",
    "training",
    "graph",
    "forward",
    "_parameters",
    "__dict__",
    "code.x",
    "a..b",
    ".",
    "x.",
    "register_buffer",
    "a.training",
    "a.forward.b",
]
NAMES += ["meta", "recompile.weight", "x" * 5000, ".".join("x" * 500), "T_destination"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_weights_that_are_none(folder: Path, name: str) -> None:
    def change(data: dict[str, Any]) -> None:
        data["program"] = json.loads(json.dumps(data["program"]).replace('"up.weight"', json.dumps(name)))
        data["tensors"]["weights"][name] = data["tensors"]["weights"].pop("up.weight")

    forge(folder, "graph.json", change)
    refused(folder, "weight")


@pytest.mark.parametrize(
    "name", ["class", "None", "self", "__import__", "lambda", "x y", "", "1x", "x" * 5000, "del"]
)
def test_names_of_nodes_that_are_none(folder: Path, name: str) -> None:
    def change(data: dict[str, Any]) -> None:
        data["program"] = json.loads(json.dumps(data["program"]).replace('"relu"', json.dumps(name)))

    forge(folder, "graph.json", change)
    refused(folder)


@pytest.mark.parametrize(
    "device",
    [
        "",
        "meta",
        "nowhere",
        "cuda:99999999999999",
        "cpu:x",
        "cpu\0",
        7,
        None,
        ["cpu"],
        "CPU",
        "x" * 5000,
        "mps:1000",
        "privateuseone",
    ],
)
def test_devices(folder: Path, device: Any) -> None:
    forge(folder, "graph.json", lambda data: data["tensors"]["weights"]["up.weight"].update(device=device))
    refused(folder, "device")


SIGNATURES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another argument": lambda data: data.update(captured=["other"]),
    "no argument": lambda data: data.update(captured=[]),
    "one more": lambda data: data["captured"].append("other"),
    "an argument of generated code": lambda data: data["parameters"][0].update(name="_call"),
    "the same twice": lambda data: data["parameters"].append(copy.deepcopy(data["parameters"][0])),
    "another order": lambda data: data["parameters"].reverse(),
    "an outline of what is not captured": lambda data: data["outlines"].update(scale=[1]),
    "names in a list": lambda data: data["parameters"][0].update(name=["x"]),
    "no parameters": lambda data: data.update(parameters=7),
    "a device": lambda data: data["parameters"][1].update(default={"device": "nowhere"}),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_of_other_programs(folder: Path, name: str) -> None:
    forge(folder, "signature.json", SIGNATURES[name])
    refused(folder, r"signature\.json|device")


def test_weights_of_another_size_or_kind(folder: Path) -> None:
    file = folder / "weights.safetensors"
    held = load_file(file)
    for other in (held["up.weight"][:-1].clone(), held["up.weight"].double(), torch.zeros(0)):
        save_file({**held, "up.weight": other}, file)
        seal(folder, "weights.safetensors")
        refused(folder, r"'up\.weight'")


# --- models of transformers


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "hf"
    FORMATS["hf"].make(folder)
    return folder


CONFIGS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no original": lambda data: data.update(original=None),
    "a list for the original": lambda data: data.update(original=[1]),
    "an original of no known kind": lambda data: data["original"].update(model_type=["llama"]),
    "an original that transformers refuses": lambda data: data["original"].update(num_attention_heads="many"),
    "a billion layers": lambda data: data["original"].update(model_type="qwen2", num_hidden_layers=10**9),
    "more layers than weights": lambda data: data["original"].update(num_hidden_layers=4000),
    "a deep original": lambda data: data["original"].update(extra=nested(900)),
    "positions in words": lambda data: data.update(positions="by heart"),
    "a limit in words": lambda data: data.update(position_limit="many"),
    "architectures in numbers": lambda data: data.update(architectures=7),
    "a dtype of no kind": lambda data: data.update(dtype="float99"),
    "a generated field": lambda data: data.update(id2label=7),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(language: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(language, tmp_path / "out"))
    forge(folder, "config.json", CONFIGS[name])
    with limited(LIMIT), pytest.raises(fasp_fx.FaspError) as caught:
        fasp_fx.hf.PrunedForCausalLM.from_pretrained(folder)
    assert isinstance(caught.value, (fasp_fx.StoreError, fasp_fx.ArgumentError))


PROGRAMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another name": lambda data: data["programs"].update(other=data["programs"].pop("decode")),
    "none": lambda data: data.update(programs={}),
    "a list": lambda data: data.update(programs=[]),
    "a weight called as an attribute": lambda data: rename(data, "lm_head.weight", "config"),
    "a weight called as a method": lambda data: rename(data, "lm_head.weight", "generate.weight"),
    "constants that are none": lambda data: data["programs"]["decode"].update(constants={"x": "y"}),
}


def rename(data: dict[str, Any], old: str, new: str) -> None:
    held = json.loads(json.dumps(data).replace(json.dumps(old), json.dumps(new)))
    held["tensors"]["model"][new]["stored_as"] = old
    data.clear()
    data.update(held)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(language: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(language, tmp_path / "out"))
    forge(folder, "programs.json", PROGRAMS[name])
    with limited(LIMIT), pytest.raises(fasp_fx.StoreError):
        fasp_fx.hf.PrunedForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"[" * 100_000])
def test_generation_settings(language: Path, tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(language, tmp_path / "out"))
    (folder / "generation_config.json").write_bytes(content)
    with limited(LIMIT), pytest.raises(fasp_fx.StoreError, match="generation_config"):
        fasp_fx.hf.PrunedForCausalLM.from_pretrained(folder)


def test_generation_settings_that_are_a_pipe(language: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(language, tmp_path / "out"))
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")
    with limited(LIMIT), pytest.raises(fasp_fx.StoreError, match="generation_config"):
        fasp_fx.hf.PrunedForCausalLM.from_pretrained(folder)
