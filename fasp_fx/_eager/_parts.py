"""The same for a model that was pruned by its submodules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from .. import plan as plans
from .._parts._stand_in import put
from .._parts._whole import copied, whole_fingerprint
from ..channels import attribute
from ..errors import ArgumentError, EagerError, tolerable
from ._copy import held
from ._make import eager

if TYPE_CHECKING:
    from .._parts._result import PartsResult


def eager_in_parts(result: PartsResult, model: nn.Module) -> nn.Module:
    """A copy of a model in which each part that was captured is a smaller copy of the caller's, held against
    the program of that part.

    What lies around the parts has the weights that ``result.module`` has now.

    Raises:
        EagerError: one of the parts has no such copy, or shares a weight with what is around it; names the
            part.
        PlanError: the model is not the one that the plan was made for.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be the nn.Module that was pruned, not {type(model).__name__}")
    plans.check_fingerprint(
        result.plan, whole_fingerprint(dict(model.named_parameters(remove_duplicate=False)))
    )
    parts = {place: path for path in result.parts for place in _places(result, path)}
    holders: dict[int, str | None] = {}
    around = []
    for name, tensor in held(result.module):
        holder = next((path for place, path in parts.items() if name.startswith(f"{place}.")), None)
        if holders.setdefault(id(tensor), holder) != holder:
            raise EagerError(
                f"'{name}' is shared between a part and what is around it, and each part is made by itself;"
                " use result.module"
            )
        if holder is None:
            around.append((name, tensor))
    made = copied(model)
    for path, part in result.parts.items():
        try:
            smaller = eager(part, model.get_submodule(path))
        except tolerable(EagerError) as error:
            group = None if error.group is None else f"{path}.{error.group}"
            raise EagerError(f"in part '{path}': {error}", group) from error
        put(made, _places(result, path), smaller)
    for name, tensor in around:
        attribute(made, name).data = tensor.detach().clone()
    return made


def _places(result: PartsResult, path: str) -> Iterator[str]:
    """Where a part stands in the model."""
    module = result.parts[path].module
    yield from (
        place for place, inner in result.module.named_modules(remove_duplicate=False) if inner is module
    )


__all__ = ["eager_in_parts"]
