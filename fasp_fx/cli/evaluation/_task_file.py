"""Multiple-choice questions in a file of the user's own: one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import ArgumentError

SUFFIX = ".jsonl"


def read_questions(file: Path) -> list[dict[str, Any]]:
    """The questions of a file: ``query`` (text), ``choices`` (two or more texts) and ``gold`` (the index of
    the right one). Blank lines are skipped.

    Raises:
        ArgumentError: the file cannot be read or holds no question, or a line is not one; names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"'{file}' is not UTF-8 text; convert it") from error
    except OSError as error:
        raise ArgumentError(
            f"'{file}' cannot be read: {error.strerror or error}; give a {SUFFIX} file with one question per"
            " line"
        ) from error
    questions = [
        _question(line, f"line {number} of '{file}'") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not questions:
        raise ArgumentError(
            f"'{file}' holds no question; write one JSON object per line with query, choices and gold"
        )
    return questions


def _question(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ArgumentError(
            f"{where} is not JSON: {error}; write one object per line with query, choices and gold"
        ) from error
    if not isinstance(found, dict):
        raise ArgumentError(f"{where} is not a JSON object; write one with query, choices and gold")
    missing = [name for name in ("query", "choices", "gold") if name not in found]
    if missing:
        raise ArgumentError(
            f"{where} has no {' and no '.join(missing)}; a question has query, choices and gold"
        )
    query, choices, gold = found["query"], found["choices"], found["gold"]
    if not isinstance(query, str) or not query.strip():
        raise ArgumentError(f"query in {where} is not a text, or blank; write the question there")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise ArgumentError(f"choices in {where} is not a list of two or more texts that are not blank")
    try:
        "".join([query, *choices]).encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{where} holds half of a character ({error.object[error.start]!r}); write it whole"
        ) from error
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ArgumentError(
            f"gold in {where} is {json.dumps(gold)}, not the index of one of the {len(choices)} choices; the"
            " first is 0"
        )
    return {"query": query, "choices": choices, "gold": gold}


__all__ = ["SUFFIX", "read_questions"]
