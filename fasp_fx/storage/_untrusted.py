"""What a stored program may contain.

Reading an exported program evaluates expressions, imports classes and generates code from names. Everything
that could reach those is held against what save() writes, before torch sees it: a damaged or forged file is
refused, never executed.
"""

from __future__ import annotations

import functools
import importlib
import json
import keyword
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fasp_fx.base import SIZE_FUNCTIONS, HigherOrderOperator, OpOverload, pytree, schema_of, tolerable
from fasp_fx.errors import StoreError

_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)")
_HIGHER_ORDER = {
    f"torch.ops.higher_order.{name}"
    for name in (
        "cond",
        "flex_attention",
        "while_loop",
        "scan",
        "map_impl",
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
    )
}
#: functions on sizes, by the names that a graph gives them
_ON_SIZES: dict[str, Any] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in [
            "add",
            "and_",
            "eq",
            "floordiv",
            "ge",
            "getitem",
            "gt",
            "le",
            "lshift",
            "lt",
            "mod",
            "mul",
            "ne",
            "neg",
            "or_",
            "pos",
            "pow",
            "rshift",
            "sub",
            "truediv",
        ]
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ["_sym_sqrt", "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not"]
        if hasattr(torch, name)
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
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
#: numbers, symbols and functions of one expression of sizes
PARTS = 500
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
#: where a node comes from
check_word = _nothing_but("word", r"[^\"\\\n\r{}]", r"\Z")
#: a size that varies; torch counts up to the number of one that only the data say
check_symbol = _nothing_but("symbol", r"\A[a-z]{1,9}\d{1,4}\Z")
#: of an argument of an operator, which generated code writes before a sign of equality
check_keyword = _nothing_but("keyword", rf"\A(?!{_one_of(' '.join(keyword.kwlist))}\Z)[^\W\d]\w{{0,99}}\Z")
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


def check_expression(written: Any) -> Any:
    """Refuse an expression of sizes with more parts than models have, with others than numbers, symbols and
    calls of known functions, or with powers and shifts that could make a number as large as memory; gives
    others back.

    Raises:
        StoreError: quotes it.
    """
    waiting = [(written, 0)]
    for count, (part, powers) in enumerate(waiting):  # which grows
        is_call = isinstance(part, list) and len(part) > 1 and part[0] in SIZE_FUNCTIONS
        is_number = isinstance(part, (int, float)) and abs(part) < 2**63
        if is_call and ("Pow" in part[0] or "Shift" in part[0]):
            powers += 1
            is_call = powers <= 2 and isinstance(part[-1], (int, float)) and abs(part[-1]) < 64
        if count >= PARTS or not (is_call or is_number or isinstance(part, str)):
            raise refuse("expression", written)
        waiting += [(inner, powers) for inner in part[1:]] if is_call else []
    return written


def check_path(path: Any) -> str:
    """Refuse the name of a weight, as :func:`check_weight_name` does, or one that would take the place of an
    attribute of graph modules; gives others back.
    """
    check_weight_name(path)
    if hasattr(_GRAPH_MODULE, path.partition(".")[0]):
        raise StoreError(
            f"the stored graph names a weight {path!r}, which would take the place of an attribute of graph"
            " modules; rename that submodule"
        )
    return str(path)


def check_weight_name(path: Any) -> None:
    """Refuse the name of a weight that is no path of submodules, or that would take the place of what every
    module has, such as ``training``.

    Raises:
        StoreError: quotes the name.
    """
    parts = path.split(".") if isinstance(path, str) and is_key(path) and len(path) < 1000 else [""]
    if len(parts) > 64 or not all(parts) or any(hasattr(_MODULE, part) for part in parts):
        raise refuse("name of a weight", path)


def name_of(target: Any) -> str:
    """The name of what a node of a graph calls; errors as for :func:`operator_called`."""
    if isinstance(target, (OpOverload, HigherOrderOperator)):
        name = f"torch.ops.{'' if isinstance(target, OpOverload) else 'higher_order.'}{target}"
    else:
        name = f"{target.__module__}.{target.__name__}"
    operator_called(name)
    return name


