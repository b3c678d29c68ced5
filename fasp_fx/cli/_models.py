"""Causal language models and their tokenizers, from a folder, the hub or a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..base._device import check_device
from ..base._tolerable import tolerable
from ..base.offload._context import keep_weights
from ..base.offload._scratch import Scratch
from ..errors import ArgumentError, FaspError, first_line
from ._arguments import check_path
from ._checkpoint import (
    check_config,
    check_folder,
    check_loaded,
    check_sizes,
    check_values,
    check_weights_fit,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

T = TypeVar("T")

_CAUSAL = "give a causal language model: anything that AutoModelForCausalLM loads"


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
        try:
            path = Path(model).expanduser()
        except tolerable(RuntimeError) as error:  # no such user
            raise ArgumentError(
                f"there is no model at '{model}': {first_line(error)}; give a model folder, a hub id or a"
                " .gguf file"
            ) from error
        check_path("the model", path)
        if path.is_file():
            if path.suffix.lower() != ".gguf":
                raise ArgumentError(
                    f"'{model}' is a file, but not a .gguf file; give a model folder, a hub id or a .gguf"
                    " file"
                )
            return Source(str(path.parent), path.name)
        if path.is_dir():
            check_folder(path)
            return Source(str(path))
        if path.exists():
            raise ArgumentError(
                f"'{model}' is neither a file nor a folder; give a model folder, a hub id or a .gguf file"
            )
        if (
            path.is_absolute()
            or model.startswith((".", "~"))
            or model.count("/") > 1
            or path.suffix.lower() == ".gguf"
        ):
            raise ArgumentError(
                f"there is no model at '{model}'; give a model folder, a hub id or a .gguf file"
            )
        return Source(model)

    @property
    def options(self) -> dict[str, str]:
        return {} if self.gguf is None else {"gguf_file": self.gguf}

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

    if source.gguf is None and (Path(source.where) / "config.json").is_file():
        check_weights_fit(
            sum(weight.numel() for weight in load_empty(source).parameters()), Path(source.where)
        )

    def build() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            source.where,
            dtype=DTYPES.get(dtype, "auto"),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **source.options,
        )

    if scratch is not None and Path(source.where).is_dir() and source.gguf is None:
        from ..hf import load_offloaded

        model = _load(
            f"'{source}'", _CAUSAL, lambda: load_offloaded(source.where, scratch, dtype=DTYPES.get(dtype))
        )
    else:
        model, info = _load(f"'{source}'", _CAUSAL, build)
        check_loaded(model, info, str(source))
        if scratch is not None:
            keep_weights(model, scratch)
    check_config(model.config, str(source))
    check_values(model, str(source))
    return model.eval().to(device)


def weight_bytes(source: Source, dtype: str) -> int:
    """Bytes of the weights of a model folder in memory, in the dtype asked for; 0 where no folder says it.

    Raises:
        ArgumentError: its configuration cannot be loaded.
    """
    if source.gguf is not None or not (Path(source.where) / "config.json").is_file():
        return 0
    empty = load_empty(source)
    kind = DTYPES.get(dtype) or getattr(getattr(empty, "config", None), "dtype", None) or torch.float32
    return sum(parameter.numel() for parameter in empty.parameters()) * kind.itemsize


def load_empty(source: Source) -> nn.Module:
    """The model on the meta device: its structure, without any weight in memory.

    Raises:
        ArgumentError: its configuration cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    def build() -> nn.Module:
        config = AutoConfig.from_pretrained(source.where, **source.options)
        check_config(config, str(source))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    empty = _load(f"'{source}'", _CAUSAL, build).eval()
    check_sizes(empty, str(source))
    return empty


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


__all__ = [
    "DTYPES",
    "Source",
    "check_length",
    "find_device",
    "load_empty",
    "load_model",
    "load_tokenizer",
    "quieten",
    "weight_bytes",
]
