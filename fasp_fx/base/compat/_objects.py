"""What objects of torch keep to themselves, a function for each thing that is read or written: where a
release renames one, one line here changes. What can be done without is left out where the name is gone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.graph import CodeGen

#: lists of their own parameters that recurrent modules make anew as they run; they keep no others
RECURRENT_LISTS = frozenset({"_flat_weights", "_flat_weight_refs"})


def schema_of(operator: OpOverload) -> Any:
    """The schema of an operator: its arguments, with types and defaults, what it writes into, and what it
    returns.
    """
    return operator._schema


def codegen_of(graph: fx.Graph) -> CodeGen:
    """What writes the code of a graph and knows how its inputs and outputs are nested;
    ``Graph.set_codegen`` sets it.
    """
    return graph._codegen


def rename(node: fx.Node, name: str) -> None:
    """Give a node of a graph another name, with a number behind it where a node has that already."""
    node._rename(name)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written into; ``None`` where torch does not count."""
    return None if tensor.is_inference() else getattr(tensor, "_version", None)


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor shows a part of another one to autograd."""
    return tensor._base is not None


def storage_id(tensor: Tensor) -> object:
    """What tensors that share memory have in common, also where there is none: a fake tensor has no
    address.
    """
    return tensor.untyped_storage()._cdata


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """The names of a module's own buffers that its state dict leaves out, to be read and changed."""
    return module._non_persistent_buffers_set


def forward_pre_hooks(module: nn.Module) -> MutableMapping[int, Any]:
    """The hooks that a module calls before its ``forward``, by number, to be read and changed."""
    return module._forward_pre_hooks


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """The hooks of a module itself, before and after its ``forward`` and on the way back."""
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield from getattr(module, kind, {}).values()


def trees_of(module: nn.Module) -> list[Any]:
    """The structures of the inputs and the outputs of a graph module whose code takes them apart."""
    return [getattr(module, name, None) for name in ("_in_spec", "_out_spec")]


def written_by_hook(hook: Any) -> set[str]:
    """The attributes that a hook of ``torch.nn.utils`` sets: it says so under one of two names."""
    return {getattr(hook, "name", ""), getattr(hook, "_tensor_name", "")}


def guards_of_module(module: nn.Module) -> Any:
    """The module that checks the sizes of a call of an exported program's module; ``None`` where there is
    none.
    """
    return getattr(module, "_guards_fn", None)


def set_guards(module: nn.Module, guards: nn.Module) -> None:
    """Put another module in the place of that one."""
    module._guards_fn = guards


def with_parts(program: ExportedProgram, **parts: Any) -> ExportedProgram:
    """A copy of an exported program with some of its parts (``graph_module``, ``graph_signature``,
    ``state_dict``, ``constants``) others; its constructor would trace and verify everything anew.
    """
    changed = copy.copy(program)
    for name, part in parts.items():
        setattr(changed, f"_{name}", part)
    return changed
