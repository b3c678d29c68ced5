"""What a stored program may contain.

Reading an exported program evaluates expressions, imports classes and generates code from names. Everything
that could reach those is held against what save() writes, before torch sees it: a damaged or forged file is
refused, never executed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import keyword
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from fasp_fx.base import ON_SIZES, OpOverload, Union, pytree, schema, tolerable
from fasp_fx.errors import StoreError

_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)")
_HIGHER_ORDER = {
    f"torch.ops.higher_order.{name}"
    for name in (
        "cond",
        "while_loop",
        "scan",
        "map_impl",
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
    )
}
_MODULE, _GRAPH_MODULE = nn.Module(), fx.GraphModule({}, fx.Graph())
_TRANSFORMERS = re.compile(
    r"transformers\.(cache_utils|modeling_outputs|configuration_utils|utils\.generic|models\.\w+(\.\w+)?)[.:]\w+"
)
_PLAIN_CLASSES = {
    "builtins:tuple",
    "builtins:list",
    "builtins:set",
    "builtins:frozenset",
    "collections:OrderedDict",
}


#: characters of a text that torch hands to sympy or to Python, far more than models have
LENGTH = 8000
#: of sizes: constructors as sympy.srepr writes them, torch's own among them, and what symbols are taken to be
_CONSTRUCTORS = (
    "Integer Rational Add Mul Pow Mod Max Min floor ceiling Abs Piecewise ExprCondPair Tuple Equality"
    " Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan And Or Not FloorDiv ModularIndexing"
    " Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv"
    " IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat"
    " Identity"
)
_ASSUMPTIONS = (
    "positive integer nonnegative real zero finite rational commutative evaluate negative extended_real"
)
_GUARD_CALLS = (
    "max min abs int float bool IsNonOverlappingAndDenseIndicator cast_symbool_to_symint_guardless math.floor"
    " math.ceil math.trunc math.sqrt math.pow torch.sym_float torch.sym_int torch.sym_max torch.sym_min"
    " torch.sym_not torch.sym_ite torch._sym_sqrt"
)


def _one_of(words: str) -> str:
    return f"(?:{'|'.join(map(re.escape, words.split()))})"


def _nothing_but(what: str, *tokens: str) -> Callable[[Any], str]:
    """What refuses a text of more than these tokens, and gives others back."""
    pattern = re.compile(f"(?:{'|'.join(tokens)})++")

    def check(text: Any) -> str:
        if not isinstance(text, str) or len(text) > LENGTH or pattern.fullmatch(text) is None:
            raise refuse(what, text)
        return text

    return check


check_expression = _nothing_but(
    "expression",
    r"Symbol\('\w{1,80}'",
    r"Float\('-?[\d.]{1,80}(?:[eE][+-]?\d{1,3})?'",
    rf"{_one_of(_CONSTRUCTORS)}\(",
    rf"{_one_of(_ASSUMPTIONS)}=(?:True|False)\b",
    r"precision=\d{1,4}\b",
    r"(?:true|false)\b",
    r"-?\d{1,20}(?!\d)",
    r"[), ]",
)
check_guard = _nothing_but(
    "guard",
    r"L(?:\[(?:\d{1,9}|'[^'\"\\\n\r{}]{0,200}')\])+"
    r"(?:\.(?:size|stride|storage_offset|numel)\(\d{0,9}\)(?:\[\d{1,9}\])?)?",
    rf"{_one_of(_GUARD_CALLS)}\(",
    r"(?:True|False|not|and|or|if|else)\b",
    r"\d{1,20}(?:\.\d{1,20})?(?:e[+-]?\d{1,3})?(?![\w.])",
    r"-(?! *-)",
    r"[() <>=!+*/%&|^,]",
)
_check_word = _nothing_but("word", r"[\w.@+-]{1,1000}", r"\Z")
#: a size, or an expression of sizes; torch counts up to the number of one that only the data say
_check_size = _nothing_but("size", r"(?!(?:u|zuf)\d{5,})[\w +*/()%,.-]")
#: what generated code calls its own
_TAKEN = " ".join(["self", "_call", "_name", "_value", "fx_pytree", "torch", *keyword.kwlist])
check_name = _nothing_but("name", rf"\A(?!__)(?!{_one_of(_TAKEN)}\Z)[^\W\d]\w{{0,999}}\Z")


def refuse(kind: str, text: Any) -> StoreError:
    """The error for a forged piece of text."""
    return StoreError(
        f"the graph holds the {kind} {text!r:.300}, which is longer than what is stored, or what save() never"
        " writes; save the result again"
    )


def is_key(key: Any) -> bool:
    """Whether this is the key of a dict that can stand between quotes."""
    return isinstance(key, str) and not set(key) & set("\"'\\\n\r{}")


def check_program(program: schema.ExportedProgram) -> None:
    """Refuse a program with anything in it that save() does not write.

    Raises:
        StoreError: names the expression, operator, name or type.
    """
    program.graph_module.metadata.clear()
    for _, item in walk(program):
        if isinstance(item, schema.Node):
            item.metadata = {
                name: text
                for name, text in item.metadata.items()
                if name in _METADATA and _METADATA[name].fullmatch(str(text))
            }
    for place, item in walk(program):
        if place in _TEXTS and item is not None and not isinstance(item, (list, tuple, dict)):
            _TEXTS[place](item)
        elif isinstance(item, str):
            raise refuse(place, item)
    calls = program.graph_module.module_call_graph
    if not calls or calls[0].fqn != "" or calls[0].signature is None:
        raise StoreError(
            "the stored graph does not say how the model itself is called; save the result again"
        )


def walk(item: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """An object of the schema and all that it holds, each with the class and the field that hold it, and
    whether it is a key there: ``"Node.target"``, ``"Graph.tensor_values key"``.
    """
    yield place, item
    kind = type(item).__name__
    if isinstance(item, Union):
        yield from walk(item.value, f"{kind}.{item.type}")
    elif dataclasses.is_dataclass(item):
        for field in dataclasses.fields(item):
            yield from walk(getattr(item, field.name), f"{kind}.{field.name}")
    elif isinstance(item, (list, tuple)):
        for child in item:
            yield from walk(child, place)
    elif isinstance(item, dict):
        for key, child in item.items():
            yield f"{place} key", key
            yield from walk(child, place)


def _check_path(path: Any) -> None:
    check_weight_name(path)
    if hasattr(_GRAPH_MODULE, path.partition(".")[0]):
        raise StoreError(
            f"the stored graph names a weight {path!r}, which would take the place of an attribute of graph"
            " modules; rename that submodule"
        )


def check_weight_name(path: Any) -> None:
    """Refuse the name of a weight that is no path of submodules, or that would take the place of what every
    module has, such as ``training``.

    Raises:
        StoreError: quotes the name.
    """
    parts = path.split(".") if isinstance(path, str) and is_key(path) and len(path) < 1000 else [""]
    if len(parts) > 64 or not all(parts) or any(hasattr(_MODULE, part) for part in parts):
        raise refuse("name of a weight", path)


def check_operator(target: Any) -> None:
    """Refuse a target that is not an operator of torch on tensors or sizes.

    Raises:
        StoreError: names the target.
    """
    if target in ON_SIZES or target in _HIGHER_ORDER:
        return
    match = _OPERATOR.fullmatch(target) if isinstance(target, str) else None
    if match is None:
        raise StoreError(
            f"the stored graph calls {target!r}, which is not a torch operator that can be stored; save the"
            " result again"
        )
    try:
        found = getattr(getattr(getattr(torch.ops, match[1]), match[2]), match[3])
    except tolerable(AttributeError, RuntimeError):
        found = None
    if not isinstance(found, OpOverload):
        raise StoreError(
            f"the operator {target} is not known here; import the package that registers it before loading"
        )
    for argument in found._schema.arguments:
        if "str" in str(argument.type) and re.search("file|path|name", argument.name):
            raise StoreError(
                f"the stored graph calls {target}, which reaches outside of the model; such a program is not"
                " loaded"
            )


def check_structure(text: Any, *, keywords: bool = False) -> None:
    """Refuse a container structure that names classes other than plain containers, outputs and caches of
    transformers, and registered types.

    Classes of transformers are imported and registered as the exporter does.

    Raises:
        StoreError: names the type.
    """
    try:
        _, tree = json.loads(text)
        _check_spec(tree)
        if keywords:
            for name in json.loads(tree["children_spec"][1]["context"]):
                check_name(name)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise refuse("structure", text) from error


def _check_spec(tree: Any) -> None:
    kind, context = tree["type"], tree["context"]
    for child in tree["children_spec"]:
        _check_spec(child)
    if kind is None:
        return
    keys = json.loads(context) if kind in ("builtins.dict", "collections.OrderedDict") else ()
    odd = next((key for key in keys if not isinstance(key, (str, int))), None)
    if odd is not None:
        raise StoreError(f"the model takes or returns a dict with the key {odd!r}; use text for keys")
    if kind == "collections.defaultdict":
        raise StoreError(
            "the program takes or returns a defaultdict, whose factory would have to be imported; use a dict"
        )
    if (
        isinstance(kind, str)
        and kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
        and _TRANSFORMERS.fullmatch(kind)
    ):
        _register(kind)
    for name in (kind, context) if kind == "collections.namedtuple" else (kind,):
        if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            raise StoreError(
                f"the program takes or returns a {name}, a type that is not registered here; import the"
                " module that registers it as a pytree first"
            )
    plain = (
        pytree.SUPPORTED_SERIALIZED_TYPES[pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE[kind]].from_dumpable_context
        is None
    )
    _check_context(json.loads(context) if plain else context)


def _check_context(value: Any) -> None:
    """Contexts are data that may name classes; only those that save() writes are allowed."""
    if isinstance(value, list):
        for item in value:
            _check_context(item)
    elif isinstance(value, dict):
        tag, path = value.get("_t"), value.get("p")
        names_class = tag is not None and path is not None
        known = not names_class or (
            isinstance(path, str) and (path in _PLAIN_CLASSES or _TRANSFORMERS.fullmatch(path) is not None)
        )
        if "__enum__" in value or not known:
            raise refuse("context", value)
        if tag in ("dtype", "layout") and not isinstance(
            getattr(torch, str(value.get("n")), None), (torch.dtype, torch.layout)
        ):
            raise refuse("context", value)
        if names_class and path not in _PLAIN_CLASSES:
            _transformers_class(str(path))
        for key, item in value.items():
            if not is_key(key):
                raise refuse("key", key)
            _check_context(item)
    elif isinstance(value, str) and not is_key(value):
        raise refuse("key", value)


def _transformers_class(path: str) -> type:
    module, name = re.split(r"[.:](?=\w+$)", path)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise StoreError(
            f"the class {path} cannot be found: {error}; install the transformers version that the result was"
            " saved with"
        ) from error
    if not isinstance(found, type) or not found.__module__.startswith("transformers."):
        raise refuse("class", path)
    return found


def _register(path: str) -> None:
    """Make a cache class of transformers known to torch; its outputs are by their own import."""
    from fasp_fx.base import is_cache_class, register_pytree_node

    found = _transformers_class(path)
    if is_cache_class(found):
        register_pytree_node(found)


#: what is known of a node besides, by which quantisers find modules and torch unflattens a program; torch
#: does not read what it writes of names with the signs that part them, and these are left out
_FIELD = r"[^,;()\[\]\"\\\n\r{}]*"
_METADATA = {
    "nn_module_stack": re.compile(rf"{_FIELD},{_FIELD},{_FIELD}(?:;{_FIELD},{_FIELD},{_FIELD})*"),
    "torch_fn": re.compile(r"[^\"\\\n\r{}]*"),
}
#: what each text of a stored program is held against, by the class and field that hold it: operators are
#: given any, which generated code quotes. A text in another place is refused, whatever some torch makes of
#: it.
_TEXTS: dict[str, Callable[[Any], object]] = {
    "Argument.as_operator": check_operator,
    "Argument.as_string": str,
    "Argument.as_strings": str,
    "BufferMutationSpec.buffer_name": _check_path,
    "ConstantValue.as_string": str,
    "Device.type": _check_word,
    "ExportedProgram.guards_code": check_guard,
    "ExportedProgram.opset_version key": _check_word,
    "ExportedProgram.range_constraints key": _check_size,
    "ExportedProgram.torch_version": _check_word,
    "ExportedProgram.verifiers": _check_word,
    "Graph.sym_bool_values key": check_name,
    "Graph.sym_float_values key": check_name,
    "Graph.sym_int_values key": check_name,
    "Graph.tensor_values key": check_name,
    "GraphArgument.name": check_name,
    "GraphModule.treespec_namedtuple_fields key": _check_word,
    "InputToBufferSpec.buffer_name": _check_path,
    "InputToConstantInputSpec.name": check_name,
    "InputToParameterSpec.parameter_name": _check_path,
    "InputToTensorConstantSpec.tensor_constant_name": _check_path,
    "ModuleCallEntry.fqn": _check_word,
    "ModuleCallSignature.forward_arg_names": check_name,
    "ModuleCallSignature.in_spec": functools.partial(check_structure, keywords=True),
    "ModuleCallSignature.out_spec": check_structure,
    "NamedArgument.name": _check_word,
    "NamedTupleDef.field_names": check_name,
    "Node.metadata": str,
    "Node.metadata key": str,
    "Node.name": check_name,
    "Node.target": check_operator,
    "ParameterMutationSpec.parameter_name": _check_path,
    "SymBoolArgument.as_name": check_name,
    "SymExpr.expr_str": check_expression,
    "SymFloatArgument.as_name": check_name,
    "SymIntArgument.as_name": check_name,
    "TensorArgument.name": check_name,
    "TokenArgument.name": check_name,
    "UserInputMutationSpec.user_input_name": check_name,
}
