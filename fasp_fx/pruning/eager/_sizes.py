"""The attributes of a module that are sizes: which there are, to write them, and what torch's own classes
call the sizes of their weights.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: longer tuples and lists hold no sizes, and others are no plain ones
_LONGEST, _SEQUENCES = 16, (tuple, list, torch.Size)
#: what every module has
_COMMON = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Size:
    """Where an integer stands: in an attribute of a submodule (of a plain object there, if ``name`` has a
    dot), at which position if that is a sequence.
    """

    path: str
    name: str
    position: int | None = None

    def __str__(self) -> str:
        at = "" if self.position is None else f"[{self.position}]"
        return f"{self.path}.{self.name}{at}" if self.path else f"{self.name}{at}"


Assignment = Mapping[Size, int]


def sizes(module: nn.Module, path: str, shared: Set[int]) -> dict[Size, int]:
    """The positive integers among the attributes of one module, and in the plain objects among these, such as
    a configuration, whose names are dotted.

    Args:
        path: where the module is.
        shared: the ids of objects that must not be changed.
    """
    own = {name: value for name, value in vars(module).items() if name not in _COMMON}
    found = dict(_integers(own, path, ""))
    for name, value in own.items():
        if id(value) not in shared and _is_record(value):
            found |= dict(_integers(_fields(value), path, f"{name}."))
    return found


def _integers(held: Mapping[str, object], path: str, start: str) -> Iterator[tuple[Size, int]]:
    for name, value in held.items():
        if not isinstance(name, str) or "." in name:
            continue
        items: Any = [(None, value)]
        if isinstance(value, (tuple, list)) and type(value) in _SEQUENCES and len(value) <= _LONGEST:
            items = enumerate(value)
        for at, item in items:
            if type(item) is int and item > 0:
                yield Size(path, start + name, at), item


def _is_record(value: object) -> bool:
    """Whether a value is a dictionary, or an object of a class that somebody has written to hold data."""
    return isinstance(value, dict) or (
        hasattr(value, "__dict__")
        and not callable(value)
        and not isinstance(value, (torch.Tensor, enum.Enum))
        and type(value).__module__.partition(".")[0] not in ("torch", "builtins")
    )


def _fields(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else vars(value)


def write(module: nn.Module, assignment: Assignment) -> None:
    """Set attributes of the submodules of a module; tuples and lists are made anew."""
    for size, value in assignment.items():
        held: dict[str, Any] = module.get_submodule(size.path).__dict__
        *outer, name = size.name.split(".")
        for step in outer:
            held = _fields(held[step])
        if size.position is None:
            held[name] = value
        else:
            items = list(held[name])
            items[size.position] = value
            # torch.Size takes integers of no other class
            held[name] = items if type(held[name]) is list else tuple(items)


def is_within(path: str, outer: str) -> bool:
    """Whether a path is that of a submodule or of one inside it."""
    return not outer or path == outer or path.startswith(f"{outer}.")


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


def write_said(model: nn.Module, copy: nn.Module) -> None:
    """Have the modules of torch's classes in a copy say the sizes of the weights that they have now, where
    those of the model do so.
    """
    for path, inner in model.named_modules():
        for kind, said in _SAID:
            for name, of in said.items() if isinstance(inner, kind) else ():
                if getattr(inner, name) == of(inner) is not None:
                    setattr(copy.get_submodule(path), name, of(copy.get_submodule(path)))


__all__ = ["Assignment", "Size", "is_within", "sizes", "write", "write_said"]
