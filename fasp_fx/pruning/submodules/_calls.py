"""The calls that submodules get while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...base.compat import pytree
from ...capturing._signature import is_plain


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Any]) -> Call:
        """The same call with each tensor changed."""
        args, kwargs = pytree.tree_map(
            lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return Call(args, kwargs)

    def held(self) -> Call:
        """The same call with copies of its tensors, which nobody writes into."""
        return self.map(lambda tensor: tensor.detach().clone())

    def shapes(self) -> Call:
        """The same call with tensors that take no memory, on their devices: what holds them may look where
        they lie, as a ``PackedSequence`` does.
        """
        return self.map(lambda tensor: tensor.new_zeros(()).expand(tensor.shape))

    def leaves(self) -> list[Any]:
        """Tensors and constants, in order."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def tensors(self) -> list[Tensor]:
        """The tensors, in order."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def key(self) -> str:
        """Calls with the same structure, shapes, dtypes and constants have the same key."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        shown = [
            (
                f"{leaf.dtype}{list(leaf.shape)}"
                if isinstance(leaf, Tensor)
                else f"{type(leaf).__name__} {id(leaf) if not is_plain(leaf) else leaf}"
            )
            for leaf in leaves
        ]
        return f"{spec} {shown}"

    def opaque(self) -> str | None:
        """The class of an argument that holds tensors out of the exporter's sight, or that holds nothing but
        tensors, so that it cannot say what is known of them, if there is one.
        """
        for value in (*self.args, *self.kwargs.values()):
            try:
                pytree.tree_map(lambda _: {}, value)
            except (AttributeError, TypeError, ValueError):  # a PackedSequence looks at what it is made of
                return type(value).__name__
        return next(
            (
                type(leaf).__name__
                for leaf in self.leaves()
                if not isinstance(leaf, Tensor) and _hides_tensors(leaf)
            ),
            None,
        )

    def run(self, module: nn.Module) -> Any:
        """Call a module with copies of the arguments."""
        held = self.held()
        with torch.no_grad():
            return module(*held.args, **held.kwargs)


def _hides_tensors(value: Any, depth: int = 4) -> bool:
    """Whether an object holds tensors that pytree does not see."""
    if (
        not depth
        or not hasattr(value, "__dict__")
        or isinstance(value, type)
        or (callable(value) and not isinstance(value, nn.Module))
    ):
        return False
    held = pytree.tree_leaves(vars(value))
    return any(isinstance(leaf, Tensor) or _hides_tensors(leaf, depth - 1) for leaf in held)


@dataclass
class Seen:
    """What one module was called with.

    Attributes:
        count: the number of calls.
        example: the call with the most elements, with data.
        kinds: one call of each structure and shape, without data.
    """

    count: int = 0
    example: Call | None = None
    kinds: dict[str, Call] = field(default_factory=dict)

    def add(self, call: Call) -> None:
        """Take note of a call."""
        self.count += 1
        self.kinds.setdefault(call.key(), call.shapes())
        if self.example is None or sum(t.numel() for t in call.tensors()) > sum(
            t.numel() for t in self.example.tensors()
        ):
            self.example = call.held()


@contextlib.contextmanager
def watching(modules: Iterable[nn.Module], seen: Callable[[nn.Module, Call], None]) -> Iterator[None]:
    """Report every call that one of ``modules`` gets inside."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen(module, Call(args, kwargs))

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
