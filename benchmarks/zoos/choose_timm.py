"""Choose the model of each timm module for the zoo: the fewest parameters, then the smallest image that it
takes. Writes ``timm_models.json``.
"""

from __future__ import annotations

import json
import pathlib
import sys
import warnings
from typing import Any

import timm
import torch
from timm.models import _registry as registry

SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
#: modules that only wrap others
SKIPPED: frozenset[str] = frozenset()


def parameters(name: str) -> int:
    """The number of parameters, without allocating them where that is possible."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except (RuntimeError, NotImplementedError):
        model = timm.create_model(name, pretrained=False)
    return sum(parameter.numel() for parameter in model.parameters())


def smallest_image(name: str) -> tuple[int, int, dict[str, Any]] | None:
    """The smallest square image that a forward pass takes, its channels, and the builder's options for it."""
    channels, _, natural = timm.create_model(name, pretrained=False).default_cfg.get(
        "input_size", (3, 224, 224)
    )
    for size in (*[size for size in SIZES if size < natural], natural):
        for options in ({"img_size": size}, {}):
            try:
                model = timm.create_model(name, pretrained=False, num_classes=10, **options).eval()
                with torch.no_grad():
                    model(torch.zeros(2, channels, size, size))
            except Exception:  # whatever a model raises on an image that it does not take
                continue
            return size, channels, options
    return None


def main() -> None:
    warnings.simplefilter("ignore")
    target = pathlib.Path(__file__).with_name("timm_models.json")
    chosen: dict[str, Any] = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    for module in timm.list_modules():
        names = sorted(registry._module_to_models[module])
        if module in chosen or module in SKIPPED or not names:
            continue
        counts = {}
        for name in names:
            try:
                counts[name] = parameters(name)
            except Exception as error:
                print(f"{module}: {name} cannot be built: {type(error).__name__}: {error}", file=sys.stderr)
        for name in sorted(counts, key=lambda name: (counts[name], name)):
            found = smallest_image(name)
            if found is not None:
                size, channels, options = found
                chosen[module] = {
                    "model": name,
                    "size": size,
                    "channels": channels,
                    "options": options,
                    "parameters": counts[name],
                }
                break
        else:
            print(f"{module}: no model takes an image", file=sys.stderr)
        print(module, chosen.get(module), flush=True)
        target.write_text(json.dumps(chosen, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
