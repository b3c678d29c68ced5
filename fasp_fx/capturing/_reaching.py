"""Find out whether a copy reads the module that it was copied from.

What Python copies along with a module are its attributes. A function that it keeps (a lambda, a hook, a
nested function) is not copied, and goes on to hold whatever it was written around: often the module itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn


@contextmanager
def noting_reads(model: nn.Module, copy: nn.Module) -> Iterator[list[str]]:
    """Note every attribute of a model's modules that is read meanwhile, but of those that the copy has as
    well: a class may copy itself so.
    """
    own = {id(inner) for inner in copy.modules()}
    paths = {id(inner): path for path, inner in model.named_modules() if id(inner) not in own}
    noted: list[str] = []

    def read(module: nn.Module, name: str) -> Any:
        if id(module) in paths and not name.startswith("_"):
            held = vars(module)
            if any(name in table for table in (held, held["_parameters"], held["_buffers"])):
                path = paths[id(module)]
                noted.append(f"{path}.{name}" if path else name)
        return object.__getattribute__(module, name)

    with mock.patch.object(nn.Module, "__getattribute__", read):
        yield noted


def said_of_reads(model: nn.Module, read: list[str]) -> str:
    """What is wrong with a copy that reads these attributes of a model, in words."""
    return (
        f"a copy of {type(model).__name__} goes on to read '{read[0]}' of the given model: a function that it"
        " keeps (a lambda, a hook) holds on to the model itself; make it a method"
    )


__all__ = ["noting_reads", "said_of_reads"]
