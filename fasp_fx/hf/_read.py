"""What :func:`fasp_fx.load` makes of the folders of language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import StoreError
from ..storage._config_json import LAYERS
from ..storage._folder import kind_of, parsing, read_json
from ._causal import PrunedForCausalLM
from ._config import PrunedConfig, check_layers
from ._folder import KIND
from ._plain_folder import read_plain
from ._prune import Pruned
from ._seq2seq import PrunedForSeq2SeqLM


def read_pruned(folder: Path, device: torch.device | None) -> Pruned:
    """A pruned model as :func:`fasp_fx.hf.prune` returned it, from a folder of either kind, with its
    tokenizer if there is one.

    Raises:
        StoreError: a file is missing, damaged or of another version.
    """
    tokenizer = None
    if (folder / "tokenizer_config.json").is_file():
        with parsing("tokenizer_config.json"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if kind_of(folder) == KIND:
        with parsing("config.json"):
            config = PrunedConfig.from_pretrained(folder)
        kind = PrunedForSeq2SeqLM if config.is_encoder_decoder else PrunedForCausalLM
        model = kind.from_pretrained(folder, device_map=device)
        return Pruned(model, model.plan, model.report, tokenizer)
    plan, report = read_plain(folder)
    with parsing("config.json"):
        check_layers(read_json(folder / "config.json"), LAYERS)  # it may be anybody's
        names = transformers.AutoConfig.from_pretrained(folder).architectures or ["none"]
        found: Any = getattr(transformers, names[0], None)
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            raise StoreError(f"config.json names the class {names[0]!r:.80}, which transformers has not")
        model = found.from_pretrained(folder, dtype="auto", device_map=device)
    return Pruned(model, plan, report, tokenizer)


__all__ = ["read_pruned"]
