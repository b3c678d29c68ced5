"""Calibration batches, checked before anything is run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.compat import pytree
from ..capturing import upper_bound
from ..capturing._program import Program
from ..capturing._sizes import is_dynamic
from ..errors import CalibrationError, CallError


def read_batches(
    program: Program, calibration: Iterable[Any] | None, device: torch.device | None
) -> list[list[Any]]:
    """The graph inputs of every batch.

    Batches of inputs and labels, as most data loaders give them, are refused with the line that takes the
    inputs out. To drop by itself what the model does not take would serve a model of one argument; one with a
    further, optional argument (a mask) would take the labels for it.

    Args:
        calibration: an iterable of tensors (one positional argument), tuples (positional arguments) or
            mappings (keyword arguments).
        device: move batches there; ``None`` takes them as they are.

    Raises:
        CalibrationError: no batch at all, or one that does not fit; names the batch, the argument and what
            was expected.
    """
    batches = []
    for index, (args, kwargs) in enumerate(calibration_calls(calibration)):
        try:
            flat = program.flat_inputs(args, kwargs)
        except CallError as error:
            raise CalibrationError(
                f"calibration batch {index}: {error}{_without_labels(program, args)}"
            ) from error
        if device is not None:
            flat = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in flat]
        _check(program, flat, index)
        batches.append(flat)
    return batches


def _without_labels(program: Program, args: tuple[Any, ...]) -> str:
    """What to do about a batch that brings more than the program takes."""
    taken = len(program.signature.captured)
    if len(args) <= taken:
        return ""
    pick = "batch[0]" if taken == 1 else f"batch[:{taken}]"
    return (
        ". A batch is given to the model whole; if labels follow its inputs, leave them out:"
        f" calibration=({pick} for batch in loader)"
    )


def calibration_calls(calibration: Iterable[Any] | None) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Positional and keyword arguments of every calibration batch.

    Raises:
        CalibrationError: what was given is no iterable of batches, or yields none.
    """
    return as_calls(check_calibration(calibration), "calibration")


def as_calls(batches: Any, what: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Positional and keyword arguments of every batch.

    Args:
        what: the argument that the batches came in.

    Raises:
        CalibrationError: what was given is no iterable of batches, or yields none.
    """
    index, is_held = -1, isinstance(batches, list | tuple)
    for index, batch in enumerate(_check_batches(batches, what)):
        yield _apart(_as_call(batch, index, what), is_held)
    if index < 0:
        raise CalibrationError(f"{what} is empty: it yielded no batch")


def _apart(
    call: tuple[tuple[Any, ...], dict[str, Any]], is_held: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with tensors that no graph of the caller's leads to, and that autograd may keep; copies unless
    the caller holds all of them, since what makes one after another may fill the same memory again.
    """

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach() if is_held and not leaf.is_inference() else leaf.detach().clone()

    if is_held and not any(
        isinstance(leaf, Tensor) and (leaf.requires_grad or leaf.is_inference())
        for leaf in pytree.tree_leaves(call)
    ):
        return call
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(of, call)
    return found


def check_calibration(calibration: Iterable[Any] | None) -> Iterable[Any]:
    """The calibration data, if it is an iterable of batches.

    Raises:
        CalibrationError: it is none; says what it is.
    """
    if calibration is None:
        raise CalibrationError(
            "no calibration data: pass calibration=, an iterable of batches, or use score='magnitude' or"
            " 'random' with restore=None, which need none"
        )
    return _check_batches(calibration, "calibration")


def _check_batches(batches: Any, what: str) -> Iterable[Any]:
    if isinstance(batches, (Tensor, Mapping, str)):
        raise CalibrationError(
            f"{what} is a single {type(batches).__name__}; pass an iterable of batches, for example [batch]"
        )
    is_number = isinstance(batches, np.generic)  # which has a __getitem__
    if is_number or (not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__")):
        raise CalibrationError(
            f"{what} is a {type(batches).__name__}; pass an iterable of batches, for example [batch]"
        )
    return batches


def _as_call(batch: Any, index: int, what: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise CalibrationError(
        f"{what} batch {index} is a {type(batch).__name__}; a batch is a tensor, a tuple of positional"
        " arguments or a dict of keyword arguments"
    )


def _check(program: Program, flat: list[Any], index: int) -> None:
    nodes = program.placeholders()
    if len(nodes) != len(flat):
        raise CalibrationError(
            f"calibration batch {index} holds {len(flat)} values, the captured program takes {len(nodes)};"
            " give it the structure of the example inputs"
        )
    for node, leaf in zip(nodes, flat, strict=True):
        expected = node.meta.get("val")
        if not isinstance(expected, Tensor):
            continue
        where = f"calibration batch {index}, input '{node.name}'"
        if not isinstance(leaf, Tensor):
            raise CalibrationError(f"{where}: expected a tensor, found {type(leaf).__name__}")
        if leaf.dtype != expected.dtype:
            raise CalibrationError(
                f"{where}: dtype {leaf.dtype}, expected {expected.dtype}; convert the batch"
            )
        if leaf.layout != expected.layout:
            raise CalibrationError(
                f"{where}: layout {leaf.layout}, expected {expected.layout}; convert the batch, for example"
                " with to_dense()"
            )
        if leaf.device != expected.device:
            raise CalibrationError(
                f"{where} is on {leaf.device}, the model on {expected.device}; move the batch, or pass"
                " device="
            )
        _check_shape(leaf, expected, where)
        if leaf.numel() == 0 and node.name not in program.state_inputs:  # a cache may be empty
            raise CalibrationError(
                f"{where} is empty (shape {tuple(leaf.shape)}); give it at least one token"
            )
        if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise CalibrationError(f"{where} holds values that are not finite; remove or repair them")


def _check_shape(leaf: Tensor, expected: Tensor, where: str) -> None:
    if leaf.dim() != expected.dim():
        raise CalibrationError(
            f"{where}: shape {tuple(leaf.shape)} has {leaf.dim()} dimensions, expected {expected.dim()}"
        )
    for dim, (size, wanted) in enumerate(zip(leaf.shape, expected.shape, strict=True)):
        if is_dynamic(wanted):
            upper = upper_bound(wanted)
            if upper is not None and size > upper:
                raise CalibrationError(
                    f"{where}: dimension {dim} is {size}, the captured program takes at most {upper}"
                )
        elif size != wanted:
            raise CalibrationError(
                f"{where}: dimension {dim} is {size}, the captured program has it fixed at {wanted}; reshape"
                " the batch or capture with dynamic_shapes"
            )
