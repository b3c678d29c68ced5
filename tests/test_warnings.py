"""Warnings point at the line of the caller, whichever way it came into the library."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Vectors, X, made
from torch import Tensor, nn

import fasp_fx


def _ending(end: Callable[[Tensor], Tensor]) -> nn.Module:
    return made(lambda self, x: end(self.inner(x)), inner=Vectors())


def _traced() -> nn.Module:
    """Does something else while it is traced."""
    return _ending(lambda found: found if torch.compiler.is_exporting() else found + 1)


def _forked() -> nn.Module:
    """Is taken in parts."""
    return _ending(lambda found: found if found.sum() > 1e6 else found + 1)


def places(call: Any, *args: Any, **options: Any) -> set[str]:
    """The files that the library's warnings name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args, **options)
    return {
        warning.filename
        for warning in caught
        if issubclass(warning.category, (fasp_fx.CaptureWarning, fasp_fx.CalibrationWarning))
    }


@pytest.mark.parametrize("call", [fasp_fx.capture, fasp_fx.prune], ids=lambda call: call.__name__)
def test_a_capture_that_differs(call: Any) -> None:
    options = {"score": "magnitude", "restore": None} if call is fasp_fx.prune else {}
    assert places(call, _traced(), (X,), **options) == {__file__}


@pytest.mark.parametrize("model", [Vectors(), _forked()], ids=["whole", "in parts"])
def test_too_little_data(model: nn.Module) -> None:
    assert places(fasp_fx.prune, model.eval(), (X,), calibration=[X[:1]], sparsity=0.3) == {__file__}


def test_options_of_a_whole_model_are_refused_where_it_is_taken_in_parts() -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=r"loss=.* needs a model that is captured as a whole"):
        fasp_fx.prune(_forked(), (X,), score="magnitude", restore=None, loss="next-token")
    with pytest.raises(fasp_fx.ExportError):
        fasp_fx.analyze(_forked(), (X,), state=("past",))
    with pytest.raises(fasp_fx.CaptureError, match="captured in parts has no single program"):
        _ = fasp_fx.capture(_forked(), (X,)).program
    with pytest.raises(fasp_fx.CaptureError, match="training mode") as caught:
        fasp_fx.analyze(_forked().train(), (X,), state=("past",))
    assert not isinstance(caught.value, fasp_fx.ExportError)
