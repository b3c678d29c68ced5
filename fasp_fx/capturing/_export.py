"""Export a module, with as much freedom in its sizes as it allows."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import linecache
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fasp_fx.base import (
    PyTreeCodeGen,
    applied_functions,
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
from ._rewrites import as_weights, constants_as_numbers, fixed_sizes, settled_as_numbers
from ._shapes import by_shapes
from ._signature import CallerCodeGen, CallSignature, is_plain
from ._sizes import (
    all_dims,
    every_dim,
    first_dim,
    images_of,
    of_features,
    recorded_shapes,
    takes_any_number,
    widened,
)
from ._transformers import export_transformers, is_transformers
from ._unchanged import Seen, called, unchanged


@dataclass(frozen=True)
class CaptureOptions:
    """How a model is captured.

    Attributes:
        dynamic_shapes: as for ``torch.export.export``; ``None`` keeps every dimension dynamic that the model
            lets vary, of images (floating-point tensors of four dimensions and more) only the first.
        state: names of arguments and outputs that hold state (a cache) and may become narrower.
        device: move the captured copy there; ``None`` leaves it where the model is.
        image_sizes: let heights and widths of images vary as well.
        fold: put parameters in the place of weights that the model computes from others.
        own_defaults: an argument that is left out has the default that ``forward`` gives it, rather than what
            it was captured with.
        doubles: whether an example of one sample may be captured as one of two, so that their number varies.
    """

    dynamic_shapes: Any = None
    state: tuple[str, ...] = ()
    device: torch.device | str | None = None
    image_sizes: bool = False
    fold: bool = True
    own_defaults: bool = False
    doubles: bool = True


@dataclass(frozen=True)
class Exported:
    """What a model became.

    Attributes:
        program: the program, in functional operators.
        notes: what a user should know of it.
        doubled: whether its example is a batch of one that was doubled, and of which a single sample can be
            run.
        seen: what the model gave for the inputs as they were given.
    """

    program: ExportedProgram
    notes: tuple[str, ...] = ()
    doubled: bool = False
    seen: Seen | None = None


class _Attempt(NamedTuple):
    """One way to export a model.

    Attributes:
        note: what a user should know of a program that comes of it; empty where nothing was given up.
        inputs: the example inputs by name.
        shapes: as for ``torch.export.export``, or a function that gives that.
        is_doubled: whether the inputs are twice the caller's.
    """

    note: str
    inputs: dict[str, Any]
    shapes: Any
    is_doubled: bool = False


def export(
    model: nn.Module, signature: CallSignature, inputs: dict[str, Any], how: CaptureOptions, leading: int
) -> Exported:
    """The program of a module, with as much freedom in its sizes as it allows.

    Args:
        model, signature: the module and its calling convention.
        inputs: the example inputs by name.
        how: ``dynamic_shapes``, ``image_sizes`` and ``doubles`` say what may vary; where no shapes are given,
            one freedom after the other is tried, the greatest first.
        leading: how many arguments were given by position.

    Raises:
        ArgumentError: the model does not run on the inputs.
        ExportError: no attempt succeeded; the message carries the reason of the first.
    """
    exporter = _Exporter(model, signature, _by_position(model, signature, leading))
    if exporter.is_empty:
        inputs = pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, inputs)
    failures: list[Exception] = []
    for attempt in _attempts(inputs, how):
        try:
            return exporter.tried(attempt)
        except ArgumentError:
            raise
        except tolerable(Exception) as error:
            failures.append(error)
    raise ExportError(
        f"{type(model).__name__} cannot be captured by torch.export: {first_line(failures[0])}"
        f"{_line_of(model, failures[0])}."
        " Try the inputs on the model itself, then capture the largest submodule"
        " without data-dependent control flow."
    ) from failures[0]


def _line_of(model: nn.Module, error: Exception) -> str:
    """In which line of a module's own code the export of a model ended."""
    forwards = (inspect.getattr_static(type(module), "forward", None) for module in model.modules())
    own = {getattr(forward, "__code__", None) for forward in forwards}
    lines = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code in own]
    for frame, line in lines[-1:]:
        file = frame.f_code.co_filename
        return f", in line {line} of {file}: `{linecache.getline(file, line).strip()}`"
    return ""


def _attempts(inputs: dict[str, Any], how: CaptureOptions) -> Iterator[_Attempt]:
    if how.dynamic_shapes is not None:
        yield _Attempt("", inputs, how.dynamic_shapes)
        return
    free, double = every_dim if how.image_sizes else all_dims, widened(inputs) if how.doubles else None
    if double is not None:
        yield _Attempt("", double, free, True)
    yield _Attempt("", inputs, free)
    yield _Attempt(
        "only the first dimension of each input is dynamic", double or inputs, first_dim, double is not None
    )
    yield _Attempt("the shapes of the inputs are fixed to those of the example", inputs, None)


#: of a function with a derivative of its own
_GRADIENTS = (
    "the derivative that {} defines is lost in the graph, which trains with that of what it computes; train"
    " result.eager(model) instead"
)


