"""Models of transformers: their own exporter, and their caches."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fasp_fx.base import pytree

from ._sizes import all_dims, every_dim, images_of


def _class_of(module: str, name: str) -> Any:
    """A class of transformers. Nothing is an instance of it before it is imported, which takes as long as
    torch: then it is ``()``, as :func:`isinstance` takes it.
    """
    return getattr(sys.modules.get(f"transformers.{module}"), name, ())


def is_transformers(model: nn.Module) -> bool:
    return isinstance(model, _class_of("modeling_utils", "PreTrainedModel"))


def register_caches(model: Any) -> None:
    """Make torch see the tensors inside caches before arguments are told from constants; the exporter does so
    only later.
    """
    from fasp_fx.base import register_cache_pytrees_for_model

    register_cache_pytrees_for_model(model)


def is_cache(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, _class_of("cache_utils", "Cache"))


def export_transformers(model: Any, kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    from fasp_fx.base import export_program, prepare_for_export

    # So that the shapes speak of what the exporter will see.
    model, prepared, flags = prepare_for_export(model, dict(kwargs))
    kwargs = dict(prepared)
    if shapes is every_dim or (shapes is all_dims and not images_of(kwargs.values())):
        shapes = cached_dims(kwargs)
    elif callable(shapes):
        shapes = shapes((), kwargs).dynamic_shapes(model, (), kwargs)
    forward = vars(model).get("forward")
    try:
        with _told_to_parts(model, flags):
            return export_program(model, {**kwargs, **flags}, shapes)
    finally:
        if forward is None:
            vars(model).pop("forward", None)  # the exporter puts the method back as an attribute


@contextlib.contextmanager
def _told_to_parts(model: nn.Module, flags: dict[str, Any]) -> Iterator[None]:
    """Let submodules with a configuration of their own return what the model is asked for: the exporter
    writes that into the model's alone.
    """
    config_of_model = getattr(model, "config", None)
    configs = {
        id(config): config
        for module in model.modules()
        if (config := getattr(module, "config", None)) is not None and config is not config_of_model
    }
    asked = {
        name: flags[name]
        for name in ("use_cache", "output_attentions", "output_hidden_states")
        if flags.get(name) is not None
    }
    with contextlib.ExitStack() as stack:
        for config in configs.values():
            for name, value in asked.items():
                # An encoder keeps no cache, whoever asks.
                caches = name != "use_cache" or not value or getattr(config, "is_decoder", False)
                if caches and hasattr(config, name):
                    stack.callback(setattr, config, name, getattr(config, name))
                    setattr(config, name, value)
        yield


def cached_dims(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every dimension dynamic, but in caches the number of heads and the width: a size that varies between
    calls is no channel that could go.
    """
    from fasp_fx.base import get_auto_dynamic_shapes

    dims = {}
    for name, value in kwargs.items():
        dims[name] = get_auto_dynamic_shapes(value)
        if is_cache(type(value)):
            dims[name] = [
                _cache_dims(leaf) if isinstance(leaf, Tensor) else spec
                for leaf, spec in zip(pytree.tree_leaves(value), dims[name], strict=True)
            ]
    return dims


def _cache_dims(tensor: Tensor) -> dict[int, Any]:
    # [batch, heads, length, width], or states without a length.
    fixed = {tensor.dim() - 1} | ({1} if tensor.dim() == 4 else set())
    return {dim: Dim.STATIC if dim in fixed and tensor.dim() > 1 else Dim.AUTO for dim in range(tensor.dim())}
