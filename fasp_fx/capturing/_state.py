"""Which inputs and outputs of a program hold state, and may become narrower."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx
from torch.export import ExportedProgram

from ..base.compat import pytree
from ..errors import ArgumentError
from ._transformers import is_cache


def _leaves_in_state(spec: pytree.TreeSpec, state: tuple[str, ...], inside: bool = False) -> Iterator[bool]:
    if spec.is_leaf():
        yield inside
        return
    for index, name in enumerate(_names(spec)):
        yield from _leaves_in_state(
            spec.child(index), state, inside or is_cache(spec.type) or (name is not None and name in state)
        )


def _names(spec: pytree.TreeSpec) -> list[str | None]:
    """What the children of a structure are called, where they have names."""
    if not isinstance(spec.context, (list, tuple)) or len(spec.context) != spec.num_children:
        return [None] * spec.num_children
    return [name if isinstance(name, str) else None for name in spec.context]


def _all_names(spec: pytree.TreeSpec) -> Iterator[str]:
    if not spec.is_leaf():
        yield from (name for name in _names(spec) if name is not None)
        for child in spec.children():
            yield from _all_names(child)


def state_positions(
    module: fx.GraphModule,
    exported: ExportedProgram,
    arguments: list[str],
    state: tuple[str, ...],
) -> tuple[frozenset[str], frozenset[int]]:
    """The names of the inputs and the numbers of the outputs that hold state: caches, and what goes by one of
    the names in ``state``.

    Args:
        arguments: names of the arguments in the order of ``forward``, those given by position first.

    Raises:
        ArgumentError: nothing goes by one of the names.
    """
    given, returned = exported.call_spec.in_spec, exported.call_spec.out_spec
    named = dict(zip(arguments, given.child(0).children(), strict=False))
    known = {*named, *_all_names(given), *_all_names(returned)}
    if unknown := [name for name in state if name not in known]:
        raise ArgumentError(
            f"state: no argument or output is called {unknown[0]!r}; there are"
            f" {', '.join(map(repr, sorted(known))) or 'none with a name'}"
        )
    inputs = [
        *(held for name, spec in named.items() for held in _leaves_in_state(spec, state, name in state)),
        *_leaves_in_state(given.child(1), state),
    ]
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    outputs = list(_leaves_in_state(returned, state))
    return (
        frozenset(name for name, held in zip(names, inputs, strict=True) if held),
        frozenset(index for index, held in enumerate(outputs) if held),
    )
