"""What a module's attributes must be for the shapes that its tensors have, found by building its class anew
at other sizes.

The arguments of a constructor are mostly kept as attributes of their names. Where the class, built of these
on the meta device, gives the tensors that the module had, other values show which of them stand for what has
become smaller: a square matrix does not tell its two sizes apart, its class does.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .._compat import pytree
from ._sizes import Cut, Size, sizes

#: how many combinations of values are tried for one module
_TRIED = 256
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

Shapes = Mapping[str, tuple[int, ...]]


class Rebuilder:
    """Builds classes at other sizes, each only once; what was found for one module serves all that are like
    it.
    """

    def __init__(self) -> None:
        self._found: dict[Any, list[dict[tuple[str, int | None], int]]] = {}

    def fitting(
        self, module: nn.Module, path: str, before: Shapes, after: Shapes, cuts: Sequence[Cut]
    ) -> list[dict[Size, int]]:
        """The ways in which a module's sizes can be set so that its class makes tensors of the shapes
        ``after``, those that change least first.

        Args:
            module: one that holds tensors itself.
            path: where it is.
            before, after: the shapes of its own tensors.
            cuts: the dimensions in which they differ.

        Returns:
            For each way, the attributes that differ and their values; nothing if the class cannot be built of
            the attributes.
        """
        recipe = _recipe(module)
        if recipe is None:
            return []
        build, given = recipe
        kind = nn.utils.parametrize.type_before_parametrizations(module)
        key = (
            kind,
            repr(sorted(given.items(), key=repr)),
            repr(sorted(before.items())),
            repr(sorted(after.items())),
        )
        if key not in self._found:
            self._found[key] = list(_fitting(build, kind, given, before, after, cuts))
        return [
            {Size(path, name, position): value for (name, position), value in found.items()}
            for found in self._found[key]
        ]


def _recipe(module: nn.Module) -> tuple[Any, dict[str, Any]] | None:
    """The constructor that names all its arguments, and these as the module's attributes have them; ``None``
    if one is not known.
    """
    for base in type(module).__mro__:
        if base is nn.Module:
            return None
        if "__init__" not in vars(base):
            continue
        build = vars(base)["__init__"]
        parameters = list(inspect.signature(build).parameters.values())[1:]
        if not any(parameter.kind in _VARIADIC for parameter in parameters):
            break
    given = {}
    for parameter in parameters:
        if not hasattr(module, parameter.name):
            if parameter.default is inspect.Parameter.empty:
                return None
            continue
        value = getattr(module, parameter.name)
        if isinstance(value, torch.Tensor):
            value = True  # whether there is one
        elif value is None and isinstance(parameter.default, bool):
            value = False
        if any(isinstance(leaf, (nn.Module, torch.Tensor)) for leaf in pytree.tree_leaves(value)):
            return None  # a constructor may write into what it is given
        given[parameter.name] = value
    return build, given


def _fitting(
    build: Any,
    kind: type[nn.Module],
    given: dict[str, Any],
    before: Shapes,
    after: Shapes,
    cuts: Sequence[Cut],
) -> Iterator[Any]:
    original = _built(build, kind, given)
    if original is None or _shapes(original) != before:
        return
    options = {name: _options(value, cuts) for name, value in given.items()}
    options = {name: values for name, values in options.items() if len(values) > 1}
    combinations = itertools.islice(
        itertools.product(*(range(len(values)) for values in options.values())), 16 * _TRIED
    )
    seen = []
    for chosen in sorted(combinations, key=lambda indices: sum(map(bool, indices)))[:_TRIED]:
        made = _built(
            build, kind, {**given, **{name: options[name][index] for name, index in zip(options, chosen)}}
        )
        if made is None or _shapes(made) != after:
            continue
        was = sizes(original, "")
        found = {
            (size.name, size.position): value
            for size, value in sizes(made, "").items()
            if size in was and was[size] != value
        }
        if found not in seen:
            seen.append(found)
            yield found


def _options(value: Any, cuts: Sequence[Cut]) -> list[Any]:
    """A value, and what it may be now."""
    if type(value) is int and value > 0:
        return list(dict.fromkeys([value, *(new for cut in cuts if (new := cut.scale(value)) is not None)]))
    if isinstance(value, (tuple, list)) and value and all(type(item) is int for item in value):
        return list(
            dict.fromkeys(
                itertools.islice(itertools.product(*(_options(item, cuts) for item in value)), _TRIED)
            )
        )
    return [value]


def _built(build: Any, kind: type[nn.Module], given: dict[str, Any]) -> nn.Module | None:
    module = kind.__new__(kind)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            build(module, **copy.deepcopy(given))
        except Exception:  # a class raises what it likes about sizes that do not fit together
            return None
    return module


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    own = {**module._parameters, **module._buffers}
    return {name: tuple(tensor.shape) for name, tensor in own.items() if tensor is not None}


__all__ = ["Rebuilder"]
