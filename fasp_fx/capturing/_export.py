"""Export a module, with as much freedom in its sizes as it allows."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fasp_fx.base import (
    PyTreeCodeGen,
    called_as,
    codegen_of,
    compile_graphs,
    compiled_when_called,
    pytree,
    quiet,
    tolerable,
)
from fasp_fx.errors import ArgumentError, ExportError, first_line

from ._functional import functional, out_of_place, take_apart
from ._rewrites import as_weights, fixed_sizes, settled_as_numbers
from ._shapes import by_shapes
from ._signature import CallerCodeGen, CallSignature, is_plain
from ._sizes import all_dims, first_dim, images_of, of_features, recorded_shapes, takes_any_number, widened
from ._transformers import export_transformers, is_transformers
from ._unchanged import Seen, called, functions_called, unchanged


def export(
    model: nn.Module,
    signature: CallSignature,
    given: dict[str, Any],
    dynamic_shapes: Any,
    free: Any,
    leading: int,
    doubles: bool = True,
) -> tuple[ExportedProgram, tuple[str, ...], bool, Seen | None]:
    """The program of a module, what a user should know of it, whether its example is a batch of one that was
    doubled and of which a single sample can be run, and what the model gave for the inputs as they were
    given.

    Args:
        model, signature: the module and its calling convention.
        given: the example inputs by name.
        dynamic_shapes: as for ``torch.export.export``; ``None`` tries one freedom after the other, the
            greatest first.
        free: which dimensions may vary at most.
        leading: how many arguments were given by position.
        doubles: whether a batch of one may be captured as one of two, so that it can vary.

    Raises:
        ArgumentError: the model does not run on the inputs.
        ExportError: no attempt succeeded; the message carries the reason of the first.
    """
    names = _by_position(model, signature, leading)
    meta = any(parameter.device.type == "meta" for parameter in model.parameters())
    if meta:
        given = pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, given)
    double = widened(given) if doubles and dynamic_shapes is None else None
    wide = given if double is None else double
    attempts: list[tuple[str, dict[str, Any], Any]] = [
        *([("", double, free)] if double is not None else []),
        ("", given, free),
        ("only the first dimension of each input is dynamic", wide, first_dim),
        ("the shapes of the inputs are fixed to those of the example", given, None),
    ]
    if dynamic_shapes is not None:
        attempts = [("", given, dynamic_shapes)]
    failures: list[Exception] = []
    for note, inputs, shapes in attempts:
        try:
            called_with = _arguments(signature, names, inputs)
            seen = None if meta else _run(model, *called_with, inputs is given)
            with functions_called() as functions:
                exported, sets = _undisturbed(model, signature, names, inputs, shapes)
            if inputs is not given and not takes_any_number(exported):
                raise ValueError("it takes a batch of two where one was given")
            features = of_features(exported) if dynamic_shapes is None and callable(shapes) else frozenset()
            if features:
                exported, sets = _undisturbed(
                    model, signature, names, inputs, functools.partial(shapes, fixed=features)
                )
            images = images_of(inputs.values()) if dynamic_shapes is None and shapes is all_dims else set()
            fixed = (
                f"all sizes of {', '.join(repr(name) for name in inputs if id(inputs[name]) in images)}"
                " but the first are fixed to those of the example, as images have four dimensions and more;"
                " dynamic_shapes= lets them vary"
            )
            said = (
                *filter(None, (note, fixed if images else "")),
                *(fixed_sizes(exported) if shapes is not None else ()),
                *(f"forward sets the attribute '{name}', which a graph does not" for name in sets),
            )
            return (
                exported,
                (*said, *(_GRADIENTS.format(name) for name in functions)),
                # Freedom can have been taken away since that was asked above.
                inputs is not given and takes_any_number(exported),
                seen if inputs is given else None,
            )
        except ArgumentError:
            raise
        except tolerable(Exception) as error:
            failures.append(error)
    raise ExportError(
        f"{type(model).__name__} cannot be captured by torch.export: {first_line(failures[0])}."
        " Try the inputs on the model itself, then capture the largest submodule"
        " without data-dependent control flow."
    ) from failures[0]


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_given: bool) -> Seen:
    """Call the model itself, so that what functions of its code remember (``functools.cache``, a dictionary
    of the module) are tensors with values: those of a trace have none, and would be there in every later
    call.

    Args:
        is_given: whether these are the caller's inputs.

    Returns:
        As for :func:`called`.

    Raises:
        ArgumentError: it does not run on the caller's inputs.
    """
    try:
        return called(model, args, kwargs)
    except tolerable(Exception) as error:  # of forward, which raises what it likes
        if not is_given:
            raise
        raise ArgumentError(
            f"the model does not run on the example inputs: {type(error).__name__}: {first_line(error)}; pass"
            " others"
        ) from error


#: of a function with a derivative of its own
_GRADIENTS = (
    "the derivative that {} defines is lost in the graph, which trains with that of what it computes; train"
    " result.eager(model) instead"
)


def _undisturbed(
    model: nn.Module, signature: CallSignature, names: list[str], inputs: dict[str, Any], shapes: Any
) -> tuple[ExportedProgram, list[str]]:
    """One attempt, which finds the model as it was and leaves it so, and the names of the attributes that its
    forward sets.
    """
    with quiet(), torch.no_grad(), by_shapes(), unchanged(model) as changed:
        exported = _export_once(model, signature, names, inputs, shapes)
    return exported, changed


def _by_position(model: nn.Module, signature: CallSignature, leading: int) -> list[str]:
    """The arguments to pass by position: those that must be, those that an exported module has fixed there,
    and the ``leading`` ones given so.
    """
    codegen = codegen_of(model.graph) if isinstance(model, fx.GraphModule) else None
    if isinstance(codegen, PyTreeCodeGen) and not isinstance(codegen, CallerCodeGen):
        return signature.given()[: codegen.pytree_info.in_spec.child(0).num_children]
    must = signature.by_position()
    if is_transformers(model):
        return must  # its exporter takes keywords
    first = list(
        itertools.takewhile(
            lambda name: name not in signature.constants or is_plain(signature.constants[name]),
            signature.given()[:leading],
        )
    )
    return max(must, first, key=len)


def _arguments(
    signature: CallSignature, names: list[str], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a call is given, those of ``names`` by position."""
    held = {**inputs, **{name: one for name, one in signature.constants.items() if name not in inputs}}
    return tuple(held.pop(name) for name in names), held


