"""Records as a Markdown table, and what they add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ._copies import WAYS, way, why_none
from ._shares import STATUSES

Record = dict[str, Any]

_HEAD = [
    "model",
    "kind",
    "layers",
    "parameters",
    *STATUSES,
    "most",
    "sparsity",
    "shrinks by",
    "mask error",
    "own class",
    "capture",
    "analysis",
    "verdict",
]


def table(records: dict[str, Record]) -> str:
    """One row per model, sorted by kind and name, then a summary."""
    rows = [
        _row(record)
        for record in sorted(records.values(), key=lambda record: (record["kind"], record["name"]))
    ]
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD)), *map(_line, rows)]
    return "\n".join([*lines, "", *summary(records)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _shrunk(record: Record) -> float | None:
    return (
        1 - record["parameters_after"] / record["parameters_before"] if "parameters_after" in record else None
    )


def _worst(record: Record) -> float | None:
    return max(record["mask_error"], record.get("mask_error_unseen", 0.0)) if "mask_error" in record else None


def _row(record: Record) -> list[str]:
    shares, seconds, worst = record.get("shares", {}), record["seconds"], _worst(record)
    return [
        record["name"],
        record["kind"],
        str(record.get("layers", "")),
        f"{record['parameters']:,}" if "parameters" in record else "",
        *(_percent(shares.get(status)) for status in STATUSES),
        _percent(record.get("max_sparsity")),
        _percent(record.get("sparsity")),
        _percent(_shrunk(record)),
        "" if worst is None else f"{worst:.0e}",
        way(record),
        f"{seconds['capture']:.1f}" if "capture" in seconds else "",
        f"{seconds['analysis']:.1f}" if "analysis" in seconds else "",
        verdict(record),
    ]


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
        return record.get("error") or "analysed"
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
    lines = [
        f"* {len(captured)} of {len(everything)} captured",
        f"* {len(pruned)} pruned, {sum(record['ok'] is True for record in pruned)} of them exact",
    ]
    lines.append(
        f"* {len(parts)} of the other {len(everything) - len(captured)} pruned in parts,"
        f" {sum(record['ok'] is True for record in parts)} of them exact"
    )
    tried = Counter(way(record) for record in everything if record.get("copies"))
    lines.append(
        f"* copies of their own class, of {sum(tried.values())} pruned models:"
        f" {', '.join(f'{tried[name]} by {name}' for name in WAYS)},"
        f" none of {tried['none']}"
    )
    if captured:
        enough = [record for record in captured if record.get("sparsity", 0.0) >= 0.2]
        lines.append(f"* {len(enough)} of {len(captured)} lose 20 % or more of the counted weights")
    if weights:
        totals = [
            sum(record["weights"] * record["shares"][status] for record in analysed) / weights
            for status in STATUSES
        ]
        means = [sum(record["shares"][status] for record in analysed) / len(analysed) for status in STATUSES]
        lines.append(
            "* weights of linear and convolution operators: "
            + ", ".join(f"{_percent(t)} % {s}" for t, s in zip(totals, STATUSES))
        )
        lines.append(
            "* the same, each model counted once: "
            + ", ".join(f"{_percent(m)} % {s}" for m, s in zip(means, STATUSES))
        )
    deep = [record for record in analysed if record["layers"] >= 100]
    slow = [record["name"] for record in deep if record["seconds"]["analysis"] > record["seconds"]["capture"]]
    lines.append(
        f"* {len(deep)} models of 100 or more layers; analysis slower than capture:"
        f" {', '.join(slow) or 'none'}"
    )
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
    none = [record for record in everything if way(record) == "none"]
    lines += [
        f"* no copy of their own class: {len(none)}",
        *(f"    * {record['name']}: {' '.join(why_none(record).split())[:300]}" for record in none),
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
