"""A plan as a backend of ``torch.compile``: the graph gets smaller, the model keeps its weights."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fasp_fx.analysis import PruningPlan, analyze_program, check_fingerprint, gone_of
from fasp_fx.base import (
    SET_GRAD,
    FakeTensorMode,
    InstructionTranslator,
    TracingContext,
    aot_export_module,
    assign_attr,
    fingerprint,
    lookup_backend,
    tolerable,
    tracing,
    version_of,
    warn,
)
from fasp_fx.capturing import (
    FLEX,
    CallSignature,
    Program,
    Recipe,
    attribute,
    by_shapes,
    graph_module,
    is_plain,
    put_behind,
    take_apart,
    target_name,
    weights_of,
)
from fasp_fx.errors import (
    CaptureError,
    FaspError,
    PartialPlanWarning,
    PlanError,
    VerificationError,
    first_line,
)
from fasp_fx.passes import remove, split_fused

Compiled = Callable[..., Any]


def backend(
    plan: PruningPlan,
    *,
    inner: str | Callable[..., Any] = "inductor",
    model: nn.Module | None = None,
    check: bool = True,
) -> Callable[[fx.GraphModule, list[Any]], Compiled]:
    """A backend for ``torch.compile`` that computes the pruned model from the whole one:
    ``torch.compile(model, backend=fasp_fx.backend(plan))``.

    Each graph that dynamo captures is analysed and rewritten as by :func:`fasp_fx.apply`; the smaller graph
    goes to ``inner`` with slices of the model's weights. That saves time, not memory: the model keeps its
    full weights, and the slices are copies beside them. A slice is made again when its weight has changed (an
    optimiser step, ``load_state_dict``): what bypasses autograd's version counter (``weight.data.add_(…)``)
    is not seen. With gradients enabled the slices are made in every call, and gradients reach the full
    weights; they are zero for what the plan removes.

    The result is the mask-exact pruned model: the plan holds no repaired weights, so that ``restore`` of
    :func:`fasp_fx.prune` has no part in it.

    A graph break divides the model. A group of the plan whose weights lie in several graphs, or whose
    channels pass from one to another, stays whole, with a :class:`~fasp_fx.PartialPlanWarning`. So does a
    graph that cannot be read (one that writes into buffers, as batch norm does in training mode), and a group
    that cannot be followed in dynamo's graph though it could in the capture's.

    dynamo runs what it does not trace as it is, and does not tell a backend of it: recurrent layers. With
    ``dynamic=True``, ``torch._dynamo.config.specialize_float = True`` is needed where a module holds a float,
    such as the epsilon of a norm.

    Args:
        plan: made for this model.
        inner: the backend for the smaller graph: a name that ``torch.compile`` knows, or a function of a
            graph module and example inputs.
        model: the model that the plan names the weights of; needed only where the compiled function holds it
            inside something else, or where graph breaks make dynamo compile submodules by themselves.
        check: refuse a model whose weights, when it is first compiled, are not those that the plan was made
            for. ``False``: a model of the same architecture will do, such as one that has been trained since.

    Raises:
        PlanError: the plan names weights that were folded at capture, which the model does not have; (in the
            call) the plan is for another model.

    Examples:
        >>> fast = torch.compile(model, backend=fasp_fx.backend(result.plan, inner="eager"))
        >>> with torch.no_grad():
        ...     print(fast(x).shape)
        torch.Size([64, 4])
    """
    if plan.folds:
        raise PlanError(
            f"the plan is for a model that computes {plan.folds[0]} in every call: it names a weight folded"
            " at capture, which a compiled model does not have; use fasp_fx.apply(model, plan, args), or"
            " fold the weight in the model and plan again"
        )
    if recurrent := next((name for name, _ in plan.slices() if _OF_RECURRENT.search(name)), None):
        warn(
            f"dynamo does not trace the recurrent layer that holds '{recurrent}' and runs the whole model in"
            " its place, without a word; use fasp_fx.apply",
            PartialPlanWarning,
        )
    return _Backend(plan, lookup_backend(inner) if isinstance(inner, str) else inner, model, check).compile


#: names that torch gives the weights of its recurrent layers
_OF_RECURRENT = re.compile(r"(^|\.)(weight|bias)_(ih|hh|hr)_l\d+")


class _Backend:
    def __init__(
        self, plan: PruningPlan, inner: Callable[..., Any], model: nn.Module | None, check: bool
    ) -> None:
        self.plan, self.inner, self.model, self.check = plan, inner, model, check
        self.named = {name for name, _ in plan.slices()}
        self.checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def compile(self, module: fx.GraphModule, example: list[Any]) -> Compiled:
        """What dynamo calls for each graph."""
        try:
            return self._compile(module, example)
        except tolerable(CaptureError) as reason:
            warn(f"a graph of the model is not pruned: {reason}", PartialPlanWarning)
            return self.inner(module, example)
        except FaspError as error:
            # Raised here it would reach the caller as an error of dynamo's.
            return functools.partial(_refuse, error)

    def _compile(self, module: fx.GraphModule, example: list[Any]) -> Compiled:
        owner = self._owner(set(map(id, example)))
        named = {} if owner is None else weights_of(owner)
        names = {id(tensor): name for name, tensor in reversed(named.items())}  # the first of each
        weights = {
            position: (names[id(value)], value)
            for position, value in enumerate(example)
            if id(value) in names
        }
        if owner is None and any(isinstance(value, nn.Parameter) for value in example):
            raise CaptureError(
                "it holds weights of no module that the compiled function names; pass fasp_fx.backend(plan,"
                " model=model)"
            )
        if owner is None or not weights:
            return self.inner(module, example)  # a graph without weights has nothing to lose
        grad = torch.is_grad_enabled() and any(getattr(value, "requires_grad", False) for value in example)
        program = as_program(trace(module, grad), weights, named)
        rewritten = self._rewritten(program)
        if rewritten is program:
            return self.inner(module, example)
        lifted, order = _lift(rewritten)
        positions = {known: position for position, (known, _) in weights.items()}
        slices = [_Slice.of(name, positions, rewritten) for name in order]
        rest = [position for position in range(len(example)) if position not in weights]
        mode = cast(FakeTensorMode, TracingContext.get().fake_mode)
        values = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            fakes = [
                mode.from_tensor(piece.cut(example), static_shapes=True).requires_grad_(
                    grad and piece.trains(example)
                )
                for piece in slices
            ]
        compiled = self.inner(lifted, [*(values[position] for position in rest), *fakes])
        return lambda *args: compiled(
            *(args[position] for position in rest), *(piece.current(args) for piece in slices)
        )

    def _owner(self, weights: set[int]) -> nn.Module | None:
        """The module whose names the plan speaks of, once it is known to be the right one."""
        candidates = [self.model] if self.model is not None else holders(weights)
        fitting = [module for module in candidates if self.named <= weights_of(module).keys()]
        if not candidates:
            return None
        if not fitting:
            missing = min(self.named - weights_of(candidates[0]).keys())
            raise PlanError(
                f"the plan names '{missing}', which {type(candidates[0]).__name__} does not have; it is a"
                " plan for another model, or the compiled function holds the model inside this module or"
                " breaks the graph inside a submodule: then pass fasp_fx.backend(plan, model=model)"
            )
        owner = fitting[0]
        if self.check and owner not in self.checked:
            check_fingerprint(self.plan, fingerprint(dict(owner.named_parameters(remove_duplicate=False))))
        self.checked.add(owner)
        return owner

    def _rewritten(self, program: Program) -> Program:
        """The program without what of the plan can be done in it: a graph can hold a part of the model, and
        not all can be followed in dynamo's graph that could be in the capture's.
        """
        divided = split_fused if self.plan.splits else None
        analysis = analyze_program(program, divided, self.plan.granularity, self.plan.include)
        present = set(program.canonical())
        groups, left = [], []
        for group in self.plan.groups:
            names = {part.name for part in (*group.producers, *group.consumers)}
            try:
                if names & present and not names <= present:
                    raise PlanError(f"'{min(names - present)}' is in another graph")
                if names <= present:
                    gone_of(replace(self.plan, groups=(group,)), analysis)
                    groups.append(group)
            except PlanError as error:
                left.append(f"'{group.name}': {error}")
        if left:
            warn(
                "graph breaks divide the model, or dynamo's graph of it is not that of the capture, and these"
                f" groups stay whole: {'; '.join(left)}",
                PartialPlanWarning,
            )
        here = replace(self.plan, groups=tuple(groups))
        return remove(analysis, gone_of(here, analysis)) if groups else program


def _refuse(error: FaspError, *args: Any) -> Any:
    raise error


class _Slice:
    """One weight of the smaller graph, made of one of the model's, or a constant."""

    def __init__(self, recipe: Recipe, position: int | None, constant: Tensor | None = None) -> None:
        self.recipe, self.position, self.constant = recipe, position, constant
        self._made: tuple[Tensor, weakref.ref[Tensor], Tensor, Any] | None = None

    @staticmethod
    def of(name: str, positions: dict[str, int], program: Program) -> _Slice:
        """The slice that stands under ``name`` in the rewritten program."""
        recipe = program.recipe(name)
        position = positions.get(program.canonical().get(recipe.source, recipe.source))
        if position is None and recipe.cuts:
            raise VerificationError(f"'{name}' would be cut, but is no weight of the model")
        constant = program.weights().get(name, getattr(program.module, name, None))
        return _Slice(recipe, position, constant if position is None else None)

    def weight(self, args: Any) -> Any:
        """The present weight, or the constant, of which all stays."""
        return self.constant if self.position is None else args[self.position]

    def cut(self, args: Any) -> Tensor:
        """The slice of the present weight, differentiably."""
        return self.recipe.apply(self.weight(args))

    def trains(self, args: Any) -> bool:
        """Whether its weight wants gradients."""
        return self.position is not None and args[self.position].requires_grad

    def current(self, args: Any) -> Tensor:
        """The slice; made anew if its weight is another or has changed since."""
        weight = self.weight(args)
        # for autograd; and a tensor that does not count its versions
        is_made_anew = (torch.is_grad_enabled() and weight.requires_grad) or weight.is_inference()
        if not self.recipe.cuts or is_made_anew:
            return self.cut(args)
        now = (weight.data_ptr(), weight.dtype, version_of(weight))
        if self._made is None or self._made[1]() is not weight or self._made[3] != now:
            storage = weight.detach()  # keeps the storage, so that no other can come to lie at its address
            with torch.inference_mode(False), torch.no_grad():  # a slice outlives the call
                self._made = (self.cut(args), weakref.ref(weight), storage, now)
        return self._made[0]


