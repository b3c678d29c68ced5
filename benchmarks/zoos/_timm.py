"""The timm zoo: of every module of ``timm.list_modules()`` the model with the fewest parameters, at a small
image.

The choice takes minutes to make and is kept in ``timm_models.json``; ``python
benchmarks/zoos/choose_timm.py`` makes it anew.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from ._entry import Entry, image

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
