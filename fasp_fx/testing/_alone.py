"""Invariants 3, 6, 9, 10 and 13: the caller's signature, recorded shapes, ties that stay, a result that is a
model of its own, and restoration, which brings consumers closer to what they computed.
"""

import copy
import inspect
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.modules.module import register_module_forward_pre_hook

import fasp_fx
from fasp_fx.base import pytree, tolerable

from ._case import Case, Skipped, Violation, alike, hold, rewinding, with_own
from ._exact import call_result, refused, shapes
from .oracle import error, floats, kept, tensors_of


def signature(case: Case) -> None:
    """Names, kinds and defaults of the arguments, the structure of the output, and dynamic dimensions are
    those of the caller's model.
    """
    dense = case.run(case.dense, (case.args, case.kwargs))
    output = case.run(case.result.module, (case.args, case.kwargs))
    hold(
        pytree.tree_structure(output) == pytree.tree_structure(dense),
        f"the output is {pytree.tree_structure(output)} instead of {pytree.tree_structure(dense)}",
    )
    if isinstance(case.model, nn.Module):
        before, after = inspect.signature(case.model.forward), inspect.signature(case.result.module.forward)
        hold(_outline(before) == _outline(after), f"forward{after} instead of forward{before}")
        _by_keyword(case, before, output)
        _constants_are_refused(case, before)
    for call in case.calls:
        result_output, expected = call_result(case, case.result, call), case.run(case.dense, call)
        if result_output is not None:
            for a, b in zip(pytree.tree_leaves(result_output), pytree.tree_leaves(expected), strict=True):
                hold(
                    not isinstance(a, Tensor) or a.dtype == b.dtype,
                    f"on inputs {shapes(call)} an output has type {getattr(a, 'dtype', type(a))}",
                )


def _outline(outlined: inspect.Signature) -> list[tuple[str, Any, bool]]:
    return [(p.name, p.kind, p.default is not inspect.Parameter.empty) for p in outlined.parameters.values()]


def _by_keyword(case: Case, signature: inspect.Signature, expected: Any) -> None:
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    unnamed = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
    if unnamed & set(kinds.values()):
        return
    keywords: dict[str, Any] = {}
    for name, value in signature.bind(*case.args, **case.kwargs).arguments.items():
        keywords |= value if kinds[name] is inspect.Parameter.VAR_KEYWORD else {name: value}
    output = case.run(case.result.module, ((), keywords))
    hold(
        error(output, expected) == 0.0,
        f"called by keyword ({', '.join(keywords)}) it computes something else",
    )


def _constants_are_refused(case: Case, signature: inspect.Signature) -> None:
    """An argument without tensors is part of the program: another value has to be refused, never ignored."""
    for name, value in case.kwargs.items():
        default = signature.parameters[name].default if name in signature.parameters else None
        if not isinstance(value, bool) or default is not inspect.Parameter.empty:
            continue
        refused(
            partial(case.run, case.result.module, (case.args, {**case.kwargs, name: not value})),
            TypeError,
            f"'{name}={not value}' is accepted, though the program was captured with {value}",
        )


def recorded_shapes(case: Case) -> None:
    """The shape recorded at every node is the one that is executed."""
    program: ExportedProgram = case.result.program
    leaves = iter(pytree.tree_leaves(case.captured.flat_inputs(case.args, case.kwargs)))
    tensors = {**program.constants, **program.state_dict}
    inputs = [
        next(leaves) if spec.kind == InputKind.USER_INPUT else tensors[str(spec.target)]
        for spec in program.graph_signature.input_specs
    ]
    runner = _Runner(program)
    with torch.no_grad():
        runner.run(*inputs)
    hold(runner.checked > 0, "no node of the program records a shape")


