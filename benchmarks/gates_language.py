"""What learned gates choose on SmolLM2-135M: perplexity on chunks 100-139 after restoration in closed form,
beside the best choice in closed form, from the same calibration chunks. Resumes where it was stopped.

Gates are projected ones (GRASPrune, arXiv 2604.19398) that begin with the closed form's choice; they alone
are trained, towards the dense model's predictions, one chunk a step.
"""

from __future__ import annotations

import copy
import json
import pathlib
import time
import warnings

import torch
from _protocol import EVALUATION, arguments, chunks, smollm2
from fasp_fx.evaluation import perplexity
from fasp_fx.gates import Projected, attach
from fasp_fx.recovery import Divergence

import fasp_fx
from fasp_fx.base._device import multiplies_bfloat16, products_in_bfloat16


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="results, a line of JSON each; none is made twice"
    )
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.2, 0.3])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="*", default=[0.02], help="learning rates of the gates")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.8,
        help="by how much the gates of what stays begin higher: with N steps at a rate r one comes down by rN"
        " at most, and another up",
    )
    parser.add_argument("--quality", default="balanced", help="of the choice that gates begin with")
    options = parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    model, tokenizer = smollm2(options.device)
    text = chunks(tokenizer, options.text, options.device)
    example = {"input_ids": text[:1], "use_cache": False}
    data = [{"input_ids": row[None]} for row in text[: options.chunks]]
    coarse = multiplies_bfloat16(text.device)
    captured = fasp_fx.capture(model, (), example)
    match = Divergence()
    targets = []
    for batch in data:
        with torch.no_grad(), products_in_bfloat16(text.device, coarse):
            outputs = model(**batch, use_cache=False)
        targets.append(match.targets(outputs))
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []

    def say(found: dict[str, object]) -> None:
        with options.out.open("a") as out:
            out.write(json.dumps(found) + "\n")
        print(found, flush=True)

    for sparsity in options.sparsity:
        rates = [
            rate
            for rate in options.rates
            if not any(
                {
                    "sparsity": sparsity,
                    "rate": rate,
                    "margin": options.margin,
                    "epochs": options.epochs,
                }.items()
                <= one.items()
                for one in done
            )
        ]
        if not rates:
            continue
        started = time.perf_counter()
        chosen = fasp_fx.prune(
            captured, calibration=data, sparsity=sparsity, quality=options.quality, loss="next-token"
        )
        found = {"sparsity": sparsity, "quality": options.quality}
        seconds = round(time.perf_counter() - started)
        say({**found, "perplexity": perplexity(chosen.module, text[EVALUATION]), "seconds": seconds})
        for rate in rates:
            torch.manual_seed(0)
            started = time.perf_counter()
            student = copy.deepcopy(model).requires_grad_(False)
            gates = attach(student, (), example, kind=Projected(), sparsity=sparsity)
            gates.prefer(chosen.plan, by=options.margin / 2)
            optimizer = torch.optim.Adam(gates.parameters(), lr=rate)
            student.train()
            losses = []
            for step in range(options.epochs * len(data)):
                batch, target = data[step % len(data)], targets[step % len(data)]
                with products_in_bfloat16(text.device, coarse):
                    outputs = student(**batch, use_cache=False)
                loss = match.terms(outputs, target, batch).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                gates.step()
                losses.append(float(loss.detach()))
            student.eval()
            plan = gates.plan()
            kept = {group.name: group for group in chosen.plan.groups}
            moved = sum(
                len({*group.consumers[0].removed} - {*kept[group.name].consumers[0].removed})
                for group in plan.groups
                if group.consumers and group.name in kept
            )
            result = fasp_fx.apply(captured, plan, calibration=data)
            quarter = max(len(data) // 4, 1)
            say(
                {
                    **found,
                    "rate": rate,
                    "margin": options.margin,
                    "epochs": options.epochs,
                    "perplexity": perplexity(result.module, text[EVALUATION]),
                    "columns that went instead": moved,
                    "loss": [sum(part) / quarter for part in (losses[:quarter], losses[-quarter:])],
                    "seconds": round(time.perf_counter() - started),
                }
            )


if __name__ == "__main__":
    main()
