"""How a model is captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class CaptureOptions:
    """How a model is captured.

    Attributes:
        dynamic_shapes: as for ``torch.export.export``; ``None`` keeps every dimension dynamic that the model
            lets vary, of images (floating-point tensors of four dimensions and more) only the first.
        state: names of arguments and outputs that hold state (a cache) and may become narrower.
        device: move the captured copy there; ``None`` leaves it where the model is.
        image_sizes: let heights and widths of images vary as well.
        fold: put parameters in the place of weights that the model computes from others.
        own_defaults: an argument that is left out has the default that ``forward`` gives it, rather than what
            it was captured with.
        doubles: whether an example of one sample may be captured as one of two, so that their number varies.
    """

    dynamic_shapes: Any = None
    state: tuple[str, ...] = ()
    device: torch.device | str | None = None
    image_sizes: bool = False
    fold: bool = True
    own_defaults: bool = False
    doubles: bool = True