@dataclass(frozen=True)
class _Exporter:
    """Exports one model.

    Attributes:
        by_position: the arguments that are passed so.
    """

    model: nn.Module
    signature: CallSignature
    by_position: list[str]

    @property
    def is_empty(self) -> bool:
        """Whether the model has no values to run with."""
        return any(parameter.device.type == "meta" for parameter in self.model.parameters())

    def tried(self, attempt: _Attempt) -> Exported:
        """What comes of an attempt; raises what the model or the exporter does."""
        inputs, shapes = attempt.inputs, attempt.shapes
        seen = None if self.is_empty else self._run(attempt)
        with applied_functions() as functions:
            program, attributes = self._traced(inputs, shapes)
        if attempt.is_doubled and not takes_any_number(program):
            raise ValueError("it takes a batch of two where one was given")
        # where the freedom is of ours to choose
        if shapes in (all_dims, every_dim, first_dim) and (features := of_features(program)):
            program, attributes = self._traced(inputs, functools.partial(shapes, fixed=features))
        images = images_of(inputs.values()) if shapes is all_dims else set()
        fixed = (
            f"all sizes of {', '.join(repr(name) for name in inputs if id(inputs[name]) in images)}"
            " but the first are fixed to those of the example, as images have four dimensions and more;"
            " dynamic_shapes= lets them vary"
        )
        notes = (
            *filter(None, (attempt.note, fixed if images else "")),
            *(fixed_sizes(program) if shapes is not None else ()),
            *(f"forward sets the attribute '{name}', which a graph does not" for name in attributes),
            *map(_GRADIENTS.format, functions),
        )
        return Exported(
            program,
            notes,
            # Freedom can have been taken away since that was asked above.
            doubled=attempt.is_doubled and takes_any_number(program),
            seen=None if attempt.is_doubled else seen,
        )

    def _run(self, attempt: _Attempt) -> Seen:
        """Call the model itself, so that what functions of its code remember (``functools.cache``, a
        dictionary of the module) are tensors with values: those of a trace have none, and would be there in
        every later call.

        Raises:
            ArgumentError: it does not run on the caller's inputs.
        """
        try:
            return called(self.model, self._arguments(attempt.inputs))
        except tolerable(Exception) as error:  # of forward, which raises what it likes
            if attempt.is_doubled:
                raise
            raise ArgumentError(
                f"the model does not run on the example inputs: {type(error).__name__}: {first_line(error)};"
                " pass others"
            ) from error

    def _arguments(self, inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a call is given, by position and by name."""
        named = {**inputs, **self.signature.constants}
        return tuple(named.pop(name) for name in self.by_position), named

    def _traced(self, inputs: dict[str, Any], shapes: Any) -> tuple[ExportedProgram, list[str]]:
        """The program, of a model that is found as it was and left so, and the names of the attributes that
        its forward sets.
        """
        model, (args, kwargs) = self.model, self._arguments(inputs)
        with quiet(), torch.no_grad(), by_shapes(), unchanged(model) as attributes:
            if is_transformers(model) and not args:
                return _rewritten(lambda: export_transformers(model, kwargs, shapes)), attributes
            objects = {
                name: value for name, value in kwargs.items() if name not in inputs and not is_plain(value)
            }
            kwargs = {name: value for name, value in kwargs.items() if name not in objects}
            return _exported(model, objects, args, kwargs, shapes), attributes


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
    first = itertools.takewhile(
        lambda name: name not in signature.constants or is_plain(signature.constants[name]),
        signature.given()[:leading],
    )
    return max(must, list(first), key=len)


def _rewritten(trace: Callable[[], ExportedProgram]) -> ExportedProgram:
    """What is traced, in operators that return what they compute and have rules, as far as that can be."""
    with compiled_when_called():
        exported = trace()
    exported = as_weights(settled_as_numbers(exported))
    out_of_place(exported.graph)
    exported = constants_as_numbers(functional(exported))
    take_apart(exported.graph)
    exported.graph_module.recompile()
    return exported


def _exported(
    model: nn.Module, objects: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> ExportedProgram:
    """The program of a model; ``objects`` as for :func:`_called_as`, ``shapes`` as for an attempt."""
    with _called_as(model, objects, kwargs):
        spec = shapes(args, kwargs).dynamic_shapes(model, args, kwargs) if callable(shapes) else shapes
        return _rewritten(lambda: torch.export.export(model, args, kwargs, dynamic_shapes=spec, strict=False))


def _called_as(
    model: nn.Module, objects: dict[str, Any], kwargs: dict[str, Any]
) -> contextlib.AbstractContextManager[Any]:
    """Let forward hold objects that the exporter does not take, such as members of an enum, and its signature
    name the arguments that it takes as ``**kwargs``: of sizes given for all of these by one name an exporter
    makes nothing.
    """
    forward = functools.partial(model.forward, **objects)
    parameters = inspect.signature(forward).parameters
    named = {name: one for name, one in parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
    extra = [name for name in kwargs if name not in named]
    if not (objects or extra):
        return contextlib.nullcontext()
    vars(forward)["__signature__"] = inspect.Signature(
        [*named.values(), *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra)]
    )
    return called_as(model, forward)


def export_again(module: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]]) -> ExportedProgram:
    """Export a rewritten graph module; guards, ranges and recorded shapes are made anew."""
    args, kwargs = example
    compile_graphs(module)  # an exporter asks for its signature before it calls it
    with quiet(), torch.no_grad(), by_shapes():
        return _exported(module, {}, args, kwargs, lambda *_: recorded_shapes(module.graph, example))
