"""The checks of input sizes that an exported program carries, failing with a typed error that says what may
be given.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..base.compat import pytree
from ..errors import CallError

_FAILED = "Guard failed: "
#: what torch says of one size alone, such as ``x.size()[1] == 8``
_ONE_SIZE = re.compile(r"(?P<name>.+)\.size\(\)\[(?P<dim>\d+)\] (?P<relation>==|>=|<=) (?P<bound>\d+)")
_BOUNDS = {"==": "for {}", ">=": "for at least {}", "<=": "for at most {}"}


class Like(NamedTuple):
    """What is fixed of a tensor in every call: how many dimensions it has, and what its dtype stands for."""

    rank: int
    dtype: torch.dtype


class Guards(nn.Module):
    """Stands where torch puts the module of its guards, which it wraps.

    A compiler or exporter that looks through a call sees the guards as torch wrote them and takes them over.
    A call that is merely executed gets :class:`CallError` in the place of their ``AssertionError``.

    Args:
        check: the function of torch's guards; takes the graph's inputs in order.
        names: what the caller calls each of those inputs, such as ``x`` or ``rest['left']``.
        like: what is fixed of each, ``None`` for what is no tensor.
    """

    _is_impure = True  # nothing uses its result: passes that remove dead code must leave it

    def __init__(
        self, check: Callable[..., Any], names: tuple[str, ...], like: tuple[Like | None, ...]
    ) -> None:
        super().__init__()
        self.check, self.names, self.like = check, names, like

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
            if _kind(value.dtype) != _kind(like.dtype):
                raise CallError(
                    f"argument '{name}' is a tensor of {value.dtype}, but the program was captured for"
                    f" {like.dtype}, and a model may do something else with each; pass {like.dtype}, or"
                    " capture it with what you need"
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
    recorded = [node.meta.get("val") for node in lifted.graph.find_nodes(op="placeholder")]
    like = tuple(Like(value.dim(), value.dtype) if isinstance(value, Tensor) else None for value in recorded)
    lifted._guards_fn = Guards(found.forward, names, like)


def _kind(dtype: torch.dtype) -> str:
    """What a dtype stands for: truth, numbers that count, or real or complex numbers of some precision."""
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"
