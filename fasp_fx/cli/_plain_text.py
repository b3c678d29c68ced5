"""Text from files and arguments, made harmless for a terminal."""

from __future__ import annotations

_ESCAPES = {"\a": r"\a", "\b": r"\b", "\t": r"\t", "\n": r"\n", "\v": r"\v", "\f": r"\f", "\r": r"\r"}


def printable(text: str, keep: str = "") -> str:
    """The text with every character escaped that a terminal would obey or not show: controls, changes of
    direction, half characters.

    A name in a model's folder may hold any character, and a terminal that is sent an escape sequence moves
    its cursor, changes its title or worse.

    Args:
        keep: characters to leave as they are.
    """
    return "".join(
        character if character.isprintable() or character in keep else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


__all__ = ["printable"]
