"""What it means to refuse an input: a typed error, and nothing changed; and what goes of one program, without
taking it out, which takes longest.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import BATCH, Vectors, X
from torch import Tensor, nn

import fasp_fx
from fasp_fx.analysis import Analysis
from fasp_fx.calibration import Decision
from fasp_fx.capturing import Program
from fasp_fx.pruning import Whole, _prune


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model has the same tensors with the same values, modes and attributes afterwards."""

    def tensors() -> dict[str, Tensor]:
        return dict(
            [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        )

    before = {
        name: (tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors().items()
    }
    modes = [module.training for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    yield
    after = tensors()
    assert after.keys() == before.keys()
    for name, (tensor, value, grad) in before.items():
        assert after[name] is tensor
        assert tensor.requires_grad == grad
        assert tensor.grad is None
        assert tensor.device.type == "meta" or torch.equal(
            tensor.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)
        ), name
    assert [module.training for module in model.modules()] == modes
    assert [sorted(vars(module)) for module in model.modules()] == attributes


def refused(
    error: type[fasp_fx.FaspError],
    match: str,
    model: nn.Module | None = None,
    args: Any = (X,),
    **options: Any,
) -> None:
    """Pruning raises this error with this message and touches nothing."""
    model = Vectors().eval() if model is None else model
    options.setdefault("calibration", [BATCH])
    with untouched(model), pytest.raises(error, match=match) as caught:
        fasp_fx.prune(model, args, **options)
    assert isinstance(caught.value, fasp_fx.FaspError)


def alike(found: Decision, expected: Decision) -> bool:
    """Whether two decisions are the same in all bits."""
    return (
        np.array_equal(found.gone, expected.gone)
        and found.weights.keys() == expected.weights.keys()
        and all(torch.equal(weight, expected.weights[name]) for name, weight in found.weights.items())
        and found.notes == expected.notes
    )


def decide(program: Program, config: Any, calibration: Any, **how: Any) -> tuple[Analysis, Decision]:
    subject = Whole(program)
    ((_, decision),) = _prune.decide(subject, config, calibration, _prune.Job(**how))
    return subject.analyses[""], decision
