"""Which fields of a config say which sizes, found by building the model's class at other sizes."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from fasp_fx.analysis import Group
from fasp_fx.base import quiet_transformers, tolerable
from fasp_fx.errors import ArgumentError, first_line

#: where a value stands in a config: keys of nested configs, positions of lists
Place = tuple[str | int, ...]
#: values to put in places of a config
Assignment = Mapping[Place, Any]
Shapes = Mapping[str, tuple[int, ...]]
#: by how much dimensions of parameters and buffers shrink
Losses = dict[tuple[str, int], int]


def written(path: Place) -> str:
    """A place as text: ``text_config.intermediate_size[3]``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


class Experiments:
    """Builds a model's class from changed configs on the meta device and compares shapes.

    Buffers count: half as many heads and heads of half the size have the same weights, but not the same table
    of positions. Every config goes through its own text form on the way, as it will when it is loaded from a
    file.

    Args:
        kind: the class.
        config: what the class makes a dense model of.

    Attributes:
        dense: the config.
        base: it as a dictionary.
        values: what stands at each place of it.
        shapes: of the parameters and buffers that the class makes of the config, under all their names.
        layers: what the names begin with in each of the layers that the config counts.

    Raises:
        ArgumentError: the class cannot be built from the config.
    """

    def __init__(self, kind: Any, config: PreTrainedConfig) -> None:
        self.kind, self.dense = kind, config
        self.base: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        if self.base.get("num_attention_heads") and self.base.get("hidden_size"):
            # Left out, it is computed of the number of heads, which then cannot be lowered alone.
            self.base.setdefault("head_dim", self.base["hidden_size"] // self.base["num_attention_heads"])
        self.layers: tuple[str, ...] = ()
        self.values = dict(leaves(self.base))
        self._found: dict[str, Shapes | str] = {}
        shapes = self.build({})
        if isinstance(shapes, str):
            raise ArgumentError(
                f"{self.kind.__name__} cannot be built from its own config: {shapes}; this format needs that"
            )
        self.shapes = shapes

    @property
    def name(self) -> str:
        """The name of the config's class."""
        return type(self.dense).__name__

    def config(self, values: Assignment) -> PreTrainedConfig:
        """The config with other values in some places, as it will come back from a file."""
        data = copy.deepcopy(self.base)
        for path, value in values.items():
            place: Any = data
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = value
        kind = type(self.dense)
        return kind.from_dict(json.loads(kind.from_dict(data).to_json_string()))

    def build(self, assignment: Assignment) -> Shapes | str:
        """The shapes that the class gives its parameters and buffers, or why it cannot be built."""
        key = repr(sorted(assignment.items(), key=repr))
        if key not in self._found:
            with quiet_transformers(), torch.random.fork_rng(devices=[]):
                try:
                    config = self.config(assignment)
                    with torch.device("meta"):
                        model = self.kind(config)
                    named = (
                        model.named_parameters(remove_duplicate=False),
                        model.named_buffers(remove_duplicate=False),
                    )
                    self._found[key] = {name: tuple(tensor.shape) for part in named for name, tensor in part}
                    self.layers = self.layers or tuple(_layers(model, config))
                except tolerable(Exception) as error:  # a class raises what it likes about sizes
                    self._found[key] = first_line(error)
        return self._found[key]

    def losses(self, assignment: Assignment) -> Losses | None:
        """By how much each dimension of each parameter and buffer shrinks, where it does; ``None`` where
        that cannot be said.
        """
        shapes = self.build(assignment)
        return None if isinstance(shapes, str) or shapes.keys() != self.shapes.keys() else self.lost(shapes)

    def lost(self, shapes: Shapes) -> Losses | None:
        """By how much each dimension of some parameters and buffers is less than the class makes it;
        ``None`` where there are more dimensions or fewer.
        """
        pairs = {name: (self.shapes[name], shape) for name, shape in shapes.items()}
        if any(len(old) != len(new) for old, new in pairs.values()):
            return None
        return {
            (name, dim): was - now
            for name, (old, new) in pairs.items()
            for dim, (was, now) in enumerate(zip(old, new, strict=True))
            if was != now
        }


@dataclass(frozen=True)
class Field:
    """A number of a config that says sizes.

    Attributes:
        path: where it stands.
        value: what it says of the dense model.
        moves: by how much each dimension shrinks where the number is lower by one.
    """

    path: Place
    value: int
    moves: Losses

    def within(self, scope: str) -> Losses:
        """What it moves of tensors whose names begin so."""
        return {place: by for place, by in self.moves.items() if place[0].startswith(scope)}


def find_fields(experiments: Experiments, lost: Iterable[tuple[str, int]]) -> list[Field]:
    """The fields of a config that say how long some dimensions are.

    Numbers that divide such a length are lowered, by one and to half, as far as the class can be built then;
    a field that is not set stands for one of the lengths.
    """
    sizes = sorted({experiments.shapes[name][dim] for name, dim in lost})
    numbers = [
        (path, value) for path, value in experiments.values.items() if type(value) is int and value > 1
    ]
    fields = [_moved(experiments, *one) for one in numbers if any(size % one[1] == 0 for size in sizes)]
    fields += [
        _moved(experiments, path, size)
        for path in [path for path, value in experiments.values.items() if value is None]
        for size in sizes
        if experiments.losses({path: size}) == {}
    ]
    return [field for field in fields if field.moves]


def _moved(experiments: Experiments, path: Place, value: int) -> Field:
    """A field; it moves nothing where the class takes no other number, or sizes do not follow it evenly."""
    seen = [
        {place: by / steps for place, by in lost.items()}
        for steps in {1, value // 2}
        if (lost := experiments.losses({path: value - steps})) is not None
    ]
    even = bool(seen) and seen[0] == seen[-1] and all(by > 0 and by == int(by) for by in seen[0].values())
    return Field(path, value, {place: int(by) for place, by in seen[0].items()} if even else {})


def lowered(
    lost: Losses, fields: Iterable[Field], scope: str = "", *, partly: bool = False
) -> tuple[dict[Place, int], Losses]:
    """By how much fields are lower where some dimensions of tensors in a scope have shrunk.

    Args:
        lost: by how much.
        partly: whether more shrinks than is said here.

    Returns:
        That, and what of ``lost`` no field says.
    """
    steps_of: dict[Place, int] = {}
    left = dict(lost)
    for field in fields:
        moves = field.within(scope)
        places = [place for place in moves if not partly or place in left]
        by = {left.get(place, 0) / moves[place] for place in places}
        steps = by.pop() if len(by) == 1 else 0
        if steps > 0 and steps == int(steps):
            steps_of[field.path] = int(steps)
            left = {place: loss for place, loss in left.items() if place not in places}
    return steps_of, left


def units(group: Group) -> Losses:
    """By how much each dimension of each member shrinks for each channel set that every block of the group
    loses.
    """
    return {
        (member.name, member.dim): len(member.indices) // (group.width * member.blocks)
        for member in (*group.producers, *group.consumers)
    }


def arrange(groups: Sequence[Group], fields: Sequence[Field], scopes: Sequence[str]) -> list[int | None]:
    """Which groups shrink together, as fields say them.

    Args:
        groups: the groups that may be pruned; their members are named as in the experiments.
        scopes: within each of which the fields have values of their own.

    Returns:
        For each group the number of the first that shrinks as it does; ``None`` where no field can say it.
    """
    every = [units(group) for group in groups]
    places: dict[int, int] = {}
    for scope in scopes:
        inside = {
            number: lost
            for number, lost in enumerate(every)
            if all(name.startswith(scope) for name, _ in lost)
        }
        touched = {place for lost in inside.values() for place in lost}
        usable = [field for field in fields if field.within(scope).keys() <= touched]
        said: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, lost in inside.items():
            steps_of, left = lowered(lost, usable, scope, partly=True)
            if steps_of and not left:
                said[tuple(steps_of.items())].append(number)
        for steps, members in said.items():
            together = {at: by for number in members for at, by in every[number].items()}
            if lowered(together, usable, scope) == (dict(steps), {}):
                places |= dict.fromkeys(members, members[0])
    return [places.get(number) for number in range(len(groups))]


def _layers(model: nn.Module, config: Any) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", 0):
            yield from (f"{path}.{index}." for index in range(len(module)))


def leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value
