"""Calibration batches, checked before anything is run, and in pieces which do not see each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, zip_longest
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from fasp_fx.base import check_kind, distance, pytree, tolerable, tolerance
from fasp_fx.capturing import Program, Runner, is_dynamic, upper_bound
from fasp_fx.errors import CalibrationError, CallError

from ._roles import Batches, numbers_in, sequences_of

T = TypeVar("T")
#: one in so many batches is held out of choices and repairs
_ONE_IN = 8


def read_batches(program: Program, calibration: Iterable[Any] | None, device: torch.device | None) -> Batches:
    """The graph inputs of every batch.

    Batches of inputs and labels, as most data loaders give them, are refused with the line that takes the
    inputs out. To drop by itself what the model does not take would serve a model of one argument; one with a
    further, optional argument (a mask) would take the labels for it.

    Args:
        calibration: an iterable of tensors (one positional argument), tuples (positional arguments) or
            mappings (keyword arguments); or such iterables by the names of sources.
        device: move batches there; ``None`` takes them as they are.

    Raises:
        CalibrationError: no batch at all, or one that does not fit; names the batch, the argument and what
            was expected.
    """
    data = all_of(calibration)
    batches = []
    for index, (args, kwargs) in enumerate(as_calls(data)):
        try:
            flat = program.flat_inputs(args, kwargs)
        except CallError as error:
            taken = len(program.signature.captured)
            pick = "batch[0]" if taken == 1 else f"batch[:{taken}]"
            hint = (
                ". A batch is given to the model whole; if labels follow its inputs, leave them out:"
                f" calibration=({pick} for batch in loader)"
            )
            more = hint if len(args) > taken else ""
            raise CalibrationError(f"{data.place(index)}: {error}{more}") from error
        if device is not None:
            flat = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in flat]
        check_inputs(program, flat, data.place(index))
        batches.append(flat)
    return Batches(batches, data.sources)


def in_turn(parts: Iterable[Iterable[T]]) -> Iterator[T]:
    """The first of each part, the second of each, and so on; parts may end before others."""
    missing = object()
    return (one for some in zip_longest(*parts, fillvalue=missing) for one in some if one is not missing)  # type: ignore[misc]


def as_calls(batches: Any, what: str = "calibration") -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Positional and keyword arguments of every batch.

    Args:
        what: the argument that the batches came in.

    Raises:
        CalibrationError: what was given is no iterable of batches, or yields none.
    """
    batches = all_of(batches, what) if "" not in sources_in(batches) else batches
    index, keeps_all = -1, isinstance(batches, list | tuple | HeldOut)

    def of(leaf: Any) -> Any:
        """A tensor that no graph of the caller's leads to, and that autograd may keep; a copy unless the
        caller holds all of them, since what makes one after another may fill the same memory again.
        """
        is_free = not isinstance(leaf, Tensor) or not (leaf.requires_grad or leaf.is_inference())
        return leaf if is_free and (keeps_all or not isinstance(leaf, Tensor)) else leaf.detach().clone()

    for index, batch in enumerate(check_calibration(batches, what)):
        check_kind(
            f"{what} batch {index}",
            batch,
            Tensor | Mapping | tuple | list,
            "a batch is a tensor, a tuple of positional arguments or a dict of keyword arguments",
            CalibrationError,
        )
        named = dict(batch) if isinstance(batch, Mapping) else {}
        args = () if named else (batch,) if isinstance(batch, Tensor) else tuple(batch)
        yield pytree.tree_map(of, args), pytree.tree_map(of, named)
    if index < 0:
        raise CalibrationError(f"{what} is empty: it yielded no batch")


