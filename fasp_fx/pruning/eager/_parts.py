"""The same for a model that was pruned by its submodules."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ...analysis import plan as plans
from ...analysis.plan import PruningPlan
from ...base._tolerable import tolerable
from ...capturing._fx import attribute
from ...errors import ArgumentError, EagerError
from .._result import Result
from ..submodules._stand_in import copied, put, whole_fingerprint
from ._copy import tensors
from ._make import eager


def eager_in_parts(
    pruned: nn.Module, plan: PruningPlan, results: Mapping[str, Result], model: nn.Module
) -> nn.Module:
    """A copy of a model in which each part that was captured is a smaller copy of the caller's, compared with
    the program of that part.

    What lies around the parts has the weights that ``result.module`` has now.

    Raises:
        EagerError: one of the parts has no such copy, or shares a weight with what is around it; names the
            part.
        PlanError: the model is not the one that the plan was made for.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be the nn.Module that was pruned, not {type(model).__name__}")
    plans.check_fingerprint(plan, whole_fingerprint(dict(model.named_parameters(remove_duplicate=False))))
    named = list(pruned.named_modules(remove_duplicate=False))
    places = {
        path: [place for place, inner in named if inner is part.module] for path, part in results.items()
    }
    holders: dict[int, str | None] = {}
    made = copied(model)
    for name, tensor in tensors(pruned):
        holder = next(
            (path for path, own in places.items() if any(name.startswith(f"{place}.") for place in own)), None
        )
        if holders.setdefault(id(tensor), holder) != holder:
            raise EagerError(
                f"'{name}' is shared between a part and what is around it, and each part is made by itself;"
                " use result.module"
            )
        if holder is None:
            attribute(made, name).data = tensor.detach().clone()
    for path, part in results.items():
        try:
            smaller = eager(part.module, part.plan, model.get_submodule(path))
        except tolerable(EagerError) as error:
            group = None if error.group is None else f"{path}.{error.group}"
            raise EagerError(f"in part '{path}': {error}", group) from error
        put(made, places[path], smaller)
    return made


__all__ = ["eager_in_parts"]
