"""What each score and allocation costs and brings, on SmolLM2-135M, MiniLM-L6, EfficientNet-Lite0 and a
vision transformer. Resumes where it was stopped.

SmolLM2: perplexity on chunks 100-139 after calibration on chunks 0-31.

MiniLM: mean cosine of 1,000 sentences with the dense model's embeddings after calibration on 512
others. EfficientNet: agreement with the dense network on 300 crops of photographs after calibration on 192
crops of others. The vision transformer: trained on four fifths of scikit-learn's 1,797 handwritten digits,
512 of which calibrate; accuracy on the last fifth, and agreement.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import sentences
import torch
import vision
from _protocol import CALIBRATION, EVALUATION, Peak, Results, arguments, chunks, smollm2, timed

import fasp_fx
from fasp_fx.hf import perplexity

METHODS = ("fast", "fasp,global", "balanced", "best", "obs,uniform", "fasp,global,none", "fasp,uniform,none")
HOW = (
    "a quality, or SCORE,ALLOCATION, or SCORE,ALLOCATION,none: without repair; +exempt: query and key"
    " channels may go as well; +depth: whole blocks; +heads: whole heads in attention; +OPTION=NUMBER: an"
    " option of fasp_fx.prune"
)
WORDS: dict[str, dict[str, Any]] = {
    "exempt": {"include": ("exempt",)},
    "depth": {"include": ("depth",)},
    "heads": {"granularity": ("channel", "head")},
}
Measure = Callable[[Any], dict[str, float]]
#: model, example, calibration, what is measured, and options of its own
Subject = tuple[Any, dict[str, Any], list[Any], Measure, dict[str, Any]]


def cached(module: torch.nn.Module) -> int:
    """Bytes of a Llama's key-value cache per token of one sequence: what its key and value projections
    give.
    """
    named = module.named_parameters()
    kept = [weight for name, weight in named if name.endswith(("k_proj.weight", "v_proj.weight"))]
    return sum(weight.shape[0] * weight.itemsize for weight in kept)


def language(options: argparse.Namespace) -> Subject:
    model, tokenizer = smollm2(options.device)
    data = chunks(tokenizer, options.text, options.device)

    def measure(module: Any) -> dict[str, float]:
        found = perplexity(module, data[EVALUATION][: options.evaluation])
        return {"perplexity": found, "cache": cached(module)}

    batches = [{"input_ids": row[None]} for row in data[:CALIBRATION]]
    return model, {"input_ids": data[:1], "use_cache": False}, batches, measure, {"loss": "next-token"}


def encoder(options: argparse.Namespace) -> Subject:
    model, calibration, data, dense = sentences.subject(options)
    measure: Measure = lambda module: {"cosine": sentences.cosine(module, dense, data)}  # noqa: E731
    return model, dict(data[0]), calibration, measure, {}


def photographs(options: argparse.Namespace, make: Callable[..., Any], name: str) -> Subject:
    """A network for images, on crops."""
    calibration = vision.crops(vision.FITTED, 32, 0, options.device)
    data = vision.crops(vision.MEASURED, 50, 1, options.device)
    model = make(options.device, calibration)
    dense = vision.outputs(model, data)
    measure: Measure = lambda module: vision.agreement(module, dense, data)  # noqa: E731
    return model, {name: calibration[0][:2]}, calibration, measure, {}


def transformer(options: argparse.Namespace) -> Subject:
    model, calibration, data, labels = vision.digits(options.device)
    dense = vision.outputs(model, data)
    measure: Measure = lambda module: {  # noqa: E731
        **vision.agreement(module, dense, data),
        "accuracy": vision.accuracy(module, data, labels),
    }
    return model, {"pixel_values": calibration[0][:2]}, calibration, measure, {}


MODELS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "smollm2": language,
    "minilm": encoder,
    "efficientnet": lambda options: photographs(options, vision.efficientnet, "inputs"),
    "resnet50": lambda options: photographs(options, vision.resnet50, "pixel_values"),
    "vit": transformer,
}


def options_of(method: str) -> dict[str, Any]:
    """What the name of a method stands for."""
    name, *more = method.split("+")
    how: dict[str, Any] = {"quality": name}
    if "," in name:
        how = dict(zip(("score", "allocation", "restore"), name.split(","), strict=False))
    for word in more:
        option, is_number, number = word.partition("=")
        how |= {option: float(number)} if is_number else WORDS[word]
    return how | ({"restore": None} if "restore" in how else {})


def parser(description: str | None, models: list[str]) -> argparse.ArgumentParser:
    """The options of this script and of recovery.py."""
    found = arguments(description, out=True)
    found.add_argument("--models", nargs="*", choices=list(MODELS), default=models)
    found.add_argument("--methods", nargs="*", default=list(METHODS), help=HOW)
    found.add_argument("--sparsity", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.5])
    return found


def tables(done: list[dict[str, Any]]) -> str:
    """Results in Markdown: a table for every figure of every model, a row for each method, a column for each
    sparsity.
    """
    figures: dict[tuple[str, str], dict[str, dict[float, float]]] = {}
    for found in done:
        measured = {name: value for name, value in found.items() if isinstance(value, float)}
        measured["seconds"] = round(found.get("seconds", 0.0), 1)
        for figure in measured.keys() - {"sparsity", "reached"}:
            rows = figures.setdefault((found["model"], figure), {})
            rows.setdefault(found["method"], {})[found["sparsity"]] = measured[figure]
    lines = []
    for (model, figure), rows in sorted(figures.items()):
        sparsities = sorted({sparsity for row in rows.values() for sparsity in row})
        cells = [[f"{model}, {figure}", *map("{:.0%}".format, sparsities)], ["---"] * (1 + len(sparsities))]
        for method, row in rows.items():
            cells.append([method, *(f"{row[s]:.5g}" if s in row else "" for s in sparsities)])
        lines += [f"| {' | '.join(row)} |" for row in cells] + [""]
    return "\n".join(lines)


def main() -> None:
    own_parser = parser(__doc__, ["smollm2", "minilm", "efficientnet", "vit"])
    own_parser.add_argument("--tables", action="store_true", help="show results as tables; measure nothing")
    options = own_parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    results = Results(options.out)
    if options.tables:
        print(tables(results.done))
        return
    for name in options.models:
        model, example, calibration, measure, own = MODELS[name](options)
        captured = fasp_fx.capture(model, (), example)
        runs = [(method, sparsity) for sparsity in options.sparsity for method in options.methods]
        for method, sparsity in [("dense", 0.0), *runs]:
            found = {"model": name, "method": method, "sparsity": sparsity}
            found |= {"evaluation": options.evaluation}
            if results.has(found):
                continue
            module = model
            if method != "dense":
                how = {
                    "calibration": calibration,
                    "held_out": (),
                    "sparsity": sparsity,
                    **options_of(method),
                    **own,
                }
                with Peak() as peak:
                    found["seconds"], result = timed(fasp_fx.prune, captured, **how)
                module = result.module
                found |= {"peak_gib": round(peak.bytes / 2**30, 2), "reached": result.report.sparsity}
            results.add(found | measure(module))


if __name__ == "__main__":
    main()
