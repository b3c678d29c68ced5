"""What distillation brings back, on SmolLM2-135M (perplexity on chunks 100-139), on the encoder MiniLM-L6
(mean cosine), and on EfficientNet-Lite0 and a ResNet-50 with weights at random (agreement with the dense
network on crops of other photographs). Resumes where it was stopped.

A recipe is EPOCHS,LEARNING_RATE,CHUNKS,LENGTH[,TRAIN][,own][,PARTS][,OPTION=NUMBER …]: how often
over how many calibration chunks (for the others: batches), how many tokens of each, what is trained, whether
SmolLM2 writes the chunks itself, whether each is two, four or eight texts ("halves", …), and options of
distil; the chunks that measure are left out. Each pruning is saved once under --out, and every recipe starts
from there.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
import warnings
from typing import Any

import torch
import vision
from _protocol import CALIBRATION, EVALUATION, chunks, smollm2
from choosing import HOW, Measure, convolutional, encoder, language, options_of
from self_calibration import write

import fasp_fx

PARTS = {"halves": 2, "quarters": 4, "eighths": 8}
WORDS = ("own", *PARTS)
RECIPES = ("1,3e-5,32,512", "2,3e-5,32,512", "2,3e-5,32,1024", "2,3e-5,96,1024")


def residual(options: argparse.Namespace) -> tuple[Any, dict[str, Any], list[Any], Measure, dict[str, Any]]:
    """A ResNet-50, as the models of choosing.py."""
    calibration, data = (
        vision.crops(names, each, seed, options.device)
        for names, each, seed in ((vision.FITTED, 32, 0), (vision.MEASURED, 50, 1))
    )
    model = vision.resnet50(options.device, calibration)
    dense = vision.outputs(model, data)
    example = {"pixel_values": calibration[0][:2]}
    return model, example, calibration, lambda module: vision.agreement(module, dense, data), {}


MODELS = {"smollm2": language, "minilm": encoder, "efficientnet": convolutional, "resnet50": residual}


def pruned(
    model: Any,
    example: dict[str, Any],
    calibration: list[Any],
    method: str,
    sparsity: float,
    own: dict[str, Any],
    folder: pathlib.Path,
) -> fasp_fx.Result:
    """The result of one pruning, from its folder if it is there."""
    if not folder.exists():
        how = options_of(method) | own
        fasp_fx.prune(model, (), example, calibration=calibration, sparsity=sparsity, **how).save(folder)
    return fasp_fx.load(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", type=pathlib.Path, required=True, help="WikiText-2 validation text (wikitext2-valid.txt)"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="a folder: results.jsonl, and the pruned models"
    )
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=["smollm2"])
    parser.add_argument("--methods", nargs="*", default=["fast", "balanced", "best"], help=HOW)
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.1, 0.2, 0.3])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--chunks", type=int, default=CALIBRATION, help="calibration chunks of SmolLM2")
    parser.add_argument(
        "--evaluation", type=int, default=40, help="chunks of WikiText-2 that are measured, from the 100th on"
    )
    parser.add_argument("--tasks", nargs="*", default=[], help="files of tasks to measure SmolLM2 on")
    parser.add_argument("--limit", type=int, help="examples of each task")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name in options.models:
        model, example, calibration, measure, own = MODELS[name](options)
        loss = "outputs"
        if name == "smollm2":
            tokenizer, loss = smollm2(options.device)[1], "divergence"
            text = chunks(tokenizer, options.text, options.device)
            text = torch.cat([text[: EVALUATION.start], text[EVALUATION.stop :]])
            calibration = [{"input_ids": row[None]} for row in text[: options.chunks]]
        for sparsity, method, recipe in (
            (s, m, r) for s in options.sparsity for m in options.methods for r in ("none", *options.recipes)
        ):
            key = {
                "model": name,
                "method": method,
                "sparsity": sparsity,
                "recipe": recipe,
                "chunks": options.chunks,
                "evaluation": options.evaluation,
                "tasks": sorted(map(str, options.tasks)),
                "limit": options.limit,
            }
            if any(key.items() <= found.items() for found in done):
                continue
            folder = options.out / f"{name}-{method}-{sparsity:g}-{options.chunks}"
            result = pruned(model, example, calibration, method, sparsity, own, folder)
            found: dict[str, Any] = {**key, "pruning": round(sum(result.report.seconds.values()), 1)}
            if recipe != "none":
                epochs, rate, count, length, *more = recipe.split(",")
                train = [word for word in more if word not in WORDS and "=" not in word]
                batches = calibration[: int(count)]
                if name == "smollm2":
                    rows = text[: int(count), : int(length)]
                    if "own" in more:
                        written = f"{count}x{length},1,1,bos"
                        rows, found["writing"] = write(model, tokenizer, written, 0, options.out)
                    parts = next((PARTS[word] for word in more if word in PARTS), 1)
                    batches = [{"input_ids": row.reshape(parts, -1)} for row in rows]
                how: dict[str, Any] = {
                    "epochs": int(epochs),
                    "learning_rate": float(rate),
                    "loss": loss,
                    **({"train": train[0]} if train else {}),
                    **{key: json.loads(value) for key, _, value in (w.partition("=") for w in more) if value},
                }
                started = time.perf_counter()
                result = fasp_fx.distil(result, model, batches, **how)
                found |= {"distilling": round(time.perf_counter() - started, 1)}
                recovery = result.report.recovery
                assert recovery is not None
                found |= {
                    "kept": recovery.kept,
                    "curve": [round(point.held_out, 5) for point in recovery.curve],
                }
            found |= measure(result.module)
            with file.open("a") as out:
                out.write(json.dumps(found) + "\n")
            print(found, flush=True)


if __name__ == "__main__":
    main()
