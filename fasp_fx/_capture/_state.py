"""Which inputs and outputs of a program hold state, and may become narrower."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from .._compat import pytree
from ._transformers import is_cache


def _leaves_in_state(spec: pytree.TreeSpec, state: tuple[str, ...], inside: bool = False) -> Iterator[bool]:
    if spec.is_leaf():
        yield inside
        return
    names = (
        spec.context
        if isinstance(spec.context, (list, tuple)) and len(spec.context) == spec.num_children
        else [None] * spec.num_children
    )
    for index, name in enumerate(names):
        yield from _leaves_in_state(
            spec.child(index),
            state,
            inside or is_cache(spec.type) or (isinstance(name, str) and name in state),
        )


def state_positions(
    module: fx.GraphModule,
    exported: ExportedProgram,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    state: tuple[str, ...],
) -> tuple[frozenset[str], frozenset[int]]:
    inputs = list(_leaves_in_state(exported.call_spec.in_spec, state))
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    outputs = list(_leaves_in_state(exported.call_spec.out_spec, state))
    return (
        frozenset(name for name, held in zip(names, inputs, strict=False) if held),
        frozenset(index for index, held in enumerate(outputs) if held),
    )
