"""Budgets asked and met: what stays of parameters, bytes and multiply-accumulates of a ResNet-50 and of
SmolLM2-135M, and of the latter's key-value cache, as the report says and as counted.

Channels go by their magnitude and nothing is restored, since budgets do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _protocol import arguments, macs, smollm2
from fasp_fx.budgets import Bytes, CacheBytes, Macs, Parameters
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fasp_fx
from fasp_fx.passes._finish import finish

HOW: dict[str, Any] = {"score": "magnitude", "restore": None}
TOKENS = torch.randint(0, 40000, (2, 512), generator=torch.Generator().manual_seed(0))


def resnet50() -> tuple[nn.Module, dict[str, Any]]:
    """A ResNet-50 of torchvision, with random weights, and images."""
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet50().eval(), {"x": torch.randn(4, 3, 224, 224)}


MODELS = {
    "resnet50": resnet50,
    "smollm2": lambda: (smollm2("cpu")[0], {"input_ids": TOKENS, "use_cache": False}),
}


def operations(module: Any, kwargs: dict[str, Any]) -> float:
    """Multiply-accumulates; torch does not count what the CPU's own kernel for attention does."""
    with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
        return macs(lambda: module(**kwargs))


def cached(module: Any) -> float:
    """Bytes of the key-value cache of a run."""
    with torch.no_grad():
        layers = module(input_ids=torch.arange(64)[None], use_cache=True).past_key_values.layers
    return float(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))


def show(name: str, cap: Any, report: Any, count: Callable[[Any], float], dense: Any, pruned: Any) -> None:
    (spent,) = report.budgets
    print(
        f"| {name} | {cap.name} | {cap.amount:.0%} | {spent.used / spent.dense:.2%} |"
        f" {count(pruned) / count(dense):.2%} |",
        flush=True,
    )


def main() -> None:
    parser = arguments(__doc__, text=False)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--share", type=float, default=0.8)
    options = parser.parse_args()
    print("| model | budget | asked | predicted | measured |\n|---|---|---|---|---|", flush=True)
    for name in options.models:
        model, kwargs = MODELS[name]()
        captured = fasp_fx.capture(model, (), kwargs)
        counts: dict[Any, Callable[[Any], float]] = {
            Parameters: lambda module: sum(p.numel() for p in module.parameters()),
            Bytes: lambda module: sum(p.nbytes for p in module.parameters()),
            Macs: lambda module, kwargs=kwargs: operations(module, kwargs),
        }
        for kind, count in counts.items():
            cap = kind(options.share)
            result = fasp_fx.prune(captured, budget=cap, round_to=16, **HOW)
            dense = finish(captured.program) if kind is Macs else model
            show(name, cap, result.report, count, dense, result.module)
        if name == "smollm2":
            cap = CacheBytes(options.share)
            result = fasp_fx.hf.prune(model, smollm2("cpu")[1], budget=cap, **HOW)
            show(name, cap, result.report, cached, model, result.model)


if __name__ == "__main__":
    main()
