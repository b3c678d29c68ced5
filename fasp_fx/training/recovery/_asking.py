"""A loss, asked and checked: it may be code of the user's, and a batch may hold nothing for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...base._tolerable import tolerable
from ...errors import ArgumentError, CalibrationError, FaspError, first_line
from ._matching import Match


def targets_of(match: Match, outputs: Any, index: int) -> dict[str, Tensor]:
    """What a loss keeps of the dense model's outputs for a batch.

    Args:
        index: the number of the batch.

    Raises:
        ArgumentError: the loss raises an error, or returns something else than tensors by name.
        CalibrationError: what it keeps is not finite.
    """
    with _said(match, "targets", index):
        found: Any = match.targets(outputs)
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise ArgumentError(
            f"loss={type(match).__name__}: targets() returned a {type(found).__name__}; return a dict of"
            " tensors by name"
        )
    if not found:
        raise ArgumentError("the loss keeps nothing of the dense model's outputs; use another loss=")
    for tensor in found.values():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise CalibrationError(
                f"what the dense model returns for batch {index} is not finite; check the batch and the"
                " model's dtype"
            )
    return dict(found)


def terms_of(
    match: Match, outputs: Any, targets: Mapping[str, Tensor], inputs: Mapping[str, Any], index: int
) -> Tensor:
    """The terms of a loss for a batch, at least one, with gradients where these are taken.

    Raises:
        ArgumentError: the loss raises an error, or returns something else than terms.
        CalibrationError: nothing of the batch counts.
    """
    with _said(match, "terms", index):
        found: Any = match.terms(outputs, targets, inputs)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        what = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
        raise ArgumentError(
            f"loss={type(match).__name__}: terms() returned a {what}; return a floating-point tensor, of"
            " which the mean is taken"
        )
    if not found.numel():
        raise CalibrationError(
            f"nothing of batch {index} counts, as where its attention_mask hides every token; leave it out"
        )
    if torch.is_grad_enabled() and not found.requires_grad:
        raise ArgumentError(
            f"loss={type(match).__name__}: terms() for batch {index} leads to no parameter that is trained;"
            " compute it from the outputs as they are given, and train parameters that take part in these"
        )
    return found


def check_terms(
    match: Match, outputs: Any, targets: Mapping[str, Tensor], inputs: Mapping[str, Any], index: int
) -> None:
    """Refuse a batch, or a loss, that the dense model's own outputs show to be of no use, before anything is
    trained.

    Raises:
        ArgumentError: see :func:`terms_of`.
        CalibrationError: nothing of the batch counts, or the loss is not finite.
    """
    if not bool(terms_of(match, outputs, targets, inputs, index).isfinite().all()):
        raise CalibrationError(
            f"loss={type(match).__name__} of what the dense model returns for batch {index}, against itself,"
            " is not finite; check the batch, the model's dtype and the loss"
        )


@contextlib.contextmanager
def _said(match: Match, method: str, index: int) -> Iterator[None]:
    try:
        yield
    except FaspError:
        raise
    except tolerable(Exception) as error:  # code of the user's raises what it likes
        raise ArgumentError(
            f"loss={type(match).__name__}: {method}() for batch {index} raised {type(error).__name__}:"
            f" {first_line(error)}"
        ) from error


__all__ = ["check_terms", "targets_of", "terms_of"]
