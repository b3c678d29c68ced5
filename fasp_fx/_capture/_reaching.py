"""Find out whether a copy reads tensors of the module that it was copied from.

What Python copies along with a module are its attributes. A function that it keeps (a lambda, a hook, a
nested function) is not copied, and goes on to hold whatever it was written around: often the module itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import TorchDispatchMode, pytree
from .._storage import storage_of
from ._unchanged import rewound


class Reaching(TorchDispatchMode):
    """Notes the first parameter or buffer of a module that an operator takes while the mode is on.

    Args:
        model: whose tensors are looked for.
        copy: what it holds itself is left out; a class may copy itself so that both hold the same.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, copy: nn.Module) -> None:
        super().__init__()
        self.found: str | None = None
        self._kind = type(model).__name__
        own = {storage_of(tensor) for tensor in (*copy.parameters(), *copy.buffers())}
        registered = [*model.named_parameters(), *model.named_buffers()]
        self._names = {
            storage: name for name, tensor in registered if (storage := storage_of(tensor)) not in own
        }

    @property
    def said(self) -> str | None:
        """What is wrong with the copy, in words, if something is."""
        if self.found is None:
            return None
        return (
            f"a copy of {self._kind} goes on to read '{self.found}' of the given model: a function that it"
            " keeps (a lambda, a hook) holds on to the model itself; make it a method"
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.found is None:
            tensors = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.found = next(filter(None, (self._names.get(storage_of(leaf)) for leaf in tensors)), None)
        return func(*args, **(kwargs or {}))


def find_reached(model: nn.Module, copy: nn.Module, run: Callable[[], object]) -> str | None:
    """What is wrong with a copy, in words, if it reads tensors of the model while something runs it."""
    reaching = Reaching(model, copy)
    # what a model compiles for itself cannot be compiled under a mode
    with rewound(model), rewound(copy), torch.compiler.set_stance("force_eager"), reaching:
        run()
    return reaching.said


__all__ = ["Reaching", "find_reached"]
