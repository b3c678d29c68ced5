"""Measure what the groups of a model cost, once for several prunings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Unpack

import torch
import torch.distributed as dist

from ..allocation._allocation import CostAllocation
from ..allocation.costs import Costs
from ..analysis import plan as plans
from ..base._device import device_named
from ..base._options import check_callable
from ..base._undisturbed import check_default_device, in_usual_modes, one_at_a_time
from ..calibration.observe._calibration import check_calibration, read_batches
from ..calibration.observe._consumers import Consumers
from ..calibration.observe._ranks import Ranks, ended_together
from ..capturing._captured import Captured, Model, capture
from ._chooser import Chooser
from ._prune import analyze
from .config import PruningConfig, PruningOptions


@one_at_a_time
@in_usual_modes
@ended_together
def measure(
    model: Model | Captured,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    calibration: Iterable[Any],
    config: PruningConfig | None = None,
    state: tuple[str, ...] = (),
    dynamic_shapes: Any = None,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
    group: dist.ProcessGroup | None = None,
    **options: Unpack[PruningOptions],
) -> Costs:
    """Predict what each coupled group costs, channel set by channel set.

    The dense model runs on the batches, forward and, unless ``loss=None``, back. The curves serve
    :func:`fasp_fx.prune` for any number of sparsities and budgets, with the same ``score``, ``granularity``
    and ``include``.

    Args:
        model, args, kwargs, state, dynamic_shapes, device: as for :func:`fasp_fx.prune`; a model that cannot
            be captured whole is not measured by itself.
        calibration: an iterable of batches; all of them are run, and what autograd keeps of one has to fit
            the device. Some thousand tokens do.
        config, options: as for :func:`fasp_fx.prune`; ``score``, ``loss``, ``granularity``, ``include`` and
            ``padding_mask`` count.
        progress: called with the fraction of the batches done.
        group: as for :func:`fasp_fx.prune`.

    Raises:
        ArgumentError: an option is not known or out of range.
        CalibrationError: the batches do not fit, the loss fails or does not depend on the weights, or its
            gradients vanish or are not finite.
        CaptureError: see :func:`fasp_fx.capture`.
    """
    check_default_device()
    check_callable(progress=progress)
    asked = PruningConfig.of(config, options)
    if not isinstance(asked.allocator, CostAllocation):
        asked = replace(asked, sparsity=None if asked.budget else asked.requested, allocation="global")
    check_calibration(calibration)
    captured = (
        model
        if isinstance(model, Captured)
        else capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state, device=device)
    )
    program = captured.program
    analysis = analyze(captured, granularity=asked.granularity, include=asked.include)
    batches = read_batches(program, calibration, None if device is None else device_named(device))
    advance = progress or (lambda fraction: None)
    ranks = Ranks.of(group)
    fingerprint = plans.computed_fingerprint(program)
    ranks.check_alike(lambda: fingerprint, batches, vars(asked))
    costs = Chooser(asked, ranks=ranks).measure(
        Consumers(analysis, asked.restore is not None),
        batches,
        fingerprint,
        advance,
        part=1,
    )
    assert costs is not None
    return costs


__all__ = ["measure"]
