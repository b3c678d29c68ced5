"""A Llama or an OPT of a common shape, pruned with its weights in files and in memory: peak memory, time, and
whether both come to the same, beside what the planner says. Resumes.

The checkpoint is made of random numbers, in bfloat16. Each pruning is a process of its own. ``--ways
predicted`` writes no checkpoint and runs nothing: it says what larger shapes would take.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import torch
from _memory import Peak
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

import fasp_fx
import fasp_fx.hf
from fasp_fx.cli._forecast import forecast

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
WAYS = ("predicted", "files", "memory")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config_of(options: argparse.Namespace) -> PretrainedConfig:
    if options.shape == OPT:
        return OPTConfig(num_hidden_layers=options.layers or 12, dtype=torch.bfloat16)
    width, neurons, queries, keys, layers = SHAPES[options.shape]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=neurons,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        num_hidden_layers=options.layers or layers,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )


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


def run(options: argparse.Namespace) -> None:
    """Prune once, and print what it took."""
    how: dict[str, Any] = {
        "calibration": batches(options.batches, options.length),
        "sparsity": 0.2,
        "quality": options.quality,
    }
    started = time.perf_counter()
    with Peak() as peak:
        if options.run == "files":
            resident = round(options.resident * 2**30)
            with fasp_fx.offload(options.folder / "scratch", resident=resident) as scratch:
                model = fasp_fx.hf.load_offloaded(
                    options.folder / "dense", scratch, dtype=DTYPES[options.dtype]
                )
                result = fasp_fx.hf.prune(model, **how)
                result.save_pretrained(options.folder / "files", overwrite=True)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                options.folder / "dense", dtype=DTYPES[options.dtype]
            ).eval()
            result = fasp_fx.hf.prune(model, **how)
            result.save_pretrained(options.folder / "memory", overwrite=True)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    seconds = {step: round(spent, 1) for step, spent in result.report.seconds.items()}
    print(
        json.dumps(
            {
                "how": options.run,
                "peak": peak.bytes,
                "of the weights": peak.bytes / weights,
                "seconds": time.perf_counter() - started,
                "steps": seconds,
            }
        )
    )


def predict(options: argparse.Namespace) -> dict[str, Any]:
    """What a dry run says."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(options)).eval()
    analysis = fasp_fx.analyze(model, (), {"input_ids": batches(1, options.length)[0], "use_cache": False})
    found = forecast(
        analysis,
        fasp_fx.PruningConfig(sparsity=0.2, quality=options.quality),
        options.batches,
        dtype=DTYPES[options.dtype],
    )
    streamed = found.streamed(round(options.resident * 2**30))
    return {
        "how": "predicted",
        "files": streamed,
        "memory": found.peak,
        "device": found.on_device,
        "disk": found.disk,
    }


def compare(folder: pathlib.Path) -> dict[str, Any]:
    """Whether the two results are the same."""
    first, second = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("files", "memory"))
    other = dict(second.named_parameters())
    torch.set_grad_enabled(False)
    worst = max(float((parameter - other[name]).abs().max()) for name, parameter in first.named_parameters())
    return {
        "how": "compared",
        "same plan": first.plan.groups == second.plan.groups,
        "largest difference of a weight": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    if options.run:
        print(json.dumps(predict(options))) if options.run == "predicted" else run(options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.ways != ["predicted"]:
        make(options.folder / "dense", config_of(options))
    results = options.folder / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for how in options.ways:
        if any(found["how"] == how for found in done):
            continue
        shared = [
            f"--{name}={value}"
            for name in ("folder", "shape", "layers", "dtype", "batches", "length", "resident", "quality")
            if (value := getattr(options, name)) is not None
        ]
        printed = subprocess.run(
            [sys.executable, __file__, *shared, "--run", how], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        line = printed.strip().splitlines()[-1]
        print(line, flush=True)
        with results.open("a") as out:
            out.write(line + "\n")
    if {"files", "memory"} <= {*options.ways}:
        print(json.dumps(compare(options.folder)))


if __name__ == "__main__":
    main()