class _Runner(fx.Interpreter):
    """Runs an exported program and holds every result against the recorded one."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.sizes, self.checked = dict[Any, int](), 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        recorded = n.meta.get("val") if n.op != "output" else None
        leaves = () if recorded is None else zip(*map(pytree.tree_leaves, (recorded, value)), strict=True)
        for expected, actual in leaves:
            if isinstance(expected, Tensor):
                self._compare(n, expected, actual)
        return value

    def _compare(self, node: fx.Node, recorded: Tensor, value: Tensor) -> None:
        sizes = zip(recorded.shape, value.shape, strict=True)
        expected = [self._size(node, size, actual) for size, actual in sizes], recorded.dtype
        actual = list(value.shape), value.dtype
        hold(expected == actual, f"node '{node.name}' ({node.target}) records {expected} and has {actual}")
        self.checked += 1

    def _size(self, node: fx.Node, recorded: int | torch.SymInt, actual: int) -> int:
        if not isinstance(recorded, torch.SymInt):
            return recorded
        if node.op == "placeholder" and recorded.node.expr.is_Symbol:
            self.sizes.setdefault(recorded.node.expr, actual)
        value = recorded.node.expr.xreplace(self.sizes)
        return int(value) if isinstance(value, int) or value.is_number else actual


def ties_stay(case: Case) -> None:
    """Parameters that were one are one, under all their names."""
    named = list(case.dense.named_parameters(remove_duplicate=False))
    alike = [[name for name, other in named if other is parameter] for parameter in case.dense.parameters()]
    tied = [group for group in alike if len(group) > 1]
    if not tied:
        raise Skipped("no weights are tied")
    for result in (case.result, case.untouched):
        parameters = dict(result.module.named_parameters(remove_duplicate=False))
        for group in tied:
            present = [name for name in group if name in parameters]
            hold(
                len({id(parameters[name]) for name in present}) <= 1,
                f"{', '.join(present)} were one parameter and are several",
            )
            hold(
                not present or present == group,
                f"of the tied {', '.join(group)} only {', '.join(present)} are left",
            )


def alone(case: Case) -> None:
    """The result shares no storage with the caller's model; it trains, changes mode and type, copies, exports
    again and, if asked, compiles.
    """
    result, call = case.result, (case.args, case.kwargs)
    expected = case.run(result.module, call)
    for module in (result.module, case.untouched.module):
        shared = _storages(tensors_of(module)) & _storages(tensors_of(case.dense))
        hold(not shared, f"{len(shared)} storages are shared with the caller's model")
    for mode in (True, False):
        hold(
            error(case.run(result.module.train(mode), call), expected) == 0.0,
            f"train({mode}) changes the output",
        )
    with rewinding(result.module):
        _trains(case, result.module, call)
    _copies(case, result.module, expected)
    plain = (Tensor, bool, int, float, str, type(None))
    others: dict[str, Any] = {}
    if isinstance(case.model, nn.Module) and all(
        isinstance(leaf, plain) for leaf in pytree.tree_leaves(call)
    ):
        others["exported again"] = torch.export.export(result.module, *call, strict=False).module()
    if case.compile:
        others["compiled"] = torch.compile(result.module)
    for how, module in others.items():
        hold(error(case.run(module, call), expected) <= case.tolerance, f"{how} it computes something else")
    for name, tensor in tensors_of(case.dense).items():
        hold(
            alike(tensor, case.before[name]),
            f"'{name}' of the caller's model changed",
        )


def _storages(tensors: dict[str, Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()}


def _trains(case: Case, module: nn.Module, call: Any) -> None:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return
    if case.times > 1:
        try:
            _backward(copy.deepcopy(case.dense), call)
        except tolerable(RuntimeError):
            return  # the model itself writes over what a gradient needs
    module.zero_grad()
    if not _backward(module, call):
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    hold(bool(gradients), "no parameter gets a gradient")
    hold(all(bool(torch.isfinite(g).all()) for g in gradients), "a gradient is not finite")
    module.zero_grad()


def _backward(module: nn.Module, call: Any) -> bool:
    """Take gradients of a call; whether an output carries any."""
    leaves = pytree.tree_leaves(with_own(module, *call))
    outputs = [leaf.pow(2).sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if outputs:
        torch.stack(outputs).sum().backward()
    return bool(outputs)


def _copies(case: Case, module: nn.Module, expected: Any) -> None:
    copied = copy.deepcopy(module)
    hold(
        error(case.run(copied, (case.args, case.kwargs)), expected) == 0.0,
        "a deep copy computes something else",
    )
    kinds = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if len(kinds) != 1:
        return
    (dtype,) = kinds
    other = torch.float64 if dtype == torch.float32 else torch.float32
    moved = pytree.tree_map(
        lambda leaf: leaf.to(other) if isinstance(leaf, Tensor) and leaf.dtype == dtype else leaf,
        (case.args, case.kwargs),
    )
    try:
        dense = case.run(copy.deepcopy(case.dense).to(other), moved)
    except tolerable(Exception):
        return  # the model itself does not take another type
    if not all(leaf.dtype == other for leaf in floats(dense)):
        return
    try:
        output = case.run(copied.to(other), moved)
    except tolerable(Exception) as problem:
        raise Violation(f"in {other} it does not run: {problem}") from problem
    hold(
        error([leaf.to(dtype) for leaf in floats(output)], floats(expected)) <= 1e-3,
        f"in {other} it computes something else",
    )


# --- restoration


def restored(case: Case) -> None:
    """Weights that are no consumers, nor biases of such, are those of the plan alone; a restored linear layer
    is no further from the dense one than without.
    """
    sparsity = case.sparsity if case.sparsity is not None else 0.6 * case.analysis.max_sparsity
    if sparsity <= 0:
        raise Skipped("nothing of this model can be pruned")
    names = list(inspect.signature(case.dense.forward).parameters)
    batch = {**dict(zip(names, case.args)), **case.kwargs} if case.kwargs else case.args
    with warnings.catch_warnings(action="ignore"):
        repaired_result = fasp_fx.prune(
            case.once,
            sparsity=sparsity,
            score="magnitude",
            calibration=[batch],
            **case.prune_options,
        )
    if not repaired_result.plan.groups:
        raise Skipped("the sparsity removes nothing")
    plain = case.apply(repaired_result.plan)
    consumers = {
        part.name for group in repaired_result.plan.groups for part in group.consumers or group.producers
    }
    pieces = {split.name: split.source for split in repaired_result.plan.splits}
    changed = consumers | _biases(case, consumers | {pieces[name] for name in consumers & pieces.keys()})
    cut, repaired = tensors_of(plain.module), tensors_of(repaired_result.module)
    for name, tensor in cut.items():
        hold(repaired[name].shape == tensor.shape, f"restoring '{name}' changed its shape")
        hold(
            bool(torch.isfinite(repaired[name]).all()) or not bool(torch.isfinite(tensor).all()),
            f"'{name}' is no longer finite",
        )
        if name not in changed and pieces.get(name) not in changed and not _tied_to(case, name, consumers):
            hold(torch.equal(repaired[name], tensor), f"'{name}' is no consumer, but restoring changed it")
    _closer(case, repaired_result, cut, repaired)


def _biases(case: Case, consumers: set[str]) -> set[str]:
    """The vectors that the operators which read consumers are given beside them."""
    names: set[str] = set()
    for node in case.captured.module.graph.nodes:
        read = [weight for argument in node.all_input_nodes if (weight := _origin(argument)) is not None]
        if not consumers.isdisjoint(str(weight.target) for weight in read):
            names |= {str(weight.target) for weight in read if weight.meta["val"].dim() == 1}
    return names


def _origin(node: fx.Node) -> fx.Node | None:
    """The weight that a node gives, moved perhaps."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node if node.op == "get_attr" else None


