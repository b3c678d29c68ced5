"""Private names of other packages, and of their objects, are used in ``fasp_fx.base.compat`` alone: each is a
name that a release may take away without a word. By syntax tree, so that an attribute of an object counts as
an import does.
"""

import ast
import logging
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import made
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fasp_fx.base import compat, compat as _compat
from fasp_fx.base.compat import PATCHES
from fasp_fx.errors import VerificationError

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
        assert (model.forward(1), float(Double.apply(torch.ones(())))) == (1, 2)
    assert {"forward", "Double"} <= {*names, *(name.rpartition(".")[2] for name in applied)}
    assert (Function.__dict__["apply"], dict(relu.py_kernels)) == before
    assert "__getattribute__" not in vars(nn.Module)
    assert "forward" not in vars(model)


# --- what private names of torch and transformers do is what is expected of them


ATEN = torch.ops.aten


def test_what_fake_tensors_raise_they_log_there(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger(_compat.FAKE_LOGGER)
    # not all versions hand on to the root what they log
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, caplog.handler])
    with _compat.FakeTensorMode(), pytest.raises(Exception, match="reduction dim"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert _compat.FAKE_LOGGER in {record.name for record in caplog.records}


def test_the_cache_of_fake_results_can_be_left_out() -> None:
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=True):  # as outside of tests
        assert _compat.FakeTensorMode().cache_enabled
        with _compat.traced_by({}, {}):
            assert not _compat.FakeTensorMode().cache_enabled


def plain() -> nn.Module:
    return made(lambda m, x: x + 1)


def recorded(program: Any) -> Tensor:
    """The input as a program has it."""
    return next(iter(program.graph.find_nodes(op="placeholder"))).meta["val"]


def test_new_guards_are_refused_each_time_they_are_asked_for() -> None:
    program = export(plain(), (torch.ones(4, 3),), dynamic_shapes=((Dim.AUTO, None),))
    symbol: Any = recorded(program).shape[0]
    environment = symbol.node.shape_env
    assert isinstance(environment, _compat.ShapeEnv)
    before = len(environment.guards)
    for _ in range(2):
        with (
            _compat.refuse_new_guards(environment),
            pytest.raises(VerificationError, match="would have to fulfil"),
        ):
            bool(symbol == 7)
    assert len(environment.guards) == before
    with _compat.refuse_new_guards(environment):
        assert bool(symbol + 1 > symbol), "what holds at every size is no new guard"
    bool(symbol == 7)
    assert len(environment.guards) > before, "and afterwards guards are taken again"


def test_the_line_that_settles_a_size_is_known() -> None:
    model = made(lambda self, x: x @ torch.ones(3, 2) + int(x.shape[0]))
    program = export(model, (torch.ones(4, 3),), dynamic_shapes=((Dim.AUTO, Dim.AUTO),), strict=False)
    asked, met = recorded(program).shape
    by_us, by_torch = _compat.settled_by(asked), _compat.settled_by(met)
    assert by_us is not None
    assert by_torch is not None
    assert (by_us.filename, by_us.name) == (__file__, "<lambda>")
    assert by_torch.filename.startswith(str(Path(torch.__file__).parent))


def test_a_program_takes_the_guards_of_another() -> None:
    program, even = (
        export(model, (torch.ones(4, 3),), dynamic_shapes=((Dim.AUTO, Dim.STATIC),))
        for model in (plain(), made(lambda m, x: x + 1 if x.shape[0] % 2 == 0 else x))
    )
    assert len(program.module()(torch.ones(5, 3))) == 5
    _compat.take_guards(program, _compat.guards_of(even))
    assert len(program.module()(torch.ones(6, 3))) == 6
    with pytest.raises(AssertionError):
        program.module()(torch.ones(5, 3))
