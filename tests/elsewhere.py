"""A device for tests that stands for an accelerator: its values lie apart from the CPU's, and an operator
that meets both is an error, as it is on a GPU. It computes with the CPU's kernels, so that results are equal
to the bit.

A device of torch lives as long as the process: what uses this one runs in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
#: operators that may meet tensors of both devices
_BETWEEN = {
    "aten::copy_",
    "aten::_copy_from",
    "aten::index",
    "aten::index_put_",
    "aten::_index_put_impl_",
}
#: what is registered goes with its library
_KEPT: list[torch.library.Library] = []


class Elsewhere(Tensor):
    """A tensor of the device; ``raw`` holds its values on the CPU, and views share it."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
            layout=raw.layout,
        )
        made.raw = raw
        return made

    def tolist(self) -> Any:
        return self.raw.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    kwargs = dict(kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = [one for one in tensors if isinstance(one, Elsewhere)]
    name = func.name().split(".")[0]
    # Tensors of no dimension are numbers, which go anywhere.
    apart = any(one.dim() for one in tensors if not isinstance(one, Elsewhere))
    if own and apart and name not in _BETWEEN:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    device = kwargs.pop("device", None)
    there = bool(own) if device is None else torch.device(device).type == NAME
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.raw if isinstance(leaf, Elsewhere) else leaf, (args, kwargs)
    )
    found = func(*args, **kwargs, **({} if device is None else {"device": torch.device("cpu")}))
    known = {id(one.raw if isinstance(one, Elsewhere) else one): one for one in tensors}

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) in known:
            return known.get(id(leaf), leaf)
        return Elsewhere(leaf) if there else leaf

    return pytree.tree_map(wrapped, found)


def register() -> torch.device:
    """Make the device known to torch, for the rest of the process."""
    _setup_privateuseone_for_python_backend(NAME)
    made = torch.library.Library("aten", "IMPL")
    aten = torch.ops.aten
    for operator, key in (
        (aten.empty.memory_format, "PrivateUse1"),
        (aten.empty_strided.default, "PrivateUse1"),
        # Else these give another shape to a tensor that is there.
        (aten.matmul.default, "AutogradPrivateUse1"),
        (aten.eye.default, "PrivateUse1"),
        (aten.arange.default, "PrivateUse1"),
        (aten.arange.start, "PrivateUse1"),
        (aten.arange.start_step, "PrivateUse1"),
        # Else these are taken apart, by which they round otherwise.
        (aten.scaled_dot_product_attention.default, "AutogradPrivateUse1"),
        (aten.lstm.input, "AutogradPrivateUse1"),
        (aten.gru.input, "AutogradPrivateUse1"),
    ):
        made.impl(operator.name(), lambda *args, _own=operator, **kwargs: _computed(_own, args, kwargs), key)
    every = torch.library.Library("_", "IMPL")
    every.fallback(lambda func, *args, **kwargs: _computed(func, args, kwargs), "PrivateUse1")
    _KEPT.extend([made, every])
    return torch.device(NAME, 0)