def _lift(program: Program) -> tuple[fx.GraphModule, list[str]]:
    """The graph with its weights as further inputs, and their names in order; submodules stay."""
    graph = program.module.graph
    last = ([None, *program.placeholders()])[-1]
    by_name: dict[str, fx.Node] = {}
    lookups = graph.find_nodes(op="get_attr")
    for node in [
        each for each in lookups if isinstance(attribute(program.module, target_name(each)), Tensor)
    ]:
        name = target_name(node)
        if name not in by_name:
            first = graph.inserting_before(next(iter(graph.nodes)))
            with first if last is None else graph.inserting_after(last):
                last = by_name[name] = graph.placeholder("weight_" + name.replace(".", "_"))
        node.replace_all_uses_with(by_name[name])
        graph.erase_node(node)
    for node in graph.nodes:
        node.meta.pop("val", None)  # of the sizes before
    return fx.GraphModule(program.module, graph), list(by_name)


# --- Read a graph of dynamo's: which of its inputs are weights, and what it computes, in operators that the
# library reads.


def holders(weights: set[int]) -> list[nn.Module]:
    """The modules that the compiled function names and that hold weights of the graph: usually the compiled
    module alone.

    Args:
        weights: the inputs of the graph, by their ``id``.
    """
    frame = InstructionTranslator.current_tx()
    return [
        module
        for module in (*frame.f_locals.values(), *frame.f_globals.values())
        if isinstance(module, nn.Module) and weights & set(map(id, weights_of(module).values()))
    ]


