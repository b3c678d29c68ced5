"""Capture and analysis of a Llama of 7B shape on the meta device: seconds, peak memory, groups; and analysis
against export on SmolLM2's shape.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch
from _memory import Peak
from transformers import LlamaConfig, LlamaForCausalLM

from fasp_fx._capture import capture
from fasp_fx.analysis import analyze_program
from fasp_fx.passes import split_fused

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


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, config in SHAPES.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(config).eval()
        with Peak() as peak:
            start = time.perf_counter()
            program = capture(
                model, (), {"input_ids": torch.zeros(1, 16, dtype=torch.long), "use_cache": False}
            )
            captured = time.perf_counter()
            analysis = analyze_program(program, split_fused)
            done = time.perf_counter()
        statuses = dict(Counter(group.status for group in analysis.groups))
        print(
            f"{name}: capture {captured - start:.1f} s, analysis {done - captured:.1f} s, ratio"
            f" {(done - captured) / (captured - start):.2f}, peak {peak.bytes / 2**30:.2f} GiB,"
            f" {analysis.numbering.total:,} channel numbers, groups {statuses}",
            flush=True,
        )


if __name__ == "__main__":
    main()
