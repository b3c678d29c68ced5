"""Capture each model once while it is being checked. A capture must survive any number of prunings unchanged, so this only adds to what is tested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fasp_fx import _captured


@contextmanager
def one_capture() -> Iterator[None]:
    """Inside, captures of one model object with inputs of one shape are made once."""
    module: Any = _captured
    original = module.capture_program
    seen: dict[tuple[int, str], tuple[object, object]] = {}

    def capture(model: object, args: object = (), kwargs: object = None, **options: object) -> object:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        shapes = [(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
        key = (id(model), f"{shapes} {options}")
        if key not in seen:
            seen[key] = (model, original(model, args, kwargs, **options))
        return seen[key][1]

    module.capture_program = capture
    try:
        yield
    finally:
        module.capture_program = original