def _export_once(
    model: nn.Module, signature: CallSignature, names: list[str], inputs: dict[str, Any], shapes: Any
) -> ExportedProgram:
    args, kwargs = _arguments(signature, names, inputs)
    if is_transformers(model) and not args:
        return _rewritten(lambda: export_transformers(model, kwargs, shapes))
    kwargs = {name: value for name, value in kwargs.items() if name in inputs}
    constants = {name: value for name, value in signature.constants.items() if name not in names}
    kwargs |= {name: value for name, value in constants.items() if is_plain(value)}
    held = {name: value for name, value in constants.items() if not is_plain(value)}
    with _called_as(model, held, kwargs):
        spec = shapes(args, kwargs).dynamic_shapes(model, args, kwargs) if callable(shapes) else shapes
        return _rewritten(lambda: torch.export.export(model, args, kwargs, dynamic_shapes=spec, strict=False))


def _rewritten(trace: Callable[[], ExportedProgram]) -> ExportedProgram:
    """What is traced, in operators that return what they compute and have rules, as far as that can be."""
    with compiled_when_called():
        exported = trace()
    exported = as_weights(settled_as_numbers(exported))
    out_of_place(exported.graph)
    exported = functional(exported)
    take_apart(exported.graph)
    exported.graph_module.recompile()
    return exported


def _called_as(
    model: nn.Module, held: dict[str, Any], kwargs: dict[str, Any]
) -> contextlib.AbstractContextManager[Any]:
    """Let forward hold arguments that the exporter does not take, such as members of an enum, and its
    signature name those that it takes as ``**kwargs``: of sizes given for all of these by one name an
    exporter makes nothing.
    """
    forward = functools.partial(model.forward, **held)
    parameters = inspect.signature(forward).parameters
    known = {name: one for name, one in parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
    extra = [name for name in kwargs if name not in known]
    if not (held or extra):
        return contextlib.nullcontext()

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    vars(named)["__signature__"] = inspect.Signature(
        [*known.values(), *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra)]
    )
    return called_as(model, named)


def export_again(module: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]]) -> ExportedProgram:
    """Export a rewritten graph module; guards, ranges and recorded shapes are made anew."""
    args, kwargs = example
    compile_graphs(module)  # an exporter asks for its signature before it calls it
    with quiet(), torch.no_grad(), by_shapes(), _called_as(module, {}, kwargs):
        shapes = recorded_shapes(module.graph, example).dynamic_shapes(module, args, kwargs)
        return _rewritten(
            lambda: torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        )