def trace(module: fx.GraphModule, grad: bool) -> fx.GraphModule:
    """The functional graph of operators behind a graph of dynamo's, under dynamo's symbolic sizes; inputs and
    outputs as they were.

    Args:
        module: the graph module that dynamo made.
        grad: whether gradients flow: regions without them then hand on detached values.

    Raises:
        CaptureError: it writes into its inputs, changes modes that cannot be carried over, or cannot be
            traced.
    """
    if module.graph.find_nodes(op="call_function", target=FLEX):
        # The attempt would leave torch in a state in which nothing compiles.
        raise CaptureError(
            f"it calls {FLEX}, whose graphs cannot be traced here; compile the module of fasp_fx.apply(model,"
            " plan, args) instead"
        )
    if any(
        isinstance(node.meta.get("example_value"), torch.SymFloat)
        for node in module.graph.find_nodes(op="call_method", target="item")
    ):
        raise CaptureError(
            "it takes a float as an input, as dynamo makes of all of them with dynamic=True; set"
            " torch._dynamo.config.specialize_float = True, which compiles once for each value"
        )
    inputs = module.graph.find_nodes(op="placeholder")
    try:
        with tracing(TracingContext(TracingContext.get().fake_mode)), torch.no_grad(), by_shapes():
            exported = aot_export_module(
                module,
                [node.meta.get("example_value") for node in inputs],
                trace_joint=False,
                pre_dispatch=True,
                decompositions={},
            )
        traced, signature = cast(tuple[fx.GraphModule, Any], exported)
        take_apart(traced.graph)
    except tolerable(Exception) as error:
        raise CaptureError(f"the graph cannot be traced: {first_line(error)}") from error
    if signature.buffers_to_mutate or signature.parameters_to_mutate or signature.user_inputs_to_mutate:
        raise CaptureError("the graph writes into its inputs or buffers")
    _without_modes(traced.graph, grad)
    if strange := next(itertools.filterfalse(is_plain, traced.graph.nodes), None):
        raise CaptureError(f"the graph calls {strange.target}")
    traced.recompile()
    return traced


