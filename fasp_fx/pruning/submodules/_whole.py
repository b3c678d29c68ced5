"""A whole model, of which only parts can be captured: its fingerprint, and a copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...analysis import plan as plans


def whole_fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """The fingerprint of a model; sparse weights, which no part holds, do not enter."""
    return plans.fingerprint(
        {name: tensor for name, tensor in parameters.items() if tensor.layout == torch.strided}
    )


def copied(model: nn.Module, kept: Mapping[int, nn.Module] | None = None) -> nn.Module:
    """A copy that shares no storage, but for submodules that are ``kept``, by their ids. Python cannot copy
    weights that a hook computes, and sparse ones; those are cloned.
    """
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    clones: dict[int, Any] = dict(kept or {}) | {id(value): value.detach().clone() for value in computed}
    for parameter in model.parameters():
        if parameter.layout != torch.strided:
            clones[id(parameter)] = nn.Parameter(
                parameter.detach().clone(), requires_grad=parameter.requires_grad
            )
    return copy.deepcopy(model, clones)


__all__ = ["copied", "whole_fingerprint"]
