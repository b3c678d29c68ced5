"""Functions with derivatives of their own, which an export replaces by what they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.autograd import Function


@contextlib.contextmanager
def functions_called() -> Iterator[dict[str, None]]:
    """The names of the functions that are applied meanwhile, but for torch's own."""
    found: dict[str, None] = {}
    own = Function.__dict__["apply"]

    def apply(kind: type[Function], *args: Any, **kwargs: Any) -> Any:
        if kind.__module__.partition(".")[0] != "torch":
            found[kind.__qualname__] = None
        return own.__get__(None, kind)(*args, **kwargs)

    setattr(Function, "apply", classmethod(apply))  # noqa: B010 - to a type checker it is a method
    try:
        yield found
    finally:
        setattr(Function, "apply", own)  # noqa: B010


__all__ = ["functions_called"]
