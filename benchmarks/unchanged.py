"""What a change of structure must leave as it is: groups, plans and outputs of many models, before and after.

``python benchmarks/unchanged.py before.json``, change the code, ``python benchmarks/unchanged.py after.json
before.json``: the second says what differs, and fails if anything does. ``--real`` adds the real SmolLM2 and
MiniLM (some minutes). Groups and plans must be equal; outputs up to rounding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import fasp_fx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
#: how far outputs may differ, relative to the largest
CLOSE = 2e-3
_Model = tuple[str, nn.Module, dict[str, Any], list[dict[str, Any]]]


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def small() -> Iterator[_Model]:
    from models import ZOO

    for name, entry in ZOO.items():
        yield name, entry.build(), entry.example(), [entry.inputs(4, 12, seed) for seed in range(2, 8)]


def real() -> Iterator[_Model]:
    from _protocol import smollm2

    model, tokenizer = smollm2("cpu")
    texts = ["The tower was built of stone by order of the king, and stands to this day. " * 12] * 2
    batches = [{"input_ids": tokenizer(text, return_tensors="pt").input_ids} for text in texts]
    yield "smollm2", model, {**batches[0], "use_cache": False}, batches


def figures(model: nn.Module, example: dict[str, Any], batches: list[dict[str, Any]]) -> dict[str, Any]:
    """What is compared of one model."""
    captured = fasp_fx.capture(model, (), example)
    groups = [
        (group.name, group.status, group.reason, group.size, str(group.producers), str(group.consumers))
        for group in fasp_fx.analyze(captured).groups
    ]
    found: dict[str, Any] = {"groups": digest(groups)}
    for quality in ("fast", "balanced"):
        torch.manual_seed(0)
        result = fasp_fx.prune(captured, calibration=batches, held_out=(), sparsity=0.3, quality=quality)
        with torch.no_grad():
            output = result.module(**example)
        (first, *_) = (one for one in torch.utils._pytree.tree_leaves(output) if torch.is_tensor(one))
        found[quality] = {
            "plan": digest(json.loads(result.plan.to_json())["groups"]),
            "parameters": sum(parameter.numel() for parameter in result.module.parameters()),
            "outputs": first.float().flatten()[:: max(first.numel() // 16, 1)].tolist(),
        }
    return found


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    if isinstance(before, dict):
        for key in before.keys() | after.keys():
            yield from differences(before.get(key), after.get(key), f"{place} {key}")
    elif isinstance(before, list):
        largest = max(map(abs, before))
        if max(abs(one - other) for one, other in zip(before, after, strict=True)) > CLOSE * largest:
            yield f"{place}: {before} is now {after}"
    elif before != after:
        yield f"{place}: {before} is now {after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("to", type=pathlib.Path)
    parser.add_argument("before", type=pathlib.Path, nargs="?")
    parser.add_argument("--real", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for name, *of in [*small(), *(real() if given.real else ())]:
        found[name] = figures(*of)
        print(name, found[name]["groups"], found[name]["balanced"]["plan"], flush=True)
    given.to.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if given.before:
        unequal = list(differences(json.loads(given.before.read_text(encoding="utf-8")), found))
        sys.exit("\n".join(unequal) or 0)


main()
