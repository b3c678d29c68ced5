"""The dense model with what a plan removes multiplied by zero: what a pruned model has to equal.

It reads nothing of the plan but its slices and shares no code with the analysis or the passes. To multiply
the removed entries of a consumer's input by zero is to zero the columns of its weight; a lookup in the same
weight (a tied embedding) still finds the whole one. Where a plan includes groups that cross a norm, their
producers' outputs are zero: the rows of their weights and biases. An expert that is gone is never chosen: its
router's logit is -inf.
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fasp_fx.analysis import ParameterSlice, PruningPlan
from fasp_fx.base import TorchDispatchMode, pytree
from fasp_fx.errors import ArgumentError

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default}
_LOOKUPS = {torch.ops.aten.embedding.default, torch.ops.aten.index_select.default}


class Masked:
    """A copy of a model with the consumers' removed columns at zero; called like the model.

    Args:
        model: the dense model, which is not touched.
        plan: what is removed from it.

    Raises:
        ArgumentError: the plan names a weight that the model does not hold, one that it computes from others,
            say.

    Examples:
        >>> from fasp_fx.testing import Masked
        >>> unrepaired = fasp_fx.apply(captured, result.plan)
        >>> torch.allclose(Masked(model, result.plan)(x), unrepaired.module(x), atol=1e-5)
        True
    """

    def __init__(self, model: nn.Module | ExportedProgram, plan: PruningPlan) -> None:
        self.module = copy.deepcopy(callable_of(model))
        tensors = tensors_of(self.module)
        named_alike = {fold.name for fold in plan.folds if fold.name in fold.sources}
        whole: dict[int, tuple[Tensor, Tensor]] = {}
        for part in (
            part
            for group in plan.groups
            for part in (*group.consumers, *(group.producers if plan.include else ()))
        ):
            if part.name not in tensors:
                why = (
                    "it computes it in every call; mask a result from which next to nothing was removed,"
                    " which holds it folded"
                    if plan.folds
                    else "the plan is for another model"
                )
                raise ArgumentError(f"the plan names '{part.name}', which this model does not hold: {why}")
            if part.name in named_alike and not isinstance(model, (ExportedProgram, fx.GraphModule)):
                raise ArgumentError(
                    f"the plan names '{part.name}' as computed, and this model holds under that name what"
                    " it is computed of; mask a result"
                )
            tensor = tensors[part.name]
            whole.setdefault(id(tensor), (tensor, tensor.detach().clone()))
            tensor.detach().mul_(kept(tensor, part).to(tensor.dtype))
        routers: dict[int, tuple[Tensor, list[int]]] = {}
        for part in (p for group in plan.groups if group.granularity == "expert" for p in group.producers):
            if part.dim == 0 and tensors[part.name].dim() == 2:
                weight = tensors[part.name]
                routers.setdefault(id(weight), (weight, []))[1].extend(part.by_block()[0])
        self._beside = _Beside({} if plan.include else whole, list(routers.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # what a model compiles for itself (flex attention, say) cannot be compiled under a mode
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), self._beside:
            return self.module(*args, **kwargs)


class _Beside(TorchDispatchMode):
    """Lookups in a zeroed weight find the weight as it was; products with the rows of a router give -inf for
    the experts that are gone (a weight is known by itself or turned).
    """

    supports_higher_order_operators = True

    def __init__(
        self, whole: dict[int, tuple[Tensor, Tensor]], routers: list[tuple[Tensor, list[int]]]
    ) -> None:
        super().__init__()
        self.whole, self.routers = whole, routers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LOOKUPS and id(args[0]) in self.whole:
            args = (self.whole[id(args[0])][1], *args[1:])
        result = func(*args, **(kwargs or {}))
        for weight, gone in self.routers if func in _PRODUCTS else ():
            if any(
                isinstance(a, Tensor) and a.data_ptr() == weight.data_ptr() and a.numel() == weight.numel()
                for a in args
            ):
                result.index_fill_(-1, torch.tensor(gone, device=result.device), float("-inf"))
        return result


def kept(tensor: Tensor, part: ParameterSlice) -> Tensor:
    """Which elements of a parameter one slice leaves: boolean, of the parameter's shape."""
    mask = torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
    blocks = part.by_block()
    step = 0 if part.block_dim is None else tensor.shape[part.block_dim] // len(blocks)
    for block, removed in enumerate(blocks):
        part_mask = mask if part.block_dim is None else mask.narrow(part.block_dim, block * step, step)
        part_mask.index_fill_(part.dim, torch.tensor(removed, dtype=torch.long, device=tensor.device), False)
    return mask


def callable_of(model: nn.Module | ExportedProgram) -> nn.Module:
    """The module to call: the model itself, or that of an exported program."""
    return model.module(check_guards=False) if isinstance(model, ExportedProgram) else model


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name; tied ones under each of their names."""
    return dict(
        [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    )


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order."""
    return [leaf for leaf in _tensors(output) if leaf.is_floating_point()]


def _tensors(output: Any) -> list[Tensor]:
    return [
        leaf.detach().to_dense() if leaf.layout != torch.strided else leaf.detach()
        for leaf in pytree.tree_leaves(output)
        if isinstance(leaf, Tensor)
    ]


def error(output: Any, expected: Any) -> float:
    """``max|a−b| / max|b|`` of the worst output of real or complex numbers; infinite where shapes, integers
    or truths differ, or infinities and NaN do not stand at the same places.
    """
    worst = 0.0
    for a, b in zip(_tensors(output), _tensors(expected), strict=True):
        if a.shape != b.shape or a.is_complex() != b.is_complex():
            return float("inf")
        if a.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return float("inf")
            continue
        odd = ~torch.isfinite(b) | ~torch.isfinite(a)
        if not bool(((a == b) | (a.isnan() & b.isnan()))[odd].all()):
            return float("inf")
        finite = torch.isfinite(b)
        if bool(finite.any()):
            difference, scale = float((a - b)[finite].abs().max()), float(b[finite].abs().max())
            worst = max(worst, difference / scale if scale > 0 else difference)
    return worst
