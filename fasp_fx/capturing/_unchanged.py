"""Run or trace a model without leaving a trace in it."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasp_fx.base import (
    RECURRENT_LISTS,
    attributes_read,
    built_alike,
    drawing_alike,
    forward_pre_hooks,
    pytree,
    written_by_hook,
)

from ._signature import PLAIN

#: kinds of attributes that can be changed without being set
_CONTAINERS = (list, dict, set, OrderedDict)


def of_torch(hook: Any) -> bool:
    """Whether a hook computes a weight from others (``torch.nn.utils.weight_norm`` and its like), which a
    capture sees.
    """
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")


def _set_by_torch(module: nn.Module) -> set[str]:
    """Attributes that torch itself sets in forward: those of its own hooks, which compute a weight, and the
    lists in which recurrent modules keep their parameters, made anew where an exporter has put stand-ins.
    """
    return set().union(
        RECURRENT_LISTS if isinstance(module, nn.RNNBase) else (),
        *map(written_by_hook, filter(of_torch, forward_pre_hooks(module).values())),
    )


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[list[str]]:
    """Put the attributes of a model and its submodules back as they were, with what is in their lists, dicts
    and sets (buffers and hooks among them), and the values of tensors that are plain attributes.

    Afterwards, what is yielded names the attributes that had changed.
    """
    saved, plain = [], []
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # cannot be captured, and keeps its attributes elsewhere
        attributes = dict(vars(module))
        contents = {
            name: copy.copy(value) for name, value in attributes.items() if type(value) in _CONTAINERS
        }
        plain += [value for name, value in attributes.items() if not name.startswith("_")]
        saved.append((path, module, attributes, contents))
    changed: list[str] = []
    try:
        with _values_kept(pytree.tree_leaves(plain)):
            yield changed
    finally:
        for path, module, attributes, contents in saved:
            now, before = vars(module), {**attributes, **contents}
            names = {**attributes, **now}.keys() - vars(nn.Module()).keys() - _set_by_torch(module)
            same = {
                name
                for name in names & now.keys() & attributes.keys()
                if now[name] is before[name] or built_alike(now[name], before[name], _is_same)
            }
            changed += [f"{path}.{name}" if path else name for name in sorted(names - same)]
            now.clear()
            now.update(attributes)
            for name, content in contents.items():
                value = attributes[name]
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(content)


def _is_same(value: Any, before: Any) -> bool:
    """Whether a part of an attribute is what it was; exporters put back tuples, lists and dicts as equal
    copies.
    """
    return value is before or (
        type(value) is type(before) and isinstance(value, (set, *PLAIN)) and value == before
    )


@contextlib.contextmanager
def rewound(model: nn.Module, written: Iterable[str] = (), seed: int = 0) -> Iterator[list[str]]:
    """As :func:`unchanged`, and put back the values of buffers and the state of the random numbers, which
    start from ``seed`` inside, and those of embeddings that are scaled as they are looked up (``max_norm``).

    Args:
        model: the module that runs inside.
        written: the names of other parameters that its forward writes into.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    scaled = [
        module.weight
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    ]
    into = [*model.buffers(), *scaled, *(parameters[name] for name in written if name in parameters)]
    weights = (*model.parameters(), *model.buffers())
    with _values_kept(into), unchanged(model) as changed, drawing_alike(weights, seed):
        yield changed


#: what a model is called with, by position and by name
Call = tuple[Any, dict[str, Any]]
#: what a model gives, leaf by leaf, and the names of the attributes that it sets
Seen = tuple[list[Any], list[str]]


def called(
    model: nn.Module,
    call: Call,
    written: Iterable[str] = (),
    calls: int = 1,
    lie: Callable[[Tensor], Tensor] = torch.clone,
    seed: int = 0,
) -> Seen:
    """What the last of some calls of a model gives, and what they set. The model and the arguments stay as
    they are; what the model compiles for itself (flex attention, say) runs uncompiled.

    Args:
        written, seed: as for :func:`rewound`.
        lie: as for :func:`copied`.
    """
    with (
        torch.no_grad(),
        rewound(model, written, seed) as changed,
        torch.compiler.set_stance("force_eager"),
    ):
        for _ in range(calls):
            own_args, own_kwargs = copied(call, lie)
            outputs = copied(pytree.tree_leaves(model(*own_args, **own_kwargs)))
    return outputs, changed


def copied(value: Any, lie: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    """Arguments that a call may write into, or outputs that can be buffers, as they are now. What is one
    tensor stays one.

    Args:
        lie: copies a tensor, perhaps into another layout.
    """
    copies: dict[int, Tensor] = {}

    def copy_of(leaf: Tensor) -> Tensor:
        if id(leaf) not in copies:
            copies[id(leaf)] = lie(leaf.detach())
        return copies[id(leaf)]

    return pytree.tree_map_only(Tensor, copy_of, value)


@contextmanager
def _values_kept(values: Iterable[Any]) -> Iterator[None]:
    """Put back what tensors hold; those without values, and those of other layouts, are left as they are."""
    before = [
        (value, value.detach().clone())
        for value in values
        if isinstance(value, Tensor) and value.layout == torch.strided
        if not value.is_quantized and value.device.type != "meta"
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, content in before:
                if not torch.equal(tensor, content):
                    tensor.copy_(content)


# --- Find out whether a copy reads the module that it was copied from.
#
# What Python copies along with a module are its attributes. A function that it keeps (a lambda, a hook, a
# nested function) is not copied, and goes on to hold whatever it was written around: often the module
# itself.


@contextmanager
def noting_reads(model: nn.Module, copy: nn.Module) -> Iterator[list[str]]:
    """Note every attribute of a model's modules that is read meanwhile, but of those that the copy has as
    well: a class may copy itself so.
    """
    copied_as_well = {id(inner) for inner in copy.modules()}
    attributes, noted = dict[tuple[int, str], str](), list[str]()
    for path, inner in model.named_modules():
        if id(inner) not in copied_as_well:
            names = (set(dir(inner)) - set(dir(type(inner)))) | vars(inner).keys()
            for name in names - dict(inner.named_children()).keys():
                attributes[id(inner), name] = f"{path}.{name}" if path else name

    def note(module: nn.Module, name: str) -> None:
        if not name.startswith("_") and (id(module), name) in attributes:
            noted.append(attributes[id(module), name])

    with attributes_read(note):
        yield noted


def said_of_reads(model: nn.Module, read: list[str]) -> str:
    """What is wrong with a copy that reads these attributes of a model, in words."""
    return (
        f"a copy of {type(model).__name__} goes on to read '{read[0]}' of the given model: a function that it"
        " keeps (a lambda, a hook) holds on to the model itself; make it a method"
    )
