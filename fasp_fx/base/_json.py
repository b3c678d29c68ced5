"""The one codec: dataclasses as JSON, and back with each field held against its annotation."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import Field, GetCoreSchemaHandler, PlainValidator, TypeAdapter, ValidationError

from fasp_fx.errors import FaspError, StoreError

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
