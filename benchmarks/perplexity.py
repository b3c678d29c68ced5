"""Perplexity of SmolLM2-135M after pruning at several sparsities, with and without restoration; time and
memory of the whole of prune(), with ``--forward`` against one plain forward pass of the dense model over the
same batches.
"""

from __future__ import annotations

import contextlib
import pathlib

import torch
from _protocol import EVALUATION, Peak, arguments, chunks, smollm2, timed
from fasp_fx.evaluation import perplexity

import fasp_fx


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.1, 0.2, 0.3])
    parser.add_argument("--no-restore", type=float, nargs="*", default=[0.2], help="without restoration too")
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--quality", choices=["fast", "balanced", "best"], default="fast", help="fast: FASP")
    parser.add_argument("--stream", type=pathlib.Path, help="a folder that weights and activations lie in")
    parser.add_argument("--forward", action="store_true", help="time a forward pass before each pruning")
    options = parser.parse_args()
    with contextlib.nullcontext() if options.stream is None else fasp_fx.offload(options.stream) as scratch:
        model, tokenizer = smollm2(options.device)
        if scratch is not None:
            fasp_fx.keep_weights(model, scratch)
        data = chunks(tokenizer, options.text, options.device)
        calibration = [{"input_ids": row[None]} for row in data[: options.chunks]]

        @torch.no_grad()
        def forward() -> None:
            for batch in calibration:
                model(**batch, use_cache=False)

        measured = data[EVALUATION][: options.evaluation]
        print(f"dense                 {perplexity(model, measured):.3f}", flush=True)
        for sparsity, restore in [
            *((sparsity, "least-squares") for sparsity in options.sparsity),
            *((sparsity, None) for sparsity in options.no_restore),
        ]:
            plain = f", a forward pass {timed(forward)[0]:.1f}" if options.forward else ""
            with Peak() as peak:
                whole, result = timed(
                    fasp_fx.prune,
                    model,
                    (),
                    {"input_ids": data[:1], "use_cache": False},
                    calibration=calibration,
                    sparsity=sparsity,
                    restore=restore,
                    round_to=options.round_to,
                    quality=options.quality,
                    loss="next-token",
                )
            label = f"{sparsity:.0%}" + ("" if restore else " without restoration")
            print(
                f"{label:<24}{perplexity(result.module, measured):.3f}   sparsity"
                f" {result.report.sparsity:.4f}, parameters {result.report.parameters[1]:,}; seconds:"
                f" {whole:.1f}{plain}; peak resident {peak.bytes / 2**30:.2f} GiB, before"
                f" {peak.before / 2**30:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
