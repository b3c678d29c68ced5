"""What a model's class makes of its config, found by building it: nothing is known beforehand about any
field.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..base._tolerable import tolerable
from ..base._undisturbed import for_a_while
from ..errors import ArgumentError, first_line

#: where a value stands in a config: keys of nested configs, positions of lists
Path = tuple[str | int, ...]
#: values to put in places of a config
Assignment = Mapping[Path, Any]
Shapes = dict[str, tuple[int, ...]]

#: longer lists hold no sizes of layers
_LONGEST = 512
#: fields that classes ask a config for which need not have them
_ASKED = ("head_dim",)
#: values tried for a field that is not set
_PROBES = (16, 8)


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
        pins: sizes that are not set, with the values that leave every shape as it is.
        shapes: of the parameters and buffers that the class makes of the config, under all their names.

    Raises:
        ArgumentError: the config does not describe the model.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if not isinstance(config, PreTrainedConfig):
            raise ArgumentError(
                f"a plain checkpoint needs a model with a transformers config; {type(model).__name__} has"
                " none"
            )
        self._class: Any = type(model)
        self._config = config
        self.base: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        self.pins: dict[Path, int] = {}
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
        inner = [(name,) for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)]
        values = {(*place, name): None for place in ((), *inner) for name in _ASKED} | dict(
            _leaves(self.base)
        )
        sizes = {path: self._effective(path) for path, value in values.items() if value is None}
        pins = {path: size for path, size in sizes.items() if size is not None}
        if self.build(pins) == self.shapes:  # each changes nothing, but all together may
            self.pins = pins

    @property
    def name(self) -> str:
        """The name of the config's class."""
        return type(self._config).__name__

    def numbers(self) -> dict[Path, int]:
        """The integers of the config that may be sizes: positive ones, those in nested configs and lists
        included.
        """
        return {
            path: value
            for path, value in _leaves(self._changed(self.pins))
            if type(value) is int and value > 0
        }

    def _changed(self, values: Assignment) -> dict[str, Any]:
        """The config as a dictionary, with other values in some places."""
        made = copy.deepcopy(self.base)
        for path, value in values.items():
            held: Any = made
            for step in path[:-1]:
                held = held[step]
            held[path[-1]] = value
        return made

    def config(self, values: Assignment) -> PreTrainedConfig:
        """The config with other values in some places, as it will come back from a file."""
        first = type(self._config).from_dict(self._changed(values))
        return type(self._config).from_dict(json.loads(first.to_json_string()))

    def build(self, assignment: Assignment, pins: Assignment | None = None) -> Shapes | str:
        """The shapes that the class gives its parameters and buffers, or why it cannot be built.

        Args:
            pins: fields that are not set and get a value all the same; ``None``: all that can be sizes.
        """
        values = {**(self.pins if pins is None else pins), **assignment}
        key = repr(sorted(values.items(), key=repr))
        if key not in self._found:
            with quiet(), torch.random.fork_rng(devices=[]):
                try:
                    config = self.config(values)
                    with torch.device("meta"):
                        made = self._class(config)
                    self._found[key] = {name: tuple(tensor.shape) for name, tensor in named_tensors(made)}
                except tolerable(Exception) as error:  # a class raises what it likes about sizes
                    self._found[key] = first_line(error)
        return self._found[key]

    def losses(self, assignment: Assignment) -> dict[tuple[str, int], int] | str:
        """By how much each dimension of each parameter and buffer shrinks, where it does; or why that cannot
        be said.
        """
        found = self.build(assignment)
        if isinstance(found, str):
            return found
        if other := sorted(found.keys() ^ self.shapes.keys()):
            return f"the model has another set of weights, '{other[0]}' for one"
        if odd := [name for name, shape in self.shapes.items() if len(found[name]) != len(shape)]:
            return f"'{odd[0]}' has another number of dimensions"
        return {
            (name, dim): old - new
            for name, shape in self.shapes.items()
            for dim, (old, new) in enumerate(zip(shape, found[name], strict=True))
            if old != new
        }

    def without_idle_pins(self, assignment: Assignment) -> dict[str, Any]:
        """The config of an assignment as a dictionary, without the pins that change nothing."""
        wanted, pins = self.build(assignment), dict(self.pins)
        for path in self.pins:
            fewer = {other: value for other, value in pins.items() if other != path}
            if self.build(assignment, fewer) == wanted:
                pins = fewer
        return self.config({**pins, **assignment}).to_dict()

    def _effective(self, path: Path) -> int | None:
        """The value of a field that is not set, at which all shapes are as they are without it; ``None`` if
        it is no size.
        """
        found = [self.losses({path: probe}) for probe in _PROBES]
        losses = [lost for lost in found if not isinstance(lost, str)]
        if len(losses) < len(found):
            return None
        places = sorted({place for lost in losses for place in lost})
        for first, second in ([lost.get(place, 0) for lost in losses] for place in places):
            if first != second:  # the loss is linear in the field; where is it zero?
                value = round(_PROBES[0] + first * (_PROBES[0] - _PROBES[1]) / (second - first))
                return value if value > 0 and self.build({path: value}) == self.shapes else None
        return None


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of a model under all their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


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
