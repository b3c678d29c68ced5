"""The timm zoo: of every module of ``timm.list_modules()`` the model with the fewest parameters, at the
smallest image that it takes.

The choice takes minutes to make and is kept in ``timm_models.json``; ``python -m zoos._timm``, in
``benchmarks``, makes it anew.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import _registry as registry
from torch import nn
from x.benchmarks.zoos import Entry, image

CHOICE = pathlib.Path(__file__).with_name("timm_models.json")


#: measured in float64: with random weights their own float32 output is about 1 % from their float64 output
CHAOTIC = frozenset({"byoanet"})


def entries() -> list[Entry]:
    """Every model of the zoo, named by its module."""
    chosen: dict[str, dict[str, Any]] = json.loads(CHOICE.read_text(encoding="utf-8"))
    return [
        Entry(
            module,
            "timm",
            _maker(row["model"], row["options"], module in CHAOTIC),
            (image(row["size"], row["channels"]),),
            double=module in CHAOTIC,
        )
        for module, row in sorted(chosen.items())
    ]


def _maker(name: str, options: dict[str, Any], double: bool) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=10, **options).to(
        torch.float64 if double else torch.float32
    )


# --- the choice

SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)


def parameters(name: str) -> float:
    """The number of parameters, without allocating them; infinite where a model cannot be built so."""
    with contextlib.suppress(Exception), torch.device("meta"):
        return sum(weight.numel() for weight in timm.create_model(name, pretrained=False).parameters())
    return float("inf")


def smallest_image(name: str) -> dict[str, Any] | None:
    """The smallest square image that a forward pass takes, its channels, and the builder's options for it."""
    default = timm.create_model(name, pretrained=False).default_cfg
    channels, _, natural = default.get("input_size", (3, 224, 224))
    for size in (*(size for size in SIZES if size < natural), natural):
        for options in ({"img_size": size}, {}):
            with contextlib.suppress(Exception), torch.no_grad():  # whatever a model raises on such an image
                model = timm.create_model(name, pretrained=False, num_classes=10, **options).eval()
                model(torch.zeros(2, channels, size, size))
                return {"model": name, "size": size, "channels": channels, "options": options}
    return None


def main() -> None:
    warnings.simplefilter("ignore")
    chosen: dict[str, Any] = json.loads(CHOICE.read_text(encoding="utf-8")) if CHOICE.exists() else {}
    for module in timm.list_modules():
        names = sorted(registry._module_to_models[module], key=lambda name: (parameters(name), name))
        found = (smallest_image(name) for name in names if module not in chosen)
        if (first := next(filter(None, found), None)) is not None:
            chosen[module] = {**first, "parameters": parameters(first["model"])}
        print(module, chosen.get(module, "no model takes an image"), flush=True)
        CHOICE.write_text(json.dumps(chosen, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
