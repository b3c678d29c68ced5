"""Make the caller's own module smaller by the plan of a result."""

from __future__ import annotations

import itertools
import math
import operator
import re
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fasp_fx.analysis import PruningPlan, analyze_program, check_structure, gone_of, steps_to
from fasp_fx.base import (
    annotated_nodes,
    annotating,
    deviation,
    device_of,
    free_unbacked_symbols,
    pytree,
    tolerable,
    tolerance,
)
from fasp_fx.calibration import Decision
from fasp_fx.capturing import (
    ExportFacts,
    Program,
    arguments,
    attribute,
    capture,
    is_pure,
    model_copy,
    noting_reads,
    recorded_shapes,
    results,
    rewound,
    said_of_reads,
    target_name,
    trouble_with,
)
from fasp_fx.errors import EagerError, first_line
from fasp_fx.passes import PrunedModule, finish, fused_weights, split_fused
from fasp_fx.patterns import RESHAPES, lookup

from .check import Checker

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
#: what is assumed of a size that does not vary
_SETTLED = re.compile(r".+\.size\(\)\[\d+\] == \d+")


def eager(pruned: nn.Module, plan: PruningPlan, model: nn.Module) -> nn.Module:
    """See :meth:`fasp_fx.Result.eager`; ``pruned`` and ``plan`` are the result's."""
    for step in steps_to(plan, dict(model.named_parameters(remove_duplicate=False))):
        model = _made_by(step, model, pruned)
    check_structure(plan, _read(pruned, plan, model))
    smaller = _Copy(pruned, plan, model)
    with rewound(model):
        model.eval()
        wrong = smaller.difference()
        if wrong is not None:
            smaller.set_sizes()
            wrong = smaller.difference()
    if wrong is not None:
        raise EagerError(
            f"no copy of {type(model).__name__} computes what the pruned program does: {wrong}; use"
            ' result.module, prune whole heads (granularity=("channel", "head")), exclude= what is named'
            " here, or see what a class cannot say in docs/eager.md"
        )
    for path, inner in model.named_modules():
        smaller.module.get_submodule(path).training = inner.training
    return smaller.module


