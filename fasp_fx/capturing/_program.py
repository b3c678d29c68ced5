"""A captured model as the library works on it: a functional graph with its weights as attributes, and how to
call it; and how its weights come of the captured ones, as data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import SymInt, Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import InputKind

from fasp_fx.base import (
    LazyGraphModule,
    ShapeEnv,
    codegen_of,
    count_assumptions,
    guards_of,
    keep,
    non_persistent_buffers,
    pytree,
)
from fasp_fx.errors import VerificationError

from ._fx import attribute, grouped, target_name, weights_of, written_names
from ._signature import CallSignature
from ._unchanged import Seen


@dataclass(frozen=True, eq=False)
class Cut:
    """Which indices stay along one dimension.

    Attributes:
        dim: the dimension.
        kept: the indices in the order in which they are taken, in each block its own, shape ``[blocks, kept
            in each]``.
        block_dim: the dimension that is divided evenly into blocks; ``None``: there is one block.
    """

    dim: int
    kept: np.ndarray
    block_dim: int | None = None

    @staticmethod
    def of(name: str, dim: int, stays: np.ndarray, block_dim: int | None = None) -> Cut:
        """The cut that leaves what stays, a boolean of shape ``[blocks, size in each]``.

        Args:
            name: of the weight, for the message.

        Raises:
            VerificationError: the blocks would keep unequal numbers of indices.
        """
        counts = stays.sum(1)
        if (counts != counts[0]).any():
            raise VerificationError(
                f"the blocks of '{name}' would keep unequal numbers of channels along dimension {dim}:"
                f" {sorted(set(counts.tolist()))}"
            )
        return Cut(dim, stays.nonzero()[1].reshape(len(stays), -1), block_dim)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Cut)
            and (self.dim, self.block_dim) == (other.dim, other.block_dim)
            and np.array_equal(self.kept, other.kept)
        )

    def apply(self, weight: Tensor) -> Tensor:
        """What stays of a tensor, differentiably."""
        kept = torch.from_numpy(self.kept).to(weight.device)
        if self.block_dim is None:
            return weight.index_select(self.dim, kept[0])
        blocks = zip(weight.chunk(len(kept), self.block_dim), kept, strict=True)
        return torch.cat([block.index_select(self.dim, indices) for block, indices in blocks], self.block_dim)


@dataclass(frozen=True)
class Recipe:
    """How a weight is made.

    Attributes:
        source: the name of the weight that it is made of.
        cuts: what stays of that, one after the other: each speaks of what the one before leaves, so that
            blocks, which are those of the whole weight, are cut first. Without any, all stays.
    """

    source: str
    cuts: tuple[Cut, ...] = ()

    def then(self, *cuts: Cut) -> Recipe:
        """The recipe with further cuts."""
        return replace(self, cuts=self.cuts + cuts)

    def shape(self, source: Sequence[int]) -> tuple[int, ...]:
        """The shape of what is made of a weight of the shape ``source``."""
        sizes = list(source)
        for cut in self.cuts:
            sizes[cut.dim] = cut.kept.shape[1]
        return tuple(sizes)

    def apply(self, weight: Tensor) -> Tensor:
        """What is made of the source, differentiably, on its device; the source itself where nothing is left
        out.
        """
        for cut in self.cuts:
            weight = cut.apply(weight)
        return weight


@dataclass(frozen=True)
class SplitWeight:
    """A weight that holds the given rows of a fused weight of the model, in this order, before removal (see
    the pass that splits fused producers).
    """

    name: str
    source: str
    dim: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class FoldedWeight:
    """A weight that the model computes from ``sources`` in every call, and that the program holds as a
    parameter of its own.
    """

    name: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return f"'{self.name}' (of {', '.join(map(repr, self.sources))})"


@dataclass
class Program:
    """One model between capture and result.

    Attributes:
        module: graph module; graph inputs are placeholders, weights and buffers are ``get_attr`` nodes.
        signature: the caller's calling convention.
        example: positional and keyword arguments as the graph takes them.
        state_inputs: names of placeholders that may become narrower.
        state_outputs: positions of outputs that may become narrower.
        parts: weights made by splitting, by name.
        recipes: how weights that a pass has made come of the captured ones, by name: of some rows, of what
            is left, as copies. A repair has other values in the place of these.
        numbers: for weights that a pass has rewritten, the channel numbers of the analysed program along each
            dimension.
        notes: what a user should know of the capture, for the report.
        order: the names of the caller's weights in their order; the first name of a tied weight stands for
            all.
        folds: weights that the model computes from others and that the program holds as parameters.
        replaced: the caller's parameters and buffers that are gone with that, by name.
        doubled: whether the caller's example is one sample, which the capture has put twice into this one.
        facts: what the capture's exported program knows besides graph and weights; ``None`` for a graph that
            was not exported.
        seen: what the model gave for the example, until it is compared with what the program gives.
    """

    module: fx.GraphModule
    signature: CallSignature
    example: tuple[tuple[Any, ...], dict[str, Any]]
    state_inputs: frozenset[str] = frozenset()
    state_outputs: frozenset[int] = frozenset()
    parts: dict[str, SplitWeight] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    numbers: dict[str, list[Tensor | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    folds: tuple[FoldedWeight, ...] = ()
    replaced: dict[str, Tensor] = field(default_factory=dict)
    doubled: bool = False
    facts: ExportFacts | None = field(default=None, repr=False, compare=False)
    seen: Seen | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"Program({len(self.weights())} weights, inputs={list(self.signature.given())})"

    def weights(self) -> dict[str, Tensor]:
        """Every parameter and buffer by name; tied ones under each of their names."""
        return weights_of(self.module)

    def parameters(self) -> dict[str, Tensor]:
        """The parameters of the caller's model that the program was captured with: those of the graph, but
        what folded weights are computed of for these.
        """
        folded = {weight.name for weight in self.folds}
        of_graph = self.module.named_parameters(remove_duplicate=False)
        gone = {name: tensor for name, tensor in self.replaced.items() if isinstance(tensor, nn.Parameter)}
        return {**{name: tensor for name, tensor in of_graph if name not in folded}, **gone}

    def unread(self) -> list[str]:
        """The parameters that the graph does not read, by their canonical names."""
        names, lookups = self.canonical(), self.module.graph.find_nodes(op="get_attr")
        read = {names.get(target_name(node)) for node in lookups if node.users}
        return [names[name] for name, _ in self.module.named_parameters() if names[name] not in read]

    def fixed(self) -> dict[str, Tensor]:
        """The buffers and constants that the graph reads and does not write into, by name."""
        written = {region(attribute(self.module, name), name) for name in written_names(self.module.graph)}
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        tensors = {
            name: tensor
            for node in self.module.graph.find_nodes(op="get_attr")
            if node.users
            and (name := target_name(node)) not in parameters
            and isinstance(tensor := attribute(self.module, name), Tensor)
        }
        return {name: tensor for name, tensor in tensors.items() if region(tensor, name) not in written}

    def canonical(self) -> dict[str, str]:
        """For each weight's name, the first of the names of the same storage region, in the order of the
        caller's model.
        """
        first: dict[tuple[Any, ...], str] = {}
        rank = {name: index for index, name in enumerate(self.order)}
        weights = sorted(self.weights().items(), key=lambda item: (rank.get(item[0], len(rank)), item[0]))
        return {name: first.setdefault(region(tensor, name), name) for name, tensor in weights}

    def aliases(self) -> dict[str, list[str]]:
        """For each canonical name, all names of that storage."""
        return grouped((canonical, name) for name, canonical in self.canonical().items())

    def known_as(self) -> dict[str, list[str]]:
        """For each canonical name, all names that the caller's model has for the weight, and for what it is
        computed of.
        """
        names = self.aliases()
        for weight in self.folds:
            regions = {
                region(gone, name) for name in weight.sources if (gone := self.replaced.get(name)) is not None
            }
            tied = [name for name, gone in self.replaced.items() if region(gone, name) in regions]
            names[weight.name] = [*names.get(weight.name, [weight.name]), *weight.sources, *tied]
        return names

    def free_name(self, wanted: str) -> str:
        """The dotted name itself, or with a suffix if the program or the caller's model has something else by
        that name.
        """
        return free_name(wanted, [*self.order, *self.weights(), *dict(self.module.named_modules())])

    def replace_weight(self, names: list[str], value: Tensor) -> None:
        """Put one tensor under several names; a parameter stays one parameter, so that tied weights stay
        tied.
        """
        first: Any = keep(value)
        for name in names:
            set_weight(self.module, name, first)
            placed = attribute(self.module, name)
            if isinstance(placed, nn.Parameter) or not isinstance(first, nn.Parameter):
                first = placed

    def recipe(self, name: str) -> Recipe:
        """How a weight comes of the captured ones; one that no pass has made is itself."""
        return self.recipes.get(name, Recipe(name))

    def origin(self, name: str, dim: int, size: int) -> tuple[str, np.ndarray]:
        """The caller's weight that a weight is of, and the index there of each of the ``size`` indices of a
        dimension.
        """
        part = self.parts.get(name)
        rows = np.array(part.rows) if part is not None and dim == part.dim else np.arange(size)
        return (part.source if part is not None else name), rows

    def copy(self) -> Program:
        """A program whose graph and module tree can be changed; tensors are shared."""
        graph = copy_graph(self.module.graph)
        graph.set_codegen(codegen_of(self.module.graph))
        return self._over(graph)

    def with_own_weights(self) -> Program:
        """A program over the same graph, which must not be changed, in which tensors can be replaced by
        others of their shape; until then they are shared.
        """
        graph = self.module.graph
        owner = graph.owning_module
        program = self._over(graph)
        graph.owning_module = owner  # or it would keep the other weights alive
        return program

    def _over(self, graph: fx.Graph) -> Program:
        """The program with a graph for its own, and a module tree that can be changed."""
        module = graph_module(self.module, graph, self.module.meta, LazyGraphModule)
        return replace(
            self,
            module=module,
            parts=dict(self.parts),
            recipes=dict(self.recipes),
            numbers=dict(self.numbers),
            seen=None,
        )

    def placeholders(self) -> list[fx.Node]:
        """The graph's inputs in order."""
        return self.module.graph.find_nodes(op="placeholder")

    def flat_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The values of the placeholders for one call in the caller's convention."""
        named = self.signature.bound(args, kwargs)
        example_args, example_kwargs = self.example
        first = self.signature.given()[: len(example_args)]
        return pytree.tree_leaves(
            ([named[name] for name in first], {key: named.get(key) for key in example_kwargs})
        )

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the caller's ``forward`` that give the placeholders the example inputs."""
        args, kwargs = self.example
        given = {**self.signature.constants, **dict(zip(self.signature.given(), args)), **kwargs}
        named = {name: given[name] for name in self.signature.given() if name in given}
        # as it was called, since a hook can tell what came by position
        by_position = [*named][: max(len(args), len(self.signature.by_position()))]
        return tuple(named.pop(name) for name in by_position), named

    def device(self) -> torch.device:
        """The device of the weights, or of the inputs if there are none."""
        tensors: Iterator[Any] = iter([*self.weights().values(), *pytree.tree_leaves(self.example)])
        return next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), torch.device("cpu"))


