"""``fasp-fx recover``: train a pruned model towards the dense one, measuring and saving."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ArgumentError
from ..training.recovery import DistillationConfig
from . import _models
from ._console import Stages
from ._paths import check_target
from ._results import measure, recover, save, show
from ._text import Texts


def run(
    folder: str,
    dense: str,
    out: Path,
    texts: Texts,
    config: DistillationConfig,
    checkpoint: Path | None,
    device: str | None,
    overwrite: bool,
    stages: Stages,
) -> None:
    """Do what the command says, as its help describes it.

    Raises:
        FaspError: it cannot be met; nothing is written then but the checkpoint.
    """
    texts.check("--data")
    if _models.is_saved(dense):
        raise ArgumentError(
            f"--dense '{dense}' is a model that was pruned; give the dense one that it was made of"
        )
    plain = not _models.is_saved(folder)
    check_target(out, overwrite=overwrite, plain=plain, checkpoint=checkpoint)
    _models.quieten()
    where = _models.find_device(device)
    source = _models.Source.of(dense)
    stages.begin("loading the models and the text")
    result = _models.load_pruned(Path(folder), where)
    texts.read(result.tokenizer, least=2)
    dtype = next(parameter.dtype for parameter in result.model.parameters() if parameter.is_floating_point())
    teacher = _models.load_model(source, dtype=str(dtype).removeprefix("torch."), device=where)
    _models.check_length(teacher, texts.length)
    texts.check_against(teacher, result.tokenizer)
    torch.manual_seed(texts.seed)
    texts.write(teacher, result.tokenizer, stages)
    assert texts.used is not None
    result = recover(result, teacher, texts.used, stages, config=config, checkpoint=checkpoint)
    try:
        result = result.with_report(figures=measure(teacher, result, texts, stages))
    finally:  # what was learned is kept even if it could not be measured
        save(result, out, overwrite, stages)
    show(result, out)


__all__ = ["run"]
