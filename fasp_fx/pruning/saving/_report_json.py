"""A report as plain data, and back with every type checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from ...base._tolerable import tolerable
from ...errors import ArgumentError, FaspError, StoreError
from ..config import PruningConfig
from ..report import CurvePoint, Figure, Line, Recovery, Report, Spent

T = TypeVar("T")
DIGITS = 12
#: bytes of all the memory there is, and more than can be counted of anything else
LARGEST = 2**63 - 1


def report_to_json(report: Report) -> dict[str, Any]:
    """Plain data that :func:`report_from_json` reads."""
    try:
        config = None if report.config is None else json.loads(report.config.to_json())
    except ArgumentError:  # it holds a function
        config = None
    return {**asdict(replace(report, config=None)), "config": config}


def report_from_json(data: Mapping[str, Any]) -> Report:
    """The report that was stored.

    Raises:
        StoreError: a field is missing or not what it should be.
    """
    try:
        read: dict[str, Callable[[Any], Any]] = {
            "sparsity": _number,
            "requested": _optional(_number),
            "parameters": _pair,
            "bytes": _pair,
            "lines": _many(_line),
            "seconds": _mapping(_number),
            "notes": _many(_text),
            "figures": _many(_figure),
            "without_rule": _mapping(_count),
            "cache": _optional(_pair),
            "include": _many(_text),
            "recovery": _optional(_recovery),
            "budgets": _many(_spent),
            "config": _optional(lambda data: PruningConfig.from_json(json.dumps(data))),
        }
        return Report(**{field.name: read[field.name](data[field.name]) for field in fields(Report)})
    except tolerable(KeyError, TypeError, ValueError, FaspError) as error:
        raise StoreError(
            f"report.json is damaged: {type(error).__name__}: {error}; save the result again"
        ) from error


def _line(data: Any) -> Line:
    read: dict[str, Callable[[Any], Any]] = {
        "name": _text,
        "status": _text,
        "before": _count,
        "after": _count,
        "blocks": _count,
        "reason": _text,
        "error_cut": _optional(_number),
        "error_restored": _optional(_number),
        "held_cut": _optional(_number),
        "held_restored": _optional(_number),
        "producers": _many(_member),
        "consumers": _many(_member),
    }
    return Line(**{field.name: read[field.name](data[field.name]) for field in fields(Line)})


def _figure(data: Any) -> Figure:
    digits = _count(data["digits"])
    if digits > DIGITS:
        raise ValueError(f"{digits} digits are too many")
    return Figure(_text(data["what"]), _number(data["dense"]), _number(data["pruned"]), digits)


def _recovery(data: Any) -> Recovery:
    read: dict[str, Callable[[Any], Any]] = {
        "method": _text,
        "criterion": _text,
        "steps": _count,
        "kept": _count,
        "curve": _many(_point),
        "seconds": _number,
        "notes": _many(_text),
    }
    found = Recovery(**{field.name: read[field.name](data[field.name]) for field in fields(Recovery)})
    if not found.curve:
        raise ValueError("a curve without points")
    return found


def _point(data: Any) -> CurvePoint:
    return CurvePoint(_count(data["step"]), _optional(_number)(data["trained"]), _number(data["held_out"]))


def _spent(data: Any) -> Spent:
    amounts = {name: _number(data[name]) for name in ("allowed", "dense", "used")}
    if not all(math.isfinite(amount) and 0 <= amount <= LARGEST for amount in amounts.values()):
        raise ValueError(f"a budget is not of what can be counted: {amounts!r}")
    return Spent(_text(data["resource"]), _text(data["unit"]), **amounts)


def _member(data: Any) -> tuple[str, int]:
    name, dim = data
    return _text(name), _count(dim)


def _pair(data: Any) -> tuple[int, int]:
    before, after = data
    return _count(before), _count(after)


def _text(data: Any) -> str:
    if not isinstance(data, str):
        raise TypeError(f"{data!r} is not text")
    return data


def _number(data: Any) -> float:
    if isinstance(data, bool) or not isinstance(data, (int, float)):
        raise TypeError(f"{data!r} is not a number")
    if isinstance(data, int) and abs(data) > LARGEST:
        raise ValueError(f"a number has {len(str(data))} digits, which is too many")
    return data


def _count(data: Any) -> int:
    if _number(data) < 0 or not math.isfinite(data) or int(data) != data or data > LARGEST:
        raise ValueError(f"{data!r} is not a count")
    return int(data)


def _optional(read: Callable[[Any], T]) -> Callable[[Any], T | None]:
    return lambda data: None if data is None else read(data)


def _many(read: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    def read_all(data: Any) -> tuple[T, ...]:
        if not isinstance(data, Sequence) or isinstance(data, str):
            raise TypeError(f"{data!r} is not a list")
        return tuple(read(item) for item in data)

    return read_all


def _mapping(read: Callable[[Any], T]) -> Callable[[Any], dict[str, T]]:
    def read_all(data: Any) -> dict[str, T]:
        if not isinstance(data, Mapping):
            raise TypeError(f"{data!r} is not an object")
        return {_text(name): read(value) for name, value in data.items()}

    return read_all


__all__ = ["report_from_json", "report_to_json"]
