"""Run a program as it is, or in a higher precision, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...base._tolerable import tolerable
from ...base._undisturbed import drawing_alike
from ...base.compat import OpOverload, pytree
from ...capturing._fx import attribute, written_by, written_names
from ...capturing._program import set_weight
from ...capturing._signature import Guards
from ...capturing._unchanged import copied

#: reads the bits of a number as those of another type, which a wider number does not have
_BITS = torch.ops.aten.view.dtype


@dataclass
class Ran:
    """What came of a program.

    Attributes:
        outputs: of each call.
        drawn: the shapes of the random numbers it drew, in order.
        rounded: whether an operator was computed in a lower precision than was asked for, as it has no other.
    """

    outputs: list[list[Any]] = field(default_factory=list)
    drawn: list[tuple[int, ...]] = field(default_factory=list)
    rounded: bool = False


def run(module: fx.GraphModule, inputs: list[Any], calls: int, precision: torch.dtype | None = None) -> Ran:
    """Call a graph module several times in a row, with random numbers that start from zero.

    Inputs may be written into; buffers of the module are as before afterwards.

    Args:
        inputs: the values of its placeholders.
        calls: how often.
        precision: nothing is computed in a lower one that can be computed in this; weights are widened one by
            one as they are used. ``None``: as the program says.
    """
    given = [widened(value, precision) for value in inputs]
    ran = Ran()
    # what a model compiles for itself (flex attention, say) runs uncompiled
    with (
        torch.no_grad(),
        drawing_alike([*given, *module.parameters(), *module.buffers()]),
        torch.compiler.set_stance("force_eager"),
        _own_buffers(module, precision),
        _default_type(wide(torch.get_default_dtype(), precision)),
    ):
        for _ in range(calls):
            execution = _Execution(module, precision, ran)
            outputs = list(execution.run(*given, enable_io_processing=False))
            ran.outputs.append(copied(outputs) if calls > 1 else outputs)
    return ran


def remembers(module: fx.GraphModule) -> bool:
    """Whether a call leaves anything behind that the next one could see: it writes into a buffer
    or an input.
    """
    return any(written_by(node) for node in module.graph.nodes)


def wide(dtype: torch.dtype, precision: torch.dtype | None) -> torch.dtype:
    """A type of real or complex numbers, or the one of this precision in its place if it has a lower one."""
    if (
        precision is None
        or not (dtype.is_floating_point or dtype.is_complex)
        or torch.finfo(dtype).eps <= torch.finfo(precision).eps
    ):
        return dtype
    return precision.to_complex() if dtype.is_complex else precision


def widened(value: Any, precision: torch.dtype | None) -> Any:
    """A tensor of numbers in this precision, if its own is lower; anything else as it is."""
    return value.to(wide(value.dtype, precision)) if isinstance(value, Tensor) else value


class _Execution(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, precision: torch.dtype | None, ran: Ran) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.precision, self.ran, self.extra_traceback = precision, ran, False

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if self.precision is not None and isinstance(value, fx.GraphModule):
            return _widened_graph(value, self.precision)
        return value

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        def load(node: fx.Node) -> Any:
            value = self.env[node]
            # Where it is read: a graph may name all of its weights before the first of them is used.
            return widened(value, self.precision) if node.op == "get_attr" else value

        return fx.map_arg(args, load)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return (
            None
            if self.precision is not None and isinstance(self.fetch_attr(target), Guards)
            else super().call_module(target, args, kwargs)
        )

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.precision is not None and target is not _BITS:
            args, kwargs = _widened_types((args, kwargs), self.precision)
        if not (isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags):
            return self._made(target, args, kwargs)
        is_cuda = any(
            isinstance(leaf, Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves((args, kwargs))
        )
        state = torch.cuda.get_rng_state if is_cuda else torch.get_rng_state
        before = state()
        made = self._made(target, args, kwargs)
        if not torch.equal(before, state()):
            self.ran.drawn += [
                tuple(value.shape) for value in pytree.tree_leaves(made) if isinstance(value, Tensor)
            ]
        return made

    def _made(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What an operator makes; in its own precision, of values rounded to it, where it has no kernel of
        the one that is asked for.
        """
        try:
            return super().call_function(target, args, kwargs)
        except tolerable(Exception):  # an operator raises what it likes about types
            own = isinstance(target, OpOverload) and not target._schema.is_mutable
            if self.precision is None or not own:
                raise
        args, kwargs = fx.map_arg((self.node.args, dict(self.node.kwargs)), self._rounded)
        made = super().call_function(target, args, kwargs)
        self.ran.rounded = True
        return pytree.tree_map(lambda leaf: widened(leaf, self.precision), made)

    def _rounded(self, node: fx.Node) -> Any:
        """The value of a node in the type that it was recorded in."""
        value, recorded = self.env[node], node.meta.get("val")
        return (
            value.to(recorded.dtype) if isinstance(value, Tensor) and isinstance(recorded, Tensor) else value
        )


def _widened_types(value: Any, precision: torch.dtype) -> Any:
    return pytree.tree_map(
        lambda leaf: wide(leaf, precision) if isinstance(leaf, torch.dtype) else leaf, value
    )


def _widened_graph(module: fx.GraphModule, precision: torch.dtype) -> fx.GraphModule:
    """A region of a graph, such as a mask function, in a higher precision."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.set_codegen(module.graph._codegen)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not _BITS:
            node.args, node.kwargs = _widened_types((node.args, node.kwargs), precision)
    return fx.GraphModule(module, graph)


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _own_buffers(module: fx.GraphModule, precision: torch.dtype | None) -> Iterator[None]:
    """Inside, the tensors that a module writes into are copies."""
    held = {name: attribute(module, name) for name in written_names(module.graph)}
    copies = {id(tensor): widened(tensor.detach().clone(), precision) for tensor in held.values()}
    try:
        for name, tensor in held.items():
            set_weight(module, name, copies[id(tensor)])
        yield
    finally:
        for name, tensor in held.items():
            set_weight(module, name, tensor)


__all__ = ["Ran", "remembers", "run"]
