"""Time and memory of the whole of prune() on the protocol, against one plain forward pass of the dense model
over the same batches.
"""

from __future__ import annotations

import time

import torch
from _memory import Peak
from _protocol import arguments, chunks, smollm2

import fasp_fx


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--quality", choices=["fast", "balanced", "best"], default="fast", help="fast: FASP")
    parser.add_argument("--rounds", type=int, default=2, help="forward, prune, forward, prune, …")
    options = parser.parse_args()
    model, tokenizer = smollm2(options.device)
    data = chunks(tokenizer, options.text, options.device)[: options.chunks]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def forward() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for row in data:
                model(input_ids=row[None], use_cache=False)
        _wait(options.device)
        return time.perf_counter() - start

    with torch.no_grad():
        model(input_ids=data[:1], use_cache=False)  # warm-up
    for _ in range(options.rounds):
        plain = forward()
        with Peak() as peak:
            start = time.perf_counter()
            result = fasp_fx.prune(
                model,
                (),
                {"input_ids": data[:1], "use_cache": False},
                calibration=[{"input_ids": row[None]} for row in data],
                sparsity=options.sparsity,
                quality=options.quality,
                loss="next-token",
            )
            _wait(options.device)
            spent = time.perf_counter() - start
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.report.seconds.items())
        print(
            f"forward {plain:.1f} s   prune {spent:.1f} s   ratio {spent / plain:.2f}   ({stages})",
            flush=True,
        )
        print(
            f"peak resident {peak.bytes / 2**30:.2f} GiB, before {peak.before / 2**30:.2f} GiB, allowed"
            f" {2 * weights / 2**30 + 1.5:.2f} GiB",
            flush=True,
        )


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
