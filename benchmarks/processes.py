"""How much sooner several processes have calibrated than one: FASP on the protocol's batches, shared among
processes of this machine with one thread each, and whether they decide alike.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from _protocol import arguments, chunks, smollm2

import fasp_fx


def run(text: pathlib.Path, count: int, out: pathlib.Path) -> None:
    """One of the processes: prunes with the others, and the first keeps what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, tokenizer = smollm2("cpu")
    data = chunks(tokenizer, text, "cpu")[:count]
    started = time.perf_counter()
    result = fasp_fx.prune(
        model,
        (),
        {"input_ids": data[:1], "use_cache": False},
        calibration=[{"input_ids": row[None]} for row in data],
        sparsity=0.2,
        quality="fast",
        loss="next-token",
        group=dist.group.WORLD,
    )
    if dist.get_rank() == 0:
        spent = time.perf_counter() - started
        found = {"weights": dict(result.module.named_parameters()), "seconds": spent}
        torch.save({**found, "plan": repr(result.plan.groups)}, out)
    dist.destroy_process_group()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2], help="how many processes")
    options = parser.parse_args()
    if "RANK" in os.environ:
        run(options.text, options.chunks, pathlib.Path(os.environ["OUT"]))
        return
    first: dict[str, Any] | None = None
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "result.pt"
            own = [__file__, "--text", str(options.text), "--chunks", str(options.chunks)]
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", *own],
                check=True,
                env={**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1"},
            )
            found = torch.load(out, weights_only=True)
        first = first or found
        pairs = [(weight, first["weights"][name]) for name, weight in found["weights"].items()]
        row = {
            "processes": size,
            "seconds": found["seconds"],
            "same plan": found["plan"] == first["plan"],
            "largest difference of a weight": max(float((a - b).abs().max()) for a, b in pairs),
            "speed-up": first["seconds"] / found["seconds"],
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
