"""Operators written as others that have rules, or that leave sizes free, for exporters."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..base._stamps import stand_for
from ..base.compat import OpOverload, traced_by
from ._fx import arguments

_ATEN = torch.ops.aten


# --- Assignments to a slice (``x[:, 1:] += y``), written as what they are to channels: a concatenation of
# what stays and what is new; and to a mask, a choice.
#
# Functionalised the former are ``slice_scatter`` and ``select_scatter`` of a ``copy``. Nothing can go
# along the dimension of a scatter, which has no gradient for complex tensors, and a copy has none at all.


def _slice_scatter(
    self: Tensor, src: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Any:
    """``NotImplemented``, which leaves the operator as it is, where the pieces are not known
    while capturing.
    """
    start, end = 0 if start is None else start, sys.maxsize if end is None else end
    fixed = all(type(bound) is int for bound in (start, end, step))
    if (
        not fixed
        or step != 1
        or src.dtype != self.dtype
        or (isinstance(src.shape[dim], int) and src.shape[dim] == 0)
    ):
        return NotImplemented
    before = [] if start == 0 else [_ATEN.slice.Tensor(self, dim, 0, start)]
    after = [] if end == sys.maxsize else [_ATEN.slice.Tensor(self, dim, end, sys.maxsize)]
    pieces = [
        piece
        for piece in (*before, src, *after)
        if not (isinstance(piece.shape[dim], int) and piece.shape[dim] == 0)
    ]
    return _ATEN.cat.default(pieces, dim) if len(pieces) > 1 else _ATEN.clone.default(src)


def _select_scatter(self: Tensor, src: Tensor, dim: int, index: Any) -> Any:
    if type(index) is not int:
        return NotImplemented
    rank = self.dim()
    return _slice_scatter(
        self, _ATEN.unsqueeze.default(src, dim % rank), dim % rank, index, None if index == -1 else index + 1
    )


def _index_put(self: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """One value wherever a mask is true (``x[x > 1] = 1``)."""
    mask = indices[0] if len(indices) == 1 else None
    one = all(isinstance(size, int) and size == 1 for size in values.shape)
    if mask is None or mask.dtype != torch.bool or not one or accumulate:
        return NotImplemented
    for _ in range(self.dim() - mask.dim()):
        mask = _ATEN.unsqueeze.default(mask, -1)
    return _ATEN.where.self(mask, _ATEN.view.default(values, []), self)


def _copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Any:
    if src.device != self.device:
        return NotImplemented
    cast = (
        _ATEN.clone.default(src) if src.dtype == self.dtype else _ATEN._to_copy.default(src, dtype=self.dtype)
    )
    return cast if cast.shape == self.shape else _ATEN.expand.default(cast, list(self.shape))


#: for :meth:`torch.export.ExportedProgram.run_decompositions`
ASSIGNMENTS: dict[OpOverload, Callable[..., Any]] = {
    _ATEN.copy.default: _copy,
    _ATEN.index_put.default: _index_put,
    _ATEN.slice_scatter.default: _slice_scatter,
    _ATEN.select_scatter.default: _select_scatter,
}


# --- Recurrent layers over any number of steps.
#
# What an exporter needs to know of a recurrent operator are the shapes of its results. Torch finds them
# by running a decomposition step by step, which fixes the number of steps; here they are read off the
# shapes of the operands.


def _lstm(
    input: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    *options: bool,
) -> Any:
    return (_steps(input, hx[0], options[0]), torch.empty_like(hx[0]), torch.empty_like(hx[1]))


def _one_state(
    input: Tensor,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    *options: bool,
) -> Any:
    return (_steps(input, hx, options[0]), torch.empty_like(hx))


def _steps(input: Tensor, state: Tensor, bidirectional: bool) -> Tensor:
    """An output for each step, ``[steps, sequences, width]`` or ``[sequences, steps, width]`` as the input
    is.
    """
    return input.new_empty([*input.shape[:2], state.shape[-1] * (2 if bidirectional else 1)])


_KERNELS: dict[OpOverload, Callable[..., Any]] = {
    _ATEN.lstm.input: _lstm,
    _ATEN.gru.input: _one_state,
    _ATEN.rnn_tanh.input: _one_state,
    _ATEN.rnn_relu.input: _one_state,
}


def any_number_of_steps() -> contextlib.AbstractContextManager[None]:
    """Recurrent operators that are traced inside do not fix the number of steps."""
    return traced_by(_KERNELS)


_ZEROS = (_ATEN.zeros.default, _ATEN.new_zeros.default)


def single_layers(graph: fx.Graph) -> None:
    """Rewrite a functional graph so that each recurrent operator has one layer and one direction, and initial
    states of zeros of its own.
    """
    for node in list(graph.nodes):
        if (
            node.op != "call_function"
            or node.target not in _KERNELS
            or any(user.target is not operator.getitem for user in node.users)
        ):
            continue
        rewriter = _Rewriter(graph, node)
        if not rewriter.settled():
            rewriter.run()


class _Rewriter:
    """Writes the layers of one node before it, and puts their results in the place of its own."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node, self.given = graph, node, arguments(node)
        hx = self.given["hx"]
        self.listed = isinstance(hx, (list, tuple))
        self.states: list[fx.Node] = list(hx) if self.listed else [hx]
        self.directions = 2 if self.given["bidirectional"] else 1
        self.layers: int = self.given["num_layers"]
        self.steps = 1 if self.given["batch_first"] else 0
        #: what the operator returns, recorded at capture
        self.recorded: list[Tensor] = list(node.meta["val"])

    def settled(self) -> bool:
        """Whether there is nothing to rewrite, as in a program captured before."""
        shared = [state.target in _ZEROS and len(state.users) > 1 for state in self.states]
        written = [state.target is _ATEN.zeros.default for state in self.states]
        return self.layers * self.directions == 1 and not any((*shared, *written))

    def run(self) -> None:
        drops = self.given["dropout"] if self.given["train"] else 0.0
        with self.graph.inserting_before(self.node):
            source, made = self.given["input"], []
            for layer in range(self.layers):
                both = [
                    self._layer(source, layer * self.directions + direction, direction == 1)
                    for direction in range(self.directions)
                ]
                made += both
                source = self._joined([output for output, *_ in both], 2, self.recorded[0])
                if drops and layer + 1 < self.layers:
                    source = self._call(self.recorded[0], _ATEN.dropout.default, source, drops, True)
            states = [
                self._joined([one[index] for one in made], 0, self.recorded[index])
                for index in range(1, 1 + len(self.states))
            ]
        results = dict(enumerate([source, *states]))
        for user in list(self.node.users):
            user.replace_all_uses_with(results[arguments(user)["1"]])
            self.graph.erase_node(user)
        self.graph.erase_node(self.node)
        for node in dict.fromkeys([*states, *(state for one in made for state in one[1:]), *self.states]):
            if not node.users and node.op == "call_function":
                self.graph.erase_node(node)

    def _layer(self, source: fx.Node, index: int, reverse: bool) -> list[fx.Node]:
        """The output and the last states of one layer in one direction."""
        if reverse:
            source = self._call(source.meta.get("val"), _ATEN.flip.default, source, [self.steps])
        states = [
            self._state(state, recorded, index)
            for state, recorded in zip(self.states, self.recorded[1:], strict=True)
        ]
        count = len(self.given["params"]) // (self.layers * self.directions)
        weights = list(self.given["params"][index * count : (index + 1) * count])
        settings = (self.given["has_biases"], 1, 0.0, False, False, self.given["batch_first"])
        wide = self.recorded[0]
        values = (
            wide.new_empty([*wide.shape[:2], wide.shape[2] // self.directions]),
            *(_first(state) for state in self.recorded[1:]),
        )
        node = self._call(
            values, self.node.target, source, states if self.listed else states[0], weights, *settings
        )
        output, *after = [
            self._call(value, operator.getitem, node, number) for number, value in enumerate(values)
        ]
        if reverse:
            output = self._call(values[0], _ATEN.flip.default, output, [self.steps])
        return [output, *after]

    def _state(self, state: fx.Node, recorded: Tensor, index: int) -> fx.Node:
        """The initial state of one layer and direction; what is merely zeros is made for it alone, so that no
        layers are coupled by it.

        Zeros are made like the input, so that they go with the module to another device or type.
        """
        if state.target in _ZEROS:
            size = [1, *arguments(state)["size"][1:]]
            return self._call(_first(recorded), _ATEN.new_zeros.default, self.given["input"], size)
        if self.layers * self.directions == 1:
            return state
        return self._call(_first(recorded), _ATEN.slice.Tensor, state, 0, index, index + 1)

    def _joined(self, parts: list[fx.Node], dim: int, recorded: Tensor) -> fx.Node:
        return parts[0] if len(parts) == 1 else self._call(recorded, _ATEN.cat.default, parts, dim)

    def _call(self, recorded: Any, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        stand_for(node, self.node)
        node.meta["val"] = recorded
        return node


def _first(states: Tensor) -> Tensor:
    """What is recorded of one layer's state, of that of all layers."""
    return states.new_empty([1, *states.shape[1:]])
