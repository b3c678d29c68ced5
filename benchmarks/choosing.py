"""What each score and allocation costs and brings, on SmolLM2-135M, MiniLM-L6, EfficientNet-Lite0 and a
vision transformer. Resumes where it was stopped.

SmolLM2: perplexity on chunks 100-139 after calibration on chunks 0-31, and accuracies of tasks where files
are given. MiniLM: mean cosine of 1,000 sentences with the dense model's embeddings after calibration on 512
others. EfficientNet: agreement with the dense network on 300 crops of photographs after calibration on 192
crops of others. The vision transformer: trained on four fifths of scikit-learn's 1,797 handwritten digits,
512 of which calibrate; accuracy on the last fifth, and agreement.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import sentences
import torch
import vision
from _protocol import CALIBRATION, EVALUATION, chunks, smollm2
from fasp_fx.evaluation import perplexity, tasks

import fasp_fx

METHODS = ("fast", "fasp,global", "balanced", "best", "obs,uniform", "fasp,global,none", "fasp,uniform,none")
HOW = (
    "a quality, or SCORE,ALLOCATION, or SCORE,ALLOCATION,none: without repair; +exempt: query and key"
    " channels may go as well; +depth: whole blocks; +heads: whole heads in attention;"
    " +OPTION=NUMBER: an option of fasp_fx.prune"
)
WORDS: dict[str, dict[str, Any]] = {
    "exempt": {"include": ("exempt",)},
    "depth": {"include": ("depth",)},
    "heads": {"granularity": ("channel", "head")},
}
Measure = Callable[[Any], dict[str, float]]


def cached(module: torch.nn.Module) -> int:
    """Bytes of a Llama's key-value cache per token of one sequence: what its key and value
    projections give.
    """
    return sum(
        weight.shape[0] * weight.itemsize
        for name, weight in module.named_parameters()
        if name.endswith(("k_proj.weight", "v_proj.weight"))
    )


def language(options: argparse.Namespace) -> tuple[Any, dict[str, Any], list[Any], Measure, dict[str, Any]]:
    """SmolLM2: model, example, calibration, what is measured, and options of its own."""
    model, tokenizer = smollm2(options.device)
    data = chunks(tokenizer, options.text, options.device)
    batches = [{"input_ids": row[None]} for row in data[:CALIBRATION]]

    def measure(module: Any) -> dict[str, float]:
        found: dict[str, float] = {
            "perplexity": perplexity(module, data[EVALUATION][: options.evaluation]),
            "cache": cached(module),
        }
        for score in tasks(module, tokenizer, options.tasks, limit=options.limit) if options.tasks else ():
            found[score.task] = score.value
        return found

    return model, {"input_ids": data[:1], "use_cache": False}, batches, measure, {"loss": "next-token"}


def encoder(options: argparse.Namespace) -> tuple[Any, dict[str, Any], list[Any], Measure, dict[str, Any]]:
    """MiniLM, likewise."""
    model, tokenizer = sentences.minilm(options.device)
    text = sentences.sentences(options.text)
    half = len(text) // 2
    data = sentences.padded(tokenizer, sentences.spread(text[half:], 1000), 32, options.device)
    calibration = sentences.unpadded(tokenizer, sentences.spread(text[:half], 512), 32, options.device)
    dense = sentences.embed(model, data)

    def measure(module: Any) -> dict[str, float]:
        return {
            "cosine": float(
                torch.nn.functional.cosine_similarity(dense, sentences.embed(module, data)).mean()
            )
        }

    return model, dict(data[0]), calibration, measure, {"padding_mask": "attention_mask"}


def convolutional(
    options: argparse.Namespace,
) -> tuple[Any, dict[str, Any], list[Any], Measure, dict[str, Any]]:
    """EfficientNet-Lite0, likewise."""
    model = vision.efficientnet(options.device)
    calibration, data = (
        vision.crops(names, each, seed, options.device)
        for names, each, seed in ((vision.FITTED, 32, 0), (vision.MEASURED, 50, 1))
    )
    dense = vision.outputs(model, data)
    return (
        model,
        {"inputs": calibration[0][:2]},
        calibration,
        lambda module: vision.agreement(module, dense, data),
        {},
    )


def transformer(
    options: argparse.Namespace,
) -> tuple[Any, dict[str, Any], list[Any], Measure, dict[str, Any]]:
    """The vision transformer, likewise."""
    model, calibration, data, labels = vision.digits(options.device)
    dense = vision.outputs(model, data)

    def measure(module: Any) -> dict[str, float]:
        return vision.agreement(module, dense, data) | {"accuracy": vision.accuracy(module, data, labels)}

    return model, {"pixel_values": calibration[0][:2]}, calibration, measure, {}


MODELS = {"smollm2": language, "minilm": encoder, "efficientnet": convolutional, "vit": transformer}


def options_of(method: str) -> dict[str, Any]:
    """What the name of a method stands for."""
    name, *more = method.split("+")
    how: dict[str, Any] = (
        dict(zip(("score", "allocation", "restore"), name.split(","), strict=False))
        if "," in name
        else {"quality": name}
    )
    if "restore" in how:
        how["restore"] = None
    for word in more:
        option, is_number, number = word.partition("=")
        how |= {option: float(number)} if is_number else WORDS[word]
    return how


def forget_peak() -> None:
    """Begin to count the most memory anew (Linux alone)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The most resident memory since, in GiB."""
    line = next(
        line
        for line in pathlib.Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return round(int(line.split()[1]) / 2**20, 2)


def tables(done: list[dict[str, Any]]) -> str:
    """Results in Markdown: a table for every figure of every model, a row for each method, a column for each
    sparsity.
    """
    figures: dict[tuple[str, str], dict[str, dict[float, float]]] = {}
    for found in done:
        measured = {name: value for name, value in found.items() if isinstance(value, float)}
        if "seconds" in found:
            measured["seconds"] = round(sum(found["seconds"].values()), 1)
        for figure in measured.keys() - {"sparsity", "reached"}:
            rows = figures.setdefault((found["model"], figure), {})
            rows.setdefault(found["method"], {})[found["sparsity"]] = measured[figure]
    lines = []
    for (model, figure), rows in sorted(figures.items()):
        sparsities = sorted({sparsity for row in rows.values() for sparsity in row})
        cells = [[model + ", " + figure, *(f"{sparsity:.0%}" for sparsity in sparsities)]]
        cells += [
            [method, *(f"{row[sparsity]:.5g}" if sparsity in row else "" for sparsity in sparsities)]
            for method, row in rows.items()
        ]
        cells.insert(1, ["---"] * len(cells[0]))
        lines += [f"| {' | '.join(row)} |" for row in cells] + [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", type=pathlib.Path, required=True, help="WikiText-2 validation text (wikitext2-valid.txt)"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        help="results, a line of JSON each; what is there is not measured again",
    )
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help=HOW)
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument(
        "--evaluation", type=int, default=40, help="chunks of WikiText-2 that are measured, from the 100th on"
    )
    parser.add_argument("--tasks", nargs="*", default=[], help="files of tasks to measure SmolLM2 on")
    parser.add_argument("--limit", type=int, help="examples of each task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--tables", action="store_true", help="show what was measured as tables; measure nothing"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.tables:
        print(tables(done))
        return
    for name in options.models:
        model, example, calibration, measure, own = MODELS[name](options)
        captured = fasp_fx.capture(model, (), example)
        for method, sparsity in [
            ("dense", 0.0),
            *((method, sparsity) for sparsity in options.sparsity for method in options.methods),
        ]:
            key = {
                "model": name,
                "method": method,
                "sparsity": sparsity,
                "evaluation": options.evaluation,
                "tasks": sorted(map(str, options.tasks)),
            }
            if any(key.items() <= found.items() for found in done):
                continue
            found: dict[str, Any] = dict(key)
            if method == "dense":
                found |= measure(model)
            else:
                forget_peak()
                result = fasp_fx.prune(
                    captured,
                    calibration=calibration,
                    sparsity=sparsity,
                    **options_of(method),
                    **own,
                )
                found |= {"peak_gib": peak()}
                found |= measure(result.module)
                found |= {
                    "seconds": {stage: round(spent, 1) for stage, spent in result.report.seconds.items()},
                    "reached": result.report.sparsity,
                }
            with options.out.open("a") as out:
                out.write(json.dumps(found) + "\n")
            print(found, flush=True)


if __name__ == "__main__":
    main()
