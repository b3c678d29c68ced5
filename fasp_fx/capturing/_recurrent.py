"""Take recurrent operators apart into single layers of one direction.

An operator of several layers hides what one layer hands to the next, and with it the weights that consume it.
One layer in one direction computes the same; a reversed direction is one between two flips, and both
directions are joined by a concatenation.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..base._stamps import stand_for
from ..patterns import lookup
from ._fx import arguments, set_argument

_ATEN = torch.ops.aten
_OPERATORS = (_ATEN.lstm.input, _ATEN.gru.input, _ATEN.rnn_tanh.input, _ATEN.rnn_relu.input)


def single_layers(graph: fx.Graph) -> None:
    """Rewrite a functional graph so that each recurrent operator has one layer and one direction, and initial
    states of zeros of its own.
    """
    for node in list(graph.nodes):
        if (
            node.op != "call_function"
            or node.target not in _OPERATORS
            or any(user.target is not operator.getitem for user in node.users)
        ):
            continue
        rewriter = _Rewriter(graph, node)
        if not rewriter.settled():
            rewriter.run()


@dataclass(frozen=True)
class _Layer:
    """The results of one layer in one direction."""

    output: fx.Node
    states: list[fx.Node]


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
        own = [
            state.target is not _ATEN.zeros.default and (len(state.users) == 1 or not _created(state))
            for state in self.states
        ]
        return self.layers * self.directions == 1 and all(own)

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
                source = self._joined([one.output for one in both], 2, self.recorded[0])
                if drops and layer + 1 < self.layers:
                    source = self._call(self.recorded[0], _ATEN.dropout.default, source, drops, True)
            states = [
                self._joined([one.states[index] for one in made], 0, self.recorded[1 + index])
                for index in range(len(self.states))
            ]
        results = dict(enumerate([source, *states]))
        for user in list(self.node.users):
            user.replace_all_uses_with(results[arguments(user)["1"]])
            self.graph.erase_node(user)
        self.graph.erase_node(self.node)
        for node in dict.fromkeys([*states, *(state for one in made for state in one.states), *self.states]):
            if not node.users and node.op == "call_function":
                self.graph.erase_node(node)

    def _layer(self, source: fx.Node, index: int, reverse: bool) -> _Layer:
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
        return _Layer(
            self._call(values[0], _ATEN.flip.default, output, [self.steps]) if reverse else output, after
        )

    def _state(self, state: fx.Node, recorded: Tensor, index: int) -> fx.Node:
        """The initial state of one layer and direction; what is merely zeros is made for it alone, so that no
        layers are coupled by it.

        Zeros are made like the input, so that they go with the module to another device or type.
        """
        if state.target is _ATEN.zeros.default:
            return self._call(
                _first(recorded),
                _ATEN.new_zeros.default,
                self.given["input"],
                [1, *arguments(state)["size"][1:]],
            )
        rule = lookup(state.target)
        if rule is not None and rule.creates:
            (name,) = (clause.words[0] for clause in rule.all("shape"))
            own = self.graph.node_copy(state)
            set_argument(own, name, [1, *arguments(state)[name][1:]])
            own.meta = {**state.meta, "val": _first(recorded)}
            stand_for(own, self.node)
            return own
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


def _created(state: fx.Node) -> bool:
    rule = lookup(state.target)
    return rule is not None and rule.creates


def _first(states: Tensor) -> Tensor:
    """What is recorded of one layer's state, of that of all layers."""
    return states.new_empty([1, *states.shape[1:]])
