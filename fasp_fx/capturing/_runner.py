"""Run a graph over several batches in step, stopping where a consumer's input is to be observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from fasp_fx.base import (
    FakeTensor,
    FakeTensorMode,
    addresses,
    built_alike,
    enable_python_dispatcher,
    for_a_while,
    keep_values,
    moved,
    pytree,
    tolerable,
)
from fasp_fx.errors import CalibrationError, VerificationError, first_line

from ._fx import WRITTEN_BY, applied, attribute, results, target_name, written_by, written_names
from ._program import Program
from ._shapes import by_shapes
from ._sizes import same_sizes


class Runner:
    """Executes nodes in graph order for all batches; a value lives until its last use.

    Together with the stops this costs one forward pass per batch, however many consumers are observed. Inside
    of :func:`fasp_fx.offload` what is alive at a stop lies in files.

    Every batch finds the tensors that the graph writes into (counts, running statistics) as they are in the
    program, and writes into copies of its own.

    Args:
        numbers: those of the batches; ``None``: from zero on.
        device: where nodes are executed, with the weights that are needed between two stops; what waits at a
            stop is on the CPU. ``None``: where the program is.
        returns: whether what the program returns is kept to be read (a cache of every layer, say).

    Attributes:
        overrides: tensors to use for weights instead of the program's, by canonical name.
    """

    def __init__(
        self,
        program: Program,
        batches: list[list[Any]],
        numbers: Sequence[int] | None = None,
        returns: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.device = device
        self._brought: dict[str, tuple[Tensor, Tensor]] = {}
        self.numbers = range(len(batches)) if numbers is None else numbers
        self.module = program.module
        self.canonical = program.canonical()
        self.nodes = list(program.module.graph.nodes)
        self.position = 0
        self.overrides: dict[str, Tensor] = {}
        self._order = {node: index for index, node in enumerate(self.nodes)}
        self._dies_at: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            last = max(
                (self._order[user] for user in node.users if returns or user.op != "output"),
                default=self._order[node],
            )
            self._dies_at.setdefault(last, []).append(node)
        placeholders = program.placeholders()
        changed = {written for node in self.nodes for written in written_by(node)}
        # The caller's batches stay as they are, and every run of one begins with what it holds.
        self._memory: list[dict[fx.Node, Any]] = [
            {
                node: leaf.clone() if node in changed and isinstance(leaf, Tensor) else leaf
                for node, leaf in zip(placeholders, batch, strict=True)
            }
            for batch in batches
        ]
        written = {
            self.canonical.get(name, name): attribute(self.module, name)
            for name in written_names(program.module.graph)
        }
        self._written: list[dict[str, Tensor]] = [
            {name: self.bring(tensor.detach().clone()) for name, tensor in written.items()} for _ in batches
        ]
        # The caller holds these anyway, or the graph writes into them.
        weights = addresses(program.weights().values())
        self._stay = [
            weights | addresses([*batch, *memory.values(), *buffers.values()])
            for batch, memory, buffers in zip(batches, self._memory, self._written, strict=True)
        ]

    def index(self, node: fx.Node) -> int:
        """The position of a node in graph order."""
        return self._order[node]

    def advance(self, stop: int) -> None:
        """Execute everything before position ``stop``, for all batches."""
        for number in range(len(self._memory)):
            if self.device is not None:
                self._memory[number] = moved(self._memory[number], self.device)
            self._run(number, self.position, stop)
            if self.device is not None:
                self._memory[number] = moved(self._memory[number], torch.device("cpu"))
            self._memory[number] = keep_values(self._memory[number], self._stay[number])
        self._brought.clear()
        self.position = max(self.position, stop)

    def bring(self, value: Any) -> Any:
        """A value where nodes are executed."""
        return value.to(self.device) if self.device is not None and isinstance(value, Tensor) else value

    def _run(self, number: int, start: int, stop: int) -> None:
        memory = self._memory[number]
        for index in range(start, stop):
            node = self.nodes[index]
            if node.op == "call_function":
                memory[node] = self._execute(node, number)
            for dead in self._dies_at.get(index, ()):
                memory.pop(dead, None)

    def read(self, node: fx.Node) -> Iterator[Tensor]:
        """The value of a live node for each batch."""
        for number in range(len(self._memory)):
            yield self._load(node, number)

    def outputs(self) -> list[Any]:
        """What the program returns for the first batch, leaf for leaf, once all of it was executed."""
        self.advance(len(self.nodes) - 1)
        return [
            next(self.read(leaf)) if isinstance(leaf, fx.Node) else leaf
            for leaf in results(self.module.graph)
        ]

    def ahead(self, node: fx.Node) -> Iterator[Any]:
        """What the node that is next in order will give, for each batch, with nothing kept of it."""
        for number in range(len(self._memory)):
            yield self._execute(node, number)

    def change(self, node: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
        """Put what ``change`` makes of the value of a live node in its place, for all batches."""
        for memory in self._memory:
            memory[node] = change(self.bring(memory[node]))

    def _load(self, argument: fx.Node, number: int) -> Any:
        if argument.op != "get_attr":
            return self.bring(self._memory[number][argument])
        name = self.canonical.get(str(argument.target), str(argument.target))
        for weights in (self.overrides, self._written[number]):
            if name in weights:
                return self._weight(name, weights[name])
        return self._weight(name, attribute(self.module, str(argument.target)))

    def _weight(self, name: str, weight: Any) -> Any:
        """A weight where nodes are executed, which it is brought to once for all batches."""
        if self.device is None or not isinstance(weight, Tensor) or weight.device == self.device:
            return weight
        known = self._brought.get(name)
        if known is None or known[0] is not weight:
            known = self._brought[name] = weight, weight.to(self.device)
        return known[1]

    def _execute(self, node: fx.Node, number: int) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: self._load(argument, number))
        if self.device is not None:  # the capture made a constant of where values are made
            args, kwargs = pytree.tree_map_only(torch.device, lambda _: self.device, (args, kwargs))
        try:
            return execute(cast(Any, node.target), args, kwargs)
        except tolerable(RuntimeError, IndexError, AssertionError) as error:
            raise CalibrationError(
                f"calibration batch {self.numbers[number]} fails in the model at node '{node.name}'"
                f" ({node.target}): {error}"
            ) from error


# --- Attention as it is fastest while batches run.
#
# Over few keys rounded products make it slower: on CPUs the fused kernel takes a product for each head of
# each sample, and each of these is prepared anew, which over few keys takes several times as long as the
# product.


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
#: from so many keys on rounding pays: 8 samples of 12 heads take 3.4 times as long with 128, 2.6 with 256,
#: one of 9 heads as long with 512 and two thirds with 1,024
_MANY_KEYS = 768
_PRODUCTS = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def execute(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator gives, now and on the way back: with products in full where it is attention over few
    keys on a CPU, else with the precision that is set.
    """
    if (
        target is not _ATTENTION
        or args[1].device.type != "cpu"
        or args[1].shape[-2] >= _MANY_KEYS
        or _PRODUCTS.fp32_precision in ("none", "ieee")
    ):
        return target(*args, **kwargs)
    precision, set_precision = _PRODUCTS.fp32_precision, partial(setattr, _PRODUCTS, "fp32_precision")
    with for_a_while(lambda: precision, set_precision):
        set_precision("ieee")
        output: Tensor = target(*args, **kwargs)
    if output.grad_fn is not None:
        output.grad_fn.register_prehook(lambda gradients: set_precision("ieee"))
        output.grad_fn.register_hook(lambda inputs, outputs: set_precision(precision))
    return output


