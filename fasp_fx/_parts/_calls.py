"""The calls that submodules get while a model runs, and running a model without leaving a trace in it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._calling._signature import is_plain


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Any]) -> Call:
        """The same call with each tensor changed."""
        args, kwargs = pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs))
        return Call(args, kwargs)

    def held(self) -> Call:
        """The same call with copies of its tensors, which nobody writes into."""
        return self.map(lambda tensor: tensor.detach().clone())

    def shapes(self) -> Call:
        """The same call with tensors that have no data."""
        return self.map(lambda tensor: torch.empty_like(tensor, device="meta"))

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
            f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, Tensor) else f"{type(leaf).__name__} {id(leaf) if not is_plain(leaf) else leaf}"
            for leaf in leaves
        ]
        return f"{spec} {shown}"

    def opaque(self) -> str | None:
        """The class of an argument that holds tensors out of the exporter's sight, if there is one."""
        return next((type(leaf).__name__ for leaf in self.leaves() if not isinstance(leaf, Tensor) and _hides_tensors(leaf)), None)

    def run(self, module: nn.Module) -> Any:
        """Call a module with copies of the arguments."""
        held = self.held()
        with torch.no_grad():
            return module(*held.args, **held.kwargs)


def _hides_tensors(value: Any, depth: int = 4) -> bool:
    """Whether an object holds tensors that pytree does not see."""
    if not depth or not hasattr(value, "__dict__") or isinstance(value, type) or (callable(value) and not isinstance(value, nn.Module)):
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
        if self.example is None or sum(t.numel() for t in call.tensors()) > sum(t.numel() for t in self.example.tensors()):
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


_CONTAINERS = (list, dict, set)
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


class Changed(dict[nn.Module, set[str]]):
    """The attributes of each module that its forward has set.

    Left out are those of torch's own hooks, which compute a weight, and the lists in which torch's recurrent modules keep their parameters: they
    are made anew where an exporter has put stand-ins for the parameters.
    """

    def note(self, module: nn.Module, names: set[str]) -> None:
        """Add the changed attributes of one module."""
        if isinstance(module, nn.RNNBase):
            names = names - {"_flat_weights", "_flat_weight_refs"}
        hooks = [hook for hook in module._forward_pre_hooks.values() if of_torch(hook)]
        names = {name for name in names if not any(name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)) for hook in hooks)}
        if names:
            self[module] = names

    def names(self, model: nn.Module) -> list[str]:
        """The dotted names of the attributes."""
        return [f"{path}.{name}" if path else name for path, module in model.named_modules() for name in sorted(self.get(module, ()))]


def of_torch(hook: Any) -> bool:
    """Whether a hook computes a weight from others (``torch.nn.utils.weight_norm`` and its like), which a capture sees."""
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[Changed]:
    """Put attributes and hooks of a model and its submodules back as they were; afterwards, what is yielded names the attributes that had changed."""
    saved = []
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # cannot be captured, and keeps its attributes elsewhere
        contents = {name: copy.copy(value) for name, value in vars(module).items() if not name.startswith("_") and type(value) in _CONTAINERS}
        hooks = {name: dict(vars(module)[name]) for name in _HOOKS if name in vars(module)}
        saved.append((module, dict(vars(module)), dict(module._buffers), contents, hooks))
    changed = Changed()
    try:
        yield changed
    finally:
        for module, attributes, buffers, contents, hooks in saved:
            changed.note(module, _put_back(vars(module), attributes, contents))
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, held in hooks.items():  # some models hook themselves when they are first asked for hidden states
                if vars(module)[name].keys() != held.keys():
                    vars(module)[name].clear()
                    vars(module)[name].update(held)


def _put_back(own: dict[str, Any], attributes: dict[str, Any], contents: dict[str, Any]) -> set[str]:
    """Restore attributes, and what is in the plain containers among them."""
    changed = {name for name in own if name not in attributes}
    for name in changed:
        del own[name]
    for name, value in attributes.items():
        if name not in own or own[name] is not value:
            if name not in own or not _same_plain(own[name], value):
                changed.add(name)
            own[name] = value
    for name, content in contents.items():
        value = attributes[name]
        if len(value) != len(content) or any(a is not b for a, b in zip(_items(value), _items(content))):
            changed.add(name)
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
    return changed


def _same_plain(a: Any, b: Any) -> bool:
    """Whether two constants are equal; exporters put back tuples as equal copies."""
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(map(_same_plain, a, b))
    return is_plain(a) and type(a) is type(b) and a == b


def _items(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


@contextlib.contextmanager
def rewound(model: nn.Module) -> Iterator[Changed]:
    """As :func:`unchanged`, and put back the values of buffers and the state of the random numbers, which start from zero inside."""
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    try:
        with unchanged(model) as changed, torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(0)
            yield changed
    finally:
        with torch.no_grad():
            for buffer, value in values:
                if not _same_bits(buffer, value):
                    buffer.copy_(value)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether nothing was written; buffers of other layouts are left as they are."""
    if a.layout != torch.strided or a.is_quantized:
        return True
    return torch.equal(a, b)
