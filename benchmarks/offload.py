"""A Llama or an OPT of a common shape, pruned with its weights in files and in memory: peak memory, time, and
whether both come to the same. Resumes.

The checkpoint is made of random numbers, in bfloat16. Each pruning is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

import torch
from _protocol import Peak, Results, arguments, timed
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

import fasp_fx
import fasp_fx.hf

#: the smallest of the models' vocabularies, which all ids are drawn from
VOCABULARY = 32000
#: of a Llama: width, neurons, heads of queries, of keys, and layers
SHAPES = {
    "1.3B": (2048, 5504, 16, 16, 24),
    "7B": (4096, 11008, 32, 32, 32),
    "30B": (6656, 17920, 52, 52, 60),
    "70B": (8192, 28672, 64, 8, 80),
}
#: what Hugging Face's configuration of OPT takes for its own
OPT = "OPT-125M"
WAYS = ("files", "memory")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config_of(options: argparse.Namespace) -> PretrainedConfig:
    if options.shape == OPT:
        return OPTConfig(num_hidden_layers=options.layers or 12, dtype=torch.bfloat16)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    *sizes, layers = SHAPES[options.shape]
    own = {"num_hidden_layers": options.layers or layers, "vocab_size": VOCABULARY, "dtype": torch.bfloat16}
    return LlamaConfig(**dict(zip(names, sizes, strict=True)), **own, max_position_embeddings=2048)


def make(folder: pathlib.Path, config: PretrainedConfig) -> None:
    """Write the checkpoint, unless it is there."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="500MB")


def batches(count: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (1, length), generator=generator) for _ in range(count)]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prune once; what it took."""
    how: dict[str, Any] = {"calibration": batches(options.batches, options.length), "sparsity": 0.2}
    dense, dtype = options.folder / "dense", DTYPES[options.dtype]

    def prune(model: Any) -> Any:
        result = fasp_fx.hf.prune(model, quality=options.quality, **how)
        result.save_pretrained(options.folder / options.run, overwrite=True)
        return result.report

    def work() -> Any:
        if options.run == "memory":
            return prune(AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval())
        with fasp_fx.offload(options.folder / "scratch", resident=round(options.resident * 2**30)) as scratch:
            return prune(fasp_fx.hf.load_offloaded(dense, scratch, dtype=dtype))

    with Peak() as peak:
        spent, report = timed(work)
    of = peak.bytes / (4 * report.parameters[0])
    return {"how": options.run, "peak": peak.bytes, "of the weights": of, "seconds": spent}


def compare(folder: pathlib.Path) -> dict[str, Any]:
    """Whether the two results are the same."""
    first, second = (fasp_fx.load(folder / name) for name in ("files", "memory"))
    other = dict(second.model.named_parameters())
    torch.set_grad_enabled(False)
    pairs = ((parameter, other[name]) for name, parameter in first.model.named_parameters())
    worst = max(float((one - another).abs().max()) for one, another in pairs)
    return {
        "how": "compared",
        "same plan": first.plan.groups == second.plan.groups,
        "largest difference of a weight": worst,
    }


def main() -> None:
    parser = arguments(__doc__, text=False)
    parser.add_argument(
        "--folder", type=pathlib.Path, required=True, help="where everything goes; 25 GB, and 60 for 7B"
    )
    parser.add_argument("--shape", choices=[*SHAPES, OPT], default="1.3B")
    parser.add_argument("--layers", type=int, help="instead of those of the shape")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="that it is pruned in")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--resident", type=float, default=0.2, help="GiB of weights that may be in memory")
    parser.add_argument("--quality", choices=["fast", "balanced", "best"], default="fast")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = Results(options.folder / "results.jsonl")
    if options.run:
        results.add(run(options))
        return
    make(options.folder / "dense", config_of(options))
    for how in options.ways:
        if not results.has({"how": how}):
            subprocess.run([sys.executable, *sys.argv, "--run", how], check=True)
    if {"files", "memory"} <= {*options.ways}:
        print(json.dumps(compare(options.folder)))


if __name__ == "__main__":
    main()
