"""Pruned language models as those of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import ArgumentError
from ..plan import PruningPlan
from ..report import Report


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` returns.

    Attributes:
        model: the smaller model, of the class that was given.
        plan: what was removed.
        report: what it cost.
        tokenizer: the tokenizer that was given, saved along with the model.
    """

    model: PreTrainedModel
    plan: PruningPlan
    report: Report
    tokenizer: Any = None

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write model and tokenizer to a new folder, whole or not at all (see :func:`fasp_fx.hf._plain_folder.save_plain`)."""
        from ._plain_folder import save_plain

        return save_plain(self.model, self.tokenizer, self.plan, self.report, folder, overwrite=overwrite)


def prune(model: Any, tokenizer: Any = None, *, calibration: Iterable[Any] | None = None, sparsity: float = 0.2, plain: bool = False, **options: Any) -> Pruned:
    """Prune a model of transformers to what its config can say (see :func:`fasp_fx.hf._plain.prune_plain`).

    Raises:
        ArgumentError: ``plain`` is not set.
    """
    if not plain:
        raise ArgumentError("pass plain=True")
    from ._plain import prune_plain

    return Pruned(*prune_plain(model, calibration=calibration, sparsity=sparsity, **options), tokenizer)


__all__ = ["Pruned", "prune"]
