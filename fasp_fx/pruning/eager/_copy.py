"""Copy a module with other tensors in the place of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...analysis.plan import PruningPlan
from ...base._tolerable import tolerable
from ...capturing._fx import attribute
from ...errors import EagerError, first_line
from .._weights import FusedWeights


@dataclass(frozen=True)
class Copied:
    """A copy of the caller's module that holds the weights of a result.

    Attributes:
        model: the caller's.
        module: the copy, of the same class; all attributes but tensors are those of the original.
    """

    model: nn.Module
    module: nn.Module

    def cuts(self) -> dict[str, list[tuple[int, int]]]:
        """For each submodule that holds tensors which have become smaller, how long their dimensions were and
        are.
        """
        found: dict[str, list[tuple[int, int]]] = {}
        for (name, dense), (_, now) in zip(held(self.model), held(self.module), strict=True):
            lost = [pair for pair in zip(dense.shape, now.shape) if pair[0] != pair[1]]
            if lost:
                found.setdefault(name.rpartition(".")[0], []).extend(lost)
        return found


def copied(model: nn.Module, pruned: nn.Module, plan: PruningPlan) -> Copied:
    """Copy a model with the weights that the module of a result has now; no storage is shared with either.

    Each tensor that the copy holds in several places is one tensor there as well, and a parameter is trained
    if it is in the model. What the program does not use (a branch that was not captured, the count of batches
    of a norm) is as in the model.

    Raises:
        EagerError: a weight cannot be had in the form that the model holds it in, or the model cannot be
            copied.
    """
    memo: dict[int, Any] = {}
    made: dict[
        int, tuple[Tensor, Tensor]
    ] = {}  # each with what it was made of, whose id must not be given to another
    computed = {source for weight in plan.folds for source in weight.sources}
    device = next((tensor.device for tensor in [*pruned.parameters(), *pruned.buffers()]), None)
    smaller = _Smaller(pruned, plan)
    tensors = list(held(model))
    for name, tensor in tensors:
        value = None if name in computed else smaller.get(name)
        value = tensor if value is None else value
        if id(tensor) not in memo:
            if id(value) not in made:
                made[id(value)] = value, _own(value, tensor, device)
            memo[id(tensor)] = made[id(value)][1]
    try:
        module = copy.deepcopy(model, memo)
    except tolerable(Exception) as error:  # a module copies itself as it likes
        raise EagerError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {first_line(error)}); use"
            " result.module"
        ) from error
    for path, inner in model.named_modules():
        module.get_submodule(path).training = inner.training  # some are built anew by their class
    lost = {name for name, _ in plan.slices()}
    # The others are computed as ever; should training have changed one, it shows.
    for weight in plan.folds:
        if weight.name in lost:
            value = smaller.get(weight.name)
            assert value is not None
            _take_computed(module, weight.name, weight.sources, value)
    return Copied(model, module)


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for _, tensor in held(model)})


def held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name, and every tensor that is a plain attribute; those held in several
    places under each of their names.
    """
    for path, inner in module.named_modules(remove_duplicate=False):
        if isinstance(inner, torch.jit.ScriptModule):
            continue
        prefix = f"{path}." if path else ""
        plain = {name: value for name, value in vars(inner).items() if isinstance(value, Tensor)}
        for name, value in {**plain, **inner._buffers, **inner._parameters}.items():
            if value is not None:
                yield prefix + name, value


class _Smaller:
    """The tensors of a result by the names of the model's."""

    def __init__(self, pruned: nn.Module, plan: PruningPlan) -> None:
        self.module, self.fused = pruned, FusedWeights(plan)
        self.parameters = dict(pruned.named_parameters(remove_duplicate=False))

    def get(self, name: str) -> Tensor | None:
        """The tensor by that name, put together of its parts if need be; ``None`` for what the program does
        not use.
        """
        if name in self.fused:
            try:
                return self.fused.joined(name, self.parameters)
            except tolerable(RuntimeError) as error:
                raise EagerError(
                    f"the parts of '{name}' have lost different positions, so that no single weight holds"
                    " them; use result.module"
                ) from error
        try:
            found = attribute(self.module, name)
        except AttributeError:
            return None
        return found if isinstance(found, Tensor) else None


def _own(value: Tensor, like: Tensor, device: torch.device | None) -> Tensor:
    """A copy of a value, on the device of the result; of the class of ``like``, with what that has for
    attributes.
    """
    value = value.detach().to(device if device is not None else value.device, copy=True)
    made = value.as_subclass(type(like)).requires_grad_(like.requires_grad and value.is_floating_point())
    vars(made).update(copy.copy(vars(like)))
    return made


def _take_computed(module: nn.Module, name: str, sources: tuple[str, ...], value: Tensor) -> None:
    """Let a module compute a weight to be ``value``, where it can tell what to compute it from: a
    parametrisation that has an inverse.
    """
    path, _, leaf = name.rpartition(".")
    owner = attribute(module, path) if path else module
    trained = {source: attribute(module, source).requires_grad for source in sources}
    try:
        if not nn.utils.parametrize.is_parametrized(owner, leaf):
            raise TypeError("it is no parametrisation of torch.nn.utils.parametrize")
        with torch.no_grad():
            setattr(owner, leaf, value.detach().clone())
    except tolerable(Exception) as error:  # an inverse raises what it likes
        of = ", ".join(map(repr, sources))
        raise EagerError(
            f"the model computes '{name}' from {of} in every call, which cannot be made to give the smaller"
            f" weight ({first_line(error)}); use result.module, or remove the parametrisation from the model"
            " before pruning"
        ) from error
    for source, requires_grad in trained.items():
        attribute(module, source).requires_grad_(requires_grad)


__all__ = ["Copied", "copied", "held", "twin"]
