"""Restoration: it changes consumers alone, and brings each closer to what it computed on the calibration
data.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import fasp_fx

from ._case import Case, rewinding, with_own
from ._verdict import Skipped, hold
from .oracle import kept, tensors_of


def restored(case: Case) -> None:
    """Weights that are no consumers, nor biases of such, are those of the plan alone; a restored linear layer
    is no further from the dense one than without.
    """
    sparsity = case.sparsity if case.sparsity is not None else 0.6 * case.analysis.max_sparsity
    if sparsity <= 0:
        raise Skipped("nothing of this model can be pruned")
    names = list(inspect.signature(case.dense.forward).parameters)
    batch = {**dict(zip(names, case.args)), **case.kwargs} if case.kwargs else case.args
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