def _tied_to(case: Case, name: str, consumers: set[str]) -> bool:
    tensors = tensors_of(case.reference)
    return any(
        name in tensors and other in tensors and tensors[other] is tensors[name] for other in consumers
    )


def _closer(case: Case, result: fasp_fx.Result, cut: dict[str, Tensor], repaired: dict[str, Tensor]) -> None:
    inputs, first = _linear_inputs(case), _read_first(case, result)
    dense = tensors_of(case.reference)
    consumers = [part for group in result.plan.groups for part in group.consumers]
    for part in consumers:
        owner = part.name.rpartition(".")[0]
        if owner not in inputs or part.name != f"{owner}.weight" or part.name not in cut.keys() & first:
            continue  # no linear layer, or a pass has split it
        weight, left = dense[part.name].detach().double(), cut[part.name].detach().double()
        if part.dim != 1 or part.block_dim is not None or not left.numel() or len(left) != len(weight):
            continue  # it loses rows as well
        alike = [p for p in consumers if (p.name, p.dim) == (part.name, 1)]
        keep = torch.stack([kept(weight, consumer)[0] for consumer in alike]).all(0)
        x, bias = inputs[owner], f"{owner}.bias"
        raised = (repaired[bias].double() - cut[bias].double()).detach() if bias in cut else 0.0
        wanted, fewer = x @ weight.t(), x[:, keep]
        before = (fewer @ left.t() - wanted).norm()
        after = (fewer @ repaired[part.name].detach().double().t() + raised - wanted).norm()
        hold(
            bool(after <= before * (1 + 1e-3) + 1e-9),
            f"restoring '{part.name}' moves its output away from the dense one: {float(before):.3e} to"
            f" {float(after):.3e}",
        )


def _read_first(case: Case, result: fasp_fx.Result) -> set[str]:
    """The consumers whose inputs no removal has changed: later ones are repaired behind earlier ones."""
    consumers = {part.name for group in result.plan.groups for part in group.consumers}
    first, changed = set[str](), set[fx.Node]()
    for node in case.captured.module.graph.nodes:
        weights = {str(origin.target) for argument in node.all_input_nodes if (origin := _origin(argument))}
        if not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
        elif node.op == "call_function" and weights & consumers:
            first |= weights & consumers
            changed.add(node)
    return first


def _linear_inputs(case: Case) -> dict[str, Tensor]:
    """What each linear layer that is used once is given, as a matrix."""
    seen: dict[nn.Module, list[Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Linear):
            seen.setdefault(module, []).append(args[0].detach().double().reshape(-1, args[0].shape[-1]))

    handle = register_module_forward_pre_hook(note)
    try:
        with torch.no_grad(), rewinding(case.dense):  # one call, where what remembers takes two
            with_own(case.dense, case.args, case.kwargs)
    finally:
        handle.remove()
    parameters = [parameter for _, parameter in case.dense.named_parameters(remove_duplicate=False)]
    return {
        name: seen[module][0]
        for name, module in case.dense.named_modules()
        if len(seen.get(module, ())) == 1 and sum(p is module.weight for p in parameters) == 1
    }
