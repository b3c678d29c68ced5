"""Run a program on channel numbers.

Every node is executed twice: on fake tensors, for its shape, and by its rule, for the channels. A node whose
operator has no rule freezes the channels it is given; it never fails and never guesses.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
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
    tensors_in,
    tolerable,
)
from fasp_fx.capturing import (
    Program,
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
from fasp_fx.patterns import CASTS, DoesNotApplyError, Rule, lookup

from ._call import Call
from ._choices import keep_numbered, name_results, tallied
from ._facts import Facts
from ._moves import Move
from ._numbering import Axis, Numbering, Value, counted_by, laid_by_block
from ._relation import Relation, fits

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
    """Interprets one program.

    Args:
        program: with a functional graph whose weights are ``get_attr`` nodes.
        numbering: where each weight's and input's channel numbers come from; slots are added for names it
            does not know.
        granularity: with ``"head"``, it is noted which channels belong to one head, wherever two activations
            are contracted head by head; with ``"expert"``, the numbers by which a router names experts are
            followed.
        overrides: for weights already rewritten, the original numbers along each dimension.
        reference: of the program that this one was rewritten from: sizes are those of that walk. What
            executed there and does not here, or has channels here and had none there, is an error.
    """

    def __init__(
        self,
        program: Program,
        numbering: Numbering,
        granularity: Collection[str] = (),
        overrides: Mapping[str, list[Tensor | None]] | None = None,
        reference: Walk | None = None,
    ) -> None:
        self.program, self.module, self.numbering = program, program.module, numbering
        self.granularity, self.overrides, self.reference = granularity, overrides or {}, reference
        #: for each name of a weight, the name under which its storage is known: tied weights share one
        self.canonical = program.canonical()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        #: what operators gave, by what they were called with
        self.results: dict[str, Any] = {}
        #: weights whose content changes from call to call
        self.written = {self.canonical.get(name, name) for name in written_names(self.module.graph)}

    def run(self) -> Walk:
        """Walk the graph once, at small sizes if the program runs at them, else at those of the example
        inputs.
        """
        with counted_by(self._staying()), silent_fake_tensors():  # what does not run is told otherwise
            if self.reference is not None:
                return self._run(self.reference.sizes.small)
            try:
                return self._run(small=True)
            except _Degenerate:
                return self._run(small=False)

    def _staying(self) -> np.ndarray | None:
        """How many channels of its weight stay before each channel, where some are gone."""
        staying = np.arange(self.numbering.total)
        for name, numbers in self.overrides.items():
            for dim, along in enumerate(numbers):
                slot = self.numbering.get(name, dim)
                if along is not None and slot is not None:
                    staying[along.reshape(-1).numpy()] = slot.base + np.arange(along.numel())
        return staying if self.overrides else None

    def _run(self, small: bool) -> Walk:
        walk = Walk(Sizes(self.module, small))
        for node in self.module.graph.nodes:
            getattr(self, f"_{node.op}")(node, walk)
        return walk

    def _like(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same layout."""
        with self.mode:
            return torch.empty_strided(
                tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )

    # --- leaves

    def _axes(self, name: str, shape: tuple[int, ...], kind: str, dims: Iterable[int]) -> list[Axis]:
        axes = []
        for dim in (dim for dim in dims if shape[dim] > 1):
            numbers, along = self._numbers(name, shape, kind, dim), dim
            if kind == "input" and bool((numbers == numbers.narrow(dim, 0, 1)).all()):
                # Whole heads of a cache.
                numbers = numbers.narrow(dim, 0, 1)
                along = next((d for d, size in enumerate(numbers.shape) if size > 1), dim)
            if bool((numbers != numbers.reshape(-1)[0]).any()):  # one number for all is no axis
                axes.append(Axis(numbers, along, (name, dim)))
        return axes

    def _numbers(self, name: str, shape: tuple[int, ...], kind: str, dim: int) -> Tensor:
        """The numbers along one dimension of a weight, in its rank; those of blocks vary along the dimension
        that these divide.
        """
        slot, left = self.numbering.get(name, dim), dict(enumerate(self.overrides.get(name, ()))).get(dim)
        if slot is None and left is None and self.reference is not None:
            raise VerificationError(
                f"'{name}' has {shape[dim]} channels along dimension {dim} that were not there before"
            )
        if left is None:
            slot = slot or self.numbering.add(name, dim, shape[dim], kind)
            left = slot.numbers()
        numbers = self.numbering.speaking(left)
        if numbers.dim() == 1 or slot is None or slot.block_dim is None:
            return numbers.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        if shape[slot.block_dim] % numbers.shape[0]:
            raise VerificationError(
                f"dimension {slot.block_dim} of '{name}' is {shape[slot.block_dim]}, not a multiple of its"
                f" {numbers.shape[0]} blocks"
            )
        return laid_by_block(numbers, dim, slot.block_dim, shape)

    def _placeholder(self, node: fx.Node, walk: Walk) -> None:
        recorded = node.meta.get("val")
        with self.mode:
            executed = walk.sizes.concrete(recorded)
        walk.executed[node] = walk.values[node] = executed
        if not isinstance(recorded, Tensor):
            return
        walk.executed[node], shape = self._like(executed), tuple(executed.shape)
        # Part of other dimensions' numbers.
        inside = {self.numbering.blocked.get((node.name, dim), (None, 1))[0] for dim in range(len(shape))}
        fixed = [dim for dim, size in enumerate(recorded.shape) if not is_dynamic(size)]
        axes = self._axes(node.name, shape, "input", [dim for dim in fixed if dim not in inside])
        walk.values[node] = Value(shape, tuple(axes))
        if node.name not in self.program.state_inputs:
            walk.facts.freeze(axes, f"reaches the input '{node.name}'", node)

    def _get_attr(self, node: fx.Node, walk: Walk) -> None:
        tensor = attribute(self.module, target_name(node))
        walk.values[node] = walk.executed[node] = tensor
        if not isinstance(tensor, Tensor):
            return
        name, shape = self.canonical.get(target_name(node), target_name(node)), tuple(tensor.shape)
        walk.executed[node] = self._like(tensor)
        axes = tuple(self._axes(name, shape, "weight", range(len(shape))))
        is_index = tensor.dtype in (torch.int32, torch.int64) and name not in self.written
        is_real = tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)
        walk.values[node] = Value(
            shape, axes, True, name, tensor.detach().cpu() if is_index and is_real else None
        )

    def _output(self, node: fx.Node, walk: Walk) -> None:
        for index, result in enumerate(results(self.module.graph)):
            value = walk.values.get(result) if isinstance(result, fx.Node) else None
            if isinstance(value, Value) and value.names is not None:
                why = f"named by number in output {index}"
                walk.facts.say(walk.facts.remarks.frozen, value.names, why, node)
            if isinstance(value, Value) and index not in self.program.state_outputs:
                walk.facts.freeze(value.axes, f"reaches output {index}", node)

    # --- operators

    def _call_function(self, node: fx.Node, walk: Walk) -> None:
        walk.executed[node] = walk.values[node] = executed = self._execute(node, walk)
        shapes = [tuple(leaf.shape) for leaf in tensors_in(executed)]
        several = walk.values.get(node.args[0]) if node.target is operator.getitem else None  # type: ignore[arg-type]
        if isinstance(several, (list, tuple)):
            walk.values[node] = several[arguments(node)["1"]]
        elif not shapes:
            self._read(node, walk)
        else:
            values = self._apply(node, walk, shapes)
            if node.name in walk.unexecuted:
                operands = _known(_values(arguments(node), walk))
                why = f"{node.target} does not run on stand-ins ({walk.unexecuted[node.name]})"
                self._freeze_operands(node, walk, [*operands, *values], why)
            for value in values:
                walk.facts.boxes_of(value, node)
            walk.values[node] = _in_place_of_tensors(executed, iter(values))

    _call_module = _call_method = _call_function

    def _read(self, node: fx.Node, walk: Walk) -> None:
        """What an operator returns no tensor of, it has read all the same."""
        operands = _values(arguments(node), walk)
        if node.target is torch.ops.aten.sym_size.int:
            counted = operands["self"].at(operands["dim"] % len(operands["self"].shape))
            walk.facts.freeze(counted, f"their number is read by {node.target}", node)
        elif lookup(node.target) is None:
            self._freeze_operands(node, walk, _known(operands))

    def _execute(self, node: fx.Node, walk: Walk) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), walk.executed.__getitem__)
        try:
            if node.op != "call_function" or not callable(node.target):
                raise NotImplementedError(f"{node.op} is not executed while analysing")
            with self.mode:
                executed = self._result(node, args, kwargs, walk)
        except tolerable(Exception) as error:
            if not _is_decided_later(node, error):
                if self.reference is not None and node.name not in self.reference.unexecuted:
                    raise VerificationError(
                        f"node '{node.name}' ({node.target}) no longer executes: {error}"
                    ) from error
                if walk.sizes.small and walk.sizes.assigned:
                    raise _Degenerate from error
                walk.unexecuted[node.name] = f"{type(error).__name__}: {first_line(error)}"
            with self.mode:
                # Decided by data, or higher-order, say: the recorded shape serves.
                executed = walk.sizes.concrete(node.meta.get("val"))
        is_full = all(leaf.numel() for leaf in tensors_in(executed))
        fit = is_full and walk.sizes.fit(node.meta.get("val"), executed)
        if walk.sizes.small and walk.sizes.assigned and self.reference is None and not fit:
            raise _Degenerate
        return executed

    def _result(self, node: fx.Node, args: Any, kwargs: Any, walk: Walk) -> Any:
        """What a node gives; an operator is run once for each kind of call, since layers are alike."""
        if not isinstance(node.target, OpOverload):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        call = call_in_words(node, walk.executed.__getitem__)
        if call not in self.results:
            if schema_of(node.target).is_mutable:  # writes into a copy
                args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            self.results[call] = node.target(*args, **kwargs)
        return self.results[call]

    def _apply(self, node: fx.Node, walk: Walk, shapes: list[tuple[int, ...]]) -> list[Value]:
        written, rule = arguments(node), lookup(node.target)
        values = _values(written, walk)
        operands, experts = _known(values), "expert" in self.granularity
        if rule is not None and rule.creates:
            return [self._created(node, rule, shapes[0])]
        constant = bool(operands) and all(value.constant for value in operands)
        results = [Value(shape, (), constant) for shape in shapes]
        call = None if rule is None else Call(node, rule, values, written, shapes)
        if call is None:
            self._freeze_operands(node, walk, operands)
        elif (
            call.rule.moves
            or call.rule.tallies
            or (call.rule.alternatives and any(value.axes for value in operands))
        ):
            try:
                results = self._by_rule(call, walk)
                self._freeze_unnamed(call, walk.facts)
                clauses = [*call.rule.all("index"), *([] if experts else call.rule.all("choose"))]
                keep_numbered(call, clauses, walk.facts)
            except DoesNotApplyError as error:
                # Numbers do not fit (sizes known only at run time, say): the operator freezes what it
                # touches, as one without a rule.
                why = f"{node.target} is called in a way that its rule does not speak of ({error})"
                self._freeze_operands(node, walk, operands, why)
        if operands and all(value.created for value in operands):
            results = [replace(value, created=True) for value in results]
        for dim in (dim for name, dim in self.numbering.stretched if name == node.name):
            axes = (*results[0].axes, *self._axes(node.name, shapes[0], "created", [dim]))
            results = [replace(results[0], axes=axes)]
        return name_results(node, values, call, results, walk.facts) if experts else results

    def _freeze_operands(
        self, node: fx.Node, walk: Walk, operands: list[Value], why: str | None = None
    ) -> None:
        """Freeze all channels of a node's operands; unless there is a reason why its rule does not serve, for
        want of one.
        """
        if why is None:
            # A buffer or an input that the model changes, nothing can make smaller. An exporter hands the
            # operator that writes to a higher-order one that gives the changed arguments back.
            handed = isinstance(node.target, HigherOrderOperator) and node.args
            called = node.args[0] if handed else node.target
            writes = isinstance(called, OpOverload) and schema_of(called).is_mutable
            why = f"written by {called}" if writes else f"no rule for {node.target}"
            if any(value.axes for value in operands) and not writes:
                walk.without_rule.setdefault(str(node.target), []).append(node)
        walk.facts.freeze((axis for value in operands for axis in value.axes), why, node)

    def _created(self, node: fx.Node, rule: Rule, shape: tuple[int, ...]) -> Value:
        """A tensor of equal elements has channels of its own wherever its size is fixed: what it meets
        decides whether they can go.
        """
        sizes = arguments(node)[rule.all("shape")[0].words[0]]
        sizes = sizes if isinstance(sizes, (list, tuple)) else ()
        fixed = (dim for dim, size in enumerate(sizes) if isinstance(size, int))
        return Value(shape, tuple(self._axes(node.name, shape, "created", fixed)), True, created=True)

    def _freeze_unnamed(self, call: Call, facts: Facts) -> None:
        """Channels of an operand that the rule does not name would be lost; of its other arguments a cast
        reads type and place alone.
        """
        declared = {operand.name for form in call.rule.alternatives for operand in form.operands}
        unnamed = {
            name: argument
            for name, argument in elements(call.arguments).items()
            if name not in declared and name.partition(".")[0] not in (call.rule.moves, *declared)
        }
        operands = _known(unnamed) if str(call.node.target) not in CASTS else []
        why = f"decides by position in {call.node.target}"
        facts.freeze((axis for value in operands for axis in value.axes), why, call.node)

    def _by_rule(self, call: Call, walk: Walk) -> list[Value]:
        """The results as the rule gives them.

        Raises:
            DoesNotApplyError: it does not serve for this call.
        """
        node, rule = call.node, call.rule
        if str(node.target) in CASTS:
            # The same channels; and the same weight, unless it is one of integers, which mean something else
            # than what they are cast to.
            source, both = call.arguments["self"], (node, node.all_input_nodes[0])
            floats = all(walk.executed[tensor].is_floating_point() for tensor in both)
            return [Value(source.shape, source.axes, source.constant, source.origin if floats else None)]
        only = (clause.words for clause in rule.all("only"))
        if any(call.arguments.get(name) != int(value) for name, value in only):
            raise DoesNotApplyError("its arguments are others")
        if rule.tallies:
            return tallied(call, "expert" in self.granularity)
        try:
            if rule.moves:
                return Move(call, walk.facts, walk.sizes).run()
            relation = Relation(call, walk.facts, self.numbering)
            if "head" in self.granularity:
                relation.couple_heads()
            results = relation.run()
        except DoesNotApplyError:
            raise
        except tolerable(Exception) as error:  # ours, or of a rule that does not fit its operator
            raise RuleError(
                f"the rule of {node.target} fails at node '{node.name}': {type(error).__name__}:"
                f" {first_line(error)}; give it another one with fasp_fx.patterns.register()"
            ) from error
        constant = relation.operands.constant
        values = [Value(shape, tuple(axes), constant) for shape, axes in zip(call.shapes, results)]
        if len(results) != len(call.shapes) or not fits(values, call.shapes):
            raise DoesNotApplyError("its results have other dimensions")
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


def _in_place_of_tensors(executed: Any, values: Iterator[Value]) -> Any:
    """What a node returned, with what is known of each tensor in its place."""
    if isinstance(executed, (list, tuple)):
        return tuple(_in_place_of_tensors(item, values) for item in executed)
    return next(values) if isinstance(executed, Tensor) else executed


def _known(arguments: dict[str, Any]) -> list[Value]:
    """What is known of the tensors among some arguments."""
    return [leaf for leaf in elements(arguments).values() if isinstance(leaf, Value)]


def _values(written: dict[str, Any], walk: Walk) -> dict[str, Any]:
    """Arguments with what is known of nodes in their place."""
    return {name: fx.map_arg(argument, walk.values.get) for name, argument in written.items()}
