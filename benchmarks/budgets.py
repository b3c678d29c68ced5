"""Budgets asked, met and measured: what stays of parameters, bytes and multiply-accumulates, on a
ResNet-50 and on SmolLM2-135M, and of the latter's key-value cache.

Channels go by their magnitude and nothing is restored, since budgets do not depend on it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fasp_fx.budgets import Bytes, CacheBytes, Cap, Macs, Parameters
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fasp_fx
from fasp_fx.passes._finish import finish


def resnet50() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A ResNet-50 of torchvision, with random weights, and images."""
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet50().eval(), (torch.randn(4, 3, 224, 224),), {}


def language() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """SmolLM2 and two texts of 512 tokens."""
    from _protocol import smollm2

    tokens = torch.randint(0, 40000, (2, 512), generator=torch.Generator().manual_seed(0))
    return smollm2("cpu")[0], (), {"input_ids": tokens, "use_cache": False}


MODELS = {"resnet50": resnet50, "smollm2": language}


def operations(call: Callable[[], Any]) -> float:
    """Multiply-accumulates as torch counts them."""
    with (
        torch.no_grad(),
        torch.backends.mkldnn.flags(enabled=False),
        sdpa_kernel(SDPBackend.MATH),  # torch does not count what the CPU's own kernel for attention does
        FlopCounterMode(display=False) as counter,
    ):
        call()
    return counter.get_total_flops() / 2


def cache_row(share: float) -> None:
    """What the key-value cache of SmolLM2 takes per token, pruned to generate."""
    from _protocol import smollm2

    model, tokenizer = smollm2("cpu")
    cap, tokens = CacheBytes(share), torch.arange(64)[None]
    result = fasp_fx.hf.prune(model, tokenizer, budget=cap, score="magnitude", restore=None)
    (spent,) = result.report.budgets

    def taken(module: Any) -> float:
        layers = module(input_ids=tokens, use_cache=True).past_key_values.layers
        return float(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))

    with torch.no_grad():
        measured = taken(result.model) / taken(model)
    print(
        f"| smollm2 | {cap.name} | {share:.0%} | {spent.used / spent.dense:.2%} | {measured:.2%} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--share", type=float, default=0.8)
    options = parser.parse_args()
    print("| model | budget | asked | predicted | measured |\n|---|---|---|---|---|", flush=True)
    for name in options.models:
        model, args, kwargs = MODELS[name]()
        captured = fasp_fx.capture(model, args, kwargs)
        dense = finish(captured.program)
        caps: list[Cap] = [
            Parameters(options.share),
            Bytes(options.share),
            Macs(options.share),
        ]
        for cap in caps:
            result = fasp_fx.prune(captured, budget=cap, score="magnitude", restore=None, round_to=16)
            (spent,) = result.report.budgets
            calls = [partial(module, *args, **kwargs) for module in (dense, result.module)]
            if isinstance(cap, Macs):
                measured = [operations(call) for call in calls]
            else:
                sizes = (
                    [
                        p.numel() * (p.element_size() if isinstance(cap, Bytes) else 1)
                        for p in module.parameters()
                    ]
                    for module in (model, result.module)
                )
                measured = [float(sum(own)) for own in sizes]
            print(
                f"| {name} | {cap.name} | {options.share:.0%} | {spent.used / spent.dense:.2%} |"
                f" {measured[1] / measured[0]:.2%} |",
                flush=True,
            )
        if name == "smollm2":
            cache_row(options.share)


if __name__ == "__main__":
    main()
