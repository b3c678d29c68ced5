"""What a stored program may contain.

Reading an exported program evaluates expressions, imports classes and generates code from names. Everything that could reach those is held
against what save() writes, before torch sees it: a damaged or forged file is refused, never executed.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde import serialize as serde
from torch.utils import _pytree as pytree

from ..errors import StoreError

_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)")
_HIGHER_ORDER = {
    f"torch.ops.higher_order.{name}"
    for name in ("cond", "while_loop", "scan", "map_impl", "wrap_with_set_grad_enabled", "wrap_with_autocast", "flex_attention")
}
_ON_SIZES = {f"{target.__module__}.{target.__name__}" for target in serde._SYM_OPS}
#: constructors that sympy.srepr writes for sizes, with torch's own
_EXPRESSIONS = {
    *(
        "Symbol",
        "Integer",
        "Rational",
        "Float",
        "Add",
        "Mul",
        "Pow",
        "Mod",
        "Max",
        "Min",
        "floor",
        "ceiling",
        "Abs",
        "Piecewise",
        "ExprCondPair",
        "Tuple",
    ),
    *(
        "Equality",
        "Unequality",
        "StrictLessThan",
        "LessThan",
        "StrictGreaterThan",
        "GreaterThan",
        "And",
        "Or",
        "Not",
        "FloorDiv",
        "ModularIndexing",
        "Where",
    ),
    *(
        "PythonMod",
        "CleanDiv",
        "CeilToInt",
        "FloorToInt",
        "CeilDiv",
        "LShift",
        "RShift",
        "PowByNatural",
        "FloatPow",
        "FloatTrueDiv",
        "IntTrueDiv",
    ),
    *("IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity"),
}
_CONSTANTS = {"true", "false"}
#: names of symbols and digits of numbers
_WORD = re.compile(r"-?\w+(\.\d+)?([eE][+-]?\d+)?")
_GUARD_CALLS = {"max", "min", "abs", "int", "float", "bool", "IsNonOverlappingAndDenseIndicator", "cast_symbool_to_symint_guardless"}
_GUARD_MODULES = {
    "math": {"floor", "ceil", "trunc", "sqrt", "pow"},
    "torch": {"sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "_sym_sqrt"},
}
_GUARD_METHODS = {"size", "stride", "storage_offset", "numel"}
_OPERATIONS = (ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Load)
_TRANSFORMERS = re.compile(r"transformers\.(cache_utils|modeling_outputs|configuration_utils|utils\.generic|models\.\w+(\.\w+)?)[.:]\w+")
_PLAIN_CLASSES = {"builtins:tuple", "builtins:list", "builtins:set", "builtins:frozenset", "collections:OrderedDict"}


def check_program(program: schema.ExportedProgram) -> None:
    """Refuse a program with anything in it that save() does not write.

    Raises:
        StoreError: names the expression, operator, name or type.
    """
    for guard in program.guards_code:
        check_guard(guard)
    for item in walk(program):
        if isinstance(item, schema.SymExpr):
            check_expression(item.expr_str)
        elif isinstance(item, schema.Node):
            check_operator(item.target)
            _check_names(item.name if item.name is not None else "_")
            item.metadata.clear()
        elif isinstance(item, schema.Argument) and item.type == "as_operator":
            check_operator(item.value)
        elif isinstance(item, schema.Argument) and item.type == "as_string_to_argument":
            _check_options(item.value)
        elif isinstance(item, (schema.CustomObjArgument, schema.InputToCustomObjSpec)):
            raise StoreError("the program holds a custom object, which cannot be stored without pickle; keep it outside of the captured model")
        elif isinstance(item, schema.Graph):
            _check_names(*item.tensor_values, *item.sym_int_values, *item.sym_bool_values, *item.sym_float_values)
        elif isinstance(item, (schema.TensorArgument, schema.GraphArgument, schema.TokenArgument, schema.InputToConstantInputSpec)):
            _check_names(item.name)
        elif isinstance(item, (schema.SymIntArgument, schema.SymFloatArgument, schema.SymBoolArgument)) and item.type == "as_name":
            _check_names(item.value)
        elif isinstance(item, schema.ModuleCallSignature):
            check_structure(item.in_spec, keywords=True)
            check_structure(item.out_spec)
            _check_names(*(item.forward_arg_names or []))
        elif isinstance(item, (schema.InputToParameterSpec, schema.ParameterMutationSpec)):
            _check_path(item.parameter_name)
        elif isinstance(item, (schema.InputToBufferSpec, schema.BufferMutationSpec)):
            _check_path(item.buffer_name)
        elif isinstance(item, schema.InputToTensorConstantSpec):
            _check_path(item.tensor_constant_name)
    program.graph_module.metadata.clear()


def walk(item: Any) -> Iterator[Any]:
    """An object of the schema and all that it holds."""
    yield item
    if isinstance(item, serde._Union):
        yield from walk(item.value)
    elif dataclasses.is_dataclass(item):
        for field in dataclasses.fields(item):
            yield from walk(getattr(item, field.name))
    elif isinstance(item, (list, tuple)):
        for child in item:
            yield from walk(child)
    elif isinstance(item, dict):
        for child in item.values():
            yield from walk(child)


def _check_names(*names: Any) -> None:
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise StoreError(f"the stored graph uses {name!r} as a name, which save() never writes; save the result again")


def _check_options(options: dict[str, Any]) -> None:
    """Refuse options of an operator that are more than words and numbers: compilers write them into the code of kernels."""
    for key, value in options.items():
        for text in (key, value.value) if value.type == "as_string" else (key,):
            if not isinstance(text, str) or re.fullmatch(r"\w+", text) is None:
                raise StoreError(f"the stored graph has {text!r} among the options of an operator, which save() never writes; save the result again")


def _check_path(path: Any) -> None:
    if not isinstance(path, str) or not path or set(path) & set("\"'\\\n\r{}"):
        raise StoreError(f"the stored graph names a weight {path!r}, which save() never writes; save the result again")


def check_operator(target: Any) -> None:
    """Refuse a target that is not an operator of torch on tensors or sizes.

    Raises:
        StoreError: names the target.
    """
    if target in _ON_SIZES or target in _HIGHER_ORDER:
        return
    match = _OPERATOR.fullmatch(target) if isinstance(target, str) else None
    if match is None:
        raise StoreError(f"the stored graph calls {target!r}, which is not a torch operator that can be stored; save the result again")
    try:
        found = getattr(getattr(getattr(torch.ops, match[1]), match[2]), match[3])
    except (AttributeError, RuntimeError):
        found = None
    if not isinstance(found, torch._ops.OpOverload):
        raise StoreError(f"the operator {target} is not known here; import the package that registers it before loading")
    for argument in found._schema.arguments:
        if "str" in str(argument.type) and re.search("file|path|name", argument.name):
            raise StoreError(f"the stored graph calls {target}, which reaches outside of the model; such a program is not loaded")


def _refuse(kind: str, text: Any) -> StoreError:
    return StoreError(f"graph.json holds the {kind} {text!r}, which save() never writes; the file is damaged or forged: save the result again")


def check_expression(text: Any) -> None:
    """Refuse a size expression that is more than constructors of symbols, numbers and arithmetic.

    Raises:
        StoreError: quotes the expression.
    """
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval").body))
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise _refuse("expression", text) from error
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.Name):
            allowed = node.id in _EXPRESSIONS if id(node) in called else node.id in _CONSTANTS
        elif isinstance(node, ast.Constant):
            allowed = type(node.value) in (int, float, bool) or (isinstance(node.value, str) and _WORD.fullmatch(node.value) is not None)
        elif isinstance(node, ast.Call):
            allowed = isinstance(node.func, ast.Name)
        else:
            allowed = isinstance(node, (ast.keyword, ast.UnaryOp, ast.USub, ast.Load, ast.Tuple))
        if not allowed:
            raise _refuse("expression", text)


def check_guard(text: Any) -> None:
    """Refuse a guard that is more than arithmetic on the sizes of inputs.

    Raises:
        StoreError: quotes the guard.
    """
    try:
        tree = ast.parse(text, mode="eval").body
        allowed = _is_guard(tree)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise _refuse("guard", text) from error
    if not allowed:
        raise _refuse("guard", text)


def _is_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float, bool)
    if isinstance(node, ast.Subscript):
        called = node.value
        if isinstance(called, ast.Call):
            return isinstance(node.slice, ast.Constant) and type(node.slice.value) is int and _is_guard(called)
        return _is_input(node)
    if isinstance(node, ast.Call):
        if node.keywords:
            return False
        function = node.func
        if isinstance(function, ast.Name):
            return function.id in _GUARD_CALLS and all(map(_is_guard, node.args))
        if not isinstance(function, ast.Attribute):
            return False
        if isinstance(function.value, ast.Name):
            return function.attr in _GUARD_MODULES.get(function.value.id, set()) and all(map(_is_guard, node.args))
        return function.attr in _GUARD_METHODS and _is_input(function.value) and all(isinstance(a, ast.Constant) and type(a.value) is int for a in node.args)
    return isinstance(node, _OPERATIONS) and all(map(_is_guard, ast.iter_child_nodes(node)))


def _is_input(node: ast.AST) -> bool:
    """Whether the node is ``L[...]...[...]`` with constant keys."""
    if isinstance(node, ast.Name):
        return node.id == "L"
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Constant):
        return False
    key = node.slice.value
    return _is_input(node.value) and (type(key) is int or (isinstance(key, str) and _is_key(key)))


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and not set(key) & set("\"'\\\n\r{}")


def check_structure(text: Any, *, keywords: bool = False) -> None:
    """Refuse a container structure that names classes other than plain containers, outputs and caches of transformers, and registered types.

    Classes of transformers are imported and registered as the exporter does.

    Raises:
        StoreError: names the type.
    """
    try:
        _, tree = json.loads(text)
        _check_spec(tree)
        if keywords:
            _check_names(*json.loads(tree["children_spec"][1]["context"]))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise _refuse("structure", text) from error


def _unregistered(kind: Any) -> StoreError:
    return StoreError(f"the program takes or returns a {kind}, a type that is not registered here; import the module that registers it as a pytree first")


def _check_spec(tree: Any) -> None:
    kind, context = tree["type"], tree["context"]
    for child in tree["children_spec"]:
        _check_spec(child)
    if kind is None:
        return
    if kind == "collections.defaultdict":
        raise StoreError("the program takes or returns a defaultdict, whose factory would have to be imported; use a dict")
    if isinstance(kind, str) and kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and _TRANSFORMERS.fullmatch(kind):
        _register(kind)
    if kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        raise _unregistered(kind)
    if kind == "collections.namedtuple" and context not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        raise _unregistered(context)
    plain = pytree.SUPPORTED_SERIALIZED_TYPES[pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE[kind]].from_dumpable_context is None
    _check_context(json.loads(context) if plain else context)


def _check_context(value: Any) -> None:
    """Contexts are data that may name classes; only those that save() writes are allowed."""
    if isinstance(value, list):
        for item in value:
            _check_context(item)
    elif isinstance(value, dict):
        tag, path = value.get("_t"), value.get("p")
        names_class = tag is not None and path is not None
        known = not names_class or (isinstance(path, str) and (path in _PLAIN_CLASSES or _TRANSFORMERS.fullmatch(path) is not None))
        if "__enum__" in value or not known:
            raise _refuse("context", value)
        if tag in ("dtype", "layout") and not isinstance(getattr(torch, str(value.get("n")), None), (torch.dtype, torch.layout)):
            raise _refuse("context", value)
        if names_class and path not in _PLAIN_CLASSES:
            _transformers_class(str(path))
        for key, item in value.items():
            if not _is_key(key):
                raise _refuse("key", key)
            _check_context(item)
    elif isinstance(value, str) and not _is_key(value):
        raise _refuse("key", value)


def _transformers_class(path: str) -> type:
    module, name = re.split(r"[.:](?=\w+$)", path)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise StoreError(f"the class {path} cannot be found: {error}; install the transformers version that the result was saved with") from error
    if not isinstance(found, type) or not found.__module__.startswith("transformers."):
        raise _refuse("class", path)
    return found


def _register(path: str) -> None:
    """Make an output or cache class of transformers known to torch."""
    from transformers.exporters.exporter_dynamo import is_cache_class, register_pytree_node
    from transformers.utils.generic import ModelOutput

    found = _transformers_class(path)
    if issubclass(found, ModelOutput) and dataclasses.is_dataclass(found):
        return  # registered by its own import
    if not is_cache_class(found):
        raise StoreError(f"the program takes or returns a {path}, which is neither an output nor a cache of transformers; register it as a pytree first")
    register_pytree_node(found)
