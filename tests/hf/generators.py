"""Small models that generate, their masked dense counterparts, and prompts with padding."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from models import VOCABULARY, ZOO, randomise
from oracle import zeroed
from torch import Tensor

from fasp_fx import hf

TOKENS = 64


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.T5ForConditionalGeneration(config)


def _zoo(name: str) -> Any:
    model: Any = ZOO[name].make()
    if name == "llama_gqa":  # with room for the byte-level tokenizer of the tests of folders
        config = copy.deepcopy(model.config)
        config.vocab_size = 258
        model = type(model)(config)
    return model


@cache
def dense(name: str) -> Any:
    """A model with random weights, in float64, where no two tokens tie but by design; Gemma-2 in float32: its
    eager attention has no float64.
    """
    model: Any = randomise(_t5() if name == "t5" else _long(_zoo(name)), seed=3)
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=0, decoder_start_token_id=0 if name == "t5" else None
    )
    return (model if name == "gemma2" else model.double()).eval()


def _long(model: Any) -> Any:
    """The same model with a table of positions that 64 new tokens fit into."""
    for field in ("n_positions", "max_position_embeddings"):
        if getattr(model.config, field, 1 << 20) < 2 * TOKENS:
            config = copy.deepcopy(model.config)
            setattr(config, field, 2 * TOKENS)
            return type(model)(config)
    return model


@cache
def pruned(name: str) -> hf.Pruned:
    """The model pruned by a fifth, mask-exact."""
    made: hf.Pruned = hf.prune(dense(name), sparsity=0.2, score="magnitude", restore=None, format="fasp-fx")
    return made


@dataclass(frozen=True)
class Case:
    """One way of generating."""

    batch: int
    beams: int

    def inputs(self, name: str) -> dict[str, Tensor]:
        """Prompts; of several, all but the last are padded: on the left, of an encoder on the right."""
        ids = torch.randint(2, VOCABULARY, (self.batch, 9), generator=torch.Generator().manual_seed(5))
        mask = torch.ones_like(ids)
        for row in range(self.batch - 1):
            place = slice(9 - row - 1, 9) if name == "t5" else slice(0, row + 1)
            mask[row, place] = 0
            ids[row, place] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def run(self, model: Any, name: str, **options: Any) -> Tensor:
        """Greedy generation of exactly 64 tokens."""
        found: Tensor = model.generate(
            **self.inputs(name),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            num_beams=self.beams,
            **options,
        )
        return found


def expected(name: str, case: Case) -> Tensor:
    """What the dense model generates whose consumers' removed inputs are multiplied by zero."""
    return case.run(zeroed(dense(name), pruned(name).plan), name)


__all__ = ["TOKENS", "Case", "dense", "expected", "pruned"]
