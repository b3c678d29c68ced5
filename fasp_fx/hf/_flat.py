"""A captured program as one Python function of flat, named tensors over a tree of weights that several
programs share, and its rewrites for speed: no checks inside, no heads repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, EncoderDecoderCache

from fasp_fx.analysis import PruningPlan
from fasp_fx.base import CACHE, codegen_of, forward_from_src, pytree
from fasp_fx.capturing import copy_graph, lower_bound, upper_bound
from fasp_fx.errors import ArgumentError, CaptureError
from fasp_fx.passes import Origin
from fasp_fx.patterns import RESHAPES
from fasp_fx.pruning import Report
from fasp_fx.storage import program_to_json


@dataclass(frozen=True)
class Bound:
    """How large the sizes at some places, inputs and their dimensions, may be together."""

    places: tuple[tuple[str, int], ...]
    most: int

    def check(self, values: Mapping[str, Tensor]) -> None:
        """Refuse inputs that are larger.

        Raises:
            ArgumentError: says by how much.
        """
        count = sum(values[name].shape[dim] for name, dim in self.places)
        if count > self.most:
            raise ArgumentError(
                f"{' and '.join(name for name, _ in self.places)} hold {count} tokens, and the program takes"
                f" {self.most} at most: with more the original model does something else, or has no positions"
                " for them; shorten the input, or generate fewer tokens"
            )


@dataclass
class FlatProgram:
    """One graph behind flat names.

    Weights are looked up in the module that is passed to a call, so that programs of one model share its
    weights, and whatever moves or trains them is seen by all.

    Attributes:
        graph: placeholders in the order of ``inputs``, results in that of ``outputs``.
        inputs: names such as ``input_ids`` or ``cache.0.keys``.
        outputs: names such as ``logits`` or ``cache.0.keys``.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    _function: Callable[..., Any] | None = field(default=None, init=False, repr=False)

    @staticmethod
    def of(module: fx.GraphModule) -> FlatProgram:
        """The flat form of the graph module of an exported program.

        Raises:
            CaptureError: it takes or returns a structure that is neither a tensor, a dict of tensors nor a
                cache of keys and values.
        """
        generated: Any = codegen_of(module.graph)
        trees = generated.pytree_info
        return FlatProgram.of_graph(module.graph, trees.in_spec, trees.out_spec)

    @staticmethod
    def of_graph(body: fx.Graph, in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec) -> FlatProgram:
        """The flat form of a graph whose inputs and outputs are the leaves of two trees; errors as for
        :meth:`of`.
        """
        graph = fx.Graph()
        returned: Any = graph.graph_copy(body, {})
        graph.output(tuple(returned))
        for node in graph.nodes:
            node.type = None
        return FlatProgram(graph, _names(in_spec, of_call=True), _names(out_spec))

    def __call__(self, weights: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph over the tensors of ``weights``."""
        if self._function is None:
            code = self.graph.python_code("self")
            self._function = forward_from_src(code.src, code.globals)
        return dict(
            zip(self.outputs, self._function(weights, *[values[name] for name in self.inputs]), strict=True)
        )

    def to_device(self, device: torch.device) -> None:
        """Let the graph make its tensors on another device."""
        for node in self.graph.nodes:
            node.args, node.kwargs = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda item: device if isinstance(item, torch.device) else item
            )
        self._function = None

    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """The shape of each input."""
        return dict(zip(self.inputs, map(_shape, self.graph.find_nodes(op="placeholder")), strict=True))

    @cached_property
    def cache_sizes(self) -> dict[str, tuple[int, int]]:
        """Heads and width of each cache tensor that the program takes, ``[batch, heads, length, width]``.

        Raises:
            CaptureError: a cache of another layout.
        """
        sizes = {}
        for name, shape in self.shapes().items():
            if name.startswith("cache."):
                if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
                    raise CaptureError(
                        f"{name} was captured as {list(shape)}; only caches [batch, heads, length, width] of"
                        " fixed heads and width are served"
                    )
                sizes[name] = (shape[1], shape[3])
        return sizes

    @cached_property
    def bounds(self) -> list[Bound]:
        """The numbers of tokens up to which the program computes what its model does.

        A model that does something else with more of them (or has a table of so many) was captured at few.
        Where new tokens and those in the cache are bounded together, the largest number of each is what the
        smallest of the other leaves.
        """
        sizes = {
            (name, dim): size
            for name, shape in self.shapes().items()
            for dim, size in enumerate(shape)
            if not isinstance(size, int)
        }
        most = {place: upper for place, size in sizes.items() if (upper := upper_bound(size)) is not None}
        bounds, joint = list[Bound](), set[str]()
        for new in (place for place in most if place[0].endswith("input_ids")):
            for cached in (place for place in most if _is_of_tokens(place[0])):
                sums = {most[new] + lower_bound(sizes[cached]), most[cached] + lower_bound(sizes[new])}
                bounds.append(Bound((new, cached), min(sums)))
                if len(sums) == 1:
                    joint |= {str(sizes[new]), str(sizes[cached])}
        return bounds + [Bound((place,), most[place]) for place in most if str(sizes[place]) not in joint]

    def __deepcopy__(self, memo: Any) -> FlatProgram:
        memo[id(self)] = copied = replace(self, graph=copy_graph(self.graph))
        return copied


@dataclass(frozen=True)
class StoredProgram:
    """One program: as it is written to disk, and as it runs, with its weights under the model's names.

    Attributes:
        source: the program as it is written, or what it is made of when it is written.
    """

    source: Mapping[str, Any] | Origin
    flat: FlatProgram

    @property
    def data(self) -> Mapping[str, Any]:
        """The program as JSON.

        Raises:
            StoreError: it holds something that cannot be stored; names it.
        """
        return program_to_json(self.source.program) if isinstance(self.source, Origin) else self.source

    def __deepcopy__(self, memo: Any) -> StoredProgram:
        return self  # nobody changes it


@dataclass(frozen=True)
class Parts:
    """What a pruned model is made of.

    Attributes:
        programs: by name.
        weights: parameters and persistent buffers by the names of the original model; tied ones are one
            object.
        constants: for each program, its constants and other buffers by the names in its graph.
        plan: what was removed.
        report: what it cost.
    """

    programs: Mapping[str, StoredProgram]
    weights: Mapping[str, Tensor]
    constants: Mapping[str, Mapping[str, Tensor]]
    plan: PruningPlan
    report: Report


def _is_of_tokens(name: str) -> bool:
    """Whether an input is a cache of the tokens that the program itself is given, not of a source."""
    return name.startswith("cache.") and not name.startswith("cache.cross.") and name.endswith(".keys")


def _names(spec: pytree.TreeSpec, of_call: bool = False) -> tuple[str, ...]:
    """The names of the leaves of a tree, or of the keyword arguments of a call."""
    count = spec.num_leaves
    tree = pytree.tree_unflatten(list(range(count)), spec)
    named_leaves = {index: name for name, index in _walk(tree[1] if of_call else tree, "")}
    if missing := set(range(count)) - named_leaves.keys():
        raise CaptureError(
            f"leaf {min(missing)} of the program's inputs or outputs is neither a named tensor nor keys or"
            " values of a cache; such state is not served"
        )
    return tuple(named_leaves[index] for index in range(count))


def _walk(tree: Any, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(tree, int) and not isinstance(tree, bool):
        yield path, tree
    elif isinstance(tree, EncoderDecoderCache):
        yield from _walk(tree.self_attention_cache, f"{path}.self")
        yield from _walk(tree.cross_attention_cache, f"{path}.cross")
    elif isinstance(tree, Cache):
        for number, layer in enumerate(tree.layers):
            parts = {name: getattr(layer, name, None) for name in ("keys", "values")}
            yield from _walk(parts, f"{path}.{number}")
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            inner = "cache" if name == CACHE and not path else name
            yield from _walk(value, f"{path}.{inner}".removeprefix("."))


aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}


def without_checks(graph: fx.Graph) -> None:
    """Drop the assertions of the capture, whose place the model's own checks take."""
    for node in list(graph.nodes):
        if node.op == "call_module" or node.target in _CHECKS:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def share_heads(graph: fx.Graph) -> None:
    """Let attention read each key and value head once, where they are repeated for the query heads that share
    them. The values are the same bit by bit.
    """
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        holder, index = node, 2  # whose argument are the values: attention, or what pads them to its width
        if node.args[2].target is aten.constant_pad_nd.default and len(node.args[2].users) == 1:
            holder, index = node.args[2], 0
        key, value = _unrepeated(node.args[1]), _unrepeated(holder.args[index])
        if key is None or value is None or _shape(key)[1] != _shape(value)[1]:
            continue
        if _shape(node.args[0])[1:2] == _shape(node.args[1])[1:2]:
            node.update_arg(1, key)
            holder.update_arg(index, value)
            node.target = _attend
    graph.eliminate_dead_code()


def _unrepeated(node: Any) -> fx.Node | None:
    """What is repeated, where a node is ``[b, heads, l, d]`` repeated along a new dimension after the heads
    that was joined with them.
    """
    inner = node
    for targets in (RESHAPES, {"aten.clone.default"}, {"aten.expand.default"}, {"aten.slice.Tensor"}):
        inner = inner.args[0] if str(inner.target) in targets else inner
    if inner.target is not aten.unsqueeze.default or inner.args[1] != 2:
        return None
    (batch, heads, *others), after = _shape(inner.args[0]), _shape(node)
    if not (isinstance(heads, int) and len(after) == 4 and isinstance(after[1], int)) or after[1] % heads:
        return None
    same = str([batch, *others]) == str([after[0], *after[2:]])
    return cast(fx.Node, inner.args[0]) if same else None


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention whose query heads share keys and values. With a mask, kernels of accelerators that are told
    so materialise all scores; there heads are repeated.
    """
    grouped = query.device.type == "cpu"
    if not grouped:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    kwargs["enable_gqa"] = grouped
    return scaled_dot_product_attention(query, key, value, *args, **kwargs)
