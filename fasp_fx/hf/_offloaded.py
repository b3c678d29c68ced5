"""Load a checkpoint of transformers into files, tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from torch import Tensor, nn

from ..base._offload import keep_weights
from ..base._scratch import Scratch
from ..base._tolerable import tolerable
from ..base.compat._transformers import kept_in_float32
from ..errors import ArgumentError, FaspError, first_line

T = TypeVar("T")
_NUMBER = re.compile(r"\.\d+\.")

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: bytes of a shard that are read before it is opened anew, which frees the memory that they took
_AT_ONCE = 2**28


def load_offloaded(
    folder: str | Path, scratch: Scratch, *, dtype: torch.dtype | None = None, auto: Any = None
) -> Any:
    """Load a model whose weights lie in files, and never all in memory; otherwise as ``from_pretrained``
    does.

    Args:
        folder: a checkpoint as transformers writes it, with weights in safetensors files.
        scratch: what :func:`fasp_fx.offload` gave.
        dtype: of the weights; ``None``: the one of the configuration, or else as they are stored.
        auto: the class to load with; ``None``: ``AutoModelForCausalLM``.

    Returns:
        The model in evaluation mode.

    Raises:
        ArgumentError: the folder holds no such checkpoint, or a quantised one, or weights are missing or of
            another shape.
        OffloadError: the disk is full.
    """
    import transformers

    if not isinstance(scratch, Scratch):
        raise ArgumentError(
            f"scratch is a {type(scratch).__name__}; pass what `with fasp_fx.offload() as scratch` gives"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(f"dtype={dtype!r} is no type of real numbers; pass torch.bfloat16, say")
    folder = Path(folder)
    config = _loaded(folder, lambda: transformers.AutoConfig.from_pretrained(folder))
    if getattr(config, "quantization_config", None) is not None:
        raise ArgumentError(
            f"the weights of '{folder}' are quantised, and would have to be expanded in memory; give the"
            " checkpoint that was quantised"
        )
    with torch.device("meta"):
        empty = _loaded(folder, lambda: (auto or transformers.AutoModelForCausalLM).from_config(config))
    wanted = dtype or getattr(config, "dtype", None)
    exact = kept_in_float32(empty)
    weights: dict[str, Tensor] = {}
    for name, tensor in _tensors(folder):
        real = tensor.is_floating_point()
        wanted = wanted or (tensor.dtype if real else None)
        kind = wanted if real and wanted and not any(part in name for part in exact) else tensor.dtype
        weights[name] = scratch.empty(tensor.shape, kind).copy_(tensor)
    options: dict[str, Any] = {"config": config, "state_dict": weights, "dtype": wanted or torch.float32}
    model, info = _loaded(
        folder, lambda: type(empty).from_pretrained(None, output_loading_info=True, **options)
    )
    refuse_incomplete(model, info, str(folder))
    keep_weights(model, scratch)  # what transformers had to convert
    model.name_or_path = model.config._name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        with contextlib.suppress(OSError, ValueError):
            # Transformers makes one of the configuration where there is none that can be read.
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def _loaded(folder: Path, load: Callable[[], T]) -> T:
    """What transformers loads of a folder.

    Raises:
        ArgumentError: it cannot.
    """
    try:
        return load()
    except FaspError:
        raise
    except tolerable(Exception) as error:  # transformers raises what it likes
        raise ArgumentError(
            f"'{folder}' cannot be loaded: {first_line(error)}; give a checkpoint as transformers writes it"
        ) from error


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all shards by name, each of which is to be let go before the next."""
    for shard in _shards(folder):
        names: list[str] | None = None
        while names is None or names:
            try:
                with safetensors.safe_open(shard, "pt") as opened:
                    names = list(opened.keys()) if names is None else names
                    read = 0
                    while names and read < _AT_ONCE:
                        name = names.pop(0)
                        tensor = opened.get_tensor(name)
                        read += tensor.nbytes
                        yield name, tensor
                        del tensor
            except (OSError, safetensors.SafetensorError) as error:
                raise ArgumentError(
                    f"'{shard}' cannot be read: {first_line(error)}; give a complete checkpoint"
                ) from error


def _shards(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
        names = sorted(set(index["weight_map"].values()))
        if not all(Path(name).name == name for name in names):
            raise ValueError(f"{INDEX} names files of other folders")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArgumentError(
            f"'{folder}' has no {SINGLE}, and its {INDEX} is no index of shards: {first_line(error)}; give a"
            " complete checkpoint with weights in safetensors files"
        ) from error
    return [folder / name for name in names]


def refuse_incomplete(model: nn.Module, info: Mapping[str, Any], where: str) -> None:
    """Refuse a model with weights made up, or with fewer layers than its files: by the names of the others'
    weights, its configuration says too small a number.

    Other weights may be left out: a model of one kind can be loaded of a checkpoint that holds more.

    Args:
        info: what transformers says of the loading.

    Raises:
        ArgumentError: names a weight that would be made up or left out.
    """
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get(kind) or ())
        if found:
            rest = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ArgumentError(
                f"'{where}' lacks the weights {', '.join(found[:3])}{rest}, or holds them in another size:"
                " they would be made up; give the complete model"
            )
    known = {_NUMBER.sub(".", name) for name, _ in model.named_parameters(remove_duplicate=False)}
    beyond = sorted(
        name
        for name in map(str, info.get("unexpected_keys") or ())
        if _NUMBER.search(name) and _NUMBER.sub(".", name) in known
    )
    if beyond:
        raise ArgumentError(
            f"'{where}' holds weights of more layers than its configuration says ({beyond[0]}), which would"
            " be left out; correct the configuration"
        )
