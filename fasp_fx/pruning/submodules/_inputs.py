"""The calls that a part of a model gets while the model runs on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ...base._tolerable import tolerable
from ...calibration.observe._calibration import calibration_calls
from ...capturing._unchanged import rewound
from ...errors import CalibrationError, first_line
from ._calls import Call, watching
from ._submodules import Part, why_unfit

NEVER_REACHED = "the calibration data never reaches it"


def user_batches(calibration: Iterable[Any] | None, device: torch.device | None) -> list[Call]:
    """The calibration data as calls of the whole model.

    Raises:
        CalibrationError: a batch is no call, or holds values that are not finite.
    """
    batches = []
    for index, (args, kwargs) in enumerate(calibration_calls(calibration)):
        call = Call(args, kwargs)
        if device is not None:
            call = call.map(lambda tensor: tensor.to(device))
        for tensor in call.tensors():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(
                    f"calibration batch {index} holds values that are not finite; remove or repair them"
                )
        batches.append(call)
    return batches


def recorded(model: nn.Module, module: nn.Module, batches: list[Call]) -> list[Call]:
    """The calls that one submodule gets while the model runs on the batches."""
    calls: list[Call] = []
    for index, batch in enumerate(batches):
        with watching([module], lambda _, call: calls.append(call.held())):
            _run(model, index, batch)
    return calls


def not_reached(model: nn.Module, parts: Sequence[Part], batches: list[Call]) -> dict[str, str]:
    """The parts that no batch brings any data to, with that reason; runs batches until all parts got some."""
    waiting = {part.path: part.module for part in parts}

    def see(module: nn.Module, call: Call) -> None:
        if all(tensor.numel() for tensor in call.tensors()):
            for path in [path for path, own in waiting.items() if own is module]:
                del waiting[path]

    for index, batch in enumerate(batches):
        if not waiting:
            break
        with watching({id(module): module for module in waiting.values()}.values(), see):
            _run(model, index, batch)
    return dict.fromkeys(waiting, NEVER_REACHED)


def _run(model: nn.Module, index: int, batch: Call) -> None:
    """Run a model on a batch.

    Raises:
        CalibrationError: it fails.
    """
    try:
        with rewound(model):
            batch.run(model)
    except tolerable(Exception) as failure:
        raise CalibrationError(
            f"calibration batch {index} fails in the model: {type(failure).__name__}: {first_line(failure)};"
            " a batch is a tensor, a tuple of positional arguments or a dict of keyword arguments, so a model"
            " that takes a list takes it as (list,), and one that takes no labels is given none:"
            " calibration=(batch[0] for batch in loader)"
        ) from failure


def graph_inputs(part: Part, calls: list[Call]) -> tuple[list[list[Any]], str]:
    """The graph inputs of the calls that bring any data, and why there are none, if there are none."""
    flat = []
    for call in calls:
        if any(not tensor.numel() for tensor in call.tensors()):
            continue
        misfit = why_unfit(part.program, call)
        if misfit:
            return [], f"a call on the calibration data does not fit its graph: {misfit}"
        flat.append(part.program.flat_inputs(call.args, call.kwargs))
    return flat, "" if flat else NEVER_REACHED


__all__ = ["graph_inputs", "not_reached", "recorded", "user_batches"]
