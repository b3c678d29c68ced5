"""Causal language models and their tokenizers, from a folder, the hub or a GGUF file, dense or pruned; and
what is not loaded, since it could not be what was meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..base._device import check_device
from ..base._offload import Scratch, keep_weights
from ..base._tolerable import tolerable
from ..errors import ArgumentError, FaspError, StoreError, first_line
from ..storage._folder import MANIFEST, is_save, kind_of

if TYPE_CHECKING:
    from ..hf import Pruned

T = TypeVar("T")


def _named(model: str) -> tuple[str, dict[str, str]]:
    """What transformers' loaders take for a command line argument: a GGUF file is named beside its folder."""
    path = Path(model)
    is_gguf = path.suffix.lower() == ".gguf" and path.is_file()
    return (str(path.parent), {"gguf_file": path.name}) if is_gguf else (model, {})


def load_tokenizer(model: str) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        ArgumentError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    where, options = _named(model)
    return _load(f"the tokenizer of '{model}'", lambda: AutoTokenizer.from_pretrained(where, **options))


def load_model(
    model: str, *, dtype: str = "auto", device: torch.device | str = "cpu", scratch: Scratch | None = None
) -> Any:
    """The model in evaluation mode, with its weights on ``device``.

    Args:
        dtype: ``"auto"`` for the one it was stored in, or its name.
        scratch: files to hold the weights instead. Those of a folder are then never all in memory; others
            are, while they are loaded.

    Raises:
        ArgumentError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    from ..hf._offloaded import load_offloaded, refuse_incomplete

    where, options = _named(model)
    if scratch is not None and not options and Path(where).is_dir():
        kind = None if dtype == "auto" else getattr(torch, dtype)
        return _load(f"'{model}'", lambda: load_offloaded(where, scratch, dtype=kind)).to(device)
    more: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **options}
    loaded: Any = _load(f"'{model}'", lambda: AutoModelForCausalLM.from_pretrained(where, **more))
    made, info = loaded
    refuse_incomplete(made, info, model)
    if getattr(made.config, "quantization_config", None) and getattr(made, "hf_quantizer", None) is None:
        raise ArgumentError(
            f"the configuration of '{model}' names a quantisation that transformers does not know, so the"
            ' weights cannot be read as they are meant; remove "quantization_config" if they are not'
            " quantised, or give the model before quantisation"
        )
    if scratch is not None:
        keep_weights(made, scratch)
    return made.eval().to(device)


def load_empty(model: str) -> nn.Module:
    """The model on the meta device: its structure, without any weight in memory.

    Raises:
        ArgumentError: its configuration cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    def build() -> nn.Module:
        where, options = _named(model)
        config = AutoConfig.from_pretrained(where, **options)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval()

    return _load(f"'{model}'", build)


def is_saved(model: str) -> bool:
    """Whether a command line argument is a folder that fasp_fx wrote, rather than a model of transformers."""
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
    return replace(found, tokenizer=found.tokenizer or load_tokenizer(str(folder)))


def load_any(model: str, device: torch.device, dtype: str) -> tuple[Any, Any]:
    """A dense or a pruned model and its tokenizer.

    Raises:
        FaspError: it cannot be loaded, or not in that dtype.
    """
    if not is_saved(model):
        return load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    if dtype != "auto":
        raise ArgumentError(
            "--dtype does not apply to a pruned model: it was chosen when the model was pruned"
        )
    pruned = load_pruned(Path(model), device)
    return pruned.model, pruned.tokenizer


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
    limit = getattr(model.config, "max_position_embeddings", None) or length
    if length > limit:
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
    size = model.config.get_text_config().vocab_size
    if int(tokens.max()) >= size:
        raise ArgumentError(
            f"{what} has the token {int(tokens.max())}, and the model knows those from 0 to {size - 1}; give"
            " the tokenizer that belongs to the model"
        )


def _load(what: str, load: Callable[[], T]) -> T:
    from ..base.compat._transformers import without_gguf_bar

    try:
        with without_gguf_bar():
            return load()
    except FaspError:
        raise
    except tolerable(Exception) as error:  # loaders raise whatever the files make them trip over
        raise ArgumentError(
            f"{what} cannot be loaded: {first_line(error)}; give a causal language model with its tokenizer:"
            " anything that AutoModelForCausalLM loads"
        ) from error