def _read(pruned: nn.Module, plan: PruningPlan, model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model that a program holds, which lacks what a capture leaves out: the plan was
    made for them.
    """
    known = {
        *(name for name, _ in pruned.named_parameters(remove_duplicate=False)),
        *(split.source for split in plan.splits),
        *(source for weight in plan.folds for source in weight.sources),
    }
    return {name: tensor for name, tensor in model.named_parameters(remove_duplicate=False) if name in known}


def _made_by(plan: PruningPlan, model: nn.Module, later: Any) -> nn.Module:
    """A copy of a model at the sizes that a plan makes, with the model's own weights.

    Args:
        later: the module of a later result, which is called as the model is.

    Raises:
        PlanError, VerificationError, EagerError: the plan cannot be carried out here.
    """
    with rewound(model):
        program = capture(model.eval(), *_called(later, device_of(model)).call())
    check_structure(plan, program.parameters())
    analysis = analyze_program(program, split_fused, plan.granularity, plan.include)
    checker = Checker(program, analysis, Decision(gone_of(plan, analysis)))
    return eager(checker.run(strict=True).module, plan, model)


def _called(pruned: Any, device: torch.device) -> Program:
    """The program of a result, with its example inputs on a device.

    Raises:
        EagerError: there are none.
    """
    origin = pruned.fasp_fx_origin
    if origin.example is None:
        raise EagerError(
            "the program of the result holds no example inputs, on which a copy could be captured; use"
            " result.module"
        )
    example = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), origin.example)
    return Program(pruned, origin.signature, example)


class _Copy:
    """A copy of the caller's model that holds the weights of a result, and the program that it is to be.

    Raises:
        EagerError: the result holds no example inputs, on which the copy could be captured, or the model
            cannot be copied.
    """

    def __init__(self, pruned: Any, plan: PruningPlan, model: nn.Module) -> None:
        self.pruned, self.plan, self.model = pruned, plan, model
        self.program = _called(pruned, device_of(pruned))
        #: what it computes, as it was captured and rewritten
        self.graph = pruned.fasp_fx_origin.body()[0]
        self.module = copied_with(model, pruned, plan).eval()
        say_sizes(model, self.module)

    def set_sizes(self) -> None:
        """Set the attributes that arrive as sizes in the model's graph to what the program has there."""
        with rewound(self.model), tagged(self.model):
            dense = self._captured(self.model).module.graph
        sizes, parted = observed(dense, self.graph)
        sizes = {
            place: left_of(value, place[0], self.model, self.module, self.plan)
            for place, value in parted.items()
        } | sizes
        for (path, name), value in sizes.items():
            setattr(self.module.get_submodule(path), name, value)
        say_sizes(self.model, self.module)

    def difference(self) -> str | None:
        """Where the copy computes anything else than the program, captured or called, in words."""
        read: list[str] = []
        try:
            with noting_reads(self.model, self.module) as read:
                program = self._captured(self.module)
            if self.plan.splits:
                options = self.plan.granularity, self.plan.include
                program = analyze_program(program, split_fused, *options).program
            wrong = first_difference(
                cast(PrunedModule, finish(program)), self.pruned, [weight.name for weight in self.plan.folds]
            )
            if wrong is None:  # a module can ask whether it is captured
                args, kwargs = self.program.call()
                trouble = trouble_with(self.program, self.module, args, kwargs)
                wrong = trouble and f"the pruned program {trouble}, which a copy computes when called"
        except tolerable(Exception) as error:  # a module raises what it likes
            wrong = self._failed(error.__cause__ or error)
        return said_of_reads(self.model, read) if read else wrong

    def _captured(self, module: nn.Module) -> Program:
        """A module of the caller's, captured as the program was."""
        return capture(
            module,
            *self.program.call(),
            dynamic_shapes=lambda args, kwargs: recorded_shapes(self.graph, (args, kwargs), settled=True),
        )

    def _failed(self, error: BaseException) -> str:
        """What failed, in which submodule of the copy, in words."""
        paths = {id(inner): path for path, inner in self.module.named_modules()}
        running = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        path = next((paths[owner] for owner in reversed(running) if owner in paths), "")
        where = f"'{path}' ({type(self.module.get_submodule(path)).__name__})" if path else "it"
        return f"{where} fails: {type(error).__name__}: {first_line(error)}"


def copied_with(model: nn.Module, pruned: nn.Module, plan: PruningPlan) -> nn.Module:
    """Copy a model with the weights that the module of a result has now; no storage is shared with either,
    and all attributes but tensors are those of the model.

    What the program does not use (a branch that was not captured, the count of batches of a norm) is as in
    the model.

    Raises:
        EagerError: a weight cannot be had in the form that the model holds it in, or the model cannot be
            copied.
    """
    try:
        smaller, module = weights_by_original_name(pruned, plan), model_copy(model)
    except tolerable(Exception) as error:  # a module copies itself as it likes
        raise EagerError(
            f"{type(model).__name__} cannot be copied with these weights ({type(error).__name__}:"
            f" {first_line(error)}); use result.module, or prune whole heads"
        ) from error
    module.to(device_of(pruned))
    for name, tensor in tensors(module):
        if name in smaller:
            tensor.data = smaller[name].detach().clone()
    return module


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name, and every tensor that is a plain attribute; those held in several
    places under each of their names.
    """
    for path, inner in module.named_modules(remove_duplicate=False):
        if not isinstance(inner, torch.jit.ScriptModule):
            for name, value in (
                *vars(inner).items(),
                *inner.named_buffers(recurse=False, remove_duplicate=False),
                *inner.named_parameters(recurse=False, remove_duplicate=False),
            ):
                if isinstance(value, Tensor):
                    yield f"{path}.{name}" if path else name, value


def weights_by_original_name(pruned: nn.Module, plan: PruningPlan) -> dict[str, Tensor]:
    """The tensors that the module of a result holds, under their names in the model that was pruned; errors
    as for :func:`fasp_fx.passes.fused_weights`.
    """
    return dict(tensors(pruned)) | fused_weights(plan, dict(pruned.named_parameters(remove_duplicate=False)))


# --- Whether two programs are the same: the same operators, wired alike, with the same constants, weights and
# assumptions about sizes, so that what they compute is the same on every input that they take.


def first_difference(
    program: PrunedModule, expected: PrunedModule, folded: Collection[str] = ()
) -> str | None:
    """Where a program differs first from another of which it should compute the same; ``None`` if nowhere.

    Args:
        folded: the tensors that were computed of others, here or elsewhere, which may differ by rounding.
    """
    mine, its = program.fasp_fx_origin, expected.fasp_fx_origin
    text, other = _Text(mine.body()[0], program), _Text(its.body()[0], expected)
    for line, wanted in itertools.zip_longest(text.lines, other.lines):
        if line != wanted:
            return f"it computes {line} where the program computes {wanted}"
    for name, weight in text.weights.items():
        allowed = tolerance("computed weights", weight.dtype) if name in folded else 0.0
        if deviation(weight, other.weights[name]) > allowed:
            return f"'{name}' has other values than in the program"
    torn = _assumed(mine.facts) ^ _assumed(its.facts)
    return f"either it or the program alone assumes that {' and '.join(sorted(torn))}" if torn else None


def _assumed(facts: ExportFacts) -> set[str]:
    """What is assumed of the sizes that vary. A trace is of sizes from 2 on, also where a caller's bounds
    allow 0 and 1.
    """
    ranges = {
        f"{symbol} is in {2 if allowed.lower in (0, 1) else allowed.lower} to {allowed.upper}"
        for symbol, allowed in facts.ranges.items()
    }
    return ranges | {guard for guard in facts.guards if not _SETTLED.fullmatch(guard)}


class _Text:
    """A graph in words, which are those of another graph that computes the same. Arithmetic with sizes is
    said by what comes of it.

    Attributes:
        lines: a line for each input and operator, and for what it returns.
        weights: the tensors that the graph holds, by name.
    """

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._held, self._names = module, dict[fx.Node, str]()
        self.lines, self.weights = list[str](), dict[str, Tensor]()
        for node in graph.nodes:
            if node.op == "placeholder":
                self._add(node, f"input {_made(node)}")
            elif _takes_all(node):
                self._names[node] = self._value(node.args[0])
            elif node.op == "call_function" and _size(node) is node and (node.users or not is_pure(node)):
                self._add(node, self._call(node))
        self.lines.append(f"output {self._value(list(results(graph)))}")

    def _add(self, node: fx.Node, text: str) -> None:
        self._names[node] = f"%{len(self.lines)}"
        self.lines.append(f"{self._names[node]} = {text}")

    def _call(self, node: fx.Node) -> str:
        """An operator with its arguments. Those that say what shape a tensor gets, or in which parts, are
        said by what is made.
        """
        named, rule = arguments(node), lookup(node.target)
        operator = "reshape" if str(node.target) in RESHAPES else str(node.target)
        if node.target is _ATTENTION and named["scale"] is None:
            named["scale"] = 1.0 / math.sqrt(named["query"].meta["val"].shape[-1])
        for clause in () if rule is None else rule.clauses:
            if clause.keyword == "shape":
                named.pop(clause.words[0])
            if clause.keyword == "part" and isinstance(node.meta.get("val"), (list, tuple)):
                operator, (dim, sizes) = "parts", clause.words
                named.pop(sizes)
                named[dim] %= node.all_input_nodes[0].meta["val"].dim()
        words = ", ".join(f"{name}={self._value(value)}" for name, value in sorted(named.items()))
        return f"{operator}({words}): {_made(node)}"

    def _value(self, value: Any) -> str:
        value = _size(value)
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(self._value, value))}]"
        if not isinstance(value, fx.Node):
            return repr(value)
        if value.op != "get_attr":
            return self._names[value]
        name = target_name(value)
        tensor = attribute(self._held, name)
        if isinstance(tensor, fx.GraphModule):
            inner = _Text(tensor.graph, tensor)
            self.weights |= {f"{name}.{inner_name}": weight for inner_name, weight in inner.weights.items()}
            return f"{{{'; '.join(inner.lines)}}}"
        self.weights[name] = tensor.detach()
        return name


def _takes_all(node: fx.Node) -> bool:
    """Whether a node is a slice with all that there is, which exporters write or leave out by how the caller
    says that a size varies.
    """
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    named = arguments(node)
    return named["step"] == 1 and _made(node) == _made(node.all_input_nodes[0])


def _made(node: fx.Node) -> str:
    """What a node gives: types and sizes, in terms of those of the inputs."""

    def in_words(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(in_words, value))}]"
        if isinstance(value, Tensor):
            return f"{value.dtype}({', '.join(str(_size(size)) for size in value.shape)})"
        return repr(_size(value))

    return in_words(node.meta.get("val"))


def _size(argument: Any) -> Any:
    """What arithmetic with sizes comes to, in terms of those of the inputs; other arguments as they are, also
    numbers that data decide.
    """
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) or free_unbacked_symbols(value):
        return argument
    return int(value.node.expr) if value.node.expr.is_Integer else value.node.expr


# --- The attributes of modules that are sizes: what torch's own classes call those of their weights, and
# which integers of other classes arrive as sizes in a graph.

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def _length(tensor: Tensor | None, dim: int = 0) -> int | None:
    return None if tensor is None else tensor.shape[dim]


#: what torch's classes say of their weights in attributes, of which forward need not read any
_SAID: tuple[tuple[Any, dict[str, Callable[[Any], Any]]], ...] = (
    (nn.Linear, {"out_features": lambda m: _length(m.weight), "in_features": lambda m: _length(m.weight, 1)}),
    (
        nn.Bilinear,
        {
            "out_features": lambda m: _length(m.weight),
            "in1_features": lambda m: _length(m.weight, 1),
            "in2_features": lambda m: _length(m.weight, 2),
        },
    ),
    (
        _CONVOLUTIONS,
        {
            "out_channels": lambda m: _length(m.weight),
            "in_channels": lambda m: m.groups * m.weight.shape[1],
        },
    ),
    (
        _TRANSPOSED,
        {
            "out_channels": lambda m: m.groups * m.weight.shape[1],
            "in_channels": lambda m: _length(m.weight),
        },
    ),
    (_NORMS, {"num_features": lambda m: _length(m.running_mean if m.weight is None else m.weight)}),
    (nn.GroupNorm, {"num_channels": lambda m: _length(m.weight)}),
    (
        (nn.LayerNorm, nn.RMSNorm),
        {"normalized_shape": lambda m: m.weight if m.weight is None else tuple(m.weight.shape)},
    ),
    (nn.PReLU, {"num_parameters": lambda m: _length(m.weight)}),
    (
        (nn.Embedding, nn.EmbeddingBag),
        {"num_embeddings": lambda m: _length(m.weight), "embedding_dim": lambda m: _length(m.weight, 1)},
    ),
    (
        nn.RNNBase,
        {
            "input_size": lambda m: _length(m.weight_ih_l0, 1),
            "hidden_size": lambda m: len(m.weight_ih_l0) // 4 if m.proj_size else _length(m.weight_hh_l0, 1),
            "proj_size": lambda m: _length(m.weight_hr_l0) if m.proj_size else 0,
        },
    ),
    (
        nn.RNNCellBase,
        {"input_size": lambda m: _length(m.weight_ih, 1), "hidden_size": lambda m: _length(m.weight_hh, 1)},
    ),
)


def say_sizes(model: nn.Module, copy: nn.Module) -> None:
    """Have the modules of torch's classes in a copy say the sizes of the weights that they have now, where
    those of the model do so.
    """
    for path, inner in model.named_modules():
        its = copy.get_submodule(path)
        for kind, attributes in _SAID:
            for name, of in attributes.items() if isinstance(inner, kind) else ():
                if getattr(inner, name) == of(inner) is not None:
                    setattr(its, name, of(its))


#: key of ``node.meta["custom"]``: the integers among the arguments of the call that a node was recorded in,
#: where one of them is tagged
_ARRIVED = "fasp_fx_arrived"


class Tagged(int):
    """An integer attribute that says which it is. What Python computes of it is a plain integer.

    Attributes:
        place: the path of the module, and the name of the attribute.
    """

    place: tuple[str, str]


def _plainly(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A method that computes with plain integers, since symbolic ones take no others."""
    return lambda integer, other: compute(int(integer), int(other) if isinstance(other, Tagged) else other)


_COMPUTED = "add sub mul floordiv mod truediv pow lshift rshift and or xor eq ne lt le gt ge"
for _name in _COMPUTED.split():
    _compute = getattr(operator, f"__{_name}__")
    setattr(Tagged, f"__{_name}__", _plainly(_compute))
    setattr(Tagged, f"__r{_name}__", _plainly(lambda own, other, _compute=_compute: _compute(other, own)))
Tagged.__hash__ = int.__hash__  # type: ignore[method-assign]  # which a class that compares has to say


class Arrivals(TorchFunctionMode):
    """Has nodes say which integers have arrived at the functions of torch that they are of."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = args, kwargs or {}
        arrived = [leaf for leaf in pytree.tree_leaves(call) if type(leaf) in (int, Tagged)]
        if not any(isinstance(integer, Tagged) for integer in arrived):
            return func(*args, **call[1])
        args, kwargs = pytree.tree_map_only(Tagged, int, call)
        with annotating({_ARRIVED: arrived}):
            return func(*args, **kwargs)


@contextmanager
def tagged(model: nn.Module) -> Iterator[None]:
    """Inside, the positive integers among the attributes of a model's modules are tagged; the caller puts
    them back.
    """
    for path, inner in model.named_modules():
        for name, value in list(vars(inner).items()):
            if type(value) is int and value > 0:
                integer = Tagged(value)
                integer.place = path, name
                setattr(inner, name, integer)
    with Arrivals(), annotated_nodes():
        yield


#: attributes by the path of their module and their name
Sizes = dict[tuple[str, str], int]


def observed(dense: fx.Graph, pruned: fx.Graph) -> tuple[Sizes, Sizes]:
    """What the tagged attributes of a model have to be for its graph to become the pruned one: what stands
    there in the places where they arrive; and those that arrive at nodes which the pruned graph has in parts.
    """
    after = {node.name: _integers(node) for node in pruned.nodes}
    seen, parted = Sizes(), Sizes()
    for node in dense.nodes:
        integers, its = _integers(node), after.get(node.name, [])
        for integer in node.meta.get("custom", {}).get(_ARRIVED, ()):
            if integer in integers:
                at = integers.index(integer)
                integers[at] = None  # the next one of this value stands elsewhere
                value = its[at] if len(its) == len(integers) else None
                target = parted if value is None else seen
                # One that is as it was may be any number of a call that was taken apart.
                if isinstance(integer, Tagged) and (value != integer or integer.place not in target):
                    target[integer.place] = value or int(integer)
    return seen, parted


def left_of(value: int, path: str, model: nn.Module, copy: nn.Module, plan: PruningPlan) -> int:
    """What is left of a size of a module: of as many rows or columns of a weight, or of as many channel sets
    of a group or of a block of one.
    """
    for dense, smaller in zip(
        model.get_submodule(path).parameters(), copy.get_submodule(path).parameters(), strict=True
    ):
        for before, after in zip(dense.shape, smaller.shape, strict=True):
            if before == value != after:
                return after
    for group in plan.groups:
        members = [part for part in group.producers if not path or part.name.startswith(f"{path}.")]
        for blocks in (1, group.blocks):
            if members and value * blocks == group.size:
                return value - group.removed_sets // blocks
    return value


def _integers(node: fx.Node) -> list[int | None]:
    """The integers among the arguments of a node; ``None`` in the places of others."""
    return [leaf if type(leaf) is int else None for leaf in pytree.tree_leaves((node.args, node.kwargs))]
