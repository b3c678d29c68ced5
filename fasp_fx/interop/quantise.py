"""Weight-only quantisation of a pruned module by torchao, which by itself looks for ``nn.Linear`` and finds
none in a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..base._tolerable import tolerable
from ..capturing._fx import attribute
from ..capturing._program import set_weight
from ..errors import ArgumentError, first_line


def linear_weights(module: fx.GraphModule) -> list[list[str]]:
    """The matrices that nothing but ``linear`` reads, each with all its names; a tied embedding is not one of
    them.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    only: dict[int, bool] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value = attribute(module, str(node.target))
        used = all(
            user.target is torch.ops.aten.linear.default and user.args[1] is node and user.args[0] is not node
            for user in node.users
        )
        only[id(value)] = only.get(id(value), True) and used and getattr(value, "ndim", 0) == 2
    return [names[key] for key, linear in only.items() if linear and key in names]


def quantise(module: fx.GraphModule, config: Any) -> fx.GraphModule:
    """Quantise, in place, the weights of all linear operators: ``quantise(result.module,
    Int8WeightOnlyConfig())``.

    Args:
        module: ``result.module``, or what :func:`fasp_fx.load` gave.
        config: a weight-only configuration of ``torchao.quantization``.

    Returns:
        The module, whose weights are torchao's tensors now. Embeddings, convolutions and weights that
        anything else reads stay as they are.

    Raises:
        ArgumentError: torchao is missing, the module has no linear weights, or the configuration does not fit
            one; then nothing is changed.
    """
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise ArgumentError('quantisation needs torchao: pip install "fasp_fx[quantise]"') from error
    if not isinstance(module, fx.GraphModule):
        raise ArgumentError(
            f"module must be the graph module of a result, not {type(module).__name__}; torchao's own"
            " quantize_ takes other modules"
        )
    found = linear_weights(module)
    if not found:
        raise ArgumentError(
            "the module has no weight that only linear operators read; there is nothing to quantise"
        )
    made: list[tuple[list[str], nn.Parameter]] = []
    for names in found:
        weight = attribute(module, names[0])
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        try:
            quantize_(linear, config)
        except tolerable(Exception) as error:
            raise ArgumentError(
                f"torchao cannot quantise '{names[0]}', {tuple(weight.shape)}, as {type(config).__name__}:"
                f" {first_line(error)}"
            ) from error
        if type(linear.weight) is nn.Parameter:
            raise ArgumentError(
                f"{type(config).__name__} does not quantise '{names[0]}' of shape {tuple(weight.shape)}: it"
                " is not weight-only, or its groups do not divide the columns; pass another, or prune with"
                " round_to= the size of its groups"
            )
        made.append((names, linear.weight))
    for names, parameter in made:
        for name in names:
            set_weight(module, name, parameter)
    quantised = {name for names, _ in made for name in names}
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if str(node.args[1].target) in quantised:
            node.target = nn.functional.linear  # what torchao's tensors answer to
    module.recompile()
    return module