def _without_modes(graph: fx.Graph, grad: bool) -> None:
    """Take out the switches of the gradient mode; what is made in a region without gradients is detached."""
    start = enabled = torch.is_grad_enabled()
    for node in list(graph.nodes):
        if node.target is SET_GRAD:
            enabled = bool(node.args[0])
            if enabled and not start:
                raise CaptureError("the graph switches gradients on")
            graph.erase_node(node)
        elif node.op == "call_function" and grad and not enabled and isinstance(node.meta.get("val"), Tensor):
            detached = put_behind(node, torch.ops.aten.detach.default)
            detached.meta["val"] = node.meta["val"]


def as_program(
    traced: fx.GraphModule,
    weights: dict[int, tuple[str, Tensor]],
    named: dict[str, Tensor],
) -> Program:
    """A program of a traced graph.

    Args:
        traced: the graph; all weights are inputs.
        weights: name and tensor of each input that is a weight, by its position.
        named: the model's weights in their order, under all their names.
    """
    root, read = nn.Module(), {id(tensor) for _, tensor in weights.values()}
    for name, tensor in named.items():
        if id(tensor) in read:
            assign_attr(tensor, root, name)
    graph = traced.graph
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        if position in weights:
            with graph.inserting_before(node):
                weight = graph.create_node("get_attr", weights[position][0])
            weight.meta.update(node.meta)
            node.replace_all_uses_with(weight)
            graph.erase_node(node)
    for name, value in (
        *vars(traced).items(),  # constants that tracing has lifted are plain attributes
        *traced.named_parameters(recurse=False),
        *traced.named_buffers(recurse=False),
        *traced.named_children(),
    ):
        if isinstance(value, (Tensor, nn.Module)) and not hasattr(root, name):
            setattr(root, name, value)
    return Program(
        graph_module(root, graph, traced.meta),
        CallSignature(inspect.Signature(), (), {}),
        ((), {}),
        order=tuple(named),
    )
