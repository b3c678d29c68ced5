"""Run or trace a model without leaving a trace in it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..base._tensors import storage_of
from ..base._undisturbed import drawing_alike
from ..base.compat import OpOverload, TorchDispatchMode, pytree
from ._signature import is_plain

_CONTAINERS = (list, dict, set)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Changed(dict[nn.Module, set[str]]):
    """The attributes of each module that its forward has set.

    Left out are those of torch's own hooks, which compute a weight, and the lists in which torch's recurrent
    modules keep their parameters: they are made anew where an exporter has put stand-ins for the parameters.
    """

    def note(self, module: nn.Module, names: set[str]) -> None:
        """Add the changed attributes of one module."""
        if isinstance(module, nn.RNNBase):
            names = names - {"_flat_weights", "_flat_weight_refs"}
        hooks = [hook for hook in module._forward_pre_hooks.values() if of_torch(hook)]
        names = {
            name
            for name in names
            if not any(
                name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)) for hook in hooks
            )
        }
        if names:
            self[module] = names

    def names(self, model: nn.Module) -> list[str]:
        """The dotted names of the attributes."""
        return [
            f"{path}.{name}" if path else name
            for path, module in model.named_modules()
            for name in sorted(self.get(module, ()))
        ]


def of_torch(hook: Any) -> bool:
    """Whether a hook computes a weight from others (``torch.nn.utils.weight_norm`` and its like), which a
    capture sees.
    """
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[Changed]:
    """Put attributes and hooks of a model and its submodules back as they were, and the values of tensors
    that are plain attributes.

    Afterwards, what is yielded names the attributes that had changed.
    """
    saved = []
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # cannot be captured, and keeps its attributes elsewhere
        own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        contents = {name: copy.copy(value) for name, value in own.items() if type(value) in _CONTAINERS}
        values = _values(leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, Tensor))
        hooks = {name: dict(vars(module)[name]) for name in _HOOKS if name in vars(module)}
        saved.append((module, dict(vars(module)), dict(module._buffers), contents, values, hooks))
    changed = Changed()
    try:
        yield changed
    finally:
        for module, attributes, buffers, contents, values, hooks in saved:
            changed.note(module, _put_back(vars(module), attributes, contents))
            _write_back(values)
            module._buffers.clear()
            module._buffers.update(buffers)
            for (
                name,
                held,
            ) in hooks.items():  # some models hook themselves when they are first asked for hidden states
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
            if name not in own or not _same_plain(own[name], contents.get(name, value)):
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
    """Whether two constants are equal; exporters put back tuples, lists and dicts as equal copies."""
    if type(a) is type(b) and type(a) in (tuple, list, dict):
        return len(a) == len(b) and all(x is y or _same_plain(x, y) for x, y in zip(_items(a), _items(b)))
    return is_plain(a) and type(a) is type(b) and a == b


def _items(container: Any) -> list[Any]:
    """What a container holds, a dict its keys first."""
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


@contextlib.contextmanager
def rewound(model: nn.Module, written: Iterable[str] = ()) -> Iterator[Changed]:
    """As :func:`unchanged`, and put back the values of buffers and the state of the random numbers, which
    start from zero inside.

    Args:
        model: the module that runs inside.
        written: the names of parameters that its forward writes into (an embedding with ``max_norm``, say),
            whose values are put back too.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = _values([*model.buffers(), *(parameters[name] for name in written if name in parameters)])
    try:
        with unchanged(model) as changed, drawing_alike((*model.parameters(), *model.buffers())):
            yield changed
    finally:
        _write_back(values)


class _PuttingBack(TorchDispatchMode):
    """Afterwards, what operators have written into some tensors is as it was.

    Args:
        tensors: of which only those are copied that are written into.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._own, self._before = {storage_of(tensor): tensor for tensor in tensors}, dict[object, Tensor]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for argument, given in zip(func._schema.arguments if isinstance(func, OpOverload) else (), args):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and (key := storage_of(given)) in self._own and key not in self._before:
                self._before[key] = self._own[key].detach().clone()
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        _write_back([(self._own[key].detach(), value) for key, value in self._before.items()])


def run_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call a model, so that what functions of its code remember (``functools.cache``, a dictionary of the
    module) are tensors with values: those of a trace have none, and would be there in every later call.

    The model and the arguments stay as they are.
    """
    with (
        torch.no_grad(),
        rewound(model),
        torch.compiler.set_stance("force_eager"),  # what a model compiles is not compiled under a mode
        _PuttingBack(model.parameters()),
    ):
        model(*copied(args), **copied(kwargs))


def copied(value: Any) -> Any:
    """Arguments that a call may write into, or outputs that can be buffers, as they are now. What is one
    tensor stays one.
    """
    made: dict[int, Tensor] = {}

    def copy_of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = leaf.detach().clone()
        return made[id(leaf)]

    return pytree.tree_map(copy_of, value)


def _values(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tensors with copies of what they hold; those without values, and those of other layouts, are left as
    they are.
    """
    plain = [
        tensor
        for tensor in tensors
        if tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
    ]
    return [(tensor, tensor.detach().clone()) for tensor in plain]


def _write_back(values: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in values:
            if not torch.equal(tensor, value):
                tensor.copy_(value)


# --- Find out whether a copy reads the module that it was copied from.
#
# What Python copies along with a module are its attributes. A function that it keeps (a lambda, a hook, a
# nested function) is not copied, and goes on to hold whatever it was written around: often the module
# itself.


@contextmanager
def noting_reads(model: nn.Module, copy: nn.Module) -> Iterator[list[str]]:
    """Note every attribute of a model's modules that is read meanwhile, but of those that the copy has as
    well: a class may copy itself so.
    """
    own = {id(inner) for inner in copy.modules()}
    paths = {id(inner): path for path, inner in model.named_modules() if id(inner) not in own}
    noted: list[str] = []

    def read(module: nn.Module, name: str) -> Any:
        if id(module) in paths and not name.startswith("_"):
            held = vars(module)
            if any(name in table for table in (held, held["_parameters"], held["_buffers"])):
                path = paths[id(module)]
                noted.append(f"{path}.{name}" if path else name)
        return object.__getattribute__(module, name)

    with mock.patch.object(nn.Module, "__getattribute__", read):
        yield noted


def said_of_reads(model: nn.Module, read: list[str]) -> str:
    """What is wrong with a copy that reads these attributes of a model, in words."""
    return (
        f"a copy of {type(model).__name__} goes on to read '{read[0]}' of the given model: a function that it"
        " keeps (a lambda, a hook) holds on to the model itself; make it a method"
    )


# --- Functions with derivatives of their own, which an export replaces by what they compute.


@contextlib.contextmanager
def functions_called() -> Iterator[dict[str, None]]:
    """The names of the functions that are applied meanwhile, but for torch's own."""
    found: dict[str, None] = {}
    own = Function.__dict__["apply"]

    def apply(kind: type[Function], *args: Any, **kwargs: Any) -> Any:
        if kind.__module__.partition(".")[0] != "torch":
            found[kind.__qualname__] = None
        return own.__get__(None, kind)(*args, **kwargs)

    setattr(Function, "apply", classmethod(apply))  # noqa: B010 - to a type checker it is a method
    try:
        yield found
    finally:
        setattr(Function, "apply", own)  # noqa: B010
