"""What distillation brings back, on SmolLM2-135M (perplexity on chunks 100-139) and on the encoder MiniLM-L6
(mean cosine). Resumes where it was stopped.

A recipe is EPOCHS,LEARNING_RATE,CHUNKS,LENGTH[,TRAIN][,hidden][,OPTION=NUMBER …]: how often over how many
calibration chunks (for MiniLM: batches), how many tokens of each, what is trained, whether hidden states of
SmolLM2 are matched as well (what W_Q and the gate read in each layer), and options of distil; the chunks that
measure are left out. Each pruning is saved once under --out, and every recipe starts from there.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
import warnings
from typing import Any

import torch
from _protocol import EVALUATION, chunks, smollm2
from choosing import encoder, language

import fasp_fx

HIDDEN = ("*.q_proj", "*.gate_proj")
RECIPES = ("1,3e-5,32,512", "2,3e-5,32,512", "2,3e-5,32,1024", "2,3e-5,96,1024")


def pruned(
    captured: fasp_fx.Captured,
    calibration: list[Any],
    quality: str,
    sparsity: float,
    own: dict[str, Any],
    folder: pathlib.Path,
) -> fasp_fx.Result:
    """The result of one pruning, from its folder if it is there."""
    if not folder.exists():
        fasp_fx.prune(captured, calibration=calibration, sparsity=sparsity, quality=quality, **own).save(
            folder
        )
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
    parser.add_argument("--models", nargs="*", choices=["smollm2", "minilm"], default=["smollm2"])
    parser.add_argument("--qualities", nargs="*", default=["fast", "balanced", "best"])
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.1, 0.2, 0.3])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
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
        model, example, calibration, measure, own = (language if name == "smollm2" else encoder)(options)
        data, loss = calibration, "outputs"
        if name == "smollm2":
            text, loss = chunks(smollm2(options.device)[1], options.text, options.device), "divergence"
            text = torch.cat([text[: EVALUATION.start], text[EVALUATION.stop :]])
        captured = fasp_fx.capture(model, (), example)
        for sparsity, quality, recipe in (
            (s, q, r) for s in options.sparsity for q in options.qualities for r in ("none", *options.recipes)
        ):
            key = {
                "model": name,
                "quality": quality,
                "sparsity": sparsity,
                "recipe": recipe,
                "evaluation": options.evaluation,
                "limit": options.limit,
            }
            if any(key.items() <= found.items() for found in done):
                continue
            result = pruned(
                captured, calibration, quality, sparsity, own, options.out / f"{name}-{quality}-{sparsity:g}"
            )
            found: dict[str, Any] = {**key, "pruning": round(sum(result.report.seconds.values()), 1)}
            if recipe != "none":
                epochs, rate, count, length, *more = recipe.split(",")
                train = [word for word in more if word != "hidden" and "=" not in word]
                batches = (
                    data[: int(count)]
                    if name == "minilm"
                    else [{"input_ids": row[None, : int(length)]} for row in text[: int(count)]]
                )
                how: dict[str, Any] = {
                    "epochs": int(epochs),
                    "learning_rate": float(rate),
                    "loss": loss,
                    **({"train": train[0]} if train else {}),
                    **({"hidden": HIDDEN} if "hidden" in more else {}),
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
