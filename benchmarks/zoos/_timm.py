"""The timm zoo: of every module of ``timm.list_modules()`` the model with the fewest parameters, at a small image.

The choice takes minutes to make and is kept in ``timm_models.json``; ``python benchmarks/zoos/choose_timm.py`` makes it anew.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from ._entry import Entry, image

CHOICE = pathlib.Path(__file__).with_name("timm_models.json")


def entries() -> list[Entry]:
    """Every model of the zoo, named by its module."""
    chosen: dict[str, dict[str, Any]] = json.loads(CHOICE.read_text(encoding="utf-8"))
    return [Entry(module, "timm", _maker(row["model"], row["options"]), (image(row["size"], row["channels"]),)) for module, row in sorted(chosen.items())]


def _maker(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=10, **options)
