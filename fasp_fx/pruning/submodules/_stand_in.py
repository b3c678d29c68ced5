"""Put a captured part in the place of a submodule, and find out whether the model can tell the difference."""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...analysis import plan as plans
from ...base.compare import deviation, tolerance
from ...base.compat import PRESERVED, pytree

_LEAVES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
)


def simple_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are data and no tensors, such as ``out_channels``: what its parent may
    read besides calling it.
    """
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and not hasattr(fx.GraphModule, name) and _is_simple(value)
    }


def _is_simple(value: Any, depth: int = 3) -> bool:
    if isinstance(value, _LEAVES):
        return True
    if not depth or callable(value) or isinstance(value, Tensor):
        return False
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_simple(item, depth - 1) for item in value)
    held = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)  # a configuration
    return held is not None and all(_is_simple(item, depth - 1) for item in held.values())


class StandIn(nn.Module):
    """A captured part that shows its parent nothing but a forward, simple attributes and a flat list of
    parameters of other sizes and values.

    A parent that reads more, such as a layer inside the part, fails, and one that reads more of a parameter
    than its device and dtype (its values for a penalty, its size for a count) computes something else: what
    it reads would change with the pruning.
    """

    def __init__(self, original: nn.Module, module: nn.Module) -> None:
        super().__init__()
        for index, parameter in enumerate(original.parameters()):
            other = torch.full([1] * parameter.dim(), 3, dtype=parameter.dtype, device=parameter.device)
            self.register_parameter(f"weight_{index}", nn.Parameter(other, parameter.requires_grad))
        self.eval()
        vars(self).update(simple_attributes(original), _captured=(module,))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (module,) = vars(self)["_captured"]  # in a tuple, so that it is no submodule
        return module(*args, **kwargs)


def dressed(module: fx.GraphModule, original: nn.Module) -> fx.GraphModule:
    """The pruned part with the simple attributes of the original, which copies and pickles keep."""
    attributes = {
        name: value for name, value in simple_attributes(original).items() if not hasattr(module, name)
    }
    for name, value in attributes.items():
        setattr(module, name, value)
    module.meta[PRESERVED] = {**module.meta.get(PRESERVED, {}), **attributes}
    return module


def put(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Place a module at each of its paths."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = module


def same_output(found: Any, expected: Any) -> bool:
    """Whether two outputs have the same structure and, up to rounding, the same values."""
    a, first = pytree.tree_flatten(found)
    b, second = pytree.tree_flatten(expected)
    return first == second and all(_same_leaf(x, y) for x, y in zip(a, b, strict=True))


def _same_leaf(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return deviation(found, expected) <= tolerance("two ways", expected.dtype)
    if type(found) is not type(expected):
        return False
    if isinstance(expected, float):
        both_nan = math.isnan(found) and math.isnan(expected)
        return both_nan or math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-6)
    if not isinstance(expected, _LEAVES) and hasattr(expected, "__dict__"):  # not registered with pytree
        return same_output(vars(found), vars(expected))
    return bool(found == expected)


def whole_fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """The fingerprint of a model; sparse weights, which no part holds, do not enter."""
    return plans.fingerprint(
        {name: tensor for name, tensor in parameters.items() if tensor.layout == torch.strided}
    )


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares no storage. Python cannot copy weights that a hook computes; those are cloned. Torch
    copies a parameter without its attributes.
    """
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    made = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    for own, parameter in zip(model.parameters(), made.parameters(), strict=False):
        vars(parameter).update(copy.copy(vars(own)))
    return made


__all__ = ["copied", "whole_fingerprint"]
