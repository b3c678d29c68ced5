"""Causal language models and their tokenizers, from a folder, the hub or a GGUF file, dense or pruned; and
what is not loaded, since it could not be what was meant.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..base._device import check_device
from ..base._offload import keep_weights
from ..base._scratch import Scratch
from ..base._tolerable import tolerable
from ..errors import ArgumentError, FaspError, StoreError, first_line
from ..storage._config_json import LAYERS
from ..storage._folder import MANIFEST, is_save, kind_of
from ._options import check_path

if TYPE_CHECKING:
    from ..hf import Pruned

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_CAUSAL = "give a causal language model: anything that AutoModelForCausalLM loads"

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        where: a folder, or the name of a repository on the hub.
        gguf: the name of a GGUF file in it, or ``None``.
    """

    where: str
    gguf: str | None = None

    @staticmethod
    def of(model: str) -> Source:
        """Read a command line argument.

        Raises:
            ArgumentError: it is a path, and nothing usable is there.
        """
        check_path("the model", model)
        path = Path(model)
        is_gguf = path.suffix.lower() == ".gguf"
        if path.is_file() and is_gguf:
            return Source(str(path.parent), path.name)
        if path.is_dir():
            return Source(model)
        is_path = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
        if is_path or is_gguf or path.exists():
            raise ArgumentError(
                f"there is no model at '{model}'; give a model folder, a hub id or a .gguf file"
            )
        return Source(model)

    @property
    def options(self) -> dict[str, str]:
        return {} if self.gguf is None else {"gguf_file": self.gguf}

    @property
    def config(self) -> Path | None:
        """The file of the configuration, where it is one on this machine."""
        file = Path(self.where) / "config.json"
        return file if self.gguf is None and file.is_file() else None

    def __str__(self) -> str:
        return self.where if self.gguf is None else str(Path(self.where) / self.gguf)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        ArgumentError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    return _load(
        f"the tokenizer of '{source}'",
        "give a model with the files of its tokenizer",
        lambda: AutoTokenizer.from_pretrained(source.where, **source.options),
    )


