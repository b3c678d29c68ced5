"""The command, ``fasp-fx``: what it does, and how it speaks."""

from __future__ import annotations


def main() -> None:
    """Run the command."""
    from ._app import app

    app()


__all__ = ["main"]
