"""What a public function does not take from its surroundings: modes of the thread that calls it, the state of
its random numbers, and other threads that do the same, which take turns.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ._tolerable import tolerable

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda")
#: held by the thread that works
_TURN = threading.RLock()


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
    """Have one thread at a time run a function of all that are marked so, which may call one another; others
    wait.

    Exporting, random numbers and the precision of products have one state for the whole process: torch.export
    in two threads at once leaves ``torch.compile`` switched off.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _TURN:
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def for_a_while(read: Callable[[], Any], write: Callable[[Any], Any]) -> Iterator[None]:
    """Put back what is changed inside of a state of the whole process."""
    before = read()
    try:
        yield
    finally:
        write(before)


@contextlib.contextmanager
def logging_from(level: int, *names: str) -> Iterator[None]:
    """Have loggers of these names keep what is below a level to themselves."""
    with contextlib.ExitStack() as stack:
        for logger in map(logging.getLogger, names):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(level)
        yield


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Have Python's collector of cyclic garbage wait while many small objects are made that stay: it would
    look through all of them, and all that was imported, again and again, for a tenth of the time.
    """
    with for_a_while(gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable()):
        gc.disable()
        yield


@contextlib.contextmanager
def drawing_alike(values: Iterable[Any], seed: int = 0) -> Iterator[None]:
    """Random numbers that a model draws (dropout that is always on, say) start from a seed inside, so that
    the same comes out each time.

    Those of the caller go on as if nothing had happened, on other devices too, which
    :func:`torch.manual_seed` would seed.

    Args:
        values: the weights of the model, and whatever else is on the devices that it draws on.
    """
    cards = list({value.device for value in values if isinstance(value, Tensor) and value.is_cuda})
    with torch.random.fork_rng(cards):
        torch.default_generator.manual_seed(seed)
        for card in cards:
            with torch.cuda.device(card):
                torch.cuda.manual_seed(seed)
        yield


# --- The precision of products.


def products_in_bfloat16(device: torch.device, wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Within it, products are computed in bfloat16 by autocast, if wanted."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else contextlib.nullcontext()


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within it, products of float32 have a precision by :func:`torch.set_float32_matmul_precision`, unless
    the caller asked torch for one before.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except tolerable(RuntimeError):  # backends were given one each
        before = None
    with contextlib.ExitStack() as stack:
        if before == "highest" and precision != before:
            # "highest" asks each of them for something, who were asked for nothing.
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            stack.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision(precision)
        yield


# --- Random numbers that are the same each time, wherever and in whichever order they are drawn.


def seed_of(*place: object) -> int:
    """A seed of its own for each place, of 32 bits, which is what torch takes of one.

    Args:
        place: whole numbers and names that tell it from others.
    """
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=4).digest())


def generator_of(*place: object) -> torch.Generator:
    """Random numbers of their own for each place, on the CPU; arguments as for :func:`seed_of`."""
    return torch.Generator(device="cpu").manual_seed(seed_of(*place))
