"""What learned gates choose, on the encoder MiniLM-L6 with its own similarities as the task: mean cosine of
1,000 sentences' embeddings with the dense model's.

Everything is trained for the same number of steps in all, on other sentences than those that are measured:
after a choice in closed form, or half of them with gates, restoration in closed form in between, and half
without. Gates are FLOP's ("hard concrete"), CoFi's ("coarse": heads, and whole blocks with gates of their
own; the dense model's layers are matched meanwhile), or projected ones that begin with the closed form's
choice.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import sentences
import torch
from fasp_fx.gates import Gates, HardConcrete, Projected, attach
from torch import Tensor, nn
from torch.nn import functional

import fasp_fx

METHODS = ("one shot", "one shot, blocks", "hard concrete", "projected", "coarse")
#: what CoFi lets go: heads, what is inside of feed-forward layers, and attention and feed-forward as a whole
BLOCKS = {"granularity": ("channel", "head"), "include": ("depth",)}
Batch = dict[str, Tensor]


def similarities(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Embeddings of a batch, and how alike they are to one another."""
    hidden = outputs["last_hidden_state"] if isinstance(outputs, dict) else outputs[0]
    mask = batch["attention_mask"][..., None]
    found = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return found, found @ found.T


def apart(outputs: Any, dense: Any, batch: Batch) -> Tensor:
    """How far what layers return is from what the dense model's do: the mean of squared errors, relative."""
    mask = batch["attention_mask"].bool()
    errors = [
        (own[mask] - other[mask]).square().mean() / other[mask].square().mean()
        for own, other in zip(outputs.hidden_states[1:], dense.hidden_states[1:], strict=True)
    ]
    return torch.stack(errors).mean()


def train(
    model: Any,
    data: list[Batch],
    targets: list[tuple[Tensor, Tensor]],
    steps: int,
    rates: list[dict[str, Any]],
    gates: Gates | None = None,
    dense: Any = None,
) -> None:
    """Steps of Adam towards the dense model's embeddings and similarities, and, where it is given, to what
    its layers return.
    """
    optimizer = torch.optim.Adam(rates)
    heights = [partial(_height, steps, bool(group.get("fixed"))) for group in rates]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, heights)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(data)).tolist()
        index = order.pop()
        layers = {} if dense is None else {"output_hidden_states": True}
        outputs = model(**data[index], **layers)
        found, alike = similarities(outputs, data[index])
        loss = (found - targets[index][0]).square().sum(-1).mean() + (
            alike - targets[index][1]
        ).square().mean()
        if dense is not None:
            with torch.no_grad():
                wanted = dense(**data[index], **layers)
            loss = loss + apart(outputs, wanted, data[index])
        optimizer.zero_grad()
        (loss if gates is None else loss + gates.penalty()).backward()
        optimizer.step()
        schedule.step()
        if gates is not None:
            gates.step()


def _height(steps: int, is_fixed: bool, step: int) -> float:
    return 1.0 if is_fixed else 1 - step / steps


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
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of weights")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    model, tokenizer = sentences.minilm(options.device)
    text = sentences.sentences(options.text)
    half = len(text) // 2
    measured = sentences.padded(tokenizer, sentences.spread(text[half:], 1000), 32, options.device)
    calibration = sentences.unpadded(tokenizer, sentences.spread(text[:half], 512), 32, options.device)
    data = sentences.padded(tokenizer, sentences.spread(text[:half], 3840), 32, options.device)
    dense = sentences.embed(model, measured)
    with torch.no_grad():
        targets = [similarities(model(**batch), batch) for batch in data]
    example, own = dict(data[0]), {"padding_mask": "attention_mask"}

    def cosine(module: Any) -> float:
        return float(functional.cosine_similarity(dense, sentences.embed(module, measured)).mean())

    def one_shot(**how: Any) -> tuple[fasp_fx.Result, int]:
        result = fasp_fx.prune(
            model, (), example, calibration=calibration, sparsity=options.sparsity, **how, **own
        )
        return result, 0

    def with_gates(kind: Any, **how: Any) -> tuple[fasp_fx.Result, int]:
        student = copy.deepcopy(model)
        gates = attach(
            student,
            (),
            example,
            kind=kind,
            sparsity=options.sparsity,
            warmup=options.steps // 4,
            **how,
        )
        if isinstance(kind, Projected):
            gates.prefer(
                fasp_fx.prune(
                    model, (), example, calibration=calibration, sparsity=options.sparsity, **own
                ).plan
            )
        of_gates = {id(scores) for scores in gates.parameters()}
        weights = [parameter for parameter in student.parameters() if id(parameter) not in of_gates]
        rates = [
            {"params": list(gates.parameters()), "lr": 0.05, "fixed": True},
            {"params": weights, "lr": options.rate},
        ]
        student.train()
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        train(student, data, targets, options.steps // 2, rates, gates, model if how else None)
        student.eval()
        plan = gates.plan()
        gates.detach()
        return fasp_fx.apply(student, plan, (), example, calibration=calibration, **own), options.steps // 2

    choose: dict[str, Callable[[], tuple[fasp_fx.Result, int]]] = {
        "one shot": one_shot,
        "one shot, blocks": partial(one_shot, **BLOCKS),
        "hard concrete": lambda: with_gates(HardConcrete()),
        "projected": lambda: with_gates(Projected()),
        "coarse": lambda: with_gates(HardConcrete(), coarse=True, **BLOCKS),
    }
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for method in options.methods:
        key = {"method": method, "sparsity": options.sparsity, "steps": options.steps, "rate": options.rate}
        if any(key.items() <= found.items() for found in done):
            continue
        torch.manual_seed(0)
        started = time.perf_counter()
        result, spent = choose[method]()
        found = {**key, "reached": result.report.sparsity, "before": cosine(result.module)}
        train(
            result.module,
            data,
            targets,
            options.steps - spent,
            [{"params": list(result.module.parameters()), "lr": options.rate}],
        )
        found |= {"after": cosine(result.module), "seconds": round(time.perf_counter() - started)}
        with options.out.open("a") as out:
            out.write(json.dumps(found) + "\n")
        print(found, flush=True)


if __name__ == "__main__":
    main()