def load_model(
    source: Source, *, dtype: str = "auto", device: torch.device | str = "cpu", scratch: Scratch | None = None
) -> Any:
    """The model in evaluation mode, with its weights on ``device``.

    Args:
        dtype: ``"auto"`` for the one it was stored in, or a name of :data:`DTYPES`.
        scratch: files to hold the weights instead. Those of a folder are then never all in memory; others
            are, while they are loaded.

    Raises:
        ArgumentError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    from ..hf import load_offloaded

    def build() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            source.where,
            dtype=DTYPES.get(dtype, "auto"),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **source.options,
        )

    if source.config is not None:
        _check_weights_fit(load_empty(source), Path(source.where))
    if scratch is not None and Path(source.where).is_dir() and source.gguf is None:
        model = _load(
            f"'{source}'", _CAUSAL, lambda: load_offloaded(source.where, scratch, dtype=DTYPES.get(dtype))
        )
    else:
        model, info = _load(f"'{source}'", _CAUSAL, build)
        _check_loaded(model, info, str(source))
        if scratch is not None:
            keep_weights(model, scratch)
    _check_values(model, str(source))
    return model.eval().to(device)


def weight_bytes(source: Source, dtype: str) -> int:
    """Bytes of the weights of a model folder in memory, in the dtype asked for; 0 where no folder says it.

    Raises:
        ArgumentError: its configuration cannot be loaded.
    """
    if source.config is None:
        return 0
    empty = load_empty(source)
    return dtype_of(empty, dtype).itemsize * sum(weight.numel() for weight in empty.parameters())


def dtype_of(model: Any, name: str) -> torch.dtype:
    """The dtype of that name; of ``"auto"``, the one that the model's configuration names."""
    named = DTYPES.get(name) or getattr(getattr(model, "config", None), "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.float32


def load_empty(source: Source) -> nn.Module:
    """The model on the meta device: its structure, without any weight in memory.

    Raises:
        ArgumentError: its configuration cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..hf._config import check_layers

    def build() -> nn.Module:
        if source.config is not None:  # some classes make lists as long as this says
            check_layers(json.loads(source.config.read_text(encoding="utf-8")), LAYERS, 1)
        config = AutoConfig.from_pretrained(source.where, **source.options)
        check_layers(config.to_dict(), LAYERS, 1)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval()

    return _load(f"'{source}'", _CAUSAL, build)


def is_saved(model: str) -> bool:
    """Whether a command line argument is a folder that fasp_fx wrote, rather than a model of transformers."""
    check_path("the model", model)
    return (Path(model) / MANIFEST).is_file() and not is_save(Path(model), "plain")


def load_pruned(folder: Path, device: torch.device) -> Pruned:
    """A pruned model as :func:`fasp_fx.hf.prune` returned it, of either kind of folder.

    Raises:
        StoreError: a file is missing, damaged or of another version, or the folder is no pruned model.
        ArgumentError: there is no tokenizer with it.
    """
    from ..hf._prune import read_pruned

    if not (folder / MANIFEST).is_file() or kind_of(folder) not in ("hf", "plain"):
        raise StoreError(
            f"'{folder}' holds no pruned language model; give a folder that `fasp-fx prune` wrote"
        )
    found = read_pruned(folder, device)
    return replace(found, tokenizer=found.tokenizer or load_tokenizer(Source(str(folder))))


def find_device(name: str | None) -> torch.device:
    """The device of that name; ``None``: the accelerator if there is one.

    Raises:
        ArgumentError: there is no such device here.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return check_device(name)


def quieten() -> None:
    """Keep transformers and the hub from writing to the terminal."""
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()


def check_length(model: Any, length: int) -> None:
    """Refuse chunks longer than the model has positions for, if it says how many that is.

    Raises:
        ArgumentError: names both.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        raise ArgumentError(
            f"--length {length} is more than the {limit} positions of the model; use a smaller --length"
        )


def check_tokens(model: Any, tokens: Tensor, what: str) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        what: what holds them, for the message.

    Raises:
        ArgumentError: names the token and the size of the vocabulary.
    """
    size = vocabulary(model)
    if size is not None and int(tokens.max()) >= size:
        raise ArgumentError(
            f"{what} has the token {int(tokens.max())}, and the model knows those from 0 to {size - 1}; give"
            " the tokenizer that belongs to the model"
        )


def vocabulary(model: Any) -> int | None:
    """How many tokens the model has embeddings for, if it says so."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return len(weight)


def _load(what: str, remedy: str, load: Callable[[], T]) -> T:
    from ..base.compat._transformers import without_gguf_bar

    try:
        with without_gguf_bar():
            return load()
    except FaspError:
        raise
    except ImportError as error:
        raise ArgumentError(f"{what} needs a package that is not installed: {first_line(error)}") from error
    except tolerable(Exception) as error:  # loaders raise whatever the files make them trip over
        raise ArgumentError(f"{what} cannot be loaded: {first_line(error)}; {remedy}") from error


def _check_weights_fit(empty: nn.Module, folder: Path) -> None:
    """Refuse a model of more weights than the files in its folder have bits: they would be made up, and not
    fit into memory.
    """
    elements = sum(weight.numel() for weight in empty.parameters())
    held = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in _WEIGHTS)
    if held and elements > 8 * held:
        raise ArgumentError(
            f"the configuration of '{folder}' describes {elements:,} weights, and its files have {held:,}"
            " bytes, too few for them; give the configuration that belongs to the weights"
        )


def _check_loaded(model: Any, info: dict[str, Any], where: str) -> None:
    """Refuse a model that is not the one stored: with weights made up, left out or quantised by something
    unknown.

    Args:
        info: what transformers says of the loading.
    """
    from ..hf._offloaded import refuse_incomplete

    refuse_incomplete(model, info, where)
    quantised = getattr(model.config, "quantization_config", None) is not None
    if quantised and getattr(model, "hf_quantizer", None) is None:
        raise ArgumentError(
            f"the configuration of '{where}' names a quantisation that transformers does not know, so the"
            ' weights cannot be read as they are meant; remove "quantization_config" if they are not'
            " quantised, or give the model before quantisation"
        )


def _check_values(model: Any, where: str) -> None:
    """Refuse weights that are not finite, or so large that their squares are not: norms and statistics are
    sums of squares.
    """
    largest = torch.finfo(torch.float32).max ** 0.5
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.numel() and tensor.itemsize > 1:
            top = float(torch.stack(torch.aminmax(tensor.detach())).abs().max())
            if not top <= largest:
                raise ArgumentError(
                    f"the weight '{name}' of '{where}' holds values that are not finite, or not once they are"
                    f" squared ({top:g}); give an undamaged model"
                )
