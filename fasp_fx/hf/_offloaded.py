"""Load a checkpoint of transformers into files, tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from fasp_fx.base import Scratch, keep_weights, kept_in_float32
from fasp_fx.errors import ArgumentError

from ._folder import check_sums

_NUMBER = re.compile(r"\.\d+\.")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
        StoreError: it is a folder that was saved here, and damaged.
        ArgumentError: the checkpoint is quantised, or weights are missing or of another shape. What else is
            wrong with it, transformers and safetensors say.
        OffloadError: the disk is full.

    Examples:
        >>> llama.save_pretrained("dense")
        >>> with fasp_fx.offload() as scratch:
        ...     model = hf.load_offloaded("dense", scratch)
        >>> torch.equal(model(texts[0]).logits, llama(texts[0]).logits)
        True
    """
    import transformers

    folder = Path(folder)
    weights: dict[str, Tensor] = {}
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ArgumentError(
            f"the weights of '{folder}' are quantised, and would have to be expanded in memory; give the"
            " checkpoint that was quantised"
        )
    with torch.device("meta"):
        empty = (auto or transformers.AutoModelForCausalLM).from_config(config)
    wanted, exact = dtype or getattr(config, "dtype", None), kept_in_float32(empty)
    for name, tensor in _tensors(folder):
        real = tensor.is_floating_point()
        wanted = wanted or (tensor.dtype if real else None)
        kind = wanted if real and wanted and not any(part in name for part in exact) else tensor.dtype
        weights[name] = scratch.empty(tensor.shape, kind).copy_(tensor)
    options: dict[str, Any] = {"config": config, "state_dict": weights, "dtype": wanted or torch.float32}
    model, info = type(empty).from_pretrained(None, output_loading_info=True, **options)
    refuse_incomplete(model, info, str(folder))
    keep_weights(model, scratch)  # what transformers had to convert
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        with contextlib.suppress(OSError, ValueError):
            # Transformers makes one of the configuration where there is none that can be read.
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all shards by name, each of which is to be let go before the next."""
    shards = [folder / SINGLE]
    if not shards[0].is_file():
        index = json.loads((folder / INDEX).read_text("utf-8"))
        shards = [folder / Path(name).name for name in sorted(set(index["weight_map"].values()))]
    for shard in shards:
        with safetensors.safe_open(shard, "pt") as opened:
            names = list(opened.keys())
        for name in names:
            with safetensors.safe_open(shard, "pt") as opened:  # anew, which frees the memory of the last
                yield name, opened.get_tensor(name)


def refuse_incomplete(model: nn.Module, info: Mapping[str, Any], where: str) -> None:
    """Refuse a model with weights made up, or with fewer layers than its files, or of a folder that was saved
    here and changed since. Other weights may be left out: a model of one kind can be loaded of a checkpoint
    that holds more.

    Args:
        info: what transformers says of the loading.

    Raises:
        StoreError: names a file that was changed.
        ArgumentError: names a weight that would be made up or left out.
    """
    check_sums(Path(where))
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if lacking := _named(info, kind):
            rest = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise ArgumentError(
                f"'{where}' lacks the weights {', '.join(lacking[:3])}{rest}, or holds them in another size:"
                " they would be made up; give the complete model"
            )
    numberless = {_NUMBER.sub(".", name) for name, _ in model.named_parameters(remove_duplicate=False)}
    unexpected = [name for name in _named(info, "unexpected_keys") if _NUMBER.search(name)]
    layers = [name for name in unexpected if _NUMBER.sub(".", name) in numberless]
    if layers:
        raise ArgumentError(
            f"'{where}' holds weights of more layers than its configuration says"
            f" ({layers[0]}), which would be left out; correct the configuration"
        )


def first_fault(info: Mapping[str, Any]) -> str:
    """A weight that transformers made up or left out, as it says of a loading; ``""``: none."""
    return next((f"{kind.replace('_', ' ')}: {_named(info, kind)[0]}" for kind in info if info[kind]), "")


def _named(info: Mapping[str, Any], kind: str) -> list[str]:
    """The weights of one kind of fault."""
    return sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get(kind) or ())
