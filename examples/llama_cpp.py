"""A model with which stock llama.cpp writes in 85 % of the time: it is timed there at a few sizes of its
layers, and a budget of latency looks the times up.

`npm install --prefix build/llama_cpp node-llama-cpp`, then `python llama_cpp.py MODEL TEXT`; MODEL is a
folder or a hub id.
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasp_fx import hf
from fasp_fx.allocation import Budget, Latency

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("text", type=Path)
folders = {"out": Path("small"), "node": Path("build/llama_cpp")}
for name, default in {**folders, "share": 0.85, "format": "gguf-q8_0", "length": 512}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
options = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(options.model)
dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
layers = dense.config.num_hidden_layers
whole = {"channel": dense.config.intermediate_size, "head": dense.config.num_key_value_heads}
counts = {"channel": [32, 64, 128, 256, 512], "head": list(range(1, whole["head"]))}
steps = {kind: [count for count in counts[kind] if count < whole[kind]] for kind in counts}


def losing(kind: str, count: int, of: int = layers) -> Path:
    """A file of the model whose first layers lose so many neurons, or heads."""

    def lost(budget: Budget, round_to: int | None) -> list[int]:
        taken = [group.name for group in budget.groups if group.granularity == kind][:of]
        return [count if group.name in taken else 0 for group in budget.groups]

    cheap: dict[str, Any] = {"score": "random", "restore": None, "sparsity": 0.1, "allocation": lost}
    folder = hf.prune(dense, tokenizer, format=options.format, **cheap).save_pretrained(options.out / "timed")
    file = (folder / "model.gguf").rename(options.out / f"{kind}-{count}-{of}.gguf")
    shutil.rmtree(folder)
    return file


def seconds_of(*files: Path) -> list[Any]:
    """Of each file, for a prompt of 256 tokens, and for each token that is written."""
    script = shutil.copy(Path(__file__).with_suffix(".mjs"), options.node)
    command = ["node", script, *(file.absolute() for file in files)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return [json.loads(line) for line in told.splitlines()]


options.out.mkdir()
files = [losing(kind, count) for kind in steps for count in steps[kind]]
near, *others = [
    answer["token"] for answer in seconds_of(losing("channel", steps["channel"][0], of=1), *files)
]
full = near + (near - others[0]) / (layers - 1)  # the first lacks a step of one layer
saved = iter(full - each for each in others)  # by all layers together
tables = {}
for kind, fewer in steps.items():
    times = np.maximum.accumulate([0.0, *(next(saved) for _ in fewer)]) / layers
    tables[kind] = [0, *fewer], times.tolist()
    for count, less in zip(*tables[kind]):
        print(f"{count:4} of {whole[kind]} {kind}s less in a layer: {less * 1e6:6.1f} microseconds less")
each = {count: less / count for count, less in zip(*tables["channel"]) if count}
pays = min(count for count in each if each[count] >= 0.9 * max(each.values()))
print(f"round_to={pays} pays: fewer neurons at a time save less than nine tenths of the most that one can")


def seconds(widths: Mapping[str, int]) -> float:  # what is left of each group -> how long a token takes
    kinds = {name: "head" if name.endswith("o_proj.weight") else "channel" for name in widths}
    less = [np.interp(whole[kind] - widths[name], *tables[kind]) for name, kind in kinds.items()]
    return float(full - sum(less))


ids = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
chunks = ids[: len(ids) // options.length * options.length].view(-1, 1, options.length)[:32]
budget = Latency(options.share, seconds)
small = hf.prune(
    dense, tokenizer, format=options.format, budget=budget, calibration=chunks.unbind(), round_to=pays
)
small.save_pretrained(options.out / "small")
(spent,), (answer,) = small.report.budgets, seconds_of(options.out / "small" / "model.gguf")
print(f"predicted: {1e6 / spent.dense:.1f} tokens a second, then {1e6 / spent.used:.1f}")
print(f"measured:  {1 / full:.1f} tokens a second, then {1 / answer['token']:.1f}")
