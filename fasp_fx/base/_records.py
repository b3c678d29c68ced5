"""Dataclasses made of what others give: options as keywords, unknown ones named; and the one codec, JSON,
with each field held against its annotation.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, TypeVar, cast

from pydantic import Field, GetCoreSchemaHandler, PlainValidator, TypeAdapter, ValidationError

from fasp_fx.errors import ArgumentError, FaspError, StoreError

T = TypeVar("T")
#: of single documents: plans, cost curves, configurations, reports
DOCUMENT = "fasp_fx.document/1"
#: a number of things, or an index, as large as a size of a tensor can be
Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class ReadBy:
    """Annotates a field whose value is made by a function of what JSON holds, whatever its type; a
    ``ValueError`` says that it cannot be.
    """

    make: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(Annotated[Any, PlainValidator(self.make)])


@dataclass(frozen=True)
class _Header:
    format: str = "none"
    kind: str = "none"


_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


def parse(
    target: type[T],
    text: str | bytes,
    what: str,
    remedy: str = "save the result again",
    error: type[FaspError] = StoreError,
) -> T:
    """What a text of JSON holds; fields that are not known are left out.

    Args:
        target: a dataclass, or another type that annotations can say.
        what, remedy, error: how to say that it holds something else.

    Raises:
        FaspError: of the type ``error``; names the field.
    """
    try:
        return _adapter(target).validate_json(text, strict=True)
    except ValidationError as failure:
        first = failure.errors(include_url=False, include_context=False, include_input=False)[0]
        place = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        says = first["msg"].removeprefix("Value error, ")
        raise error(f"{what} is damaged: {place:.200}{says:.300}; {remedy}") from failure
    except FaspError as failure:
        raise error(f"{what} is damaged: {failure}") from failure


def to_document(kind: str, content: Mapping[str, Any], indent: int | None = None) -> str:
    """A document of its own, which :func:`from_document` reads."""
    return json.dumps({"format": DOCUMENT, "kind": kind, **content}, indent=indent)


def from_document(kind: str, target: type[T], text: str, remedy: str, error: type[FaspError]) -> T:
    """What a document of that kind holds.

    Raises:
        FaspError: of the type ``error``: it is none, of another version, or damaged; names the field.
    """
    header = parse(_Header, text, f"the {kind}", remedy, error)
    if (header.format, header.kind) != (DOCUMENT, kind):
        raise error(
            f"the {kind} is of the format {header.format!r:.80} and the kind {header.kind!r:.80}, this"
            f" version reads {DOCUMENT!r}, {kind!r}; {remedy}"
        )
    return parse(target, text, f"the {kind}", remedy, error)


# --- Options.


class Options:
    """What a configuration is: a frozen dataclass of options, which checks itself."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse an option that is not known before ``__init__`` does, in more words.

        Raises:
            ArgumentError: names the nearest that there is.
        """
        known = [field.name for field in fields(cast(Any, cls))]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                guess = f"did you mean '{near[0]}'? There" if near else "there"
                raise ArgumentError(f"the option '{name}' is not known; {guess} are {', '.join(known)}")
        return super().__new__(cls)

    @classmethod
    def of(cls, config: Self | None, options: Mapping[str, Any]) -> Self:
        """A configuration with some options in the place of its own; ``None`` stands for the defaults.

        Raises:
            ArgumentError: an option is not known, out of range, or ``config`` is no configuration.
        """
        check_kind("config", config, cls | None, f"pass a {cls.__name__}, or the options as keywords")
        before: Any = config if config is not None else cls()
        return replace(before, **options)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold, and no truth value."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and abs(value) <= sys.float_info.max


def check_kind(
    name: str,
    value: object,
    kind: type | UnionType,
    advice: str,
    error: type[FaspError] = ArgumentError,
) -> None:
    """Refuse an argument that is of another kind.

    Args:
        advice: what to pass instead, in words.
        error: what is raised.

    Raises:
        FaspError: names it, and its type.
    """
    if not isinstance(value, kind):
        raise error(f"{name} is a {type(value).__name__}; {advice}")


def check_callable(**arguments: object) -> None:
    """Refuse arguments that are to be called and cannot be.

    Raises:
        ArgumentError: names one.
    """
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise ArgumentError(f"{name} is a {type(value).__name__}; pass a function, or leave it out")


def path_of(path: Any, name: str) -> Path:
    """A path that an argument gives.

    Raises:
        ArgumentError: it gives none; names the argument.
    """
    check_kind(name, path, str | os.PathLike, "pass a path")
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
