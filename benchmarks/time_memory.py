"""Time and memory of the whole of prune() on the protocol, against one plain forward pass of the dense model
over the same batches.
"""

from __future__ import annotations

from typing import Any

import torch
from _protocol import Peak, arguments, chunks, smollm2, timed

import fasp_fx


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--quality", choices=["fast", "balanced", "best"], default="fast", help="fast: FASP")
    parser.add_argument("--rounds", type=int, default=2, help="forward, prune, forward, prune, …")
    options = parser.parse_args()
    model, tokenizer = smollm2(options.device)
    data = chunks(tokenizer, options.text, options.device)[: options.chunks]
    how: dict[str, Any] = {"calibration": [{"input_ids": row[None]} for row in data], "loss": "next-token"}
    how |= {"sparsity": options.sparsity, "quality": options.quality}

    @torch.no_grad()
    def forward(rows: Any) -> None:
        for row in rows:
            model(input_ids=row[None], use_cache=False)

    forward(data[:1])  # warm-up
    for _ in range(options.rounds):
        plain, _ = timed(forward, data)
        with Peak() as peak:
            example = {"input_ids": data[:1], "use_cache": False}
            spent, result = timed(fasp_fx.prune, model, (), example, **how)
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.report.seconds.items())
        print(
            f"forward {plain:.1f} s   prune {spent:.1f} s   ratio {spent / plain:.2f}   ({stages})   peak"
            f" resident {peak.bytes / 2**30:.2f} GiB, before {peak.before / 2**30:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
