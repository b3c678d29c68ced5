"""Calibration batches, checked before anything is run, and in pieces which do not see each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..base._tolerable import tolerable
from ..base.compare import unfilled
from ..base.compat import pytree
from ..capturing import upper_bound
from ..capturing._fx import results
from ..capturing._program import Program
from ..capturing._runner import Runner
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
        check_inputs(program, flat, f"calibration batch {index}")
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
    has_items = isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
    if not has_items or isinstance(batches, (Tensor, Mapping, str, np.generic)):
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


def check_inputs(program: Program, flat: list[Any], what: str) -> None:
    """Refuse graph inputs that a program does not take, or that nothing can be seen of.

    Args:
        what: how to name them.

    Raises:
        CalibrationError: says what was expected.
    """
    nodes = program.placeholders()
    if len(nodes) != len(flat):
        raise CalibrationError(
            f"{what} holds {len(flat)} values, the captured program takes {len(nodes)};"
            " give it the structure of the example inputs"
        )
    for node, leaf in zip(nodes, flat, strict=True):
        expected = node.meta.get("val")
        if not isinstance(expected, Tensor):
            continue
        where = f"{what}, input '{node.name}'"
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
        upper = upper_bound(wanted) if is_dynamic(wanted) else wanted
        if not is_dynamic(wanted) and size != wanted:
            said = f"has it fixed at {wanted}; reshape the batch or capture with dynamic_shapes"
        elif upper is not None and size > upper:
            said = f"takes at most {upper}"
        else:
            continue
        raise CalibrationError(f"{where}: dimension {dim} is {size}, the captured program {said}")


#: how many rows are run back at a time, where an input is a table of them
ROWS = 512


@dataclass(frozen=True)
class Piece:
    """Some sequences of a calibration batch: the graph's inputs, and the number of the batch.

    Attributes:
        first, rows: the number of the first sequence, counted through all batches, and how many there are.
    """

    inputs: list[Any]
    batch: int
    first: int = 0
    rows: int = 1


def whole_batches(program: Program, batches: Sequence[list[Any]]) -> list[Piece]:
    """Batches as they came. A sequence is one index of the first dimension of the first input
    that has one.
    """
    at = next(
        (
            index
            for index, node in enumerate(program.placeholders())
            if isinstance(v := node.meta.get("val"), Tensor) and v.dim()
        ),
        None,
    )
    found: list[Piece] = []
    first = 0
    for number, batch in enumerate(batches):
        rows = 1 if at is None else batch[at].shape[0]
        found.append(Piece(batch, number, first, rows))
        first += rows
    return found


def in_pieces(program: Program, whole: list[Piece], rows: int | None = None) -> list[Piece]:
    """Batches in pieces of ``rows`` sequences (``None``: of one, or of one image, or of some rows of a
    table), where these do not see each other; others as they are.

    So it does not matter how sequences were put together, and the memory does not grow with the batch. The
    first dimension of the first input must be free; inputs are divided along with it whose first dimension is
    the same size by the graph, or, from two dimensions on, whose first dimension is free and of the same size
    in the batch (a mask). That no sequence sees another is tried, on the first batch that has such inputs: a
    first dimension may as well be time, or nodes; and what all sequences share, which may happen to be as
    long as a batch, is left whole then. Where ``rows`` are asked for, because memory is short, it is tried
    with two sequences.
    """
    shapes = [
        tuple(value.shape) if isinstance(value := node.meta.get("val"), Tensor) else ()
        for node in program.placeholders()
    ]
    first = next((shape[0] for shape in shapes if shape), None)
    inner = {str(size) for shape in shapes for size in shape[1:]}
    if first is None or not is_dynamic(first) or str(first) in inner:
        return whole
    same = [bool(shape) and str(shape[0]) == str(first) for shape in shapes]
    free = [len(shape) > 1 and is_dynamic(shape[0]) and str(shape[0]) not in inner for shape in shapes]
    found: list[Piece] = []
    divisible: dict[tuple[bool, ...], bool] = {}
    for piece in whole:
        leaf = piece.inputs[same.index(True)]
        each = rows or (ROWS if leaf.dim() <= 1 + leaf.is_floating_point() else 1)
        along = [
            is_same or (is_free and leaf.shape[0] == piece.rows)
            for leaf, is_same, is_free in zip(piece.inputs, same, free, strict=True)
        ]
        for chosen in map(tuple, (along, same)):
            parts = [_part(piece, chosen, start, each) for start in range(0, piece.rows, each)]
            if len(parts) > 1 and chosen not in divisible:
                both = piece if rows is None else _part(piece, chosen, 0, 2)
                tried = parts if rows is None else [_part(both, chosen, row, 1) for row in (0, 1)]
                divisible[chosen] = _is_divisible(program, both, tried)
            if divisible.get(chosen, True):
                break
        else:
            return whole
        found += parts
    return found


def halved(program: Program, batches: Sequence[list[Any]]) -> list[list[Any]] | None:
    """Batches of at most half as many sequences as the largest of them has, in their order; ``None`` where
    they cannot be divided.
    """
    whole = whole_batches(program, batches)
    parts = in_pieces(program, whole, -(-max(piece.rows for piece in whole) // 2))
    return [part.inputs for part in parts] if len(parts) > len(whole) else None


def _part(piece: Piece, along: Sequence[bool], start: int, size: int) -> Piece:
    """Some sequences of a piece."""
    inputs = [
        leaf[start : start + size] if splits else leaf
        for leaf, splits in zip(piece.inputs, along, strict=True)
    ]
    return Piece(inputs, piece.batch, piece.first + start, min(size, piece.rows - start))


def _is_divisible(program: Program, piece: Piece, parts: list[Piece]) -> bool:
    """Whether the first and the last part of a piece give what they give within it, by the outputs that hold
    something for each of its sequences.
    """
    count = piece.rows
    try:
        within, first, last = (ran(program, one) for one in (piece, parts[0], parts[-1]))
    except tolerable(CalibrationError):
        return False
    compared = []
    for index, (whole, start, end) in enumerate(zip(within, first, last, strict=True)):
        is_numbers = isinstance(whole, Tensor) and whole.is_floating_point() and whole.dim() > 0
        if is_numbers and whole.shape[0] == count and index not in program.state_outputs:
            compared += [
                _are_alike(start, whole[: parts[0].rows]),
                _are_alike(end, whole[count - parts[-1].rows :]),
            ]
    return bool(compared) and all(compared)


def _are_alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by no more than rounding, fillings aside."""
    if found.shape != expected.shape:
        return False
    allowed = 1e-3 if found.dtype in (torch.float32, torch.float64) else 5e-2
    found, expected = unfilled(found, expected).float(), unfilled(expected, expected).float()
    return bool((found - expected).norm() <= allowed * expected.norm())


@torch.no_grad()
def ran(program: Program, piece: Piece) -> list[Any]:
    """What the dense model returns for one piece, as leaves."""
    run = Runner(program, [piece.inputs], numbers=[piece.batch])
    run.advance(len(run.nodes) - 1)
    return returned(program, run)


def returned(program: Program, run: Runner) -> list[Any]:
    """What a program returned that ran to its end, for one batch, as leaves."""
    return [
        next(run.read(node)) if isinstance(node, fx.Node) else node for node in results(program.module.graph)
    ]


__all__ = ["Piece", "halved", "in_pieces", "ran", "returned", "whole_batches"]