def free_name(wanted: str, taken: Iterable[str]) -> str:
    """The dotted name itself, or with a suffix if something else has it."""
    count, free = 1, wanted
    while any(name == free or name.startswith(f"{free}.") for name in taken):
        count, free = count + 1, f"{wanted}_{count + 1}"
    return free


def region(tensor: Tensor, name: str) -> tuple[Any, ...]:
    """What tells the storage of a weight from that of others; tied weights share it. ``name`` stands for a
    tensor without elements.
    """
    if tensor.device.type == "meta" or tensor.layout != torch.strided:  # which have no storage
        return (id(tensor),)
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.numel() or name,
    )


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, to be changed; what is recorded of its output stays with it."""
    copied = fx.Graph()
    returned = copied.graph_copy(graph, {})
    copied.output(returned).meta.update(graph.find_nodes(op="output")[0].meta)
    return copied


def graph_module(
    root: nn.Module, graph: fx.Graph, meta: dict[str, Any], kind: type[fx.GraphModule] = fx.GraphModule
) -> fx.GraphModule:
    """A graph module over the tensors of ``root``, of the class ``kind``.

    ``fx.GraphModule`` registers every tensor that is not a parameter as a persistent buffer; here a buffer
    stays out of the state dict if it was, and so does a constant, which must still move with the module.
    """
    built = kind(root, graph)
    built.meta.update(meta)
    for path, module in built.named_modules():
        try:
            source = attribute(root, path) if path else root
        except AttributeError:
            continue
        buffers, theirs = (
            {name for name, _ in holder.named_buffers(recurse=False, remove_duplicate=False)}
            for holder in (module, source)
        )
        non_persistent_buffers(module).update(buffers - (theirs - non_persistent_buffers(source)))
    return built


def set_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer by its dotted name, keeping its kind, or add a parameter under a new
    name.
    """
    value = keep(value)
    path, _, leaf = name.rpartition(".")
    owner = attribute(module, path) if path else module
    before = getattr(owner, leaf, None)
    if isinstance(before, nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=before.requires_grad)
    elif isinstance(before, Tensor) and not isinstance(before, nn.Parameter):
        # A constant of the graph can be a weight that the model also holds elsewhere, in a list say.
        value = value.detach() if isinstance(value, nn.Parameter) else value
    setattr(owner, leaf, value)


