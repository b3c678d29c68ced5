"""A model of which submodules were captured: what stands around them, and how they are called."""

from __future__ import annotations

import contextlib
import copy
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fasp_fx.base import PRESERVED, pytree
from fasp_fx.errors import CaptureError

from ._program import Program
from ._signature import PLAIN, CallSignature
from ._unchanged import copied


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | None) -> Call:
        """The same call with its tensors on a device."""
        return Call(
            *pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device=device), (self.args, self.kwargs))
        )

    def __iter__(self) -> Iterator[Any]:
        """Tensors and constants, in order."""
        return iter(pytree.tree_leaves((self.args, self.kwargs)))

    def tensors(self) -> list[Tensor]:
        """The tensors, in order."""
        return [leaf for leaf in self if isinstance(leaf, Tensor)]

    def size(self) -> int:
        """The number of elements."""
        return sum(tensor.numel() for tensor in self.tensors())

    def run(self, module: nn.Module) -> Any:
        """Call a module with copies of the arguments."""
        with torch.no_grad():
            return module(*copied(self.args), **copied(self.kwargs))


@contextlib.contextmanager
def watching(modules: Iterable[nn.Module], seen: Callable[[nn.Module, Call], None]) -> Iterator[None]:
    """Report every call that one of ``modules`` gets inside, with copies of what it gets."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen(module, Call(copied(args), copied(kwargs)))

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@dataclass(frozen=True)
class Part:
    """A captured submodule.

    Attributes:
        paths: where it stands in the model, more than one if it is shared; by the first its parameters are
            named.
        module: the original.
        calls: how often one run of the model on the example inputs calls it.
    """

    paths: tuple[str, ...]
    module: nn.Module
    program: Program
    calls: int


@dataclass(frozen=True, repr=False)
class Parts:
    """A model that was captured by its submodules.

    Attributes:
        model: a copy of the caller's, in which the parts stand.
        call: the example inputs.
        signature: how the caller's is called.
        error: why it cannot be captured as a whole.
        parts: what was captured, in the order in which the model calls it.
        left: for each submodule that was not, why.
    """

    model: nn.Module
    call: Call
    signature: CallSignature
    error: CaptureError
    parts: tuple[Part, ...]
    left: Mapping[str, str]


#: what a parent may read of a submodule besides calling it
_SIMPLE = (*PLAIN, enum.Enum, torch.dtype, torch.device)


def simple_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are plain data, such as ``out_channels``."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not hasattr(fx.GraphModule, name)
        and all(isinstance(leaf, _SIMPLE) for leaf in pytree.tree_leaves(value))
    }


def with_attributes_of(module: fx.GraphModule, original: nn.Module) -> fx.GraphModule:
    """The pruned part with the simple attributes of the original, which copies and pickles keep."""
    attributes = {
        name: value for name, value in simple_attributes(original).items() if not hasattr(module, name)
    }
    vars(module).update(attributes)
    module.meta[PRESERVED] = {**module.meta.get(PRESERVED, {}), **attributes}
    return module


def replace_submodule(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Place a module at each of its paths."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def model_copy(model: nn.Module) -> nn.Module:
    """A copy that shares no storage. Python cannot copy weights that a hook computes; those are cloned. Torch
    copies a parameter without its attributes.
    """
    clones = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    model_too = copy.deepcopy(model, clones)
    for parameter, its in zip(model.parameters(), model_too.parameters(), strict=False):
        vars(its).update(copy.copy(vars(parameter)))
    return model_too
