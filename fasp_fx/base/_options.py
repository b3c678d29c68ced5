"""Options as keywords: those of a configuration replaced, unknown ones named."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from fasp_fx.errors import ArgumentError

C = TypeVar("C")


def configured(kind: type[C], config: C | None, options: Mapping[str, Any]) -> C:
    """A configuration with some options in the place of its own.

    Args:
        kind: the class of the configuration, a frozen dataclass that checks itself.
        config: ``None`` stands for the defaults.

    Raises:
        ArgumentError: an option is not known, out of range, or ``config`` is no such configuration.
    """
    if config is not None and not isinstance(config, kind):
        raise ArgumentError(
            f"config is a {type(config).__name__}; pass a {kind.__name__}, or the options as keywords"
        )
    before: Any = config if config is not None else kind()
    known = [field.name for field in fields(before)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            guess = f"did you mean '{near[0]}'? There" if near else "there"
            raise ArgumentError(f"the option '{name}' is not known; {guess} are {', '.join(known)}")
    return replace(before, **options)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold, and no truth value."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and abs(value) <= sys.float_info.max


def check_callable(**arguments: object) -> None:
    """Refuse arguments that are to be called and cannot be.

    Raises:
        ArgumentError: names one.
    """
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise ArgumentError(f"{name} is a {type(value).__name__}; pass a function, or leave it out")


def path_of(path: object, name: str) -> Path:
    """A path that an argument gives.

    Raises:
        ArgumentError: it gives none; names the argument.
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"{name} is a {type(path).__name__}; pass a path")
    return Path(path)


def names_of(option: str, value: Any, known: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names that an option was given, as a tuple.

    Args:
        known: those there are; ``None``: patterns are asked for.

    Raises:
        ArgumentError: it was given something else.
    """
    try:
        names = None if isinstance(value, str) else tuple(value)
    except TypeError:  # a number, or a tensor of one
        names = None
    if names is None or not all(isinstance(name, str) and (known is None or name in known) for name in names):
        wanted = (
            f"a tuple of {', '.join(map(repr, known))}"
            if known
            else "a tuple of name patterns, such as ('lm_head', 'layers.0.*')"
        )
        raise ArgumentError(f"{option}={value!r} is not known; pass {wanted}")
    return names
