"""The oracle of mask-exactness: the dense model whose consumers do not see the removed entries of their
inputs.

It reads a plan's consumers, which say what columns of which weights are removed, and nothing else of the
library: the model runs eagerly, with forward hooks and zeroed weights. A module that is known to contract its
input with its weight gets the input's removed channels multiplied by zero; that is the definition, and it
also holds where the module computes its weight anew (weight norm, weight standardisation). Any other
consuming weight has its removed columns set to zero, which is the same function. A weight shared with an
embedding table is untied first, so that only the consuming use is masked.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_Cut = tuple[int, int | None, Any]  # dim, block_dim, removed


@contextlib.contextmanager
def masked(model: nn.Module, plan: Any) -> Iterator[None]:
    """Inside the block the model computes what the pruned one should; it must have run once inside
    :func:`find_called`.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in [*module._parameters.items(), *module._buffers.items()]:
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    computed = {
        id(module.parametrizations.weight): module
        for module in model.modules()
        if "weight" in getattr(module, "parametrizations", {})
    }
    weights = dict(
        [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    )
    called: set[int] = getattr(model, "_masked_called", set())

    with contextlib.ExitStack() as undo, torch.no_grad():
        for name, cuts in _consumers(plan).items():
            if name not in weights:  # folded at capture: the module computes it in every call
                module = model.get_submodule(name.rpartition(".")[0])
                for cut in cuts:
                    mask = _input_mask(module, cut)
                    if mask is None:
                        raise ValueError(
                            f"'{name}' is computed, and {type(module).__name__} is not known to contract its"
                            " input with it"
                        )
                    undo.callback(
                        module.register_forward_pre_hook(_multiply(module, mask), with_kwargs=True).remove
                    )
                continue
            users = owners[id(weights[name])]
            consuming = [user for user in users if not isinstance(user[0], nn.Embedding)] or users
            for owner, attribute in consuming:
                module = computed.get(id(owner), owner)
                for cut in cuts:
                    mask = _input_mask(module, cut) if id(module) in called else None
                    if mask is not None:
                        undo.callback(
                            module.register_forward_pre_hook(_multiply(module, mask), with_kwargs=True).remove
                        )
                    else:
                        undo.callback(setattr, owner, attribute, getattr(owner, attribute))
                        setattr(owner, attribute, _zeroed(getattr(owner, attribute), cut))
        yield


@contextlib.contextmanager
def find_called(model: nn.Module) -> Iterator[None]:
    """Note which modules' ``forward`` runs inside the block; the weights of the others are used by code
    around them.
    """
    called: set[int] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args: called.add(id(module)))
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.__dict__["_masked_called"] = called


def _consumers(plan: Any) -> dict[str, list[_Cut]]:
    found: dict[str, list[_Cut]] = {}
    for group in plan.groups:
        for part in group.consumers:
            if len(part.removed):
                found.setdefault(part.name, []).append(
                    (part.dim, getattr(part, "block_dim", None), part.removed)
                )
    return found


def _input_mask(module: nn.Module, cut: _Cut) -> Tensor | None:
    """Ones and zeros for the input channels of a module that contracts ``cut``'s dimension of its weight;
    ``None`` if it is not known to.
    """
    dim, block_dim, removed = cut
    if isinstance(module, nn.Linear):
        size, consumed, groups = module.in_features, 1, 1
    elif isinstance(module, _ConvTransposeNd):
        size, consumed, groups = module.in_channels, 0, 1
    elif isinstance(module, _ConvNd):
        size, consumed, groups = module.in_channels, 1, module.groups
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        # The transposed linear layer of transformers.
        size, consumed, groups = module.weight.shape[0], 0, 1
    else:
        return None
    if dim != consumed or (block_dim is not None and (block_dim != 0 or len(removed) != groups)):
        return None
    mask = torch.ones(groups, size // groups)
    for group in range(groups):
        mask[group, list(removed[group] if block_dim is not None else removed)] = 0
    return mask.reshape(-1)


def _multiply(module: nn.Module, mask: Tensor) -> Any:
    spatial = len(module.kernel_size) if isinstance(module, _ConvNd) else 0

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = args[0] if args else kwargs["input"]
        kept = given * mask.to(given).reshape(-1, *[1] * spatial)
        return (kept, *args[1:]) if args else (), kwargs if args else {**kwargs, "input": kept}

    return hook


def _zeroed(weight: Tensor, cut: _Cut) -> Tensor:
    dim, block_dim, removed = cut
    new = weight.detach().clone()
    blocks = [new] if block_dim is None else new.chunk(len(removed), dim=block_dim)
    for block, indices in zip(blocks, [removed] if block_dim is None else removed, strict=True):
        block.index_fill_(dim, torch.tensor(list(indices), dtype=torch.long), 0)
    return nn.Parameter(new, requires_grad=weight.requires_grad) if isinstance(weight, nn.Parameter) else new


# --- outputs


def leaves(output: Any, state: bool = False) -> list[tuple[Tensor, bool]]:
    """The floating-point tensors of an output in order, each with whether it lies in a cache."""
    if isinstance(output, Tensor):
        return [(output.detach(), state)] if output.is_floating_point() else []
    inside = state or type(output).__name__.endswith("Cache")
    items: list[Any] = []
    if isinstance(output, Mapping):
        items = list(output.values())
    elif isinstance(output, (list, tuple)):
        items = list(output)
    elif inside:  # a cache, or one of its layers
        items = list(getattr(output, "__dict__", {}).values())
    elif dataclasses.is_dataclass(output):
        items = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return [leaf for item in items for leaf in leaves(item, inside)]


def error(found: Any, expected: Any) -> float:
    """max|a−b| / max|b| of the worst floating-point output; caches may be narrower and are then left out.

    Raises:
        ValueError: the outputs cannot be compared; says why.
    """
    left, right = leaves(found), leaves(expected)
    if len(left) != len(right):
        raise ValueError(f"{len(left)} floating-point outputs instead of {len(right)}")
    worst, compared = 0.0, 0
    for (a, _), (b, state) in zip(left, right, strict=True):
        if a.shape != b.shape:
            if state:
                continue
            raise ValueError(f"an output has shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        if not b.numel():
            continue
        if bool(b.isnan().any()):
            raise ValueError("the dense model's own output is not a number")
        same = (a == b) & b.isinf()  # masked scores
        if bool((b.isinf() & ~same).any()):
            return float("inf")
        difference = torch.where(same, 0, a - b).abs().max()
        scale = torch.where(same, 0, b).abs().max()
        compared += 1
        if not bool(difference == 0):
            worst = (
                max(worst, float(difference / scale))
                if bool(difference.isfinite()) and bool(scale > 0)
                else float("inf")
            )
    if not compared:
        raise ValueError("the outputs hold no floating-point tensor that can be compared")
    return worst
