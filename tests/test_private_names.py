"""Private names of other packages, and of their objects, are used in ``fasp_fx.base.compat`` alone: each is a
name that a release may take away without a word. By syntax tree, so that an attribute of an object counts as
an import does.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.autograd import Function
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fasp_fx.base import compat
from fasp_fx.base.compat import PATCHES

ROOT = Path(__file__).resolve().parent.parent
#: is saved along with a model and stands alone there, so that it imports nothing of ours
ALONE = "fasp_fx/hf/modeling_per_layer.py"
#: documented, though they begin with an underscore
DOCUMENTED = {"sys._getframe"}
#: fields of torch's environment of shapes that nothing documents
UNDOCUMENTED = {
    *("backed_var_to_val", "var_to_val", "var_to_range", "deferred_runtime_asserts", "replacements"),
    *("replacements_slocs", "unbacked_symint_counter"),
}
#: of torch's operators, private ones have rules as others have
OPERATORS = ("torch.ops.aten", "_ATEN", "aten", "ATEN")
relu = torch.ops.aten.relu.default
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def of_torch() -> set[str]:
    """Private names that torch's objects have, whatever ours have."""
    module, graph = nn.Linear(1, 1), fx.Graph()
    kinds = (nn.Module, torch.Tensor, fx.Graph, fx.Node, fx.GraphModule, ExportedProgram, ShapeEnv)
    objects = (module, graph, fx.GraphModule({}, graph), torch.ops.aten.relu.default)
    return {name for one in (*kinds, *objects) for name in (*dir(one),) if is_private(name)}


def defined(trees: Iterable[ast.AST]) -> set[str]:
    """Private names that a class or a file defines, or that a method sets."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return names


def private_names(tree: ast.AST, ours: set[str]) -> Iterator[str]:
    """The places of a file that use a private name of another package or of its objects."""
    for node in ast.walk(tree):
        shown = ast.unparse(node) if isinstance(node, ast.expr) else ""
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if any(map(is_private, name.name.split("."))))
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            own = node.module.startswith("fasp_fx")
            names = [*node.module.split("."), *(name.name for name in node.names)]
            yield from (f"{node.module}: {name}" for name in names if is_private(name) and not own)
            yield from [node.module] if node.module.startswith("transformers.exporters") else []
        elif isinstance(node, ast.Attribute):
            theirs = node.attr not in ours or (
                node.attr in of_torch() and ast.unparse(node.value) not in ("self", "cls", "super()")
            )
            operator = ast.unparse(node.value) in OPERATORS
            if (is_private(node.attr) and theirs and not operator) or node.attr in UNDOCUMENTED:
                yield from [shown] if shown not in DOCUMENTED else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME and len(node.args) > 1:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            yield from [shown] if is_private(name) and name not in ours else []


@cache
def trees() -> dict[str, ast.AST]:
    files = (file for folder in ("fasp_fx", "passes", "patterns") for file in (ROOT / folder).rglob("*.py"))
    own = (file for file in files if file.resolve() == ROOT / file.relative_to(ROOT))  # no links
    return {
        str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8"))
        for file in own
        if "compat" not in file.parts
    }


def test_private_names_stand_in_one_package() -> None:
    ours = {"_registry", *defined(trees().values())}
    used = [
        f"{file}: {name}"
        for file, tree in trees().items()
        if file != ALONE
        for name in private_names(tree, ours)
    ]
    assert used == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "import torch.fx._compatibility as known",
        "from torch._ops import OpOverload",
        "from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen",
        "from transformers.exporters.utils import prepare_for_export",
        "torch._check(True)",
        "node.target._schema",
        "owner._parameters[name] = value",
        "getattr(module, '_guards_fn', None)",
        "setattr(graph, '_codegen', code)",
        "environment.var_to_range",
    ],
)
def test_a_private_name_is_seen(code: str) -> None:
    assert list(private_names(ast.parse(code), {"_parameters"}))


@pytest.mark.parametrize(
    "code",
    [
        "torch.__version__",
        "self._parts",
        "_ATEN._to_copy.default",
        "from fasp_fx._x import y",
        "from ._x import y",
        "getattr(module, 'weight')",
    ],
)
def test_what_is_ours_or_public_is_none(code: str) -> None:
    assert not list(private_names(ast.parse(code), {"_parts"}))


# --- Objects of others that are changed for a while.


#: put what they change back where it was, on objects of our own
OUR_OWN = {"fasp_fx/training/_gates.py", "fasp_fx/testing/rule/__init__.py"}


def test_objects_of_others_are_changed_in_one_file() -> None:
    assert len(PATCHES) <= 8
    assert all(callable(getattr(compat, name)) for name in PATCHES)
    patching = [
        file
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "mock" in ast.unparse(node)
    ]
    assert set(patching) <= OUR_OWN


def test_what_is_changed_is_put_back() -> None:
    class Double(Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model, names, before = nn.Linear(1, 1), list[str](), (Function.__dict__["apply"], dict(relu.py_kernels))
    with (
        compat.attributes_read(lambda module, name: names.append(name)),
        compat.applied_functions() as applied,
        compat.called_as(model, lambda x: x),
        compat.traced_by({relu: torch.empty_like}, {relu: torch.empty_like}),
    ):
        assert model.forward(1) == 1
        assert float(Double.apply(torch.ones(()))) == 2
    assert {"forward", "Double"} <= {*names, *(name.rpartition(".")[2] for name in applied)}
    assert (Function.__dict__["apply"], dict(relu.py_kernels)) == before
    assert "__getattribute__" not in vars(nn.Module)
    assert "forward" not in vars(model)
