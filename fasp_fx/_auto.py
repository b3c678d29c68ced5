"""Let transformers' Auto classes know pruned models, without importing transformers.

Importing transformers takes a second, and most users of fasp_fx never need its Auto classes. So the
configuration is registered once transformers' table of configurations has been imported, by whomever, and the
models once such a configuration is made.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.models.auto.configuration_auto"


def register_when_needed() -> None:
    """Register now if transformers' table is there, or else right after its import."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # Registers itself when it is complete, which it is not if it is what imports the table.
    import_module(".hf._config", __package__)


class _Finder(MetaPathFinder):
    """Finds the table as every other finder would, and runs the registration after it; once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """A loader with the registration at its end."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()


__all__ = ["register_when_needed"]
