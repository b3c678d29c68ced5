"""The copies of callers' models that results have made: a save would forget that one was trained since."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from fasp_fx.base import fingerprint
from fasp_fx.errors import StoreError

#: of each copy, the module that it is like, and what its weights were
_COPIES: MutableMapping[nn.Module, tuple[weakref.ref[nn.Module], dict[str, str]]] = (
    weakref.WeakKeyDictionary()
)


def note_copy(copy: nn.Module, module: nn.Module) -> None:
    """Remember the weights of a copy that is like the module of a result."""
    _COPIES[copy] = weakref.ref(module), _fingerprints(copy)


def check_copies(module: nn.Module, weights: Callable[[], Mapping[str, Tensor]]) -> None:
    """Refuse to write other weights than those of a copy that was trained since it was made.

    Args:
        module: of the result.
        weights: gives those that the module has now, by their names in the copies.

    Raises:
        StoreError: names one.
    """
    if _COPIES:
        gc.collect()  # a copy that nobody holds any more may be held by itself
    changed = [
        (name, copy.state_dict()[name])
        for copy, (other, before) in list(_COPIES.items())
        if other() is module
        for name, _ in sorted(_fingerprints(copy).items() - before.items())
    ]
    now = weights() if changed else {}
    for name, tensor in changed:
        if name in now and not torch.equal(tensor, now[name].to(tensor)):
            raise StoreError(
                f"a copy that result.eager made was trained since, and result.module has other values in"
                f" '{name}'; take them with result.module.load_state_dict(copy.state_dict()), or save"
                " the copy's state_dict() and delete the copy"
            )


def _fingerprints(module: nn.Module) -> dict[str, str]:
    """What tells the weights of a module from others, but for those that were quantised."""
    tensors = module.state_dict().items()
    plain = ((name, tensor) for name, tensor in tensors if type(tensor) is Tensor and not tensor.is_meta)
    return {name: fingerprint({"": tensor}) for name, tensor in plain}
