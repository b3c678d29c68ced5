"""Prefill latency (batch 1, 1,024 tokens) of SmolLM2 pruned with round_to=16, against the captured dense
program and the Hugging Face model.

Speed-up is compared with the ratio of multiply-accumulates that the programs' operators perform.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _protocol import arguments, chunks, smollm2
from torch.utils.flop_counter import FlopCounterMode

import fasp_fx
from fasp_fx.capturing import capture
from fasp_fx.passes._finish import finish


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.2, 0.3])
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    model, tokenizer = smollm2(options.device)
    data = chunks(tokenizer, options.text, options.device)
    example = {"input_ids": data[:1], "use_cache": False}
    dense = finish(capture(model, (), example))
    for sparsity in options.sparsity:
        result = fasp_fx.prune(
            model, (), example, score="magnitude", restore=None, sparsity=sparsity, round_to=options.round_to
        )
        macs = {
            name: _macs(module, data[:1]) for name, module in (("dense", dense), ("pruned", result.module))
        }
        ratio = macs["dense"] / macs["pruned"]
        print(
            f"sparsity {result.report.sparsity:.4f}: {macs['dense'] / 1e9:.1f} -> {macs['pruned'] / 1e9:.1f}"
            f" GMAC, ratio {ratio:.3f}",
            flush=True,
        )
        subjects: dict[str, Callable[..., Any]] = {
            "Hugging Face": lambda ids: model(input_ids=ids, use_cache=False),
            "dense": dense,
            "pruned": result.module,
        }
        _report("eager", _interleaved(subjects, data[:1], options.rounds), ratio)
        if not options.no_compile:
            torch._dynamo.reset()
            compiled = {name: torch.compile(subject, dynamic=False) for name, subject in subjects.items()}
            _report("compiled", _interleaved(compiled, data[:1], options.rounds), ratio)


def _macs(module: torch.nn.Module, ids: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(ids)
    return counter.get_total_flops() / 2


def _interleaved(
    subjects: dict[str, Callable[..., Any]], ids: torch.Tensor, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each subject, taken in turn, so that drift of the machine's speed meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    with torch.no_grad():
        for count in range(rounds + 2):
            for name, subject in subjects.items():
                if ids.is_cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                subject(ids)
                if ids.is_cuda:
                    torch.cuda.synchronize()
                if count >= 2:
                    times[name].append(time.perf_counter() - start)
    return times


def _report(label: str, times: dict[str, list[float]], ratio: float) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = {
        name: statistics.median(a / b for a, b in zip(times[name], times["pruned"], strict=True))
        for name in times
    }
    print(
        f"  {label:<9}"
        + ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in medians.items())
        + f"; speed-up over dense {pairs['dense']:.3f} = {pairs['dense'] / ratio:.2f} of the ratio, over"
        f" Hugging Face {pairs['Hugging Face']:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
