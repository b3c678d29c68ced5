"""What a generating model does with arguments beside its tokens: positions, labels, packed texts. Found by
experiment, never by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base._tolerable import tolerable
from ..base.compare import deviation, tolerance
from ..base.compat._transformers import CACHE
from ..errors import CaptureError
from ._labels import LEFT_OUT, LOSSES, MOVES
from ._stages import CausalStages, Stages


@dataclass(frozen=True)
class Habits:
    """How a model reads what it is called with; see :class:`fasp_fx.hf.PrunedConfig`, which keeps it."""

    positions: str | None = None
    position_limit: int | None = None
    loss: str | None = None
    labels_moved: str | None = None
    counts_items: bool = True
    packs: bool = False


def far(found: Tensor, expected: Tensor) -> bool:
    """Whether values differ by more than rounding."""
    return deviation(found.to(expected.dtype), expected) > tolerance("two ways", expected.dtype)


def loss_of_labels(stages: Stages) -> tuple[str | None, str | None]:
    """The key of :data:`LOSSES`, and for an encoder-decoder of :data:`MOVES`, by which a model reads labels;
    ``None`` where it reads them in another way.
    """
    if "labels" not in stages.accepts:
        return None, None
    decoder = isinstance(stages, CausalStages)
    labels, source = stages.tokens(6, 2, seed=7), {"input_ids": stages.tokens(6, 2)}
    if decoder:  # the likeliest ones at their places, so that each way gives a loss of its own
        plain = called(stages, source)
        labels = labels if plain is None else plain.logits.argmax(-1)
    labels[0, 4:] = LEFT_OUT
    given = called(stages, {**source, "labels": labels})
    if (
        given is None
        or not isinstance(getattr(given, "loss", None), Tensor)
        or given.logits.shape[:2] != labels.shape
    ):
        return None, None
    found, expected = (
        {name: LOSSES[name](given.logits, labels, None) for name in (LOSSES if decoder else ("same",))},
        given.loss.float(),
    )
    nearest = min(found, key=lambda name: float((found[name] - expected).abs()))
    short = torch.finfo(given.logits.dtype).bits < 32  # a model may round its loss
    loss = None if far(found[nearest], expected.to(given.logits.dtype) if short else expected) else nearest
    if decoder:
        return loss, None
    start, padding = (
        getattr(stages.model.config, f"{name}_token_id", None) for name in ("decoder_start", "pad")
    )
    if padding is None:
        return None, None
    for name, move in MOVES.items():
        moved = called(stages, {**source, "decoder_input_ids": move(labels, start, padding)})
        if moved is not None and not far(moved.logits, given.logits):
            return loss, name
    return None, None


def counts_items(stages: Stages, loss: str | None) -> bool:
    """Whether a model divides the loss of labels by ``num_items_in_batch``, rather than ignore it as some do
    that take any argument.
    """
    if loss is None:
        return True
    source = {"input_ids": stages.tokens(6, 2), "labels": stages.tokens(6, 2, seed=7)}
    alone, counted = (
        called(stages, {**source, **given}) for given in ({}, {"num_items_in_batch": torch.tensor(1000)})
    )
    if alone is None or counted is None or getattr(counted, "loss", None) is None:
        return True
    return far(counted.loss.detach(), alone.loss.detach())


def keeps_texts_apart(stages: Stages) -> bool:
    """Whether a model takes positions that begin again, given without a mask, for several texts
    in one row.
    """
    if not isinstance(stages, CausalStages) or "position_ids" not in stages.accepts:
        return False
    ids = stages.tokens(6, 1)
    packed = {"input_ids": ids, "position_ids": torch.arange(6, device=ids.device)[None] % 3}
    apart = called(stages, packed)
    together = called(stages, packed | stages.optional(attention_mask=torch.ones_like(ids)))
    return apart is not None and together is not None and far(apart.logits, together.logits)


def called(stages: Stages, arguments: dict[str, Any]) -> Any:
    """What the model gives without a cache; ``None`` where it does not take this."""
    try:
        return stages.run({**arguments, CACHE: None}, use_cache=False)
    except tolerable(CaptureError):
        return None


__all__ = ["Habits", "called", "counts_items", "far", "keeps_texts_apart", "loss_of_labels"]
