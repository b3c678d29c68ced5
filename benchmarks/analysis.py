"""Capture and analysis, as a user calls them, against one another: seconds, ratio, numbers, groups.

python benchmarks/analysis.py                          Llamas of SmolLM2's and 7B shape, on the meta device
python benchmarks/analysis.py torchvision NAME ...     models of a zoo (torchvision, timm, transformers)
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from _memory import Peak
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fasp_fx

SHAPES = {
    "SmolLM2-135M": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "Llama-7B": LlamaConfig(),
}

Example = tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]


def _llamas() -> Iterator[Example]:
    for name, config in SHAPES.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(config).eval()
        yield name, model, (), {"input_ids": torch.zeros(1, 16, dtype=torch.long), "use_cache": False}


def _of_zoo(zoo: str, names: list[str]) -> Iterator[Example]:
    entries = {entry.name: entry for entry in importlib.import_module(f"zoos._{zoo}").entries()}
    for name in names:
        yield name, entries[name].make().eval(), *entries[name].inputs(entries[name].batches[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", nargs="?", choices=("torchvision", "timm", "transformers"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    for name, model, args, kwargs in _of_zoo(options.zoo, options.names) if options.zoo else _llamas():
        with Peak() as peak:
            start = time.perf_counter()
            captured = fasp_fx.capture(model, args, kwargs)
            between = time.perf_counter()
            analysis = fasp_fx.analyze(captured)
            done = time.perf_counter()
        statuses = dict(Counter(group.status for group in analysis.groups))
        print(
            f"{name}: capture {between - start:.1f} s, analysis {done - between:.1f} s, ratio"
            f" {(done - between) / (between - start):.2f}, peak {peak.bytes / 2**30:.2f} GiB,"
            f" {analysis.numbering.total:,} channel numbers, groups {statuses}",
            flush=True,
        )


if __name__ == "__main__":
    main()
