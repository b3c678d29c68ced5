"""Execute operators on fake tensors, each call once: the layers of a model are alike, so most calls have been
seen before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...base.compat import FakeTensorMode, OpOverload, pytree


class Execution:
    """Results by operator and arguments.

    Tensors of one layout are one object here, by which equal calls are recognised; nobody may write into it.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._tensors: dict[Any, Tensor] = {}
        #: the arguments are kept with each result: the identity of an object says nothing once it is gone
        self._known: dict[Any, tuple[Any, Any]] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """The fake tensor that stands for all of this layout."""
        layout = _layout(tensor)
        if layout is None or layout not in self._tensors:
            with self.mode:
                fake = torch.empty_strided(
                    tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
            return self._one(fake)
        return self._tensors[layout]

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator returns. What is no operator, or writes into an argument (into a copy, here), is
        executed each time.
        """
        if not isinstance(target, OpOverload) or target._schema.is_mutable:
            with self.mode:
                if isinstance(target, OpOverload):
                    args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
                return target(*args, **kwargs)
        key = (target, _key(args), _key(kwargs))
        if key not in self._known:
            with self.mode:
                self._known[key] = (self._one(target(*args, **kwargs)), (args, kwargs))
        return self._known[key][0]

    def _one(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._one(item) for item in value]
        layout = _layout(value) if isinstance(value, Tensor) else None
        return value if layout is None else self._tensors.setdefault(layout, value)


def _layout(tensor: Tensor) -> Any:
    """All that an operator can tell of a tensor without data; ``None`` where more would have to be said."""
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        return None
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _key(value: Any) -> Any:
    """Equal for arguments that an operator cannot tell apart."""
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (type(value), value)
    return id(value)
