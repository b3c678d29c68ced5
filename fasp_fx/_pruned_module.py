"""The module of a result: a graph module that can be copied and pickled."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ._calling._guards import guard_calls
from ._calling._signature import CallerCodeGen, CallSignature
from ._capture._names import own_names
from ._compat import PRESERVED, pytree
from ._compile._flex import make_traceable
from ._program import graph_module
from .channels import attribute, target_name
from .errors import StoreError


class PrunedModule(fx.GraphModule):
    """A program behind the caller's signature.

    A graph module writes its code into a pickle and traces it again, which keeps neither the caller's
    signature nor the sizes that may vary. This one writes the program as :func:`fasp_fx.store.save` does, and
    its tensors as they are now. The pickle is read by ``pickle.load`` and by ``torch.load(…,
    weights_only=False)``, in any process that can import fasp_fx.

    Attributes:
        origin: the exported program that it was made of, without the weights, and the caller's signature.
    """

    origin: tuple[ExportedProgram, CallSignature]

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickle holds.

        Raises:
            StoreError: the program holds something that cannot be stored; names it.
        """
        from ._store._graph_json import program_to_json

        program, signature = self.origin
        weights, constants = values_now(self, program)
        preserved = self.meta.get(PRESERVED, {})
        return _rebuilt, (
            program_to_json(program),
            weights,
            constants,
            _without_annotations(signature),
            preserved,
            self.training,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedModule:
        # The structure of arguments and outputs never changes, and torch warns where a leaf of one is copied.
        for spec in (getattr(self, name, None) for name in ("_in_spec", "_out_spec")):
            memo.update({id(part): part for part in _specs(spec)})
        # Never written into, and holds fake tensors that cannot be copied.
        memo[id(self.origin)] = self.origin
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, PrunedModule)
        copied.origin = self.origin
        for name, module in self.named_modules():
            # A copy of a graph module saves all its buffers, those that a model leaves out as well.
            copied.get_submodule(name)._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        return copied


def wrap(exported: ExportedProgram, signature: CallSignature) -> fx.GraphModule:
    """The module of an exported program behind the caller's signature."""
    lifted = exported.module(check_guards=True)
    guard_calls(lifted, exported)
    own_names(lifted)
    for node in lifted.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        # Strides were settled without gradients; with them attention can pick another kernel, whose result a
        # view does not fit.
        node.target = torch.ops.aten.reshape.default
    for node in lifted.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        written: Any = node.args[0]
        if written.op != "get_attr":
            continue
        # Models write without gradients, which no exporter keeps: an embedding with a largest norm into its
        # parameter, running averages into buffers, which would drag the graph of one call into the next.
        place = 0 if isinstance(attribute(lifted, target_name(written)), nn.Parameter) else 1
        with lifted.graph.inserting_before(node):
            node.update_arg(
                place, lifted.graph.call_function(torch.ops.aten.detach.default, (node.args[place],))
            )
    make_traceable(lifted.graph)
    module = graph_module(lifted, lifted.graph, lifted.meta, PrunedModule)
    _remember(module, exported, signature)
    generated: Any = lifted.graph._codegen
    module.graph._codegen = CallerCodeGen(signature, generated.pytree_info)
    module.recompile()
    # transformers' Trainer gives the loss's own arguments to a model that takes **kwargs, unless it says
    # this. Copies keep what is noted in ``meta``.
    module.meta[PRESERVED] = {"accepts_loss_kwargs": False}
    marked: Any = module
    marked.accepts_loss_kwargs = False
    return module.eval()


def _remember(module: fx.GraphModule, exported: ExportedProgram, signature: CallSignature) -> None:
    """Let a :class:`PrunedModule` know what it is made of."""
    assert isinstance(module, PrunedModule)
    program = copy.copy(exported)
    program._state_dict = {name: _without_values(tensor) for name, tensor in exported.state_dict.items()}
    program._constants = {name: _without_values(value) for name, value in exported.constants.items()}
    module.origin = (program, signature)


def program_now(module: nn.Module) -> ExportedProgram:
    """The program of a :class:`PrunedModule`, with the weights and constants that the module holds now.

    Raises:
        StoreError: see :func:`values_now`.
    """
    assert isinstance(module, PrunedModule)
    program = copy.copy(module.origin[0])
    program._state_dict, program._constants = values_now(module, program)
    return program


def values_now(module: nn.Module, program: ExportedProgram) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the constants of a module that was made of a program, as they are now; tensors may have
    been replaced by others since.

    Raises:
        StoreError: one is gone, or is no plain tensor any more; names it.
    """
    weights, constants = (
        {name: _now(module, name, value) for name, value in held.items()}
        for held in (program.state_dict, program.constants)
    )
    return weights, constants


def _now(module: nn.Module, name: str, value: Any) -> Any:
    """What the module holds under a name; constants that are no tensors are part of the program."""
    if not isinstance(value, Tensor):
        return value
    try:
        found = attribute(module, name)
    except AttributeError:
        raise StoreError(
            f"the module has no '{name}' any more, which its program reads; undo the change, or export the"
            " module again"
        ) from None
    if type(found) not in (Tensor, nn.Parameter):
        raise StoreError(
            f"'{name}' is a {type(found).__name__} now, and only plain tensors are stored; save the result"
            " before it is changed, and change what is loaded"
        )
    if isinstance(value, nn.Parameter) and not isinstance(found, nn.Parameter):
        raise StoreError(
            f"'{name}' is no parameter any more but is computed; undo that (as"
            " torch.nn.utils.parametrize.remove_parametrizations does), or save the result before"
        )
    return found


def _without_values(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    empty = value.detach().to("meta")
    return (
        nn.Parameter(empty, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else empty
    )


def _specs(spec: pytree.TreeSpec | None) -> list[pytree.TreeSpec]:
    return [] if spec is None else [spec, *(part for child in spec.children() for part in _specs(child))]


def _without_annotations(signature: CallSignature) -> CallSignature:
    """Types of arguments may be those of a function or script, which no other process finds."""
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.parameters.values()
    ]
    return replace(signature, parameters=inspect.Signature(plain))


def _rebuilt(
    program: dict[str, Any],
    weights: dict[str, Tensor],
    constants: dict[str, Any],
    signature: CallSignature,
    preserved: dict[str, Any],
    training: bool,
) -> fx.GraphModule:
    from ._store._graph_json import program_from_json

    module = wrap(program_from_json(program, weights, constants, None, cast=True), signature)
    module.meta[PRESERVED] = preserved
    for name, value in preserved.items():
        setattr(module, name, value)
    return module.train(training)


__all__ = ["PrunedModule", "program_now", "values_now", "wrap"]
