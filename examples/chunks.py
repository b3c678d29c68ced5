"""What flap.py and slimllm.py share: a Llama and a text in chunks, and the perplexity after pruning it."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fasp_fx
from fasp_fx.hf import perplexity


class Comparison:
    """Reads the command line: a folder or GGUF file of a Llama, and a text to calibrate and to measure on."""

    def __init__(self, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("model", type=Path)
        parser.add_argument("text", type=Path)
        numbers = {"sparsity": 0.2, "length": 1024, "chunks": 32, "after": 100, "measure": 40}
        for name, default in numbers.items():
            parser.add_argument(f"--{name}", type=type(default), default=default)
        options = parser.parse_args()
        is_file = options.model.suffix == ".gguf"
        where = options.model.parent if is_file else options.model
        how = {"gguf_file": options.model.name} if is_file else {}
        biased = {"attention_bias": True, "mlp_bias": True}  # the peers add biases, zero to begin with
        self.dense = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **biased, **how).eval()
        text = options.text.read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(where, **how)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        chunks = ids[: len(ids) // options.length * options.length].view(-1, options.length)
        self.calls = [{"input_ids": chunk[None], "use_cache": False} for chunk in chunks[: options.chunks]]
        self.measured = chunks[options.after :][: options.measure]
        self.captured, self.sparsity = fasp_fx.capture(self.dense, (), self.calls[0]), options.sparsity

    def run(self, name: str, **options: Any) -> None:
        """Prune with these options, and print what it came to."""
        options |= {"calibration": self.calls, "sparsity": self.sparsity, "loss": "next-token"}
        result = fasp_fx.prune(self.captured, **options)
        after = perplexity(result.module, self.measured)
        print(f"{name}: {result.report.sparsity:.1%} removed, perplexity {after:.2f}", flush=True)
