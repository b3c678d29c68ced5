"""Run a program on channel numbers.

Every node is executed twice: on fake tensors, for its shape, and by its rule, for the channels. A node whose
operator has no rule freezes the channels it is given; it never fails and never guesses.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.base import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    OpOverload,
    free_unbacked_symbols,
    pytree,
    schema_of,
    silent_fake_tensors,
    tolerable,
)
from fasp_fx.capturing import (
    Sizes,
    arguments,
    attribute,
    call_in_words,
    elements,
    is_dynamic,
    results,
    target_name,
    written_names,
)
from fasp_fx.errors import RuleError, VerificationError, first_line
from fasp_fx.patterns import CASTS, Rule, lookup

from ._facts import Facts
from ._letters import Relation, result_shapes_ok
from ._moves import move
from ._named import keep_numbered, name_results, tallied
from ._numbering import Axis, DoesNotApplyError, Numbering, Value, counted_by, laid_by_block

#: what fake tensors say of an operator whose result, or its shape, depends on data: the recorded shape
#: serves, for no channel of its arguments can go
_AT_RUN_TIME = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass
class Walk:
    """The result: the value of every node (a tuple for several results), its executed shape, and
    the facts.

    Attributes:
        unexecuted: why nodes, by name, do not run on what stands for their operands: on numbers in the place
            of those that data decide, say.
    """

    sizes: Sizes
    values: dict[fx.Node, Any] = field(default_factory=dict)
    executed: dict[fx.Node, Any] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    without_rule: dict[str, list[fx.Node]] = field(default_factory=dict)
    unexecuted: dict[str, str] = field(default_factory=dict)


class _Degenerate(Exception):
    """The small sizes do not suit this program."""


class Interpreter:
    """Interprets one graph module.

    Args:
        module: a functional graph whose weights are ``get_attr`` nodes.
        numbering: where each weight's and input's channel numbers come from; slots are added for names it
            does not know.
        canonical: for each name of a weight, the name under which its storage is known (tied weights share
            one).
        state: placeholders and output positions that may become narrower.
        overrides: for weights already rewritten, the original numbers along each dimension.
        strict: whatever does not execute, has no numbers or does not fit its rule is an error.
        unexecuted: nodes that may fail to execute all the same: their channels are frozen (:class:`Walk`).
        heads: note which channels belong to one head, wherever two activations are contracted head by head.
        experts: follow the numbers by which a router names experts.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        numbering: Numbering,
        canonical: dict[str, str],
        state_inputs: frozenset[str] = frozenset(),
        state_outputs: frozenset[int] = frozenset(),
        overrides: dict[str, list[Tensor | None]] | None = None,
        strict: bool = False,
        heads: bool = False,
        experts: bool = False,
        unexecuted: Collection[str] = (),
    ) -> None:
        self.module, self.numbering, self.canonical = module, numbering, canonical
        self.state_inputs, self.state_outputs = state_inputs, state_outputs
        self.overrides, self.strict, self.heads, self.experts = overrides or {}, strict, heads, experts
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.unexecuted = unexecuted
        #: what operators gave, by what they were called with
        self.known: dict[str, Any] = {}
        #: weights whose content changes from call to call
        self.written = {canonical.get(name, name) for name in written_names(module.graph)}

    def run(self, small: bool | None = None) -> Walk:
        """Walk the graph once.

        Args:
            small: at small sizes or at those of the example inputs; ``None``: small if the program runs at
                them.
        """
        with counted_by(self._staying()), silent_fake_tensors():  # what does not run is told otherwise
            if small is not None:
                return self._run(small)
            try:
                return self._run(small=True)
            except _Degenerate:
                return self._run(small=False)

    def _staying(self) -> np.ndarray | None:
        """How many channels of its weight stay before each channel, where some are gone."""
        if not self.overrides:
            return None
        found = np.arange(self.numbering.total)
        for name, numbers in self.overrides.items():
            for dim, own in enumerate(numbers):
                slot = self.numbering.get(name, dim)
                if own is not None and slot is not None:
                    found[own.reshape(-1).numpy()] = slot.base + np.arange(own.numel())
        return found

    def _run(self, small: bool) -> Walk:
        walk = Walk(Sizes(self.module, small))
        for node in self.module.graph.nodes:
            getattr(self, f"_{node.op}")(node, walk, small)
        return walk

    def _like(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same layout."""
        with self.mode:
            return torch.empty_strided(
                tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )

    # --- leaves

    def _axes(self, name: str, shape: tuple[int, ...], kind: str, dims: list[int]) -> list[Axis]:
        axes = []
        for dim in (dim for dim in dims if shape[dim] > 1):
            given = (
                self.overrides[name][dim]
                if name in self.overrides and dim < len(self.overrides[name])
                else None
            )
            if given is None:
                slot = self.numbering.get(name, dim)
                if slot is None and self.strict:
                    raise VerificationError(
                        f"'{name}' has {shape[dim]} channels along dimension {dim} that were not there before"
                    )
                slot = slot or self.numbering.add(name, dim, shape[dim], kind)
                given = slot.numbers()
            numbers, along = self._laid(self.numbering.speaking(given), name, dim, shape), dim
            if kind == "input" and bool((numbers == numbers.narrow(dim, 0, 1)).all()):
                # Whole heads of a cache.
                numbers = numbers.narrow(dim, 0, 1)
                along = next((d for d, size in enumerate(numbers.shape) if size > 1), dim)
            if bool((numbers != numbers.reshape(-1)[0]).any()):  # one number for all is no axis
                axes.append(Axis(numbers, along, (name, dim)))
        return axes

    def _laid(self, given: Tensor, name: str, dim: int, shape: tuple[int, ...]) -> Tensor:
        """The numbers along one dimension of a weight, in its rank; those of blocks vary along the dimension
        that these divide.
        """
        if given.dim() == 1:
            return given.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        slot = self.numbering.get(name, dim)
        assert slot is not None
        assert slot.block_dim is not None
        if shape[slot.block_dim] % given.shape[0]:
            raise VerificationError(
                f"dimension {slot.block_dim} of '{name}' is {shape[slot.block_dim]}, not a multiple of its"
                f" {given.shape[0]} blocks"
            )
        return laid_by_block(given, dim, slot.block_dim, shape)

    def _placeholder(self, node: fx.Node, walk: Walk, small: bool) -> None:
        recorded = node.meta.get("val")
        with self.mode:
            executed = walk.sizes.concrete(recorded)
        if not isinstance(recorded, Tensor):
            walk.executed[node] = walk.values[node] = executed
            return
        walk.executed[node] = executed = self._like(executed)
        # Part of other dimensions' numbers.
        inside = {self.numbering.blocked.get((node.name, dim), (None, 1))[0] for dim in range(recorded.dim())}
        static = [
            dim for dim, size in enumerate(recorded.shape) if not is_dynamic(size) and dim not in inside
        ]
        axes = self._axes(node.name, tuple(executed.shape), "input", static)
        walk.values[node] = Value(tuple(executed.shape), tuple(axes))
        if node.name not in self.state_inputs:
            walk.facts.freeze(axes, f"reaches the input '{node.name}'", node)

    def _get_attr(self, node: fx.Node, walk: Walk, small: bool) -> None:
        tensor = attribute(self.module, target_name(node))
        if not isinstance(tensor, Tensor):
            walk.values[node] = walk.executed[node] = tensor
            return
        name = self.canonical.get(target_name(node), target_name(node))
        shape = tuple(tensor.shape)
        walk.executed[node] = self._like(tensor)
        axes = self._axes(name, shape, "weight", list(range(len(shape))))
        is_index = tensor.dtype in (torch.int32, torch.int64) and name not in self.written
        known = is_index and tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)
        data = tensor.detach().cpu() if known else None
        walk.values[node] = Value(shape, tuple(axes), True, name, data)

    def _output(self, node: fx.Node, walk: Walk, small: bool) -> None:
        for index, result in enumerate(results(self.module.graph)):
            value = walk.values.get(result) if isinstance(result, fx.Node) else None
            if isinstance(value, Value) and value.names is not None:
                walk.facts.say(walk.facts.frozen, value.names, f"named by number in output {index}", node)
            if isinstance(value, Value) and index not in self.state_outputs:
                walk.facts.freeze(value.axes, f"reaches output {index}", node)

    # --- operators

    def _call_function(self, node: fx.Node, walk: Walk, small: bool) -> None:
        executed = self._execute(node, walk, small)
        walk.executed[node] = executed
        if node.target is operator.getitem:
            source, index = arguments(node)["0"], arguments(node)["1"]
            if isinstance(walk.values.get(source), (list, tuple)):
                walk.values[node] = walk.values[source][index]
                return
        shapes = _shapes(executed)
        if not shapes:
            self._read(node, walk)
            walk.values[node] = executed
            return
        values = self._apply(node, walk, shapes)
        if node.name in walk.unexecuted:
            given = _tensors(_arguments(node, walk.values)[0])
            why = f"{node.target} does not run on stand-ins ({walk.unexecuted[node.name]})"
            self._freeze_given(node, walk, [*given, *values], why)
        for value in values:
            walk.facts.boxes_of(value, node)
        walk.values[node] = _in_place_of_tensors(executed, iter(values))

    _call_module = _call_method = _call_function

    def _read(self, node: fx.Node, walk: Walk) -> None:
        """What an operator returns no tensor of, it has read all the same."""
        named, _ = _arguments(node, walk.values)
        if node.target is torch.ops.aten.sym_size.int:
            counted = named["self"].at(named["dim"] % len(named["self"].shape))
            walk.facts.freeze(counted, f"their number is read by {node.target}", node)
        elif lookup(node.target) is None:
            self._freeze_given(node, walk, _tensors(named))

    def _execute(self, node: fx.Node, walk: Walk, small: bool) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), walk.executed.__getitem__)
        try:
            if node.op != "call_function" or not callable(node.target):
                raise NotImplementedError(f"{node.op} is not executed while analysing")
            with self.mode:
                executed = self._made(node, args, kwargs, walk)
        except tolerable(Exception) as error:
            if not _is_decided_later(node, error):
                if self.strict and node.name not in self.unexecuted:
                    raise VerificationError(
                        f"node '{node.name}' ({node.target}) no longer executes: {error}"
                    ) from error
                if small and walk.sizes.assigned:
                    raise _Degenerate from error
                walk.unexecuted[node.name] = f"{type(error).__name__}: {first_line(error)}"
            with self.mode:
                # Decided by data, or higher-order, say: the recorded shape serves.
                executed = walk.sizes.concrete(node.meta.get("val"))
        fits = all(0 not in shape for shape in _shapes(executed)) and walk.sizes.fit(
            node.meta.get("val"), executed
        )
        if small and walk.sizes.assigned and not self.strict and not fits:
            raise _Degenerate
        return executed

    def _made(self, node: fx.Node, args: Any, kwargs: Any, walk: Walk) -> Any:
        """What a node gives; an operator is run once for each kind of call, since layers are alike."""
        if not isinstance(node.target, OpOverload):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        call = call_in_words(node, walk.executed.__getitem__)
        if call not in self.known:
            if schema_of(node.target).is_mutable:  # writes into a copy
                args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            self.known[call] = node.target(*args, **kwargs)
        return self.known[call]

    def _apply(self, node: fx.Node, walk: Walk, shapes: list[tuple[int, ...]]) -> list[Value]:
        named, nodes = _arguments(node, walk.values)
        given = _tensors(named)
        rule = lookup(node.target)
        if rule is not None and rule.creates:
            return [self._created(node, rule, shapes[0])]
        constant = bool(given) and all(value.constant for value in given)
        values = [Value(shape, (), constant) for shape in shapes]
        if rule is None:
            self._freeze_given(node, walk, given)
        elif rule.moves or rule.tallies or (rule.alternatives and any(value.axes for value in given)):
            found = self._by_rule(node, rule, named, nodes, shapes, walk)
            if isinstance(found, str):
                # Numbers do not fit (sizes known only at run time, say): the operator freezes what it
                # touches, as one without a rule.
                why = f"{node.target} is called in a way that its rule does not speak of ({found})"
                self._freeze_given(node, walk, given, why)
            else:
                values = found
                self._freeze_unnamed(node, rule, named, walk.facts)
                keep_numbered(node, rule, named, walk.facts, self.experts)
        if given and all(value.created for value in given):
            values = [replace(value, created=True) for value in values]
        for dim in (dim for name, dim in self.numbering.stretched if name == node.name):
            axes = (*values[0].axes, *self._axes(node.name, shapes[0], "created", [dim]))
            values = [replace(values[0], axes=axes)]
        return values if not self.experts else name_results(node, rule, named, values, walk.facts)

    def _freeze_given(self, node: fx.Node, walk: Walk, given: list[Value], why: str | None = None) -> None:
        """Freeze all channels that a node is given; unless there is a reason why its rule does not serve, for
        want of one.
        """
        if why is None:
            writer = _writer(node)
            why = f"no rule for {node.target}" if writer is None else f"written by {writer}"
            if any(value.axes for value in given) and writer is None:
                walk.without_rule.setdefault(str(node.target), []).append(node)
        walk.facts.freeze((axis for value in given for axis in value.axes), why, node)

    def _cast(self, node: fx.Node, walk: Walk, source: Value) -> Value:
        """The same channels; and the same weight, unless it is one of integers, which mean something else
        than what they are cast to.
        """
        floats = all(walk.executed[tensor].is_floating_point() for tensor in (node, node.all_input_nodes[0]))
        return Value(source.shape, source.axes, source.constant, source.origin if floats else None)

    def _created(self, node: fx.Node, rule: Rule, shape: tuple[int, ...]) -> Value:
        """A tensor of equal elements has channels of its own wherever its size is fixed: what it meets
        decides whether they can go.
        """
        sizes = arguments(node)[rule.all("shape")[0].words[0]]
        fixed = (
            [dim for dim, size in enumerate(sizes) if isinstance(size, int)]
            if isinstance(sizes, (list, tuple))
            else []
        )
        return Value(shape, tuple(self._axes(node.name, shape, "created", fixed)), True, created=True)

    def _freeze_unnamed(self, node: fx.Node, rule: Rule, named: dict[str, Any], facts: Facts) -> None:
        """Channels of an operand that the rule does not name would be lost."""
        known = {
            rule.moves,
            *(clause.words[0] for clause in rule.all("ignore")),
            *(operand.name for alternative in rule.alternatives for operand in alternative.operands),
        }
        unnamed = elements({name: value for name, value in named.items() if name not in known})
        left = _tensors({name: value for name, value in unnamed.items() if name not in known})
        axes = (axis for value in left for axis in value.axes)
        facts.freeze(axes, f"decides by position in {node.target}", node)

    def _by_rule(
        self,
        node: fx.Node,
        rule: Rule,
        named: dict[str, Any],
        nodes: dict[str, fx.Node | None],
        shapes: list[tuple[int, ...]],
        walk: Walk,
    ) -> list[Value] | str:
        """The results as the rule gives them, or why it does not serve for this call."""
        if str(node.target) in CASTS:
            return [self._cast(node, walk, named["self"])]
        only = (clause.words for clause in rule.all("only"))
        if any(named.get(name) != int(value) for name, value in only):
            return "its arguments are others"
        if rule.tallies:
            found = tallied(rule, named, shapes[0]) if self.experts else None
            return found or "no number names a position"
        try:
            if rule.moves:
                return move(node, rule, named, shapes, walk.facts, walk.sizes)
            relation = Relation(
                node, rule, {**named, **elements(named)}, nodes, walk.facts, self.numbering, self.experts
            )
            if self.heads:
                relation.couple_heads()
            results = relation.run()
        except DoesNotApplyError as error:
            return first_line(error)
        except tolerable(Exception) as error:  # ours, or of a rule that does not fit its operator
            raise RuleError(
                f"the rule of {node.target} fails at node '{node.name}': {type(error).__name__}:"
                f" {first_line(error)}; give it another one with fasp_fx.patterns.register()"
            ) from error
        values = [
            Value(shape, tuple(axes), constant)
            for shape, (axes, constant) in zip(shapes, results, strict=False)
        ]
        if len(results) != len(shapes) or not result_shapes_ok(
            values, [torch.Size(shape) for shape in shapes]
        ):
            return "its results have other dimensions"
        return values


def _is_decided_later(node: fx.Node, error: Exception) -> bool:
    """Whether a node cannot be executed here because of what only data decide: numbers for which those that
    stand for them can be out of range; or is given graphs, and has no rule: not all of these can be executed
    on fake tensors without the symbols of a capture (loops). What either is given stays, and so does the
    shape of what it returns.
    """
    sources = [source.meta.get("val") for source in node.all_input_nodes]
    by_data = any(isinstance(value, torch.SymInt) and free_unbacked_symbols(value) for value in sources)
    unseen = isinstance(node.target, HigherOrderOperator) and lookup(node.target) is None
    return isinstance(error, _AT_RUN_TIME) or unseen or (by_data and isinstance(error, IndexError))


def _writer(node: fx.Node) -> OpOverload | None:
    """The operator that writes into one of the arguments of a node: a buffer or an input that the model
    changes, which nothing can make smaller. An exporter hands it to a higher-order operator that gives the
    changed arguments back.
    """
    called = node.args[0] if isinstance(node.target, HigherOrderOperator) and node.args else node.target
    return called if isinstance(called, OpOverload) and schema_of(called).is_mutable else None


def _shapes(executed: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(executed) if isinstance(leaf, Tensor)]


def _in_place_of_tensors(executed: Any, values: Iterator[Value]) -> Any:
    """What a node returned, with what is known of each tensor in its place."""
    if isinstance(executed, (list, tuple)):
        return tuple(_in_place_of_tensors(item, values) for item in executed)
    return next(values) if isinstance(executed, Tensor) else executed


def _tensors(named: dict[str, Any]) -> list[Value]:
    found: list[Value] = []
    for argument in named.values():
        items = argument if isinstance(argument, (list, tuple)) else [argument]
        found += [item for item in items if isinstance(item, Value)]
    return found


def _arguments(node: fx.Node, values: dict[fx.Node, Any]) -> tuple[dict[str, Any], dict[str, fx.Node | None]]:
    """Arguments by schema name, with values for nodes; and the node behind each argument that is one."""
    given = arguments(node)
    nodes = {
        name: value if isinstance(value, fx.Node) else None
        for name, value in {**given, **elements(given)}.items()
    }
    return {name: fx.map_arg(value, lambda n: values.get(n)) for name, value in given.items()}, nodes
