"""Prunes models with their weights in files, with batches on the CPU and on another device, and prints as
JSON what differs. A process of its own, see :mod:`elsewhere`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from elsewhere import register
from models import VOCABULARY, made, wide
from patched import patch_torch
from torch import Tensor, nn

import fasp_fx
from fasp_fx.capturing import Runner


def recurrent() -> nn.Module:
    layers = {"up": nn.Linear(6, 24), "lstm": nn.LSTM(24, 16, batch_first=True), "down": nn.Linear(16, 3)}
    return made(lambda m, x: m.down(m.lstm(m.up(x).relu())[0]), **layers)


def counting() -> nn.Module:
    """Writes into a buffer, makes tensors where the capture ran, and reads a view of one that it wrote to."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        h = m.up(x + torch.arange(8, device=x.device)).relu()
        rest = torch.zeros(8, 8, device=x.device)
        rest[2:4] += m.calls[0]
        return m.down(h) * rest.sum(0) + torch.ones(8)

    return wide(forward, 8, 32, calls=torch.zeros(3))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 5),
    )


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            vocab_size=VOCABULARY,
        )
    )


def drawn(*shape: int) -> Callable[[], list[Any]]:
    return lambda: [torch.randn(shape) for _ in range(4)]


def texts() -> list[Any]:
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (2, 9)), "use_cache": False, "logits_to_keep": 0}
        for _ in range(4)
    ]


#: model, batches, options
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], dict[str, Any]]] = {
    "recurrent": (recurrent, drawn(4, 7, 6), {}),
    "counting": (counting, drawn(50, 8), {}),
    "convolutions": (convolutions, drawn(8, 3, 12, 12), {"drift": 0.5}),
    "experts and products": (
        mixtral,
        texts,
        {"granularity": ("channel", "expert"), "include": ("exempt",), "drift": 0.5},
    ),
}


def run(name: str, folder: Path, elsewhere: torch.device) -> dict[str, Any]:
    """What differs between a pruning with batches on the CPU and one with batches elsewhere."""
    torch.manual_seed(0)
    make, data, options = CASES[name]
    model, batches = make().eval(), data()
    example = batches[0] if isinstance(batches[0], dict) else {}
    captured = fasp_fx.capture(model, () if example else (batches[0],), example)
    results = []
    for device in (None, elsewhere):
        with fasp_fx.offload(folder, device=device), ran_on(device) as nodes:
            results.append(
                fasp_fx.prune(captured, calibration=batches, sparsity=0.3, quality="fast", **options)
            )
    first, second = (dict(result.module.named_parameters()) for result in results)
    return {
        "plan": results[0].plan == results[1].plan and len(results[0].plan.groups) > 0,
        "repaired": sum(line.error_cut is not None for line in results[1].report.lines),
        "nodes": len(nodes),
        "differing": [name for name, value in first.items() if not torch.equal(value, second[name])],
        "devices": sorted({value.device.type for value in second.values()}),
    }


@contextmanager
def ran_on(device: torch.device | None) -> Iterator[set[Any]]:
    """The nodes whose results were on the device."""
    found: set[Any] = set()
    original = Runner._execute

    def noting(self: Runner, node: Any, number: int) -> Any:
        made = original(self, node, number)
        if isinstance(made, Tensor) and made.device == device:
            found.add(node)
        return made

    Runner._execute = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Runner._execute = original  # type: ignore[method-assign]


def refusals(folder: Path, elsewhere: torch.device) -> dict[str, str]:
    """What is said of that which needs all weights on the device."""
    x = torch.randn(16, 8)
    with fasp_fx.offload(folder, device=elsewhere):
        try:
            fasp_fx.prune(counting(), (x,), calibration=[x], sparsity=0.3, quality="balanced")
        except fasp_fx.errors.FaspError as error:
            return {"costs": f"{type(error).__name__}: {error}"}
    return {}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    patch_torch()
    given = Path(sys.argv[1]), register()
    found = {"runs": {name: run(name, *given) for name in CASES}}
    print(json.dumps({**found, "refusals": refusals(*given)}))
