"""Records as a Markdown table, and what they add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

Record = dict[str, Any]

#: in the order of precedence: a weight counts for the first status of the groups that touch it
STATUSES = ("prunable", "exempt", "approximate", "no rule", "layout", "other")

Cell = Callable[[Record], Any]
#: the columns, by what they show of a record; a float is a percentage
_COLUMNS: dict[str, Cell] = {
    "model": lambda record: record["name"],
    "kind": lambda record: record["kind"],
    "layers": lambda record: record.get("layers"),
    "parameters": lambda record: f"{record['parameters']:,}" if "parameters" in record else None,
    **{status: lambda record, status=status: record.get("shares", {}).get(status) for status in STATUSES},
    "most": lambda record: record.get("max_sparsity"),
    "sparsity": lambda record: record.get("sparsity"),
    "shrinks by": lambda record: (
        1 - record["parameters_after"] / record["parameters_before"] if "parameters_after" in record else None
    ),
    "mask error": lambda record: f"{record['mask_error']:.0e}" if "mask_error" in record else None,
    "own class": lambda record: ("no" if record["copy"] else "yes") if "copy" in record else None,
    "capture": lambda record: _seconds(record, "capture"),
    "analysis": lambda record: _seconds(record, "analysis"),
    "verdict": lambda record: verdict(record),
}


def table(records: dict[str, Record]) -> str:
    """One row per model, sorted by kind and name, then a summary."""
    ordered = sorted(records.values(), key=lambda record: (record["kind"], record["name"]))
    rows = [[_shown(cell(record)) for cell in _COLUMNS.values()] for record in ordered]
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS)), *map(_line, rows)]
    return "\n".join([*lines, "", *summary(records)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(value: Any) -> str:
    return "" if value is None else f"{100 * value:.1f}" if isinstance(value, float) else str(value)


def _seconds(record: Record, stage: str) -> str | None:
    return f"{record['seconds'][stage]:.1f}" if stage in record["seconds"] else None


def verdict(record: Record) -> str:
    """How a model fared, in a word or a line."""
    if record["ok"]:
        parts = (
            f" in {len(record['parts'])} part{'s' if len(record['parts']) > 1 else ''}"
            if record.get("parts")
            else ""
        )
        return f"exact{parts}{'' if record.get('visible', True) else ', invisible'}"
    if record["ok"] is None:
        return record.get("error")
    if record.get("error"):
        message = " ".join(str(record["error"]).split()).replace("|", "\\|")
        return f"{record['stage']}: {message[:120]}"
    return "NOT EXACT"


def summary(records: dict[str, Record]) -> list[str]:
    """Counts and totals over the records, one line each."""
    everything = list(records.values())
    captured = [record for record in everything if record["captured"]]
    pruned = [record for record in captured if "mask_error" in record]
    parts = [record for record in everything if record.get("parts")]
    analysed = [record for record in captured if "shares" in record]
    weights = sum(record["weights"] for record in analysed)
    none = [record for record in everything if record.get("copy")]
    tried = sum("copy" in record for record in everything)
    lines = [
        f"* {len(captured)} of {len(everything)} captured",
        f"* {len(pruned)} pruned, {sum(record['ok'] is True for record in pruned)} of them exact",
        f"* {len(parts)} of the other {len(everything) - len(captured)} pruned in parts,"
        f" {sum(record['ok'] is True for record in parts)} of them exact",
        f"* copies of their own class: of {tried - len(none)} of {tried} pruned models",
    ]
    for title, by_model in (
        ("weights of linear and convolution operators", False),
        ("each model once", True),
    ):
        counted = {
            status: sum(r["shares"][status] * (1 if by_model else r["weights"]) for r in analysed)
            / ((len(analysed) if by_model else weights) or 1)
            for status in STATUSES
        }
        shown = ", ".join(f"{_shown(share)} % {status}" for status, share in counted.items())
        lines.append(f"* {title}: {shown}")
    for title, chosen in (
        (
            "neither captured nor pruned in parts",
            [record for record in everything if not record["captured"] and not record.get("parts")],
        ),
        ("captured and failed", [record for record in captured if record["ok"] is False]),
        ("pruned in parts and failed", [record for record in parts if record["ok"] is False]),
        ("nothing to prune", [record for record in captured if record.get("max_sparsity") == 0]),
        (
            "masking changes nothing that can be seen",
            [record for record in [*pruned, *parts] if not record.get("visible", True)],
        ),
    ):
        lines += [
            f"* {title}: {len(chosen)}",
            *(f"    * {record['name']}: {verdict(record)}" for record in chosen),
        ]
    lines += [
        f"* no copy of their own class: {len(none)}",
        *(f"    * {record['name']}: {' '.join(record['copy'].split())[:300]}" for record in none),
    ]
    return [*lines, *without_rule(analysed)]


def without_rule(records: list[Record]) -> list[str]:
    """The operators without a rule, with the number of models and of nodes."""
    models: Counter[str] = Counter()
    nodes: Counter[str] = Counter()
    for record in records:
        for operator, count in record.get("without_rule", {}).items():
            models[operator] += 1
            nodes[operator] += count
    return [
        "* operators without a rule:",
        *(f"    * `{name}`: {count} models, {nodes[name]} nodes" for name, count in models.most_common()),
    ]