class HeldOut:
    """Calibration batches without the last of them, an eighth, which nothing but a measurement sees; of fewer
    than eight batches none is held out. Of several sources this is so of each, of whose batches come in turn.

    Args:
        batches: all of them, or those that calibrate; or such by the names of sources; or what another
            leaves.
        rows: batches that are held out besides; ``None``: an eighth of ``batches``.
        what: the argument that they came in.

    Attributes:
        rows: the batches that are held out, once the others were asked for; by the names of their sources, if
            there are several.
        sources, names: as for :class:`Batches`, and the names of the sources, once they were asked for.
    """

    def __init__(self, batches: Any, rows: Any = None, what: str = "calibration") -> None:
        self._batches, self.rows, self.what = batches, rows, what
        self._seen: list[Any] | None = None
        self._change: Callable[[Iterable[Any]], Iterable[Any]] = iter
        self.sources, self.names = list[int](), list[str]()

    def __iter__(self) -> Iterator[Any]:
        if self._seen is None:
            self._seen, self.sources = self._read()
        return iter(self._seen)

    def _read(self) -> tuple[list[Any], list[int]]:
        if isinstance(self._batches, HeldOut):
            batches = [*self._change(self._batches)]
            self.names = self._batches.names
            return batches, self._batches.sources
        seen, rows = dict[str, list[Any]](), dict[str, list[Any]]()
        for name, batches in sources_in(self._batches).items():
            what = f"{self.what} source {name!r}" if name else self.what
            calls = [kwargs or args for args, kwargs in as_calls(batches, what)]
            count = len(calls) - (len(calls) // _ONE_IN if self.rows is None else 0)
            seen[name], rows[name] = calls[:count], calls[count:]
        if self.rows is None:
            self.rows = rows if len(rows) > 1 else [*chain(*rows.values())]
        self.names = [*seen]
        numbers = ([number] * len(calls) for number, calls in enumerate(seen.values()))
        return [*in_turn(seen.values())], [*in_turn(numbers)] if len(seen) > 1 else []

    def place(self, index: int) -> str:
        """How to name a batch that was asked for, by its source if there are several."""
        if not self.sources:
            return f"{self.what} batch {index}"
        source = self.sources[index]
        return f"batch {self.sources[:index].count(source)} of {self.what} source {self.names[source]!r}"

    def through(self, change: Callable[[Iterable[Any]], Iterable[Any]]) -> HeldOut:
        """The same sources, of whose batches ``change`` makes others, one of each; nothing is held out."""
        changed = HeldOut(self, ())
        changed._change = change
        return changed


def all_of(batches: Any, what: str = "calibration") -> HeldOut:
    """The batches, of which none is held out from now on."""
    return batches if isinstance(batches, HeldOut) else HeldOut(batches, (), what)


def sources_in(batches: Any) -> dict[str, Any]:
    """The iterables of batches by the names of their sources; ``""`` names the only one.

    Raises:
        CalibrationError: a source has no name, or there is none.
    """
    is_named = isinstance(batches, Mapping) and not any(
        isinstance(value, Tensor | np.generic | str) or value is None for value in batches.values()
    )
    if not is_named:
        return {"": batches}
    if not batches or not all(isinstance(name, str) and name for name in batches):
        raise CalibrationError(
            f"the sources of batches are named {[*batches]!r:.80}; give each a name of its own, as in"
            " {'web': batches, 'code': batches}"
        )
    return dict(batches)


def check_calibration(batches: Any, what: str = "calibration") -> Iterable[Any]:
    """The batches, if they are an iterable of batches, or several by the names of their sources.

    Args:
        what: the argument that they came in.

    Raises:
        CalibrationError: they are none; says what they are.
    """
    if batches is None and what == "calibration":
        raise CalibrationError(
            "no calibration data: pass calibration=, an iterable of batches, which a language model can write"
            " (fasp_fx.hf.write_texts), or use score='magnitude' or 'random' with restore=None, which need"
            " none"
        )
    if "" not in (named := sources_in(batches)):
        for name, some in named.items():
            check_calibration(some, f"{what} source {name!r}")
        return cast("Iterable[Any]", batches)
    has_items = isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
    if not has_items or isinstance(batches, (Tensor, Mapping, str, np.generic)):
        raise CalibrationError(
            f"{what} is a {type(batches).__name__}; pass an iterable of batches, for example [batch]"
        )
    return cast("Iterable[Any]", batches)


_REMEDIES = {
    "dtype": "convert the batch",
    "layout": "convert the batch, for example with to_dense()",
    "device": "move the batch, or pass device=",
}


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
    tensors = [pair for pair in zip(nodes, flat, strict=True) if isinstance(pair[0].meta.get("val"), Tensor)]
    for node, leaf in tensors:
        expected = node.meta["val"]
        where = f"{what}, input '{node.name}'"
        if not isinstance(leaf, Tensor):
            raise CalibrationError(f"{where}: expected a tensor, found {type(leaf).__name__}")
        for kind, remedy in _REMEDIES.items():
            has, wanted = getattr(leaf, kind), getattr(expected, kind)
            if has != wanted:
                raise CalibrationError(f"{where}: {kind} {has}, expected {wanted}; {remedy}")
        most = [upper_bound(size) if is_dynamic(size) else size for size in expected.shape]
        if leaf.dim() != expected.dim() or not all(
            size == limit or (is_dynamic(wanted) and (limit is None or size < limit))
            for size, limit, wanted in zip(leaf.shape, most, expected.shape, strict=True)
        ):
            takes = [
                ("any" if limit is None else f"at most {limit}") if is_dynamic(wanted) else str(limit)
                for limit, wanted in zip(most, expected.shape, strict=True)
            ]
            raise CalibrationError(
                f"{where}: shape {tuple(leaf.shape)}, the captured program takes ({', '.join(takes)});"
                " reshape the batch or capture with dynamic_shapes"
            )
        if leaf.numel() == 0 and node.name not in program.state_inputs:  # a cache may be empty
            raise CalibrationError(
                f"{where} is empty (shape {tuple(leaf.shape)}); give it at least one token"
            )
        if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise CalibrationError(f"{where} holds values that are not finite; remove or repair them")


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
    """Batches as they came."""
    sizes = sequences_of(program, batches)
    places = zip(batches, range(len(sizes)), accumulate(sizes, initial=0), sizes, strict=False)
    return [Piece(*one) for one in places]


def in_pieces(program: Program, whole: list[Piece]) -> list[Piece]:
    """Batches in pieces of one sequence, of one image, or of some rows of a table, where these do not see
    each other; others as they are.

    So it does not matter how sequences were put together, and the memory does not grow with the batch. The
    first dimension of the first input must be free; inputs are divided along with it whose first dimension is
    the same size by the graph, or, from two dimensions on, whose first dimension is free and of the same size
    in the batch (a mask). That no sequence sees another is tried, on the first batch that has such inputs: a
    first dimension may as well be time, or nodes.
    """
    recorded = [node.meta.get("val") for node in program.placeholders()]
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else () for value in recorded]
    first = next((shape[0] for shape in shapes if shape), None)
    inner = {str(size) for shape in shapes for size in shape[1:]}
    if first is None or not is_dynamic(first) or str(first) in inner:
        return whole
    same = [bool(shape) and str(shape[0]) == str(first) for shape in shapes]
    free = [len(shape) > 1 and is_dynamic(shape[0]) and str(shape[0]) not in inner for shape in shapes]
    pieces: list[Piece] = []
    divisible: dict[tuple[bool, ...], bool] = {}
    for piece in whole:
        leaf = piece.inputs[same.index(True)]
        each = ROWS if leaf.dim() <= 1 + leaf.is_floating_point() else 1
        along = tuple(
            is_same or (is_free and leaf.shape[0] == piece.rows)
            for leaf, is_same, is_free in zip(piece.inputs, same, free, strict=True)
        )
        parts = [_part(piece, along, start, each) for start in range(0, piece.rows, each)]
        if len(parts) > 1 and along not in divisible:
            divisible[along] = _is_divisible(program, piece, parts)
        if not divisible.get(along, True):
            return whole
        pieces += parts
    return pieces


