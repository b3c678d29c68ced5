"""Calibration batches in pieces whose sequences do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..base._tolerable import tolerable
from ..base.compare import unfilled
from ..capturing._fx import results
from ..capturing._program import Program
from ..capturing._runner import Runner
from ..capturing._sizes import is_dynamic
from ..errors import CalibrationError

#: how many rows are run back at a time, where an input is a table of them
ROWS = 512
#: positions of a sequence that show whether it sees others, where all of them do not fit
_POSITIONS = 16


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
    in the batch (a mask). That no sequence sees another is tried: a first dimension may as well be time, or
    nodes. It is tried for each choice of inputs to divide, on the first batch that suggests it: what all
    sequences share may happen to be as long as a batch, and is then left whole. Where ``rows`` are asked for,
    because memory is short, it is tried with the first positions of two sequences.
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
    found = []
    divisible: dict[tuple[bool, ...], bool] = {}
    for piece in whole:
        leaf = next(leaf for leaf, is_same in zip(piece.inputs, same, strict=True) if is_same)
        count = leaf.shape[0]
        along = [
            is_same or (is_free and leaf.shape[0] == count)
            for leaf, is_same, is_free in zip(piece.inputs, same, free, strict=True)
        ]
        each = rows or (ROWS if leaf.dim() <= 1 + leaf.is_floating_point() else 1)
        for chosen in (along, same):
            parts = [_part(piece, chosen, start, each) for start in range(0, count, each)]
            if len(parts) == 1:
                break
            if tuple(chosen) not in divisible:
                tried = (piece, parts) if rows is None else _short(piece, chosen, shapes)
                divisible[tuple(chosen)] = _is_divisible(program, *tried)
            if divisible[tuple(chosen)]:
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


def _part(piece: Piece, along: list[bool], start: int, size: int) -> Piece:
    """Some sequences of a piece."""
    inputs = [
        leaf[start : start + size] if splits else leaf
        for leaf, splits in zip(piece.inputs, along, strict=True)
    ]
    return Piece(inputs, piece.batch, piece.first + start, min(size, piece.rows - start))


def _short(piece: Piece, along: list[bool], shapes: list[tuple[Any, ...]]) -> tuple[Piece, list[Piece]]:
    """The first positions of the first two sequences of a piece, together and one by one."""
    both = _part(piece, along, 0, 2)
    inputs = list(both.inputs)
    for index, shape in enumerate(shapes):
        for dim, size in enumerate(shape):
            if dim and is_dynamic(size):
                inputs[index] = inputs[index].narrow(dim, 0, min(_POSITIONS, inputs[index].shape[dim]))
    both = replace(both, inputs=inputs)
    return both, [_part(both, along, 0, 1), _part(both, along, 1, 1)]


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
        if (
            index in program.state_outputs
            or not isinstance(whole, Tensor)
            or not whole.is_floating_point()
            or not whole.dim()
            or whole.shape[0] != count
        ):
            continue
        for own, part in (
            (start, whole[: len(start)] if start.dim() else whole),
            (end, whole[count - len(end) :] if end.dim() else whole),
        ):
            compared.append(own.shape == part.shape and _are_alike(own, part))
    return bool(compared) and all(compared)


def _are_alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by no more than rounding, fillings aside."""
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
