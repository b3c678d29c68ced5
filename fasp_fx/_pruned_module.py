"""The module of a result: a graph module that can be copied and pickled."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as PRESERVED
from torch.utils import _pytree as pytree

from ._calling._signature import CallSignature
from .channels import attribute


class PrunedModule(fx.GraphModule):
    """A program behind the caller's signature.

    A graph module writes its code into a pickle and traces it again, which keeps neither the caller's signature nor the sizes that may vary. This one writes
    the program as :func:`fasp_fx.store.save` does, and its tensors as they are now. The pickle is read by ``pickle.load`` and by
    ``torch.load(…, weights_only=False)``, in any process that can import fasp_fx.

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
        weights, constants = ({name: _now(self, name, value) for name, value in held.items()} for held in (program.state_dict, program.constants))
        preserved = self.meta.get(PRESERVED, {})
        return _rebuilt, (program_to_json(program), weights, constants, _without_annotations(signature), preserved, self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedModule:
        # The structure of arguments and outputs never changes, and torch warns where a leaf of one is copied.
        for spec in (getattr(self, name, None) for name in ("_in_spec", "_out_spec")):
            memo.update({id(part): part for part in _specs(spec)})
        memo[id(self.origin)] = self.origin  # never written into, and holds fake tensors that cannot be copied
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, PrunedModule)
        copied.origin = self.origin
        return copied


def remember(module: fx.GraphModule, exported: ExportedProgram, signature: CallSignature) -> None:
    """Let a :class:`PrunedModule` know what it is made of."""
    assert isinstance(module, PrunedModule)
    program = copy.copy(exported)
    program._state_dict = {name: _without_values(tensor) for name, tensor in exported.state_dict.items()}
    program._constants = {name: _without_values(value) for name, value in exported.constants.items()}
    module.origin = (program, signature)


def _now(module: nn.Module, name: str, value: Any) -> Any:
    """What the module holds under a name; constants that are no tensors are part of the program."""
    return attribute(module, name) if isinstance(value, Tensor) else value


def _without_values(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    empty = value.detach().to("meta")
    return nn.Parameter(empty, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else empty


def _specs(spec: pytree.TreeSpec | None) -> list[pytree.TreeSpec]:
    return [] if spec is None else [spec, *(part for child in spec.children() for part in _specs(child))]


def _without_annotations(signature: CallSignature) -> CallSignature:
    """Types of arguments may be those of a function or script, which no other process finds."""
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.parameters.values()]
    return replace(signature, parameters=inspect.Signature(plain))


def _rebuilt(
    program: dict[str, Any], weights: dict[str, Tensor], constants: dict[str, Any], signature: CallSignature, preserved: dict[str, Any], training: bool
) -> fx.GraphModule:
    from ._result import wrap
    from ._store._graph_json import program_from_json

    module = wrap(program_from_json(program, weights, constants, None, cast=True), signature)
    module.meta[PRESERVED] = preserved
    for name, value in preserved.items():
        setattr(module, name, value)
    return module.train(training)


__all__ = ["PrunedModule", "remember"]
