"""Perplexity of SmolLM2-135M after pruning at several sparsities, with and without restoration."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
from typing import Any

from _protocol import EVALUATION, arguments, chunks, smollm2
from fasp_fx.evaluation import perplexity

import fasp_fx


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.1, 0.2, 0.3])
    parser.add_argument(
        "--no-restore",
        type=float,
        nargs="*",
        default=[0.2],
        help="sparsities measured without restoration too",
    )
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--quality", choices=["fast", "balanced", "best"], default="fast", help="fast: FASP")
    parser.add_argument("--stream", type=pathlib.Path, help="a folder that weights and activations lie in")
    options = parser.parse_args()
    files = contextlib.nullcontext() if options.stream is None else fasp_fx.offload(options.stream)
    with files as scratch:
        run(options, scratch)


def run(options: argparse.Namespace, scratch: Any) -> None:
    """Prune and measure; the model lies in the files, if there are any."""
    model, tokenizer = smollm2(options.device)
    if scratch is not None:
        fasp_fx.keep_weights(model, scratch)
    data = chunks(tokenizer, options.text, options.device)
    batches = [{"input_ids": row[None]} for row in data[: options.chunks]]
    example = {"input_ids": data[:1], "use_cache": False}
    print(f"dense                 {perplexity(model, data[EVALUATION]):.3f}", flush=True)
    runs = [(sparsity, "least-squares") for sparsity in options.sparsity] + [
        (sparsity, None) for sparsity in options.no_restore
    ]
    for sparsity, restore in runs:
        how: Any = {
            "restore": restore,
            "round_to": options.round_to,
            "quality": options.quality,
            "loss": "next-token",
        }
        result = fasp_fx.prune(model, (), example, calibration=batches, sparsity=sparsity, **how)
        value = perplexity(result.module, data[EVALUATION])
        label = f"{sparsity:.0%}" + ("" if restore else " without restoration")
        spent = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.report.seconds.items())
        print(
            f"{label:<24}{value:.3f}   sparsity {result.report.sparsity:.4f}, parameters"
            f" {result.report.parameters[1]:,}; seconds: {spent}",
            flush=True,
        )


if __name__ == "__main__":
    main()
