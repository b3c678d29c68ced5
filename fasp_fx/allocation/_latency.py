"""The seconds of a forward pass as a function of what groups lose, from a table of operators' timings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from ..analysis._counting import Size
from ..analysis.resources import Resource, ShrinkingSizes
from ..base._device import device_of
from ..base._tolerable import tolerable
from ..base.compat import OpOverload, pytree
from ..capturing._fx import arguments
from ..capturing._program import Program
from ..capturing._runner import Runner
from ..errors import BudgetError
from .latency import GRID, LatencyTable

if TYPE_CHECKING:
    from ..analysis._analysis import Analysis

#: a dimension of an argument of an operator: which of its tensors, and which dimension
_Place = tuple[int, int]
#: what shrinks a dimension, relative to its size: dimensions of one such shrink together
_Cuts = tuple[tuple[tuple[int, float], ...], ...]
_MICRO = 1e6


class PassTime(Resource):
    """Microseconds of one forward pass on the example inputs.

    Operators are timed at widths on a grid, one by one; between widths, times are interpolated. All count for
    as much more or less as the whole pass takes more or less than they do one by one, with warm caches and
    nothing between them.

    Args:
        analysis: the analysis of a program.
        table: holds timings, and takes those that it lacks.

    Raises:
        BudgetError: the table is of another device.
    """

    def __init__(self, analysis: Analysis, table: LatencyTable) -> None:
        device = device_of(analysis.program.module)
        table.check(device)
        self._units: dict[tuple[str, tuple[Size, ...]], _Unit] = {}
        whole = _Walk(analysis, table, device, self._units).run()
        timed = sum(unit.count * float(unit.seconds.reshape(-1)[-1]) for unit in self._units.values())
        self._scale = whole / timed if timed > 0 else 1.0
        super().__init__(analysis.chosen, 0.0)
        self.whole = self.used([0] * len(analysis.chosen))

    def used(self, lost: Sequence[int]) -> float:
        return _MICRO * (
            self._scale
            * sum(
                unit.count * unit.at(tuple(size.left(lost) / size.whole for size in unit.axes))
                for unit in self._units.values()
            )
        )


class _Unit:
    """Calls of one operator with operands of one kind.

    Args:
        axes: a size for each set of dimensions that shrink together.
        parts: of the dense sizes along each axis, rising to one.
        seconds: at every combination of parts.
    """

    def __init__(self, axes: tuple[Size, ...], parts: list[list[float]], seconds: np.ndarray) -> None:
        self.axes, self.parts, self.count = axes, [np.asarray(axis) for axis in parts], 0
        for axis in range(seconds.ndim):
            # What takes longer where it is narrower is noise, or reached by padding.
            seconds = np.maximum.accumulate(seconds, axis)
        self.seconds = seconds
        self._known: dict[tuple[float, ...], float] = {}

    def at(self, left: tuple[float, ...]) -> float:
        """The seconds where so much is left along each axis: on lines between the parts measured, and below
        them on the first of these lines.
        """
        if left not in self._known:
            found = self.seconds
            for parts, part in zip(self.parts, left, strict=True):
                if len(parts) == 1:
                    found = found[0]
                    continue
                place = int(np.clip(np.searchsorted(parts, part) - 1, 0, len(parts) - 2))
                found = found[place] + (part - parts[place]) / (parts[place + 1] - parts[place]) * (
                    found[place + 1] - found[place]
                )
            self._known[left] = max(float(found), 0.0)
        return self._known[left]


class _Walk:
    """Runs the dense program on the example inputs, and times what is to be timed on the way."""

    def __init__(
        self,
        analysis: Analysis,
        table: LatencyTable,
        device: torch.device,
        units: dict[tuple[str, tuple[Size, ...]], _Unit],
    ) -> None:
        self.program, self.table, self.device, self.units = analysis.program, table, device, units
        self.sizes = ShrinkingSizes(analysis)
        self.inputs = _one_sample(self.program)
        self.runner = Runner(self.program, [self.inputs])

    @torch.no_grad()
    def run(self) -> float:
        """Fill the units; the seconds of the whole pass."""
        for index, node in enumerate(self.runner.nodes):
            if isinstance(node.target, OpOverload) and not any(
                result.alias_info is not None for result in node.target._schema.returns
            ):
                self.runner.advance(index)
                self._time(node)  # views take next to no time
        said = (
            f"{self.program.module.code}"
            f" {[_kind(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.inputs]}"
            f" {[_kind(tensor) for tensor in self.program.weights().values()]}"
        )
        key = f"pass {hashlib.sha256(said.encode()).hexdigest()}"
        return float(
            self.table.entry(
                key,
                lambda: (
                    [],
                    np.asarray(self.table.seconds(lambda: self.program.module(*self.inputs), self.device)),
                ),
            )[1]
        )

    def _value(self, node: fx.Node) -> Any:
        return next(self.runner.read(node))

    def _time(self, node: fx.Node) -> None:
        operands = {
            argument: value
            for argument in node.all_input_nodes
            if isinstance(value := self._value(argument), Tensor)
        }
        if not operands or not any(value.is_floating_point() for value in operands.values()):
            return
        axes: dict[_Cuts, list[_Place]] = {}
        least: dict[_Cuts, Size] = {}
        for place, (argument, value) in enumerate(operands.items()):
            for dim in range(value.dim()):
                size = self._size(argument, value, dim)
                if size.cuts:
                    cuts = tuple(
                        tuple((group, per_set / size.whole) for group, per_set in cut) for cut in size.cuts
                    )
                    axes.setdefault(cuts, []).append((place, dim))
                    least[cuts] = min(least.get(cuts, size), size, key=lambda size: size.whole)
        numbers = {argument: f"#{place}" for place, argument in enumerate(operands)}
        rest = fx.map_arg((node.args, dict(node.kwargs)), lambda argument: numbers.get(argument, "number"))
        key = f"{node.target} {rest} {[_kind(value) for value in operands.values()]} {list(axes.values())}"
        own = key, tuple(least.values())
        if own not in self.units:
            self.units[own] = _Unit(
                own[1],
                *self.table.entry(key, lambda: self._measured(node, operands, list(axes.values()), own[1])),
            )
        self.units[own].count += 1

    def _size(self, argument: fx.Node, value: Tensor, dim: int) -> Size:
        try:
            return self.sizes.of(argument, tuple(value.shape), dim)
        except BudgetError:  # what is left depends on which channels go: it counts as if nothing went
            return Size(value.shape[dim])

    def _measured(
        self,
        node: fx.Node,
        operands: dict[fx.Node, Tensor],
        axes: list[list[_Place]],
        least: tuple[Size, ...],
    ) -> tuple[list[list[float]], np.ndarray]:
        """Seconds at every combination of parts."""
        parts = [sorted({max(round(size.whole * part), 1) / size.whole for part in GRID}) for size in least]
        seconds = np.zeros([len(axis) for axis in parts])
        for index in product(*(range(len(axis)) for axis in parts)):
            narrow = list(operands.values())
            for at, own, places in zip(index, parts, axes, strict=True):
                for place, dim in places:
                    narrow[place] = narrow[place].narrow(
                        dim, 0, max(round(narrow[place].shape[dim] * own[at]), 1)
                    )
            found = dict(zip(operands, (value.contiguous() for value in narrow), strict=True))

            def value(argument: fx.Node, found: dict[fx.Node, Tensor] = found) -> Any:
                return found[argument] if argument in found else self._value(argument)

            named = dict(fx.map_arg(arguments(node), value))
            _fit(str(node.target), named)
            try:
                seconds[index] = self.table.seconds(lambda named=named: node.target(**named), self.device)  # type: ignore[misc, operator]
            except tolerable(RuntimeError):
                # Such sizes are none of the operator's, or its kernel wants others: as the dense one.
                seconds[index] = np.inf
        dense = seconds.reshape(-1)[-1]
        return parts, np.where(np.isfinite(seconds), seconds, dense if np.isfinite(dense) else 0.0)


def _fit(target: str, named: dict[str, Any]) -> None:
    """Make arguments agree that the passes make agree: the groups of a convolution, and the heads of queries
    and values.
    """
    if target.startswith("aten.conv") and "transpose" not in target and named.get("groups", 1) > 1:
        named["groups"] = named["input"].shape[1] // named["weight"].shape[1]
    if target == "aten.scaled_dot_product_attention.default":
        width = max(named["query"].shape[-1], named["value"].shape[-1])
        for name in ("query", "key", "value"):
            if named[name].shape[-1] < width:
                named[name] = torch.nn.functional.pad(named[name], (0, width - named[name].shape[-1]))


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    """What of a tensor the time of a kernel hangs on: its shape and its type."""
    return tuple(tensor.shape), str(tensor.dtype)


def _one_sample(program: Program) -> list[Any]:
    """The example inputs; one of the two samples where a capture has doubled a single one."""
    return [
        leaf[:1] if program.doubled and isinstance(leaf, Tensor) else leaf
        for leaf in pytree.tree_leaves(program.example)
    ]


__all__ = ["PassTime"]
