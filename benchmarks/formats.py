"""What each format of model files costs: perplexity of SmolLM2-135M pruned to what the format can say, of the
model that was made, and of its files in a process without fasp_fx, or in stock llama.cpp.
"""

from __future__ import annotations

import math
import pathlib
import subprocess
import sys
import tempfile

import torch
from _protocol import EVALUATION, arguments, chunks, smollm2

from fasp_fx.hf import Pruned, perplexity, prune

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "hf"))
from llama_cpp import missing, predictions

#: a program that knows nothing of this one
STRANGER = """
import json, math, sys
sys.modules["fasp_fx"] = None
import torch
from transformers import AutoModelForCausalLM

folder, device = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval().to(device)
ids = torch.load(folder + "/chunks.pt").to(device)
total = 0.0
with torch.no_grad():
    for chunk in ids:
        logits = model(input_ids=chunk[None], use_cache=False).logits
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), chunk[1:], reduction="sum"))
print(math.exp(total / (len(ids) * (ids.shape[1] - 1))))
"""


def elsewhere(pruned: Pruned, data: torch.Tensor, device: str) -> str:
    """Perplexity of the files where fasp_fx is not."""
    with tempfile.TemporaryDirectory() as above:
        folder = pruned.save_pretrained(pathlib.Path(above) / "small")
        file = folder / "model.gguf"
        if file.is_file() and not missing():
            found = predictions(file, data[:8].tolist(), folder.parent, "F16")
            logs = [math.log(own["following"]) for chunk in found for own in chunk[:-1]]
            return (
                f"of the first eight chunks: model {perplexity(pruned.model, data[:8]):.4f}, llama.cpp"
                f" {math.exp(-sum(logs) / len(logs)):.4f}, {file.stat().st_size:,} bytes"
            )
        torch.save(data.cpu(), folder / "chunks.pt")
        command = [sys.executable, "-I", "-c", STRANGER, str(folder), device]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=above).stdout
        return printed.splitlines()[-1]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--format", action="append", help="default: all below at once")
    options = parser.parse_args()
    model, tokenizer = smollm2(options.device)
    data = chunks(tokenizer, options.text, options.device)
    batches = [{"input_ids": row[None]} for row in data[: options.chunks]]
    measured = data[EVALUATION][: options.evaluation]
    print(
        f"{'dense':<12}{perplexity(model, measured):.4f}   parameters {model.num_parameters():,}", flush=True
    )
    for name in options.format or ["fasp-fx", "per-layer", "gguf-q8_0", "decilm", "plain"]:
        pruned = prune(
            model, tokenizer, calibration=batches, held_out=(), format=name, sparsity=options.sparsity
        )
        here = perplexity(pruned.model, measured)
        there = "" if name == "fasp-fx" else elsewhere(pruned, measured, options.device)
        print(
            f"{name:<12}model {here:.4f}   files {there}   sparsity"
            f" {pruned.report.sparsity:.4f}, parameters {pruned.model.num_parameters():,};"
            f" {pruned.report.notes[0] if pruned.report.notes else ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
