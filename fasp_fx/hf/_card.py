"""The model card of a pruned model."""

from __future__ import annotations

import json
import os
from typing import Any


def card(model: Any) -> str:
    """A README.md for the hub: what was pruned from what, what it cost, and how to load it."""
    seq2seq = model.config.is_encoder_decoder
    source = str(model.config.original.get("_name_or_path") or model.name_or_path or "")
    header: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["fasp_fx", "pruned"],
        "pipeline_tag": "text2text-generation" if seq2seq else "text-generation",
    }
    if source.count("/") == 1 and not os.path.exists(source) and not source.startswith((".", "/", "~")):
        header["base_model"] = source
    report, plan = model.report, model.plan
    kind = "/".join(
        model.config.original.get("architectures") or [str(model.config.original.get("model_type"))]
    )
    rows = [("parameters", *report.parameters), ("bytes of weights", *report.bytes)]
    if report.cache is not None:
        rows.append(("bytes of cache per token of one sequence", *report.cache))
    groups = [
        f"| `{group.name}` | {group.size} | {group.size - group.removed_sets} |" for group in plan.groups
    ]
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in header.items()),  # JSON is YAML
            "---",
            "",
            f"# {kind}, pruned by {report.sparsity:.1%}",
            "",
            (
                f"A {kind} from which fasp_fx removed {report.sparsity:.1%} of the weights of linear"
                " operators by structured pruning (FASP, arXiv 2501.09412)."
            ),
            "Widths in `config.json` under `original` are those of the dense model.",
            "",
            "| | dense | pruned |",
            "|---|---|---|",
            *(f"| {name} | {before:,} | {after:,} |" for name, before, after in rows),
            "",
            "```python",
            *loading(model, "this/folder"),
            "```",
            "",
            "## What was removed",
            "",
            "| group | channels before | after |",
            "|---|---|---|",
            *groups,
            "",
            "`plan.json` lists every index.",
            "",
        ]
    )


def loading(model: Any, folder: str) -> list[str]:
    """Lines of Python that load the model."""
    auto = "AutoModelForSeq2SeqLM" if model.config.is_encoder_decoder else "AutoModelForCausalLM"
    return [
        "import fasp_fx",
        f"from transformers import {auto}",
        f'model = {auto}.from_pretrained("{folder}")',
    ]


__all__ = ["card"]
