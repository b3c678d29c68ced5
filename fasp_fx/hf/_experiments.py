"""Which fields of a config shrink which coupled groups, found by building the model's class at other sizes:
nothing is known beforehand but how transformers name the numbers of heads.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..analysis.groups import Group
from ..base._tolerable import tolerable
from ..base._undisturbed import for_a_while
from ..errors import ArgumentError, first_line

#: where a value stands in a config: keys of nested configs, positions of lists
Path = tuple[str | int, ...]
#: values to put in places of a config
Assignment = Mapping[Path, Any]
Shapes = dict[str, tuple[int, ...]]
#: by how much dimensions of parameters and buffers shrink
Losses = dict[tuple[str, int], int]

#: longer lists hold no sizes of layers
_LONGEST = 512


def written(path: Path) -> str:
    """A place as text: ``text_config.intermediate_size[3]``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


class Experiments:
    """Builds a model's class from changed configs on the meta device and compares shapes.

    Buffers count: half as many heads and heads of half the size have the same weights, but not the same table
    of positions. Every config goes through its own text form on the way, as it will when it is loaded from a
    file.

    Args:
        model: the model; its config must build a model of the same shapes.

    Attributes:
        base: the config as a dictionary.
        values: what stands at each place of it.
        shapes: of the parameters and buffers that the class makes of the config, under all their names.

    Raises:
        ArgumentError: the config does not describe the model.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        self._class: Any = type(model)
        self._config: PreTrainedConfig = config
        self.base: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        self.values = dict(_leaves(self.base))
        self._found: dict[str, Shapes | str] = {}
        found = self.build({})
        if isinstance(found, str):
            raise ArgumentError(
                f"{self._class.__name__} cannot be built from its own config: {found}; a plain checkpoint"
                " needs that"
            )
        self.shapes = found
        for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
            own, built = tuple(parameter.shape), found.get(name, "has no such weight")
            if own != built:
                raise ArgumentError(
                    f"the config does not describe the model: '{name}' has the shape {own}, a model built"
                    f" from the config {built}; a plain checkpoint needs a model of its config's sizes"
                )

    @property
    def name(self) -> str:
        """The name of the config's class."""
        return type(self._config).__name__

    def heads(self) -> Iterator[tuple[dict[Path, int], dict[Path, int]]]:
        """The fields that say how many heads there are, and the size of a head, which stays: of the config
        and of each that is nested in it.
        """
        configs: dict[Path, PreTrainedConfig] = {(): self._config}
        for name, value in vars(self._config).items():
            if isinstance(value, PreTrainedConfig):
                configs[(name,)] = value
        for place, config in configs.items():
            named = ("num_attention_heads", "num_key_value_heads")
            paths = [(*place, config.attribute_map.get(name, name)) for name in named]
            counts = {path: self.values[path] for path in paths if type(self.values.get(path)) is int}
            width = getattr(config, "hidden_size", None)
            if paths[0] in counts and isinstance(width, int):
                size = getattr(config, "head_dim", None) or width // counts[paths[0]]
                yield counts, {(*place, config.attribute_map.get("head_dim", "head_dim")): size}

    def config(self, values: Assignment) -> PreTrainedConfig:
        """The config with other values in some places, as it will come back from a file."""
        made = copy.deepcopy(self.base)
        for path, value in values.items():
            held: Any = made
            for step in path[:-1]:
                held = held[step]
            held[path[-1]] = value
        first = type(self._config).from_dict(made)
        return type(self._config).from_dict(json.loads(first.to_json_string()))

    def build(self, assignment: Assignment) -> Shapes | str:
        """The shapes that the class gives its parameters and buffers, or why it cannot be built."""
        key = repr(sorted(assignment.items(), key=repr))
        if key not in self._found:
            with quiet(), torch.random.fork_rng(devices=[]):
                try:
                    config = self.config(assignment)
                    with torch.device("meta"):
                        made = self._class(config)
                    named = (
                        made.named_parameters(remove_duplicate=False),
                        made.named_buffers(remove_duplicate=False),
                    )
                    self._found[key] = {name: tuple(own.shape) for part in named for name, own in part}
                except tolerable(Exception) as error:  # a class raises what it likes about sizes
                    self._found[key] = first_line(error)
        return self._found[key]

    def losses(self, assignment: Assignment) -> Losses | None:
        """By how much each dimension of each parameter and buffer shrinks, where it does; ``None`` where
        that cannot be said.
        """
        found = self.build(assignment)
        if isinstance(found, str) or found.keys() != self.shapes.keys():
            return None
        pairs = {name: (shape, found[name]) for name, shape in self.shapes.items()}
        if any(len(old) != len(new) for old, new in pairs.values()):
            return None
        return {
            (name, dim): was - now
            for name, (old, new) in pairs.items()
            for dim, (was, now) in enumerate(zip(old, new, strict=True))
            if was != now
        }


