"""Capture and analysis, as a user calls them, against one another: seconds, ratio, numbers, groups.

python benchmarks/analysis.py                          Llamas of SmolLM2's and 7B shape, on the meta device
python benchmarks/analysis.py torchvision NAME ...     models of a zoo (torchvision, timm, transformers)
"""

from __future__ import annotations

import argparse
import importlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from _protocol import Peak, timed
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fasp_fx

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {"SmolLM2-135M": SMOLLM2, "Llama-7B": {}}


def examples(zoo: str | None, names: list[str]) -> Iterator[tuple[str, nn.Module, Any, dict[str, Any]]]:
    """Name, model, arguments and keywords of everything that is measured."""
    entries = {} if zoo is None else {e.name: e for e in importlib.import_module(f"zoos._{zoo}").entries()}
    for name in names or SHAPES:
        if zoo is not None:
            yield name, entries[name].make().eval(), *entries[name].inputs(entries[name].batches[0])
        else:
            with torch.device("meta"):
                model = LlamaForCausalLM(LlamaConfig(**SHAPES[name])).eval()
            yield name, model, (), {"input_ids": torch.zeros(1, 16, dtype=torch.long), "use_cache": False}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", nargs="?", choices=("torchvision", "timm", "transformers"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    for name, model, args, kwargs in examples(options.zoo, options.names):
        with Peak() as peak:
            first, captured = timed(fasp_fx.capture, model, args, kwargs)
            second, analysis = timed(fasp_fx.analyze, captured)
        statuses = dict(Counter(group.status for group in analysis.groups))
        print(
            f"{name}: capture {first:.1f} s, analysis {second:.1f} s, ratio {second / first:.2f}, peak"
            f" {peak.bytes / 2**30:.2f} GiB, {analysis.numbering.total:,} channel numbers, groups {statuses}",
            flush=True,
        )


if __name__ == "__main__":
    main()