# --- What an exported program knows besides its graph and its weights.


@dataclass(frozen=True)
class ExportFacts:
    """How a captured program is called and what its sizes may be.

    Attributes:
        call: how the whole module is called.
        inputs: what the caller's inputs are, in order.
        ranges: the sizes that each symbol can have.
        guards: what else is assumed of the sizes of the inputs, in Python.
        assumed: how much was assumed of the symbols when the capture was done.
    """

    call: ModuleCallEntry
    inputs: tuple[Any, ...]
    ranges: dict[Any, Any]
    guards: tuple[str, ...]
    assumed: int

    @classmethod
    def of(cls, exported: ExportedProgram) -> ExportFacts:
        """What is known of this one."""
        inputs = tuple(
            spec.arg for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
        )
        return cls(
            exported.module_call_graph[0],
            inputs,
            dict(exported.range_constraints),
            guards_of(exported),
            assumed(exported.graph),
        )


def environment_of(graph: fx.Graph) -> ShapeEnv | None:
    """What is known of the symbols in the sizes of a graph's inputs."""
    environments = (
        size.node.shape_env
        for node in graph.find_nodes(op="placeholder")
        for size in getattr(node.meta.get("val"), "shape", ())
        if isinstance(size, SymInt)
    )
    return next(environments, None)


def assumed(graph: fx.Graph) -> int:
    """How many guards and settled symbols the sizes of a graph's inputs come with."""
    environment = environment_of(graph)
    return 0 if environment is None else count_assumptions(environment)