# --- What the nodes of a graph make, without data.


def _is_recorded(value: Any, before: Any) -> bool:
    """Whether a leaf of what a node makes is what was recorded."""
    if isinstance(value, torch.SymInt) and isinstance(before, torch.SymInt):
        return same_sizes((value,), (before,))
    return value is before or (
        isinstance(value, FakeTensor)
        and isinstance(before, FakeTensor)
        and value.fake_mode is before.fake_mode
        and (value.dtype, value.device) == (before.dtype, before.device)
        and same_sizes((*value.shape, *value.stride()), (*before.shape, *before.stride()))
    )


def record(module: fx.GraphModule, everything: bool = True) -> None:
    """Bring ``node.meta["val"]`` of every node up to date; placeholders keep theirs.

    Args:
        everything: ``False``: what is recorded is right but for nodes that passes have written, weights, and
            what comes of these.

    Raises:
        VerificationError: a node does not execute; names it.
    """
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
    if mode is None:
        return
    changed = set[fx.Node]()
    # operators that are made of others take symbolic sizes only in Python
    with torch.no_grad(), by_shapes(), mode, enable_python_dispatcher():
        for node in module.graph.nodes:
            before = node.meta.get("val")
            is_new = (
                everything
                or before is None
                or WRITTEN_BY in node.meta
                or not changed.isdisjoint(node.all_input_nodes)
            )
            if node.op == "get_attr" or (node.op == "call_function" and is_new):
                result = _made(module, node, mode)
                if everything or not built_alike(result, before, _is_recorded):
                    changed.add(node)
                    node.meta["val"] = result


def _made(module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> Any:
    """What a node makes of what is recorded of its operands."""
    try:
        if node.op != "get_attr":
            return applied(node, cast(Any, node.target))
        value = attribute(module, target_name(node))
        is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return mode.from_tensor(value, static_shapes=True) if is_real else value
    except tolerable(Exception) as error:
        raise VerificationError(
            f"node '{node.name}' ({node.target}) does not execute: {first_line(error)}"
        ) from error
