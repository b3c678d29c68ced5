"""The checks of input sizes that an exported program carries, failing with a typed error that says what may
be given.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..base._tensors import storage_of
from ..base.compat import pytree
from ..errors import CallError
from ..patterns import CASTS, lookup

_FAILED = "Guard failed: "
#: what torch says of one size alone, such as ``x.size()[1] == 8``
_ONE_SIZE = re.compile(r"(?P<name>.+)\.size\(\)\[(?P<dim>\d+)\] (?P<relation>==|>=|<=) (?P<bound>\d+)")
_BOUNDS = {"==": "for {}", ">=": "for at least {}", "<=": "for at most {}"}


@dataclass(frozen=True)
class Like:
    """What is fixed of a tensor in every call: the number of its dimensions, and the kind of its dtype; the
    dtype itself where the program is ``exact`` about it.
    """

    rank: int
    dtype: torch.dtype
    exact: bool = False

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether a tensor of another dtype can be given."""
        return dtype == self.dtype if self.exact else _kind(dtype) == _kind(self.dtype)


class Guards(nn.Module):
    """Stands where torch puts the module of its guards, which it wraps.

    A compiler or exporter that looks through a call sees the guards as torch wrote them and takes them over.
    A call that is merely executed gets :class:`CallError` in the place of their ``AssertionError``.

    Args:
        check: the function of torch's guards; takes the graph's inputs in order.
        names: what the caller calls each of those inputs, such as ``x`` or ``rest['left']``.
        like: what is fixed of each, ``None`` for what is no tensor.
        written: the numbers of those that the program writes into.
    """

    _is_impure = True  # nothing uses its result: passes that remove dead code must leave it

    def __init__(
        self,
        check: Callable[..., Any],
        names: tuple[str, ...],
        like: tuple[Like | None, ...],
        written: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.check, self.names, self.like, self.written = check, names, like, written

    def forward(self, *inputs: Any) -> None:
        """Check one call.

        Raises:
            CallError: names the argument, the dimension, what was given and what the program takes.
        """
        self._check_tensors(inputs)
        if torch.compiler.is_compiling():
            self.check(*inputs)
            return
        self._check_written(inputs)
        try:
            self.check(*inputs)
        except AssertionError as error:
            raise CallError(self._explain(str(error).removeprefix(_FAILED), inputs)) from None
        except ZeroDivisionError:
            shown = ", ".join(
                f"'{name}' of shape {tuple(value.shape)}"
                for name, value in zip(self.names, inputs, strict=True)
                if isinstance(value, Tensor)
            )
            raise CallError(
                f"the program divides by a size that is zero in this call, which has {shown}; leave such a"
                " call out"
            ) from None

    def _check_tensors(self, inputs: tuple[Any, ...]) -> None:
        for name, like, value in zip(self.names, self.like, inputs, strict=True):
            if like is None or isinstance(value, fx.Proxy):  # an fx tracer only looks on
                continue
            if not isinstance(value, Tensor):
                raise CallError(
                    f"argument '{name}' is a {type(value).__name__}, but the program was captured with a"
                    " tensor; pass a tensor"
                )
            if value.dim() != like.rank:
                raise CallError(
                    f"argument '{name}' has {value.dim()} dimensions, its shape is {tuple(value.shape)}, but"
                    f" the program was captured for {like.rank}; capture it with the number you need"
                )
            if not like.takes(value.dtype):
                raise CallError(
                    f"argument '{name}' is a tensor of {value.dtype}, but the program was captured for"
                    f" {like.dtype}, and a model may do something else with each; pass {like.dtype}, or"
                    " capture it with what you need"
                )

    def _check_written(self, inputs: tuple[Any, ...]) -> None:
        """Refuse to write into what another argument reads: the program has it as it was before."""
        for number in self.written:
            for other, value in enumerate(inputs):
                if other != number and _share_memory(inputs[number], value):
                    raise CallError(
                        f"arguments '{self.names[number]}' and '{self.names[other]}' share memory, and"
                        f" forward writes into '{self.names[number]}'; pass a copy of one of them"
                    )

    def _explain(self, guard: str, inputs: tuple[Any, ...]) -> str:
        given = {
            name: tuple(value.shape)
            for name, value in zip(self.names, inputs, strict=True)
            if isinstance(value, Tensor)
        }
        one = _ONE_SIZE.fullmatch(guard)
        if one is not None and one["name"] in given:
            name, dim = one["name"], int(one["dim"])
            allowed = _BOUNDS[one["relation"]].format(one["bound"])
            return (
                f"argument '{name}': dimension {dim} is {given[name][dim]}, the program was captured"
                f" {allowed}; capture it with the size you need"
            )
        shown = ", ".join(
            f"'{name}' of shape {shape}" for name, shape in given.items() if f"{name}.size()" in guard
        )
        return (
            "the sizes of the arguments do not fit together: the program was captured for"
            f" {guard.replace('.size()', '.shape')}, the call has {shown}"
        )


def guard_calls(lifted: fx.GraphModule, exported: ExportedProgram) -> None:
    """Let the guards in the module of an exported program fail with :class:`CallError`."""
    found = getattr(lifted, "_guards_fn", None)
    if found is None or exported.example_inputs is None:  # a program without inputs has none
        return
    args, kwargs = exported.example_inputs
    bound = inspect.signature(lifted.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    names = tuple(
        name + pytree.keystr(path)
        for name, value in bound.arguments.items()
        for path, _ in pytree.tree_leaves_with_path(value)
    )
    exact = _asserted(lifted.graph)
    like = tuple(
        Like(value.dim(), value.dtype, node in exact)
        if isinstance(value := node.meta.get("val"), Tensor)
        else None
        for node in lifted.graph.find_nodes(op="placeholder")
    )
    mutated = set(exported.graph_signature.user_inputs_to_mutate.values())
    written = tuple(
        number
        for number, name in enumerate(exported.graph_signature.user_inputs)
        if isinstance(name, str) and name in mutated
    )
    lifted._guards_fn = Guards(found.forward, names, like, written)


def _share_memory(one: Any, other: Any) -> bool:
    """Whether two arguments are tensors with values in the same storage."""
    return storage_of(one) == storage_of(other) and bool(one.numel() and other.numel())


def _asserted(graph: fx.Graph) -> set[fx.Node]:
    """The inputs whose dtype the program asserts, by itself or of what has it from there: where the model
    casts, an exporter has settled from which dtype.
    """
    found = set()
    for check in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        source = check.args[0] if _speaks_of_dtype(check) else None
        while isinstance(source, fx.Node):
            found.add(source)
            source = source.all_input_nodes[0] if _keeps_dtype(source) else None
    return found


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether a node is made of one other alone, whose dtype it has whatever that is."""
    rule = lookup(node.target)
    if rule is None or len(node.all_input_nodes) != 1 or str(node.target) in CASTS:
        return False
    given, made = (one.meta.get("val") for one in (node.all_input_nodes[0], node))
    unary = rule.moves is not None or torch.Tag.pointwise in getattr(node.target, "tags", ())
    return (
        unary
        and isinstance(given, Tensor)
        and isinstance(made, Tensor)
        and given.dtype == made.dtype
        and not _speaks_of_dtype(node)
    )


def _speaks_of_dtype(node: fx.Node) -> bool:
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))


def _kind(dtype: torch.dtype) -> str:
    """What a dtype stands for: truth, numbers that count, or real or complex numbers of some precision."""
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"
