"""A captured program as one Python function of flat, named tensors over a tree of weights that several
programs share, and its rewrites for speed: no checks inside, no heads repeated; and how a pruned model reads
what it is called with beside its tokens: masks, losses, positions, caches.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

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
        trees = codegen_of(module.graph).pytree_info
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
            # Caches of the tokens that the program itself is given, not of a source.
            for cached in (at for at in most if at[0].endswith(".keys") and ".cross." not in at[0]):
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


# --- How a pruned model reads what it is called with beside its tokens.

LEFT_OUT = -100
#: how positions follow from a mask ``[batch, tokens]``: one after the other, or counting tokens shown, where
#: those hidden before them stand at zero, or one before it
POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "count": lambda mask: torch.arange(mask.shape[1], device=mask.device).expand(mask.shape),
    "mask": lambda mask: (mask.cumsum(-1) - 1).clamp(min=0),
    "mask and hidden": lambda mask: mask.cumsum(-1) * mask - 1,
}


def cross_entropy(logits: Tensor, labels: Tensor, items: Any = None) -> Tensor:
    """The loss of predicting each label from the logits at its place: the mean over those not left out, or
    their sum divided by ``items``.
    """
    total = functional.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten().to(logits.device),
        ignore_index=LEFT_OUT,
        reduction="mean" if items is None else "sum",
    )
    return total if items is None else total / items


def after_start(labels: Tensor, start: int | None, padding: int) -> Tensor:
    """Labels behind the token that begins an output; what the loss leaves out becomes padding."""
    moved = torch.cat(
        [torch.full_like(labels[:, :1], padding if start is None else start), labels[:, :-1]], 1
    )
    return moved.masked_fill(moved == LEFT_OUT, padding)


#: how a model predicts labels from logits: each from the one before it, or at its place
LOSSES: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "next": lambda logits, labels, items: cross_entropy(logits[:, :-1], labels[:, 1:], items),
    "same": cross_entropy,
}


def refuse(arguments: dict[str, Any], known: Container[str] = ()) -> None:
    """Refuse arguments that the programs do not take, unless they ask for nothing.

    Raises:
        ArgumentError: names the first.
    """
    for name, value in arguments.items():
        if name not in known and value is not None and value is not False:
            raise ArgumentError(
                f"argument '{name}' is not served by a pruned model, whose forward is a captured program;"
                " leave it out, or use the dense model"
            )


def checked_tokens(name: str, ids: Any) -> Tensor:
    """Token numbers ``[batch, tokens]``; anything else is refused.

    Raises:
        ArgumentError: names the argument.
    """
    is_whole = isinstance(ids, Tensor) and ids.dtype in (torch.int32, torch.int64)
    if not is_whole or ids.dim() != 2 or 0 in ids.shape:
        raise ArgumentError(
            f"{name} is {shown(ids)}; pass token numbers [batch, tokens], torch.int64, at least one token"
        )
    return ids


def shown(value: Any) -> str:
    """What was given, in few words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return "missing" if value is None else f"a {type(value).__name__}"


def mask_of(name: str, mask: Tensor | None, batch: int, length: int, like: Tensor) -> Tensor:
    """A mask over ``length`` tokens, all shown by default.

    Raises:
        ArgumentError: it has another shape.
    """
    if mask is None:
        return torch.ones((batch, length), dtype=torch.long, device=like.device)
    if not isinstance(mask, Tensor) or mask.shape != (batch, length):
        raise ArgumentError(
            f"{name} is {shown(mask)}; it must cover every token, cached ones included, zero where one is"
            f" padding: [{batch}, {length}]"
        )
    return mask.to(torch.long)


