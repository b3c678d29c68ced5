"""What a public function does not take from its surroundings: modes of the thread that calls it, the state of
its random numbers, and other threads that do the same.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")

_LOCK = threading.RLock()
_DEVICES = ("cpu", "cuda")


def in_usual_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function run outside of the caller's inference mode, ``no_grad`` and autocast.

    What it makes is to be trained, gradients are taken on the way, and results do not depend on where it is
    called. Precisions and gradients are options of its own.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in _DEVICES:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Have one thread at a time run a function of all that are marked so.

    Exporting, random numbers and the precision of products have one state for the whole process: torch.export
    in two threads at once leaves ``torch.compile`` switched off.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _LOCK:
            return function(*args, **kwargs)

    return run


def without_collections(function: Callable[P, R]) -> Callable[P, R]:
    """Have Python's collector of cyclic garbage wait while a function makes many small objects that stay: it
    would look through all of them, and all that was imported, again and again, for a tenth of the time.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return run


@contextlib.contextmanager
def drawing_alike(values: Iterable[Any], seed: int = 0) -> Iterator[None]:
    """Random numbers that a model draws (dropout that is always on, say) start from a seed inside, so that
    the same comes out each time.

    Those of the caller go on as if nothing had happened, on other devices too, which
    :func:`torch.manual_seed` would seed.

    Args:
        values: the weights of the model, and whatever else is on the devices that it draws on.
    """
    devices = {value.device for value in values if isinstance(value, Tensor)}
    cards = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cards):
        torch.default_generator.manual_seed(seed)
        for card in cards:
            with torch.cuda.device(card):
                torch.cuda.manual_seed(seed)
        if any(device.type == "mps" for device in devices):
            torch.mps.manual_seed(seed)
        yield


def check_default_device() -> None:
    """Refuse to make tensors where none has values.

    Raises:
        ArgumentError: the default device is ``meta``.
    """
    if torch.get_default_device().type == "meta":
        raise ArgumentError(
            "torch's default device is 'meta', where nothing has values; call this outside of"
            " torch.device('meta')"
        )


__all__ = [
    "check_default_device",
    "drawing_alike",
    "in_usual_modes",
    "one_at_a_time",
    "without_collections",
]
