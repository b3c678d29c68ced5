"""Load a checkpoint of transformers into files, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .._offload._scratch import Scratch
from ..errors import ArgumentError, first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: bytes of a shard that are read before it is opened anew, which frees the memory that they took
_AT_ONCE = 2**28


def load_offloaded(folder: str | Path, scratch: Scratch, *, dtype: torch.dtype | None = None, auto: Any = None) -> Any:
    """Load a model whose weights lie in files, and never all in memory.

    Args:
        folder: a checkpoint as transformers writes it, with weights in safetensors files.
        scratch: what :func:`fasp_fx.offload` gave.
        dtype: of the weights; ``None``: as they are stored.
        auto: the class to load with; ``None``: ``AutoModelForCausalLM``.

    Returns:
        The model in evaluation mode; transformers names its weights as it does for any checkpoint.

    Raises:
        ArgumentError: the folder holds no such checkpoint, or a quantised one, or weights are missing.
        OffloadError: the disk is full.
    """
    import transformers

    folder = Path(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ArgumentError(f"the weights of '{folder}' are quantised, and would have to be expanded in memory; give the checkpoint that was quantised")
    weights = {name: _copied(tensor, scratch, dtype) for name, tensor in _tensors(folder)}
    own = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), torch.float32)
    with torch.device("meta"):
        kind: Any = type((auto or transformers.AutoModelForCausalLM).from_config(config))
    model, info = kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype or own, output_loading_info=True)
    if info["missing_keys"]:
        raise ArgumentError(f"'{folder}' lacks '{sorted(info['missing_keys'])[0]}'; give a complete checkpoint")
    model.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def _copied(tensor: Tensor, scratch: Scratch, dtype: torch.dtype | None) -> Tensor:
    """A tensor in a file, in another precision if it is one of numbers."""
    made = scratch.empty(tensor.shape, dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
    return made.copy_(tensor)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all shards by name, each of which is to be let go before the next."""
    for shard in _shards(folder):
        try:
            with safetensors.safe_open(shard, "pt") as opened:
                names = list(opened.keys())
            while names:
                read = 0
                with safetensors.safe_open(shard, "pt") as opened:
                    while names and read < _AT_ONCE:
                        name = names.pop(0)
                        tensor = opened.get_tensor(name)
                        read += tensor.numel() * tensor.element_size()
                        yield name, tensor
                        del tensor
        except (OSError, safetensors.SafetensorError) as error:
            raise ArgumentError(f"'{shard}' cannot be read: {first_line(error)}; give a complete checkpoint") from error


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArgumentError(f"'{index}' is no index of shards: {first_line(error)}; give a complete checkpoint") from error
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ArgumentError(f"'{folder}' has no {SINGLE} and no {INDEX}; give a checkpoint with weights in safetensors files")


__all__ = ["load_offloaded"]
