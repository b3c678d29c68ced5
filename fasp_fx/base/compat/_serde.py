"""The written form of exported programs: torch's own schema, and its reader and writer."""

from __future__ import annotations

import json
import types
import typing
from typing import Any
from unittest import mock

from torch import Tensor
from torch._export.serde import schema
from torch._export.serde import serialize as _serialize
from torch.export import ExportedProgram

#: operators on sizes, by the names that a written graph gives them
ON_SIZES = frozenset(f"{target.__module__}.{target.__name__}" for target in _serialize._SYM_OPS)
#: what an object of the schema is that is one of several things
Union = _serialize._Union


def write_graph(program: ExportedProgram) -> schema.ExportedProgram:
    """A program without its tensors, as objects of the schema."""
    # until 2.12 the tensors are always written, into bytes that nobody reads
    with mock.patch.object(_serialize, "serialize_torch_artifact", return_value=b""):
        return _serialize.ExportedProgramSerializer().serialize(program).exported_program


def graph_to_fields(written: schema.ExportedProgram) -> dict[str, Any]:
    """Such objects as what JSON holds.

    Raises:
        ValueError: a number is not finite.
    """
    fields: dict[str, Any] = json.loads(
        json.dumps(_serialize._dataclass_to_dict(written), cls=_serialize.EnumEncoder, allow_nan=False)
    )
    return fields


_HINTS: dict[type, dict[str, Any]] = {}


def _hints_of(kind: type, globalns: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = typing.get_type_hints(kind, globalns, **options)
    return _HINTS[kind]


#: what torch's reader asks for the types of a class, anew for each of a program's thousands of objects
_TYPING = types.ModuleType(typing.__name__)
vars(_TYPING).update({**vars(typing), "get_type_hints": _hints_of})


def graph_from_fields(fields: dict[str, Any]) -> Any:
    """What :func:`graph_to_fields` was given, as far as torch checks that."""
    with mock.patch.object(_serialize, "typing", _TYPING, create=True):
        return _serialize._dict_to_dataclass(schema.ExportedProgram, fields)


def read_graph(
    written: schema.ExportedProgram, weights: dict[str, Tensor], constants: dict[str, Tensor], example: Any
) -> ExportedProgram:
    """The program over the given tensors."""
    return _serialize.ExportedProgramDeserializer().deserialize(written, weights, constants, example)


__all__ = ["ON_SIZES", "Union", "graph_from_fields", "graph_to_fields", "read_graph", "schema", "write_graph"]
