"""Constants of a program that are its parameters or buffers, reached by another way.

What forward reads from a list or dict of its own is a constant to an exporter, also where it is a parameter
of the model. As a constant it would keep its values while weights are trained or loaded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..base._storage import storage_of

_ATEN = torch.ops.aten


def as_weights(exported: ExportedProgram) -> ExportedProgram:
    """A program that reads its parameters and buffers wherever it reads their memory; the same one if it does
    already.
    """
    held = {**exported.constants, **exported.state_dict}
    specs = exported.graph_signature.input_specs
    weights = {
        storage_of(held[str(spec.target)]): spec
        for spec in reversed(specs)  # the first of several
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    }
    found = {
        spec.arg.name: (weights[memory], held[str(spec.target)])
        for spec in specs
        if spec.kind is InputKind.CONSTANT_TENSOR
        and (memory := storage_of(held[str(spec.target)])) in weights
        and _is_within(held[str(spec.target)], held[str(weights[memory].target)])
    }
    if not found:
        return exported
    made = copy.copy(exported)
    made._graph_module = copy.deepcopy(exported.graph_module)
    made._graph_signature = copy.copy(exported.graph_signature)
    made._graph_signature.input_specs = [spec for spec in specs if spec.arg.name not in found]
    kept = {str(spec.target) for spec in made._graph_signature.input_specs}
    made._constants = {name: value for name, value in exported.constants.items() if name in kept}
    nodes = {node.name: node for node in made.graph.find_nodes(op="placeholder")}
    first = next(node for node in made.graph.nodes if node.op != "placeholder")
    for name, (spec, constant) in found.items():
        weight, node = nodes[spec.arg.name], nodes[name]
        with made.graph.inserting_before(first):
            node.replace_all_uses_with(_read(weight, held[str(spec.target)], constant, node.meta))
        made.graph.erase_node(node)
    made.graph_module.recompile()
    return made


def _read(weight: fx.Node, value: Tensor, constant: Tensor, meta: dict[str, Any]) -> fx.Node:
    """A constant as what it is of a weight."""
    if _layout(constant) == _layout(value):
        return weight
    node = weight.graph.call_function(
        _ATEN.as_strided.default,
        (weight, list(constant.shape), list(constant.stride()), constant.storage_offset()),
    )
    node.meta = {key: meta[key] for key in ("val",) if key in meta}
    return node


def _is_within(constant: Tensor, weight: Tensor) -> bool:
    """Whether a tensor that shares a weight's memory can be read of the weight, in whatever memory it is."""
    if constant.dtype != weight.dtype:
        return False
    whole = weight.is_contiguous() and weight.storage_offset() == 0
    end = constant.storage_offset() + sum(
        (size - 1) * step for size, step in zip(constant.shape, constant.stride(), strict=True)
    )
    return _layout(constant) == _layout(weight) or (whole and constant.numel() > 0 and end < weight.numel())


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


__all__ = ["as_weights"]
