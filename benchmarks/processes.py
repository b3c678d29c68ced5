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
from typing import Any

import torch
import torch.distributed as dist
from _protocol import arguments, chunks, smollm2

import fasp_fx


def run(text: pathlib.Path, count: int, out: pathlib.Path) -> None:
    """One of the processes: prunes with the others, and the first says what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, tokenizer = smollm2("cpu")
    data = chunks(tokenizer, text, "cpu")[:count]
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
        weights = dict(result.module.named_parameters())
        torch.save({"weights": weights, "plan": result.plan.to_json()}, out)
        print(json.dumps(dict(result.report.seconds)), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = arguments(__doc__ or "")
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
            printed = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", *own],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1"},
            ).stdout
            found = torch.load(out, weights_only=True)
        seconds = json.loads(printed.strip().splitlines()[-1])
        row: dict[str, Any] = {"processes": size, "seconds": seconds}
        if first is None:
            first = {**found, "calibration": seconds["calibration"]}
        else:
            ours, theirs = found["weights"], first["weights"]
            plans = (fasp_fx.PruningPlan.from_json(str(one["plan"])) for one in (found, first))
            row |= {
                "same plan": len({repr(plan.groups) for plan in plans}) == 1,
                "largest difference of a weight": max(
                    float((value - theirs[name]).abs().max()) for name, value in ours.items()
                ),
                "speed-up": first["calibration"] / seconds["calibration"],
            }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