def operator_called(name: Any) -> Any:
    """What a graph calls by that name: an operator of torch, or a function on sizes.

    Raises:
        StoreError: it is none, or reaches outside of the model.
    """
    if name in _ON_SIZES:
        return _ON_SIZES[name]
    match = _OPERATOR.fullmatch(name) if isinstance(name, str) else None
    if match is None and name not in _HIGHER_ORDER:
        raise StoreError(
            f"the stored graph calls {name!r}, which is not a torch operator that can be stored; save the"
            " result again"
        )
    try:
        target = functools.reduce(getattr, name.split(".")[2:], torch.ops)
    except tolerable(AttributeError, RuntimeError):
        target = None
    if match is None and isinstance(target, HigherOrderOperator):
        return target
    if not isinstance(target, OpOverload):
        raise StoreError(
            f"the operator {name} is not known here; import the package that registers it before loading"
        )
    for argument in schema_of(target).arguments:
        if "str" in str(argument.type) and re.search("file|path|name", argument.name):
            raise StoreError(
                f"the stored graph calls {name}, which reaches outside of the model; such a program is not"
                " loaded"
            )
    return target


def check_structure(written: Any) -> Any:
    """Refuse a container structure, of arguments or outputs, that names classes other than plain containers,
    outputs and caches of transformers, and registered types; gives others back.

    Classes of transformers are imported and registered as the exporter does.

    Raises:
        StoreError: names the type.
        Exception: it is none, for :func:`parsing` to say so.
    """
    if written is None:
        return written
    kind, context, children = written
    for child in children:
        check_structure(child)
    keys = json.loads(context) if kind in ("builtins.dict", "collections.OrderedDict") else ()
    odd = next((key for key in keys if not isinstance(key, (str, int))), None)
    if odd is not None:
        raise StoreError(f"the model takes or returns a dict with the key {odd!r}; use text for keys")
    if kind == "collections.defaultdict":
        raise StoreError(
            "the program takes or returns a defaultdict, whose factory would have to be imported; use a dict"
        )
    if kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and _TRANSFORMERS.fullmatch(kind):
        _register(kind)
    for name in (kind, context) if kind == "collections.namedtuple" else (kind,):
        if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            raise StoreError(
                f"the program takes or returns a {name}, a type that is not registered here; import the"
                " module that registers it as a pytree first"
            )
    registered = pytree.SUPPORTED_SERIALIZED_TYPES[pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE[kind]]
    _check_context(json.loads(context) if registered.from_dumpable_context is None else context)
    return written


def _check_context(value: Any) -> None:
    """Contexts are data that may name classes; only those that save() writes are allowed."""
    if isinstance(value, list):
        for item in value:
            _check_context(item)
    elif isinstance(value, dict):
        tag, path = value.get("_t"), value.get("p")
        names_class = tag is not None and path is not None
        is_forged = names_class and path not in _PLAIN_CLASSES and not _TRANSFORMERS.fullmatch(str(path))
        is_constant = tag not in ("dtype", "layout") or isinstance(
            getattr(torch, str(value.get("n")), None), (torch.dtype, torch.layout)
        )
        if "__enum__" in value or is_forged or not is_constant:
            raise refuse("context", value)
        if names_class and path not in _PLAIN_CLASSES:
            _transformers_class(str(path))
        for part in (*value, *value.values()):
            _check_context(part)
    elif isinstance(value, str) and not is_key(value):
        raise refuse("key", value)


def _transformers_class(path: str) -> type:
    module, name = re.split(r"[.:](?=\w+$)", path)
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise StoreError(
            f"the class {path} cannot be found: {error}; install the transformers version that the result was"
            " saved with"
        ) from error
    if not isinstance(kind, type) or not kind.__module__.startswith("transformers."):
        raise refuse("class", path)
    return kind


def _register(path: str) -> None:
    """Make a cache class of transformers known to torch; its outputs are by their own import."""
    from fasp_fx.base import is_cache_class, register_pytree_node

    kind = _transformers_class(path)
    if is_cache_class(kind):
        register_pytree_node(kind)