def loss_of(way: str | None, logits: Tensor, labels: Tensor | None, items: Any) -> Tensor | None:
    """The loss, if there are labels.

    Args:
        way: a key of :data:`LOSSES`; ``None``: the original has a loss of its own.
        items: how many labels there are in all batches that the loss will be added up over; ``None``: the
            mean over these.

    Raises:
        ArgumentError: there is not one label for each token, or labels are not served.
    """
    if labels is None:
        return None
    if way is None:
        raise ArgumentError(
            "labels are not served: the original model has a loss of its own, or none; leave them out and"
            " compute it from the logits"
        )
    if not isinstance(labels, Tensor) or labels.shape != logits.shape[:2] or labels.is_floating_point():
        raise ArgumentError(
            f"labels is {shown(labels)}, the logits speak of {list(logits.shape[:2])} tokens; give one token"
            " number for each"
        )
    return LOSSES[way](logits, labels, items)


def check_outputs(config: Any) -> None:
    """Refuse a configuration that asks for outputs which the programs do not have.

    Raises:
        ArgumentError: names the first.
    """
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        if getattr(config, name, False):
            raise ArgumentError(
                f"config.{name} is set, but a pruned model's program returns none; set model.config.{name} ="
                " False, or use the dense model"
            )


# --- Caches of transformers as named tensors, and back.


def opened(cache: Any, kind: type[Cache]) -> Any:
    """The caller's cache, or without one an empty cache that holds every token of every layer.

    Raises:
        ArgumentError: it is of another kind; names the kind.
    """
    if cache is None:
        return kind(DynamicCache(), DynamicCache()) if kind is EncoderDecoderCache else kind()
    is_double = isinstance(cache, EncoderDecoderCache)
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if is_double else [cache]
    layers = [type(layer) for part in parts for layer in getattr(part, "layers", ())]
    if not isinstance(cache, kind) or any(layer is not DynamicLayer for layer in layers):
        raise ArgumentError(
            f"cache is a {type(cache).__name__} of {', '.join(sorted({layer.__name__ for layer in layers}))};"
            f" a pruned model takes a {kind.__name__} that keeps every token of every layer: make it"
            " without a config, or pass none to begin with"
        )
    return cache


def read_cache(
    cache: Cache, sizes: Mapping[str, tuple[int, int]], batch: int, like: Tensor
) -> dict[str, Tensor]:
    """The tensors that a program takes, by name; those of a layer that holds nothing yet are empty.

    Args:
        sizes: heads and width of each, by names such as ``cache.0.keys`` or ``cache.cross.1.values``.
        batch: the number of sequences of this call.
        like: a tensor of the model's dtype and device.

    Raises:
        ArgumentError: the cache holds another number of sequences or heads, another width, dtype or device.
    """
    tensors: dict[str, Tensor] = {}
    for name, (heads, width) in sizes.items():
        part, number, kind = _place(cache, name)
        layer = part.layers[number] if number < len(part.layers) else None
        tensor = getattr(layer, kind) if layer is not None and layer.is_initialized else None
        if tensor is None or tensor.dim() != 4:
            # A layer that was made and never written holds a tensor without dimensions.
            tensor = torch.empty((batch, heads, 0, width), dtype=like.dtype, device=like.device)
        elif (
            (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != (batch, heads, width)
            or tensor.dtype != like.dtype
            or tensor.device != like.device
        ):
            raise ArgumentError(
                f"{name} of the cache is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, this model"
                f" needs {like.dtype} [{batch}, {heads}, any, {width}] on {like.device}; give it a cache that"
                " it has written itself"
            )
        tensors[name] = tensor
    return tensors


def write_cache(cache: Cache, tensors: dict[str, Tensor]) -> None:
    """Put what a program returned into the cache, in place, as a model of transformers does."""
    for name, tensor in tensors.items():
        part, number, kind = _place(cache, name)
        part.layers += [DynamicLayer() for _ in range(len(part.layers), number + 1)]
        layer: Any = part.layers[number]
        if not layer.is_initialized:
            layer.lazy_initialization(tensor, tensor)
        setattr(layer, kind, tensor)
        if isinstance(cache, EncoderDecoderCache) and part is cache.cross_attention_cache:
            cache.is_updated[number] = True


def _place(cache: Any, name: str) -> tuple[Any, int, str]:
    path = name.split(".")
    part = {"self": "self_attention_cache", "cross": "cross_attention_cache"}.get(path[1])
    return (cache if part is None else getattr(cache, part)), int(path[-2]), path[-1]
