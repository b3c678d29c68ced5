"""A model captured once, whole or in parts, for several analyses and prunings."""

from __future__ import annotations

from typing import Any

import torch

from ..base._tolerable import tolerable
from ..base._undisturbed import in_usual_modes, one_at_a_time
from ..capturing._captured import Captured, Model, capture_whole, check_given, program_of
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
    try:
        return capture_whole(model, args, kwargs, state=state, dynamic_shapes=dynamic_shapes, device=device)
    except tolerable(CaptureError) as error:
        check_parts_help(error, model, dynamic_shapes, state=state)
        return capture_parts(error, model, args, kwargs, device)


def subject_of(
    model: Model | Captured,
    args: Any,
    kwargs: dict[str, Any] | None,
    *,
    state: tuple[str, ...],
    dynamic_shapes: Any,
    device: torch.device | str | None = None,
    run: bool = True,
    config: PruningConfig | None = None,
) -> Subject:
    """A model to be pruned, which is captured unless it was.

    Args:
        run: compare what is captured now with the model on the example inputs, which runs both.
        config: what is asked for.

    Raises:
        ArgumentError: a captured model with what it was captured with already, or with weights that changed;
            or an option that speaks of the whole of a model that is captured in parts.
    """
    whole = {} if config is None else {"padding_mask": config.padding_mask, "loss": _whole_loss(config)}
    if isinstance(model, CapturedParts):
        check_given(args, kwargs, state, dynamic_shapes, device, model.device())
        check_parts_help(model.error, model.model, None, **whole)
        return InParts(model, is_own=False)
    try:
        program = program_of(
            model, args, kwargs, state=state, dynamic_shapes=dynamic_shapes, device=device, run=run
        )
    except tolerable(CaptureError) as error:
        check_parts_help(error, model, dynamic_shapes, state=state, **whole)
        return InParts(capture_parts(error, model, args, kwargs, device), is_own=True)
    return Whole(program, device)


def _whole_loss(config: PruningConfig) -> Any:
    return None if config.loss in _PARTIAL_LOSSES else config.loss


__all__ = ["capture", "subject_of"]
