"""Perplexity of SmolLM2-135M after FASP by how much text calibrated it, with and without restoration. Resumes
where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import warnings

from _protocol import EVALUATION, chunks, smollm2
from fasp_fx.evaluation import perplexity

import fasp_fx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--text", type=pathlib.Path, required=True, help="WikiText-2 validation text (wikitext2-valid.txt)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        help="results, a line of JSON each; what is there is not measured again",
    )
    parser.add_argument(
        "--calibration", type=int, nargs="*", default=[1, 2, 4, 8], help="chunks that calibrate"
    )
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.2])
    parser.add_argument(
        "--evaluation", type=int, default=10, help="chunks that are measured, from the 100th on"
    )
    parser.add_argument("--quality", choices=["fast", "balanced", "best"], default="balanced")
    parser.add_argument("--restore", nargs="*", default=["least-squares", "none"])
    options = parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    model, tokenizer = smollm2(options.device)
    data = chunks(tokenizer, options.text, options.device)
    measured = data[EVALUATION][: options.evaluation]
    runs = [{"calibration": 0, "sparsity": 0.0, "restore": "none", "evaluation": options.evaluation}] + [
        {
            "calibration": count,
            "sparsity": sparsity,
            "restore": restore,
            "evaluation": options.evaluation,
            "quality": options.quality,
        }
        for count in options.calibration
        for sparsity in options.sparsity
        for restore in options.restore
    ]
    for run in runs:
        if any(run.items() <= found.items() for found in done):
            continue
        found = dict(run)
        if run["calibration"]:
            batches = [{"input_ids": row[None]} for row in data[: run["calibration"]]]
            example = {"input_ids": data[:1], "use_cache": False}
            how = None if run["restore"] == "none" else run["restore"]
            result = fasp_fx.prune(
                model,
                (),
                example,
                calibration=batches,
                sparsity=run["sparsity"],
                restore=how,
                quality=options.quality,
                loss="next-token",
            )
            found |= {
                "perplexity": perplexity(result.module, measured),
                "seconds": dict(result.report.seconds),
                "reached": result.report.sparsity,
            }
            found["held_out"] = [
                line.held_restored / line.held_cut
                for line in result.report.lines
                if line.held_restored is not None and line.held_cut
            ]
        else:
            found["perplexity"] = perplexity(model, measured)
        with options.out.open("a") as out:
            out.write(json.dumps(found) + "\n")
        print({key: value for key, value in found.items() if key != "held_out"}, flush=True)


if __name__ == "__main__":
    main()
