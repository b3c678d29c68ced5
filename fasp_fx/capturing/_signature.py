"""The caller's calling convention, bound back around a captured graph.

Exporters drop arguments that hold no tensors and flatten the rest; a pruned module must still be called like
the original.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fasp_fx.base import (
    PyTreeCodeGen,
    PyTreeInfo,
    built_alike,
    guards_of_module,
    pytree,
    set_guards,
    tensors_in,
    tolerable,
)
from fasp_fx.errors import ArgumentError, CallError, CaptureError, FaspError

#: constants that exporters take as arguments
PLAIN = (type(None), bool, int, float, str)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


def is_plain(value: Any) -> bool:
    """Whether a (possibly nested) argument holds nothing but plain data."""
    return all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves(value))


@dataclass(frozen=True)
class CallSignature:
    """The parameters of the caller's ``forward``, and which of them were captured.

    Attributes:
        parameters: the signature of ``forward``, without ``self``. An argument that was given a constant at
            capture has it for its default, so that leaving it out means what the program does; where the
            caller is a model's own code, which means its own default by that, all defaults are as they were.
        captured: names of the arguments that the graph takes.
        constants: the arguments given at capture that hold no tensor; they are part of the program.
        outlines: for captured arguments that are lists or dicts, what they are built of.
    """

    parameters: inspect.Signature
    captured: tuple[str, ...]
    constants: dict[str, Any]
    outlines: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], own_defaults: bool = False
    ) -> CallSignature:
        """The signature of ``forward`` as seen by this example call.

        Args:
            own_defaults: leave the defaults of ``forward`` as they are.

        Raises:
            ArgumentError: the example inputs do not fit the signature.
            CaptureError: ``forward`` has no signature (a traced module), or an argument named ``self``.
        """
        try:
            signature = inspect.signature(forward)
        except ValueError as error:  # a compiled method of TorchScript
            raise CaptureError(
                f"the model's forward has no signature ({error}); pass the Python module it was made of"
            ) from error
        if "self" in signature.parameters:  # the pruned module's forward has a self of its own
            raise CaptureError("forward has an argument named 'self'; rename it")
        arguments = _bind(signature, args, kwargs)
        captured = tuple(name for name, value in arguments.items() if tensors_in(value))
        constants = {name: _kept(value) for name, value in arguments.items() if name not in captured}
        if not captured:
            raise ArgumentError(
                "the example inputs hold no tensor; pass at least one tensor in args or kwargs"
            )
        outlines = {
            name: outline_of(arguments[name])
            for name in captured
            if isinstance(arguments[name], (Mapping, list, tuple))
        }
        if not own_defaults:
            signature = signature.replace(
                parameters=[
                    parameter.replace(default=constants[parameter.name])
                    if parameter.name in constants and parameter.default is not parameter.empty
                    else parameter
                    for parameter in signature.parameters.values()
                ]
            )
        return CallSignature(signature, captured, constants, outlines)

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one call by name, with defaults for those left out.

        Raises:
            CallError: an argument was not captured, is missing, or differs from the constant seen at capture.
        """
        return self.checked({**self.defaults, **_bind(self.parameters, args, kwargs, CallError)})

    def checked(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, defaults included, with the constants seen at capture for those left out.

        Raises:
            CallError: an argument was not captured, is missing, or differs from the constant seen at capture.
        """
        expected = {**self.defaults, **self.constants}
        for name in self.captured:
            if arguments.get(name) is None:
                raise CallError(
                    f"argument '{name}' is missing: the program was captured with it; pass it, or capture"
                    " without it"
                )
        for name, value in arguments.items():
            if name not in self.captured and not same_constant(value, expected.get(name)):
                raise _refusal(name, value, repr(expected.get(name)))
            if name in self.outlines and not _fits(value, self.outlines[name]):
                raise _refusal(name, value, str(self.outlines[name]).replace(str(HELD), "a tensor"))
        return {**arguments, **self.constants}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the parameters."""
        return {p.name: p.default for p in self.parameters.parameters.values() if p.default is not p.empty}

    def given(self) -> list[str]:
        """The arguments given at capture, in the order of the parameters."""
        return [name for name, _ in self._kinds()]

    def by_position(self) -> list[str]:
        """The arguments that cannot all be passed by name: up to the last that is positional-only or one of
        ``*args``.
        """
        kinds = self._kinds()
        last = max((index for index, (_, kind) in enumerate(kinds) if kind in _POSITIONAL), default=-1)
        return [name for name, _ in kinds[: last + 1]]

    def _kinds(self) -> list[tuple[str, Any]]:
        known = [*self.captured, *self.constants]
        kinds: list[tuple[str, Any]] = []
        for name, parameter in self.parameters.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                count = sum(
                    other.rpartition("_")[0] == name and other.rpartition("_")[2].isdigit() for other in known
                )
                kinds += [(f"{name}_{index}", parameter.kind) for index in range(count)]
            elif name in known:
                kinds.append((name, parameter.kind))
        return kinds + [(name, inspect.Parameter.VAR_KEYWORD) for name in known if name not in dict(kinds)]


def _bind(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    error: type[FaspError] = ArgumentError,
) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as reason:
        raise error(f"the inputs do not fit the model's forward{signature}: {reason}") from reason
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            arguments.update({f"{name}_{index}": item for index, item in enumerate(value)})
        else:
            arguments[name] = value
    return arguments


# --- A call, held against that of the capture.


def same_constant(value: Any, expected: Any) -> bool:
    """Whether two constants are built alike of the same types, in the same order, and equal: what is no
    number is like another such, and zeros have a sign.
    """
    return _equal(value, expected) if isinstance(expected, PLAIN) else built_alike(value, expected, _equal)


def _equal(value: Any, expected: Any) -> bool:
    if value is expected or type(value) is not type(expected):
        return value is expected
    if isinstance(value, float):
        return repr(value) == repr(expected)
    if type(value).__eq__ is object.__eq__ and hasattr(value, "__dict__"):  # by what it holds
        return same_constant(vars(value), vars(expected))
    try:
        same = value == expected
        return bool(same.all() if hasattr(same, "all") else same)
    except tolerable(ValueError, TypeError, RuntimeError):  # an object raises what it likes
        return False


def _kept(value: Any) -> Any:
    """A constant as it is now: a copy, since the caller may change what is inside of it; itself, where it
    cannot be copied.
    """
    try:
        return copy.deepcopy(value)
    except tolerable(Exception):  # a class of the caller's raises what it likes
        return value


# --- The structure of a nested argument, to hold later calls against: lists and dicts of tensors and
# constants.


class HELD:
    """Stands for a tensor, or for an object that knows its own tensors (a cache, say)."""


def outline_of(value: Any) -> Any:
    """The argument with :class:`HELD` in the place of what the graph takes; constants stay."""
    if isinstance(value, Mapping):
        return {key: outline_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [outline_of(item) for item in value]
    return value if isinstance(value, PLAIN) else HELD


def _fits(value: Any, outline: Any) -> bool:
    """Whether an argument is built like the one seen at capture, and holds the same constants."""
    if isinstance(outline, dict):
        same = isinstance(value, Mapping) and value.keys() == outline.keys()
        return same and all(_fits(value[key], inside) for key, inside in outline.items())
    if isinstance(outline, list):
        same = isinstance(value, (list, tuple)) and len(value) == len(outline)
        return same and all(map(_fits, value, outline))
    is_held = not isinstance(value, (Mapping, list, tuple, *PLAIN))
    return is_held if outline is HELD else _equal(value, outline)


def _refusal(name: str, value: Any, expected: str) -> CallError:
    if isinstance(value, torch.Tensor):
        shown = f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    else:
        shown = f"a dict with the keys {list(value)}" if isinstance(value, Mapping) else f"{value!r:.80}"
    return CallError(
        f"argument '{name}' is {shown}, but the program was captured with {expected}; capture it with what"
        " you need"
    )


class _Code(str):
    """Text that a signature shows as it is."""

    __repr__ = str.__str__


class CallerCodeGen(PyTreeCodeGen):
    """Generates a ``forward`` with the caller's signature that refuses what was not captured.

    The code refers to this object: fx keys globals by value, so that constants must hide behind one.
    """

    def __init__(self, signature: CallSignature, pytree_info: PyTreeInfo) -> None:
        super().__init__(pytree_info)
        self.signature, (by_position, by_name) = signature, pytree_info.in_spec.children()
        self.by_position = signature.given()[: by_position.num_children]
        self.keywords = by_name.context or []

    def __deepcopy__(self, memo: dict[int, Any]) -> CallerCodeGen:
        return CallerCodeGen(self.signature, self.pytree_info)  # neither ever changes

    def inputs(
        self, arguments: dict[str, Any], rest: str, items: tuple[Any, ...]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call as the graph takes them, by position and by name.

        Args:
            arguments: those with names.
            rest, items: the name of ``*args``, and what it holds.

        Raises:
            CallError: an argument was not captured, is missing, or differs from the constant seen at capture.
        """
        arguments.update({f"{rest}_{index}": item for index, item in enumerate(items)})
        arguments = self.signature.checked(arguments)
        return [arguments[name] for name in self.by_position], {key: arguments[key] for key in self.keywords}

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [*super().additional_globals(), ("_call", self)]

    def _head(self) -> str:
        """The parameters of ``forward`` as code."""
        parameters = [
            parameter.replace(
                annotation=inspect.Parameter.empty,
                default=parameter.default
                # other defaults must stay the same object, by which an argument left out is recognised
                if isinstance(parameter.default, (type(None), bool))
                or parameter.name not in self.signature.defaults
                else _Code(f"_call.signature.defaults[{parameter.name!r}]"),
            )
            for parameter in self.signature.parameters.parameters.values()
        ]
        kinds = {parameter.kind for parameter in parameters} & {inspect.Parameter.POSITIONAL_ONLY}
        first = inspect.Parameter("self", *(kinds or {inspect.Parameter.POSITIONAL_OR_KEYWORD}))
        return str(inspect.Signature([first, *parameters]))

    def gen_fn_def(
        self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False
    ) -> str:
        kinds = {name: p.kind for name, p in self.signature.parameters.parameters.items()}
        by_kind = {kind: name for name, kind in kinds.items()}  # of those kinds there is one at most
        rest = by_kind.get(inspect.Parameter.VAR_POSITIONAL)
        extra = by_kind.get(inspect.Parameter.VAR_KEYWORD)
        entries = [f"{name!r}: {name}" for name in kinds if name not in (rest, extra)]
        named = ", ".join([*entries, *([f"**{extra}"] if extra else [])])
        names = ", ".join(var.split(":")[0].split("#")[0].strip() for var in free_vars)
        return (
            f"def forward{self._head()}{maybe_return_annotation}:\n"
            f"    _name, _value = _call.inputs({{{named}}}, {rest!r}, {rest or '()'})\n"
            f"    {names}, = fx_pytree.tree_flatten_spec((_name, _value), self._in_spec)\n"
        )


# --- The checks of input sizes that an exported program carries, failing with a typed error that says what
# may be given.


#: what is fixed of a tensor in every call: how many dimensions it has, and its type
Like = tuple[int, torch.dtype]


class Guards(nn.Module):
    """Stands where torch puts the module of its guards, which it wraps.

    A compiler or exporter that looks through a call sees the guards as torch wrote them and takes them over.
    A call that is merely executed gets :class:`CallError` in the place of their ``AssertionError``.

    Args:
        check: the function of torch's guards; takes the graph's inputs in order.
        names: what the caller calls each of those inputs, such as ``x`` or ``rest['left']``.
        like: what is fixed of each, ``None`` for what is no tensor.
        types: of real numbers, those of the weights at the capture.

    Attributes:
        owner: the module whose weights are asked for their types.
    """

    _is_impure = True  # nothing uses its result: passes that remove dead code must leave it

    def __init__(
        self,
        check: Callable[..., Any],
        names: tuple[str, ...],
        like: tuple[Like | None, ...],
        types: set[torch.dtype],
    ) -> None:
        super().__init__()
        self.check, self.names, self.like, self.types = check, names, like, types
        self.owner: Callable[[], nn.Module | None] = weakref.ref(self)

    def forward(self, *inputs: Any) -> None:
        """Check one call.

        Raises:
            CallError: names the argument, the dimension, what was given and what the program takes.
        """
        self._check_tensors(inputs)
        if torch.compiler.is_compiling():
            self.check(*inputs)
            return
        try:
            self.check(*inputs)
        except (AssertionError, ZeroDivisionError) as error:
            guard = str(error).removeprefix("Guard failed: ")
            shown = ", ".join(
                f"'{name}' of shape {tuple(value.shape)}"
                for name, value in zip(self.names, inputs, strict=True)
                if isinstance(value, Tensor)
            )
            raise CallError(
                "the sizes of the arguments do not fit: the program was captured for"
                f" {guard.replace('.size()', '.shape')}, the call has {shown}; capture it with sizes that you"
                " need"
            ) from None

    def _check_tensors(self, inputs: tuple[Any, ...]) -> None:
        for name, like, value in zip(self.names, self.like, inputs, strict=True):
            if not (
                like is None
                or isinstance(value, fx.Proxy)  # an fx tracer only looks on
                or (isinstance(value, Tensor) and value.dim() == like[0] and self._takes(value, like[1]))
            ):
                raise _refusal(name, value, f"one of {like[0]} dimensions, {like[1]}")

    def _takes(self, value: Tensor, captured: torch.dtype) -> bool:
        """Whether a tensor is of the captured type. Where weights are of another than they were (after
        ``half()``, say), real numbers are of theirs, and autocast mixes them.
        """
        if value.dtype == captured or not (captured.is_floating_point and value.is_floating_point()):
            return value.dtype == captured
        owner = self.owner()
        return torch.is_autocast_enabled(value.device.type) or (
            owner is not None and value.dtype in float_types(owner.parameters()) - self.types
        )


def float_types(tensors: Iterable[Any]) -> set[torch.dtype]:
    """The types of those tensors that hold real numbers."""
    return {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()}


def guard_calls(lifted: fx.GraphModule, exported: ExportedProgram, types: set[torch.dtype]) -> None:
    """Let the guards in the module of an exported program fail with :class:`CallError`; ``types`` as for
    :class:`Guards`.
    """
    guards = guards_of_module(lifted)
    if guards is None or exported.example_inputs is None:  # a program without inputs has none
        return
    args, kwargs = exported.example_inputs
    bound = inspect.signature(lifted.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    names = tuple(
        name + pytree.keystr(path)
        for name, value in bound.arguments.items()
        for path, _ in pytree.tree_leaves_with_path(value)
    )
    like = tuple(
        (value.dim(), value.dtype) if isinstance(value := node.meta.get("val"), Tensor) else None
        for node in lifted.graph.find_nodes(op="placeholder")
    )
    set_guards(lifted, Guards(guards.forward, names, like, types))
