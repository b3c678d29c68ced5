"""A model captured once, whole or in parts, for several analyses and prunings."""

from __future__ import annotations

from typing import Any

import torch

from ..base._tolerable import tolerable
from ..base._undisturbed import in_usual_modes, one_at_a_time
from ..capturing._captured import Captured, Model, capture_whole, check_given
from ..errors import CaptureError
from ._subject import Subject, Whole
from .config import PruningConfig
from .submodules._parts import CapturedParts, InParts, capture_parts, check_parts_help

#: losses that make sense for a part of a model by itself
_PARTIAL_LOSSES = ("auto", "outputs", None)


@one_at_a_time
@in_usual_modes
def capture(
    model: Model,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    state: tuple[str, ...] = (),
    dynamic_shapes: Any = None,
    device: torch.device | str | None = None,
) -> Captured:
    """Capture a model as it behaves on the example inputs, once for several prunings.

    Args:
        model: module in evaluation mode, graph module or exported program; it is not changed, and its weights
            are shared. Of one that cannot be captured as a whole, a copy is kept, with a program for each of
            the largest submodules that can (docs/submodules.md).
        args, kwargs: example inputs.
        state: names of arguments and outputs that hold state (a cache) and may become narrower.
        dynamic_shapes: as for ``torch.export.export``; inferred if ``None``.
        device: move the captured copy there; ``None`` leaves it where the model is.

    Raises:
        ArgumentError: the inputs do not fit the model.
        CaptureError: the model is in training mode, or neither it nor any of its submodules can be captured.
    """
    return _captured(model, args, kwargs, {}, state=state, dynamic_shapes=dynamic_shapes, device=device)


def subject_of(
    model: Model | Captured,
    args: Any,
    kwargs: dict[str, Any] | None,
    config: PruningConfig | None = None,
    run: bool = True,
    **how: Any,
) -> Subject:
    """A model to be pruned, which is captured unless it was.

    Args:
        config: what is asked for.
        run: compare what is captured now with the model on the example inputs, which runs both.
        how: the keywords of :func:`capture`.

    Raises:
        ArgumentError: a captured model with what it was captured with already, or with weights that changed;
            or an option that speaks of the whole of a model that is captured in parts.
    """
    whole = {} if config is None else {"padding_mask": config.padding_mask, "loss": _whole_loss(config)}
    is_given = isinstance(model, Captured)
    if isinstance(model, Captured):
        check_given(model.device(), args, kwargs, **how)
    captured = model if isinstance(model, Captured) else _captured(model, args, kwargs, whole, run=run, **how)
    if not isinstance(captured, CapturedParts):
        return Whole(captured.checked(), how["device"])
    check_parts_help(captured.error, captured.model, None, **whole)
    return InParts(captured, is_own=not is_given)


def _captured(
    model: Model, args: Any, kwargs: dict[str, Any] | None, whole: dict[str, Any], **how: Any
) -> Captured:
    """A model as one program, or else in parts, where nothing speaks of the whole of it."""
    try:
        return capture_whole(model, args, kwargs, **how)
    except tolerable(CaptureError) as error:
        check_parts_help(error, model, how["dynamic_shapes"], state=how["state"], **whole)
        return capture_parts(error, model, args, kwargs, how["device"])


def _whole_loss(config: PruningConfig) -> Any:
    return None if config.loss in _PARTIAL_LOSSES else config.loss


__all__ = ["capture", "subject_of"]
