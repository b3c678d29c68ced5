"""Perplexity of SmolLM2-135M pruned to what its config can say: of the model that was made, and of the plain
checkpoint in a process without fasp_fx.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from _protocol import EVALUATION, arguments, chunks, smollm2
from fasp_fx.evaluation import perplexity

from fasp_fx.hf import Pruned, prune

#: a program that knows nothing of this one
STRANGER = """
import json, math, sys
sys.modules["fasp_fx"] = None
import torch
from transformers import AutoModelForCausalLM

folder, device = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)
ids = torch.load(folder + "/chunks.pt").to(device)
total = 0.0
with torch.no_grad():
    for chunk in ids:
        logits = model(input_ids=chunk[None], use_cache=False).logits
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), chunk[1:], reduction="sum"))
mean = total / (len(ids) * (ids.shape[1] - 1))
print(json.dumps({"perplexity": math.exp(mean), "parameters": model.num_parameters()}))
"""


def elsewhere(pruned: Pruned, data: torch.Tensor, device: str) -> dict[str, Any]:
    """Perplexity and parameters of the plain checkpoint, in a new process."""
    with tempfile.TemporaryDirectory() as above:
        folder = pruned.save_pretrained(pathlib.Path(above) / "plain")
        torch.save(data.cpu(), folder / "chunks.pt")
        command = [sys.executable, "-I", "-c", STRANGER, str(folder), device]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=above).stdout
        return dict(json.loads(printed.splitlines()[-1]))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--round-to", type=int, default=1)
    options = parser.parse_args()
    model, tokenizer = smollm2(options.device)
    data = chunks(tokenizer, options.text, options.device)
    batches = [{"input_ids": row[None]} for row in data[: options.chunks]]
    measured = data[EVALUATION][: options.evaluation]
    print(
        f"{'dense':<22}{perplexity(model, measured):.4f}   parameters {model.num_parameters():,}", flush=True
    )
    start = time.perf_counter()
    pruned = prune(
        model,
        tokenizer,
        calibration=batches,
        plain=True,
        sparsity=options.sparsity,
        round_to=options.round_to,
    )
    spent = time.perf_counter() - start
    found = elsewhere(pruned, measured, options.device)
    here = perplexity(pruned.model, measured)
    print(
        f"{'neurons':<22}model {here:.4f}   plain checkpoint {found['perplexity']:.4f}   sparsity"
        f" {pruned.report.sparsity:.4f}, parameters {found['parameters']:,}; {pruned.report.notes[0]};"
        f" {spent:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
