"""``fasp-fx recover``: train a pruned model towards the dense one, measuring and saving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from ..errors import ArgumentError
from ..training.recovery import DistillationConfig
from . import _models, _saved
from ._arguments import check_apart, check_path
from ._console import Stages
from ._outcome import measure, recover, show
from ._texts import Texts, Wanted


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    folder: str
    dense: str
    out: Path
    texts: Wanted
    epochs: int
    learning_rate: float
    train: Literal["all", "vectors", "low-rank"]
    rank: int
    checkpoint: Path | None
    device: str | None
    overwrite: bool

    @property
    def config(self) -> DistillationConfig:
        """The options of the distillation, checked."""
        return DistillationConfig(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            train=self.train,
            rank=self.rank,
            seed=self.texts.seed,
        )

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            FaspError: says which option and why.
        """
        self.texts.check("--data")
        if self.texts.batches < 2:
            raise ArgumentError("--batches 1 is too small; use at least 2, of which one is held out")
        for option, value in (("--epochs", self.epochs), ("--rank", self.rank)):
            if value < 1:
                raise ArgumentError(f"{option} {value} is too small; use at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise ArgumentError(
                f"--learning-rate {self.learning_rate:g} is no positive number; 3e-5 is a good start"
            )
        if _saved.is_saved(self.dense):
            raise ArgumentError(
                f"--dense '{self.dense}' is a model that was pruned; give the dense one that it was made of"
            )
        check_path("the pruned model", self.folder)
        if self.checkpoint is not None:
            check_path("--checkpoint", self.checkpoint)
            check_apart(self.out, checkpoint=self.checkpoint)
        plain = not _saved.is_saved(self.folder)
        _saved.check_target(self.out, overwrite=self.overwrite, plain=plain)


def run(request: Request, stages: Stages, console: Console) -> None:
    """Do what the request says.

    Raises:
        FaspError: it cannot be met; nothing is written then but the checkpoint.
    """
    request.check()
    _models.quieten()
    device = _models.find_device(request.device)
    source = _models.Source.of(request.dense)
    stages.begin("loading the models and the text")
    result = _saved.load_pruned(Path(request.folder), device)
    texts = Texts(request.texts, result.tokenizer, "training")
    texts.check_two()
    held = next(parameter.dtype for parameter in result.model.parameters() if parameter.is_floating_point())
    dense = _models.load_model(source, dtype=str(held).removeprefix("torch."), device=device)
    _models.check_length(dense, request.texts.length)
    texts.check(dense, "the text to train on")
    torch.manual_seed(request.texts.seed)
    texts.write(dense, stages)
    assert texts.used is not None
    result = recover(result, dense, texts.used, stages, request.config, request.checkpoint)
    try:
        result = result.with_report(figures=measure(dense, result, texts, stages))
    finally:  # what was learned is kept even if it could not be measured
        stages.begin("saving")
        result.save_pretrained(request.out, overwrite=request.overwrite)
    stages.end()
    show(result, request.out, console)


__all__ = ["Request", "run"]