def mixed(pieces: list[Piece], batches: Batches) -> list[Piece]:
    """Pieces of the sources of the batches in such an order that the first of them hold as much of each: the
    next is always of the source of which least came before.
    """
    if not batches.sources:
        return pieces
    before, sizes = list[tuple[int, int]](), Counter[int]()
    for piece in pieces:
        source = batches.sources[piece.batch]
        before.append((sizes[source], source))
        sizes[source] += numbers_in(piece.inputs)
    return [pieces[place] for place in sorted(range(len(pieces)), key=before.__getitem__)]


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
    try:
        within, first, last = (ran(program, one) for one in (piece, parts[0], parts[-1]))
    except tolerable(CalibrationError):
        return False
    compared = []
    for index, (whole, start, end) in enumerate(zip(within, first, last, strict=True)):
        is_numbers = isinstance(whole, Tensor) and whole.is_floating_point() and whole.dim() > 0
        if is_numbers and whole.shape[0] == piece.rows and index not in program.state_outputs:
            pairs = (start, whole[: parts[0].rows]), (end, whole[piece.rows - parts[-1].rows :])
            compared += [distance(*pair) <= tolerance("two ways", whole.dtype) for pair in pairs]
    return bool(compared) and all(compared)


@torch.no_grad()
def ran(program: Program, piece: Piece) -> list[Any]:
    """What the dense model returns for one piece, as leaves."""
    return Runner(program, [piece.inputs], numbers=[piece.batch]).outputs()
