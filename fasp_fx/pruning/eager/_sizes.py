"""The attributes of modules that are sizes: what torch's own classes call those of their weights, and which
integers of other classes arrive as sizes in a graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fasp_fx.analysis import PruningPlan
from fasp_fx.base import annotated_nodes, annotating, pytree

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS += (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)  # type: ignore[assignment]


def _length(tensor: Tensor | None, dim: int = 0) -> int | None:
    return None if tensor is None else tensor.shape[dim]


#: what torch's classes say of their weights in attributes, of which forward need not read any
_SAID: tuple[tuple[Any, dict[str, Callable[[Any], Any]]], ...] = (
    (nn.Linear, {"out_features": lambda m: _length(m.weight), "in_features": lambda m: _length(m.weight, 1)}),
    (
        nn.Bilinear,
        {
            "out_features": lambda m: _length(m.weight),
            "in1_features": lambda m: _length(m.weight, 1),
            "in2_features": lambda m: _length(m.weight, 2),
        },
    ),
    (
        _CONVOLUTIONS,
        {
            "out_channels": lambda m: _length(m.weight),
            "in_channels": lambda m: m.groups * m.weight.shape[1],
        },
    ),
    (
        _TRANSPOSED,
        {
            "out_channels": lambda m: m.groups * m.weight.shape[1],
            "in_channels": lambda m: _length(m.weight),
        },
    ),
    (_NORMS, {"num_features": lambda m: _length(m.running_mean if m.weight is None else m.weight)}),
    (nn.GroupNorm, {"num_channels": lambda m: _length(m.weight)}),
    (
        (nn.LayerNorm, nn.RMSNorm),
        {"normalized_shape": lambda m: m.weight if m.weight is None else tuple(m.weight.shape)},
    ),
    (nn.PReLU, {"num_parameters": lambda m: _length(m.weight)}),
    (
        (nn.Embedding, nn.EmbeddingBag),
        {"num_embeddings": lambda m: _length(m.weight), "embedding_dim": lambda m: _length(m.weight, 1)},
    ),
    (
        nn.RNNBase,
        {
            "input_size": lambda m: _length(m.weight_ih_l0, 1),
            "hidden_size": lambda m: len(m.weight_ih_l0) // 4 if m.proj_size else _length(m.weight_hh_l0, 1),
            "proj_size": lambda m: _length(m.weight_hr_l0) if m.proj_size else 0,
        },
    ),
    (
        nn.RNNCellBase,
        {"input_size": lambda m: _length(m.weight_ih, 1), "hidden_size": lambda m: _length(m.weight_hh, 1)},
    ),
)


def say_sizes(model: nn.Module, copy: nn.Module) -> None:
    """Have the modules of torch's classes in a copy say the sizes of the weights that they have now, where
    those of the model do so.
    """
    for path, inner in model.named_modules():
        its = copy.get_submodule(path)
        for kind, attributes in _SAID:
            for name, of in attributes.items() if isinstance(inner, kind) else ():
                if getattr(inner, name) == of(inner) is not None:
                    setattr(its, name, of(its))


#: key of ``node.meta["custom"]``: the integers among the arguments of the call that a node was recorded in,
#: where one of them is tagged
_ARRIVED = "fasp_fx_arrived"


class Tagged(int):
    """An integer attribute that says which it is. What Python computes of it is a plain integer.

    Attributes:
        place: the path of the module, and the name of the attribute.
    """

    place: tuple[str, str]


def _plainly(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A method that computes with plain integers, since symbolic ones take no others."""
    return lambda integer, other: compute(int(integer), int(other) if isinstance(other, Tagged) else other)


_ARITHMETIC = "add sub mul floordiv mod truediv pow lshift rshift and or xor"
for _name in (*_ARITHMETIC.split(), "eq", "ne", "lt", "le", "gt", "ge"):
    _compute = getattr(operator, f"__{_name}__")
    setattr(Tagged, f"__{_name}__", _plainly(_compute))
    setattr(Tagged, f"__r{_name}__", _plainly(lambda own, other, _compute=_compute: _compute(other, own)))
Tagged.__hash__ = int.__hash__  # type: ignore[method-assign]  # which a class that compares has to say


class Arrivals(TorchFunctionMode):
    """Has nodes say which integers have arrived at the functions of torch that they are of."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = args, kwargs or {}
        arrived = [leaf for leaf in pytree.tree_leaves(call) if type(leaf) in (int, Tagged)]
        if not any(isinstance(integer, Tagged) for integer in arrived):
            return func(*args, **call[1])
        args, kwargs = pytree.tree_map_only(Tagged, int, call)
        with annotating({_ARRIVED: arrived}):
            return func(*args, **kwargs)


@contextmanager
def tagged(model: nn.Module) -> Iterator[None]:
    """Inside, the positive integers among the attributes of a model's modules are tagged; the caller puts
    them back.
    """
    for path, inner in model.named_modules():
        for name, value in list(vars(inner).items()):
            if type(value) is int and value > 0:
                integer = Tagged(value)
                integer.place = path, name
                setattr(inner, name, integer)
    with Arrivals(), annotated_nodes():
        yield


#: attributes by the path of their module and their name
Sizes = dict[tuple[str, str], int]


def observed(dense: fx.Graph, pruned: fx.Graph) -> tuple[Sizes, Sizes]:
    """What the tagged attributes of a model have to be for its graph to become the pruned one: what stands
    there in the places where they arrive; and those that arrive at nodes which the pruned graph has in parts.
    """
    after = {node.name: _integers(node) for node in pruned.nodes}
    seen, parted = Sizes(), Sizes()
    for node in dense.nodes:
        integers, its = _integers(node), after.get(node.name, [])
        for integer in node.meta.get("custom", {}).get(_ARRIVED, ()):
            if integer in integers:
                at = integers.index(integer)
                integers[at] = None  # the next one of this value stands elsewhere
                value = its[at] if len(its) == len(integers) else None
                target = parted if value is None else seen
                # One that is as it was may be any number of a call that was taken apart.
                if isinstance(integer, Tagged) and (value != integer or integer.place not in target):
                    target[integer.place] = value or int(integer)
    return seen, parted


def left_of(value: int, path: str, model: nn.Module, copy: nn.Module, plan: PruningPlan) -> int:
    """What is left of a size of a module: of as many rows or columns of a weight, or of as many channel sets
    of a group or of a block of one.
    """
    weights = zip(model.get_submodule(path).parameters(), copy.get_submodule(path).parameters(), strict=True)
    for dense, smaller in weights:
        for before, after in zip(dense.shape, smaller.shape, strict=True):
            if before == value != after:
                return after
    for group in plan.groups:
        members = [part for part in group.producers if not path or part.name.startswith(f"{path}.")]
        for blocks in (1, group.blocks):
            if members and value * blocks == group.size:
                return value - group.removed_sets // blocks
    return value


def _integers(node: fx.Node) -> list[int | None]:
    """The integers among the arguments of a node; ``None`` in the places of others."""
    return [leaf if type(leaf) is int else None for leaf in pytree.tree_leaves((node.args, node.kwargs))]