@dataclass(frozen=True)
class Knob:
    """Fields that, lowered together in proportion, shrink some groups alike and nothing else.

    Attributes:
        fields: their places and present values, multiples of ``width``.
        fixed: fields that have to be set along.
        width: channel sets per block of each of the groups.
        groups: the names of what it shrinks.
        steps: how many channel sets each block can lose.
        is_coarse: whether what it takes are whole heads.
    """

    fields: Assignment
    fixed: Assignment
    width: int
    groups: frozenset[str]
    steps: Sequence[int]
    is_coarse: bool

    def lowered(self, steps: int) -> dict[Path, Any]:
        """The values of its fields when each block has lost so many channel sets."""
        lower = {path: was * (self.width - steps) // self.width for path, was in self.fields.items()}
        return lower | dict(self.fixed)

    def reached(self, fraction: float) -> int:
        """The most channel sets that each block can lose of a fraction of them."""
        return max((steps for steps in self.steps if steps <= fraction * self.width + 1e-9), default=0)


def find_knobs(experiments: Experiments, groups: Sequence[Group]) -> tuple[list[Knob], dict[str, str]]:
    """What the fields of a config shrink.

    Args:
        groups: the groups that may be pruned; their members are named as in ``experiments.shapes``.

    Returns:
        Knobs, no group in two of them; and for each group that none shrinks, why.
    """
    units = {group.name: _units(group) for group in groups}
    knobs: list[Knob] = []
    whole: dict[str, str] = {}
    for group in groups:
        if any(group.name in knob.groups for knob in knobs):
            continue
        found = (_knob(experiments, units, group, *fields) for fields in _candidates(experiments, group))
        knob = next((knob for knob in found if knob is not None), None)
        if knob is None:
            whole[group.name] = f"no field of {experiments.name} shrinks it and nothing else"
        else:
            knobs.append(knob)
    return knobs, whole


def _candidates(experiments: Experiments, group: Group) -> Iterator[tuple[Assignment, Assignment]]:
    """Fields that may shrink a group, and those that have to be set along: numbers that are multiples of its
    width, and fields that are not set, which then stand for it.
    """
    if group.granularity == "head":
        yield from experiments.heads()
        return
    for path, value in experiments.values.items():
        if type(value) is int and value > 0 and value % group.width == 0:
            yield {path: value}, {}
    for path, value in experiments.values.items():
        if value is None:
            yield {path: group.width}, {}


def _knob(
    experiments: Experiments,
    units: Mapping[str, Losses],
    group: Group,
    fields: Assignment,
    fixed: Assignment,
) -> Knob | None:
    """The knob of these fields, if at every step that can be built they shrink this group, others alike, and
    nothing else.
    """
    if any(value % group.width for value in fields.values()):
        return None
    coarse = group.granularity == "head"  # not every number of heads can be built
    knob = Knob(fields, fixed, group.width, frozenset(), range(1, group.width), coarse)
    shrunk: dict[int, frozenset[str]] = {}
    for steps in knob.steps if coarse else (group.width // 2, 1):
        lost = experiments.losses(knob.lowered(steps))
        if lost is not None:
            names = frozenset(name for name, own in units.items() if _lose(lost, own, steps))
            if lost != {place: unit * steps for name in names for place, unit in units[name].items()}:
                return None
            shrunk[steps] = names
    if len({*shrunk.values()}) != 1 or group.name not in names:
        return None
    return replace(knob, groups=names, steps=tuple(shrunk) if coarse else knob.steps)


def _lose(lost: Losses, units: Losses, steps: int) -> bool:
    return all(lost.get(place) == unit * steps for place, unit in units.items())


def _units(group: Group) -> Losses:
    """By how much each dimension of each member shrinks for each channel set that every block of the group
    loses.
    """
    return {
        (member.name, member.dim): len(member.indices) // (group.width * member.blocks)
        for member in (*group.producers, *group.consumers)
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from remarking on configs that are only tried, and from drawing bars."""
    with (
        for_a_while(logging.get_verbosity, logging.set_verbosity),
        for_a_while(logging.is_progress_bar_enabled, _draw_bars),
        warnings.catch_warnings(action="ignore"),
    ):
        logging.set_verbosity(logging.CRITICAL)
        _draw_bars(False)
        yield


def _draw_bars(wanted: bool) -> None:
    (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, list):
        if len(value) <= _LONGEST:
            for index, inner in enumerate(value):
                yield from _leaves(inner, (*path, index))
    else:
        yield path, value
