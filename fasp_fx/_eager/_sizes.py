"""The attributes of a module that are sizes: which there are, and to read and write them."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: longer tuples and lists hold no sizes
_LONGEST = 16
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


def sizes(module: nn.Module, path: str) -> dict[Size, int]:
    """The integers among the attributes of one module, itself reached by ``path``, that may be sizes."""
    return _integers(vars(module), path, "", _COMMON)


def inner_sizes(module: nn.Module, path: str, shared: Set[int]) -> dict[Size, int]:
    """The integers in the plain objects that a module has as attributes, such as a configuration, that may be
    sizes; their names are dotted.

    Args:
        shared: the ids of objects that must not be changed.
    """
    found: dict[Size, int] = {}
    for name, value in vars(module).items():
        if name not in _COMMON and id(value) not in shared and _is_record(value):
            found |= _integers(_fields(value), path, f"{name}.", frozenset())
    return found


def records(module: nn.Module) -> Iterator[object]:
    """The plain objects that submodules have as attributes."""
    for inner in module.modules():
        yield from (value for name, value in vars(inner).items() if name not in _COMMON and _is_record(value))


def _integers(held: Mapping[str, object], path: str, start: str, without: Set[str]) -> dict[Size, int]:
    found = {}
    for name, value in held.items():
        if not isinstance(name, str) or name in without or "." in name:
            continue
        if type(value) is int and value > 0:
            found[Size(path, start + name)] = value
        elif (
            isinstance(value, (tuple, list))
            and type(value) in (tuple, list, torch.Size)
            and len(value) <= _LONGEST
        ):
            found.update(
                {
                    Size(path, start + name, at): item
                    for at, item in enumerate(value)
                    if type(item) is int and item > 0
                }
            )
    return found


def _is_record(value: object) -> bool:
    """Whether a value is a dictionary, or an object of a class that somebody has written to hold data."""
    if isinstance(value, dict):
        return True
    return (
        hasattr(value, "__dict__")
        and not callable(value)
        and not isinstance(value, (torch.Tensor, enum.Enum))
        and not _is_torchs(value)
    )


def _is_torchs(value: object) -> bool:
    return type(value).__module__.partition(".")[0] in ("torch", "builtins")


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
            old = held[name]
            items = list(old)
            items[size.position] = value
            held[name] = type(old)(items)


class Cuts:
    """Which dimensions of which tensors have become smaller, and the submodules that hold them.

    Args:
        module: the copy.
        dense, now: the shapes of its tensors, as they were and as they are.
        computed: the names of those that it computes from others.

    Attributes:
        own: for each submodule that holds a cut tensor itself, the cut dimensions.
    """

    def __init__(
        self,
        module: nn.Module,
        dense: Mapping[str, tuple[int, ...]],
        now: Mapping[str, tuple[int, ...]],
        computed: Iterable[str] = (),
    ) -> None:
        self.dense, self.now, self.computed = dense, now, tuple(computed)
        self.own: dict[str, list[Cut]] = {}
        for name, before in dense.items():
            after = now.get(name)
            if after is not None and after != before and len(after) == len(before):
                path = name.rpartition(".")[0]
                self.own.setdefault(path, []).extend(
                    Cut(name, dim, a, b)
                    for dim, (a, b) in enumerate(zip(before, after, strict=True))
                    if a != b
                )
        self.modules = dict(module.named_modules())

    def tensors(
        self, path: str, inner: nn.Module
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """The shapes of a module's own parameters and buffers by their names there, as they were and as they
        are; what it computes from others counts.
        """
        own = [
            name
            for name, tensor in [*inner._parameters.items(), *inner._buffers.items()]
            if tensor is not None
        ]
        start = f"{path}." if path else ""
        own += [name.removeprefix(start) for name in self.computed if name.rpartition(".")[0] == path]
        before, after = ({name: shapes[start + name] for name in own} for shapes in (self.dense, self.now))
        return before, after

    def within(self, path: str) -> list[Cut]:
        """The cut dimensions of all tensors at or below a submodule."""
        return [cut for owner, cuts in self.own.items() if is_within(owner, path) for cut in cuts]

    def whole(self, path: str) -> set[int]:
        """The dimensions that have stayed what they were, of all tensors at or below a submodule."""
        return {
            a
            for name, before in self.dense.items()
            if is_within(name.rpartition(".")[0], path)
            for a, b in zip(before, self.now.get(name, ()))
            if a == b
        }

    def enclosing(self) -> Iterator[str]:
        """The submodules at or below which something was cut, inner ones first."""
        paths = {outer for owner in self.own for outer in outward(owner)}
        yield from sorted(paths & self.modules.keys(), key=lambda path: (-len(_steps(path)), path))


@dataclass(frozen=True)
class Cut:
    """One dimension of one tensor, which was ``before`` long and is ``after`` now."""

    name: str
    dim: int
    before: int
    after: int

    def scale(self, value: int) -> int | None:
        """What becomes of a number that goes with this dimension in proportion, if that is a whole one."""
        new, rest = divmod(value * self.after, self.before)
        return None if rest or not new else new


def outward(path: str) -> Iterator[str]:
    """A submodule, the one that holds it, and so on to the whole module."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def is_within(path: str, outer: str) -> bool:
    """Whether a path is that of a submodule or of one inside it."""
    return not outer or path == outer or path.startswith(f"{outer}.")


def _steps(path: str) -> list[str]:
    return path.split(".") if path else []


__all__ = [
    "Assignment",
    "Cut",
    "Cuts",
    "Size",
    "inner_sizes",
    "is_within",
    "outward",
    "records",
    "sizes",
    "write",
]
