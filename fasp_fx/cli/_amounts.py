"""Amounts as people type them: ``0.8``, ``80%``, ``100M``, ``400MB``, ``1.5GiB``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..allocation.budgets import KINDS, Cap
from ..errors import ArgumentError

_POWERS = {letter: power for power, letter in enumerate("kmgt", 1)}
_AMOUNT = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?)\s*(?:(%)|([kmgt]?)(i?)(b?))", re.IGNORECASE)


def read_amount(option: str, text: str) -> float:
    """A share in (0, 1] as a float, or an amount as an int: K, M, G and T are powers of 1000, Ki, Mi … of
    1024, and B says bytes.

    Raises:
        ArgumentError: the text is neither; names the option.
    """
    match = _AMOUNT.fullmatch(text.strip())
    number, percent, prefix, binary, unit = match.groups() if match else ("", "", "", "i", "")
    is_whole = bool(prefix or unit) or ("." not in number and not percent)
    value = (
        float(number or 0)
        * (1024 if binary else 1000) ** _POWERS.get((prefix or "").lower(), 0)
        / (100 if percent else 1)
    )
    if (binary and not prefix) or not value or (not is_whole and value > 1) or (is_whole and value < 1):
        raise ArgumentError(
            f"{option} '{text:.40}' is no amount; give a share in (0, 1], such as 0.8 or 80%, or how much may"
            " stay, such as 100M"
        )
    return int(value) if is_whole else value


def read_caps(given: Mapping[str, str | None]) -> tuple[Cap, ...]:
    """The budgets of the options that were given, by the names of their resources.

    Raises:
        ArgumentError: an amount is none.
    """
    return tuple(
        KINDS[name](read_amount(f"--{name}", text)) for name, text in given.items() if text is not None
    )


__all__ = ["read_amount", "read_caps"]
