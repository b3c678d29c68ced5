"""How far a dense and a pruned model agree: what a report has measured of the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasp_fx.base import Count, device_of, lengths_apart, pytree, tensors_in, tolerable
from fasp_fx.calibration import as_calls, sources_in, token_mask
from fasp_fx.capturing import Call, Program
from fasp_fx.errors import first_line

#: a mean over rows and its standard error, which a single row does not have
Estimate = tuple[float, float | None]


@dataclass(frozen=True)
class Agreement:
    """How far a dense and a pruned model agree on some rows.

    Attributes:
        rows: how many: images, sequences, or what else the first dimension of the first input counts.
        error: ‖dense − pruned‖ / ‖dense‖ of the output that differs most, and its standard error over the
            rows.
        same: how often the first choice stays: the largest number along the last dimension of an output
            ``[rows, classes]`` or ``[rows, tokens, words]``. ``None``: no output is such.
        source: what the rows are, in words.
        by_source: the same of each source, where the rows are of several.
        weights: a digest of the pruned model's weights, so that a save tells nothing of others. ``None``: it
            is not known.

    Examples:
        >>> print(fasp_fx.agreement(model, model, batches))
        outputs differ by 0.00 % ± 0.00 %, first choices stay in 100.0 % ± 0.0 %, on 256 rows
    """

    rows: Count
    error: Estimate
    same: Estimate | None = None
    source: str = ""
    by_source: tuple[Agreement, ...] = ()
    weights: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        stay = "" if self.same is None else f", first choices stay in {percent(self.same, 1)}"
        source = f" ({self.source})" if self.source else ""
        return f"outputs differ by {percent(self.error, 2)}{stay}, on {self.rows:,} rows{source}"


def percent(estimate: Estimate, digits: int) -> str:
    """An estimate in percent, with its standard error where it has one."""
    value, doubt = estimate
    return f"{100 * value:.{digits}f} %" + ("" if doubt is None else f" ± {100 * doubt:.{digits}f} %")


def agreement(
    dense: nn.Module | Program, pruned: nn.Module, batches: Iterable[Any], source: str = ""
) -> Agreement:
    """Measure how far two models agree, with an error bar.

    Outputs that no longer have the shape of the dense model's, as caches may, are left out; so are tokens
    that an ``attention_mask`` of the batch hides.

    Args:
        dense, pruned: models in evaluation mode that are called alike; each is run where its weights are.
        batches: an iterable of batches, or several by the names of their sources, as for
            :func:`fasp_fx.prune`. What the pruning has seen says too little of other data.
        source: what the rows are, for the report.

    Raises:
        CalibrationError: there is no batch.

    Examples:
        >>> agreed = fasp_fx.agreement(model, result.module, [torch.randn(64, 8)])
        >>> agreed.rows, agreed.error[0] < 0.5
        (64, True)
    """
    named = sources_in(batches)
    seen = {name: _compared(dense, pruned, some, name or source) for name, some in named.items()}
    if len(seen) == 1:
        return next(iter(seen.values())).agreement()
    together = _Compared(sum(each.rows for each in seen.values()), source=source)
    for each in seen.values():
        together.choices += each.choices
        for number, pairs in each.errors.items():
            together.errors[number] += pairs
    return replace(together.agreement(), by_source=tuple(each.agreement() for each in seen.values()))


@dataclass
class _Compared:
    """Rows that were compared: the squares of differences and of what they are relative to, by output; how
    many first choices stay, of how many.
    """

    rows: int = 0
    errors: dict[int, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    choices: list[tuple[float, float]] = field(default_factory=list)
    source: str = ""

    def agreement(self) -> Agreement:
        """What they say."""
        square, spread = max(map(_ratio, self.errors.values()), key=lambda each: each[0], default=(0.0, None))
        error = square**0.5, None if spread is None else spread / (2 * square**0.5 or 1.0)
        return Agreement(self.rows, error, _ratio(self.choices) if self.choices else None, self.source)


def _compared(dense: nn.Module | Program, pruned: nn.Module, batches: Any, source: str) -> _Compared:
    """The rows of one source."""
    seen = _Compared(source=source)
    for args, kwargs in as_calls(batches, "held_out"):
        call = Call(args, kwargs)
        rows = next((tensor.shape[0] for tensor in call.tensors() if tensor.dim()), 1)
        outputs = (_outputs(each, call) for each in (dense, pruned))
        for number, (was, now) in enumerate(zip(*outputs, strict=True)):
            if was.shape != now.shape or not was.is_floating_point() or not was.numel():
                continue
            now, parts = now.to(was.device), rows if was.dim() and was.shape[0] == rows else 1
            counts = torch.ones(was.shape[:-1], dtype=torch.bool, device=was.device)
            if was.dim() == 3 and (mask := token_mask(kwargs, was.shape[:2])) is not None:
                counts = mask.to(was.device)
                was, now = (part.masked_fill(~counts[..., None], 0) for part in (was, now))
            apart, size = lengths_apart(now.reshape(parts, -1), was.reshape(parts, -1), dim=1)
            seen.errors[number] += zip((apart**2).tolist(), (size**2).tolist(), strict=True)
            if was.dim() in (2, 3) and was.shape[-1] > 1:
                stay = ((was.argmax(-1) == now.argmax(-1)) & counts, counts)
                seen.choices += zip(*(part.reshape(parts, -1).sum(1).tolist() for part in stay), strict=True)
        seen.rows += rows
    return seen


def _outputs(model: nn.Module | Program, call: Call) -> list[Tensor]:
    """What a model returns; a program takes the arguments of its model, constants among them."""
    if isinstance(model, Program):
        leaves = model.flat_inputs(call.args, call.kwargs)
        call = Call(*pytree.tree_unflatten(leaves, pytree.tree_structure(model.example)))
        model = model.module
    return tensors_in(call.to(device_of(model)).run(model))


#: a source on which outputs differ by so many times as much as on another is warned of
_WORSE = 3


def with_agreement(result: Any, dense: nn.Module | Program, pruned: nn.Module, rows: Any) -> Any:
    """A result with how far it agrees with the dense model in its report, if there are rows; with a note
    where these cannot be run, for which what took an hour is not given up.

    Args:
        rows: batches, or batches by the names of their sources, of which some may have none.
    """
    try:
        some = {name: batches for name, batches in sources_in(rows).items() if batches}
        agreed = agreement(dense, pruned, some.get("", some)) if some else None
        notes = result.report.notes
        if agreed is not None and agreed.by_source:
            best, *_, worst = sorted(agreed.by_source, key=lambda each: each.error[0])
            if worst.error[0] > _WORSE * best.error[0]:
                notes += (
                    f"outputs differ {worst.error[0] / (best.error[0] or 1e-9):.1f} times as much on source"
                    f" '{worst.source}' as on '{best.source}'; give more of it, or prune less",
                )
        return result.with_report(agreement=agreed, notes=notes)
    except tolerable(Exception) as failure:
        note = f"rows that were held out could not be run, so nothing was measured: {first_line(failure)}"
        return result.with_report(notes=(*result.report.notes, note))


def _ratio(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """The sum of some parts over that of their wholes, and its standard error where pairs are independent (of
    the ratio to first order; Cochran, Sampling Techniques, 1977, section 6.3).
    """
    parts, sizes = np.array(pairs).T
    total = sizes.sum()
    if not total:
        return 0.0, None
    ratio, count = parts.sum() / total, len(pairs)
    spread = np.sqrt(((parts - ratio * sizes) ** 2).sum() * count / max(count - 1, 1)) / total
    return float(ratio), float(spread) if count > 1 else None
