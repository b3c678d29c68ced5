"""What went, from where, what it cost, what stayed and why."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from torch import Tensor

from fasp_fx.allocation import Cap, is_excluded
from fasp_fx.analysis import APPROXIMATE, Analysis, Group, PruningPlan, Resource, cache_of
from fasp_fx.base import Count, OpOverload, Page, ReadBy, fingerprint, from_document, to_document
from fasp_fx.errors import ArgumentError, BudgetError, StoreError
from fasp_fx.patterns import pointwise_rule

from ._agreement import Agreement
from ._config import PruningConfig

if TYPE_CHECKING:
    from torch import nn

    from .check import Checked

#: the operators whose weights sparsity counts
COUNTED = "linear, convolution and recurrent operators"
#: what the columns of a report say, for those who read it
COLUMNS = (
    "error cut: squared error of what consumers of the group put out, relative to the dense model's, if they"
    " were only cut; restored: once what stays was repaired; held out: the same on calibration data that"
    " the repair has not seen.",
)


def weight_size(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Number of parameters and their bytes; tied weights count once."""
    unique = {id(tensor): tensor for tensor in weights.values()}.values()
    return sum(t.numel() for t in unique), sum(t.numel() * t.element_size() for t in unique)


def _cache(analysis: Analysis, removed: Mapping[str, int]) -> tuple[int, int] | None:
    """Bytes per token of one sequence that caches take, before and after; ``None`` where there are none."""
    try:
        resource = cache_of(analysis)
    except BudgetError:
        return None
    return int(resource.whole), int(resource.used([removed.get(group.name, 0) for group in resource.groups]))


@dataclass(frozen=True)
class Line:
    """One group: what it had, what it has, and the relative output error of its consumers, ‖X(W − V)ᵀ‖²_F /
    ‖XWᵀ‖²_F, the worst of them.

    Attributes:
        before, after: channel sets, in ``blocks`` blocks of equal size.
        error_cut, error_restored: without and with restoration, over the calibration tokens.
        held_cut, held_restored: the same over tokens held out of them, *restored* by a restoration that was
            fitted without them: what to expect of other data.
        producers, consumers: names and dimensions of the weights that lose rows and columns with it.
    """

    name: str
    status: str
    before: Count
    after: Count
    blocks: Count
    reason: str
    error_cut: float | None = None
    error_restored: float | None = None
    held_cut: float | None = None
    held_restored: float | None = None
    producers: tuple[tuple[str, Count], ...] = ()
    consumers: tuple[tuple[str, Count], ...] = ()

    def __str__(self) -> str:
        left = f" -> {self.after}" if self.before != self.after else ""
        blocks = f" ({self.blocks} blocks)" if self.blocks > 1 else ""
        errors = (
            " " * 9 if error is None else f"{error:9.2e}"
            for error in (self.error_cut, self.error_restored, self.held_restored)
        )
        reason = f"  ({self.reason})" if self.reason else ""
        return (
            f"{self.status:<12}{f'{self.before}{left}{blocks}':>22}  {'  '.join(errors)}  {self.name}{reason}"
        )


@dataclass(frozen=True)
class Figure:
    """Something measured of the dense and of the pruned model, such as perplexity; ``digits`` are those worth
    showing after the point.
    """

    what: str
    dense: float
    pruned: float
    digits: Annotated[int, Field(ge=0, le=12)] = 0


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation of a training: after how many steps, the loss of the last step's batches (``None``
    before the first), and that of held-out batches.
    """

    step: Count
    trained: float | None
    held_out: float


@dataclass(frozen=True)
class Recovery:
    """A training after pruning.

    Attributes:
        method: what was done.
        criterion: what the losses of the curve are.
        steps: how many steps were taken.
        kept: the step after which the weights were as they are now; 0: they are those from before the
            training.
        curve: the evaluations, the first before any step.
        seconds: time spent, without running the dense model.
        notes: why the training ended early, if it did.
    """

    method: str
    criterion: str
    steps: Count
    kept: Count
    curve: Annotated[tuple[CurvePoint, ...], Field(min_length=1)]
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        first = self.curve[0].held_out
        kept = next((point.held_out for point in self.curve if point.step == self.kept), first)
        where = (
            f"kept: those after step {self.kept} of {self.steps}"
            if self.kept
            else f"none of {self.steps} steps did better: the weights are as before"
        )
        return (
            f"{self.method}, {self.criterion} on held-out batches {first:.4g} -> {kept:.4g}; {where};"
            f" {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Prediction:
    """What an allocation by costs expects of the loss.

    Attributes:
        loss: what it is, in words.
        rise: how much it rises; ``in_words`` says that on a scale that people know.
    """

    loss: str
    rise: float
    in_words: str

    def __str__(self) -> str:
        return f"predicted rise of {self.loss}: {self.rise:.3g} ({self.in_words})"


@dataclass(frozen=True)
class Spent:
    """One budget, and how it was kept.

    Attributes:
        resource: what is counted (:mod:`fasp_fx.allocation`); ``unit`` is what several of it are called.
        allowed: how much may stay.
        dense, used: how much the dense and the pruned model have.
    """

    resource: str
    unit: str
    allowed: int | float
    dense: int | float
    used: int | float

    def __str__(self) -> str:
        share, most = max(self.dense, 1), max(self.allowed, 1)
        spare = (self.allowed - self.used) / most
        kept = f"{spare:.2%} left over" if spare >= 0 else f"{-spare:.2%} too much"
        return (
            f"{self.used:,} of {self.dense:,} {self.unit} stay ({self.used / share:.2%}),"
            f" {self.allowed / share:.2%} may: {kept}"
        )


@dataclass(frozen=True)
class Report(Page):
    """Figures of one pruning; ``str(report)`` is a table for people.

    Attributes:
        sparsity: fraction removed of the counted weights; ``requested`` is what was asked for.
        parameters, bytes: before and after.
        notes: remarks on the capture and on operators without a rule.
        figures: what was measured afterwards; the command line fills it.
        without_rule: operators that had no rule and froze what they touched, with the number of times.
        cache: bytes of the key-value cache per token of one sequence, before and after; ``None`` where the
            program holds no cache. Of an encoder-decoder model: per token of the output, and per token of the
            input, together.
        include: the statuses that were pruned besides ``"prunable"``, as given to :func:`fasp_fx.prune`.
        recovery: the training that followed, if there was one.
        budgets: what was allowed, and what is used of it.
        prediction: what the allocation expected this to cost; ``None`` where it did not go by costs.
        agreement: how far the pruned model agrees with the dense one on rows that neither a choice nor a
            repair has seen; ``None``: none were held out.
        config: what :func:`fasp_fx.prune` was asked for; ``None`` for a plan that was replayed, and for what
            was loaded if the score, the allocation or the loss was a function, which no file holds.

    Examples:
        >>> report = result.report
        >>> print(f"{report.sparsity:.1%}, {report.requested:.0%} asked for; parameters {report.parameters}")
        34.6%, 30% asked for; parameters (884, 584)
    """

    sparsity: float
    requested: float | None
    parameters: tuple[Count, Count]
    bytes: tuple[Count, Count]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    without_rule: Mapping[str, Count] = field(default_factory=dict)
    cache: tuple[Count, Count] | None = None
    include: tuple[str, ...] = ()
    recovery: Recovery | None = None
    budgets: tuple[Spent, ...] = ()
    prediction: Prediction | None = None
    agreement: Agreement | None = None
    config: Annotated[
        PruningConfig | None,
        ReadBy(lambda data: None if data is None else PruningConfig.from_json(json.dumps(data))),
    ] = None

    def with_fields(self, fields: Mapping[str, Any], model: nn.Module) -> Report:
        """The same with other fields; what was measured is of the weights that a model has now."""
        agreed = fields.get("agreement")
        found = {"agreement": replace(agreed, weights=_digest(model))} if agreed is not None else {}
        return replace(self, **{**fields, **found})

    def without_stale(self, model: nn.Module) -> Report:
        """The same without what was measured, if the model has other weights now: it was trained since."""
        if self.agreement is None or self.agreement.weights in (None, _digest(model)):
            return self
        return replace(self, agreement=None, figures=())

    def to_json(self) -> str:
        """The report as text, without a configuration that holds a function."""
        try:
            config = None if self.config is None else json.loads(self.config.to_json())
        except ArgumentError:  # it holds a function
            config = None
        return to_document("report", {**asdict(replace(self, config=None)), "config": config})

    @staticmethod
    def from_json(text: str) -> Report:
        """The report that :meth:`to_json` wrote.

        Raises:
            StoreError: it is another text, or a field is not what it should be; names it.
        """
        return from_document("report", Report, text, "save the result again", StoreError)

    def _cost(self) -> str:
        """What was lost, as far as it was seen."""
        cut = max((line.error_cut for line in self.lines if line.error_cut is not None), default=None)
        restored = max((line.error_restored or 0.0 for line in self.lines), default=0.0)
        if self.prediction is not None:
            return str(self.prediction)
        if cut is None:
            return "unknown: no layer's error was measured; run both models on data of yours"
        return (
            f"squared errors of what consumers put out are {restored:.1e} at most, {cut:.1e} without repair"
        )

    def _trust(self) -> str:
        """How far what was lost can be relied on."""
        errors = [
            (line.held_restored, line.error_restored, line.name)
            for line in self.lines
            if line.held_restored is not None and line.error_restored is not None
        ]
        if not errors:
            return "unknown: no calibration data was held out; run both models on data of yours"
        unseen, restored, name = max(errors)
        return (
            f"squared errors of single layers are {unseen:.1e} at most ({name}) on calibration data that no"
            f" repair has seen, {restored:.1e} on all; far above that, more data would help; near 1, little"
            " of a layer is left"
        )

    def __repr__(self) -> str:
        before, after = self.parameters
        return f"Report(sparsity={self.sparsity:.4f}, parameters={before:,} -> {after:,})"

    def said(self) -> list[tuple[str, str]]:
        """What there is to say of the whole model: what of, and what."""
        asked = f" (asked for {self.requested:.2%})" if self.requested is not None else ""
        (dense, kept), less = self.parameters, self.parameters[1] / max(self.parameters[0], 1) - 1
        removed = (
            f"{self.sparsity:.2%}{asked} of the weights of {COUNTED} in {counted(self.include)}: parameters"
            f" {dense:,} -> {kept:,} ({less:+.2%}), bytes {self.bytes[0]:,} -> {self.bytes[1]:,}"
        )
        caches = (
            f"{before:,} -> {after:,} bytes per token of one sequence  ({after / max(before, 1) - 1:+.2%})"
            for before, after in ([self.cache] if self.cache is not None else [])
        )
        recovery = (str(self.recovery), *self.recovery.notes) if self.recovery is not None else ()
        measured = (
            "unknown: no row held out was run, or weights were changed since; calibrate on eight batches or"
            " more, give held_out=, or call fasp_fx.agreement"
            if self.agreement is None
            else f"{self.agreement}, which neither a choice nor a repair has seen"
        )
        by_source = self.agreement.by_source if self.agreement is not None else ()
        lines = {"removed": [removed], "measured": [measured, *map(str, by_source)]}
        lines |= {"cost": [self._cost()], "trust": [self._trust()], "cache": [*caches]}
        lines |= {"budget": [*map(str, self.budgets)], "recovery": [*recovery]}
        return [(what, line) for what, several in lines.items() for line in several]

    def __str__(self) -> str:
        return "\n".join(
            (
                *(f"{what:<12}{line}" for what, line in self.said()),
                *(
                    f"{row.what}  {row.dense:,.{row.digits}f} -> {row.pruned:,.{row.digits}f}"
                    for row in self.figures
                ),
                "",
                f"{'status':<12}{'channels':>22}  {'error cut':>9}  {'restored':>9}  {'held out':>9}  group",
                *map(str, self.lines),
                *(["", *COLUMNS] if any(line.error_restored is not None for line in self.lines) else []),
                *(f"note: {note}" for note in self.notes),
            )
        )


def make_report(
    analysis: Analysis,
    plan: PruningPlan,
    checked: Checked,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    config: PruningConfig | None,
) -> Report:
    """Assemble the report of one pruning.

    Args:
        checked: what was carried out.
        before, after: the parameters of both models.
        config: what was asked for; ``None`` where a plan is replayed, or for a part of a model.
    """
    decision, whole = checked.decision, checked.whole
    removed = {group.name: group.removed_sets for group in plan.groups}
    lines = []
    for group in analysis.groups:
        outcomes = (
            [outcome for use in group.uses for outcome in decision.outcomes.get(use.weight, ())]
            if group.name in removed
            else []
        )
        lines.append(
            replace(
                line_of(group),
                after=group.size - removed.get(group.name, 0),
                reason=f"left whole: {whole[group.name]}" if group.name in whole else group.reason,
                error_cut=max((o.error_before for o in outcomes), default=None),
                error_restored=max((o.error_after for o in outcomes), default=None),
                held_cut=max((o.held_before for o in outcomes if o.held_before is not None), default=None),
                held_restored=max((o.held_after for o in outcomes if o.held_after is not None), default=None),
            )
        )
    old, new = weight_size(before), weight_size(after)
    return Report(
        plan.sparsity,
        None if config is None else config.target_sparsity,
        (old[0], new[0]),
        (old[1], new[1]),
        with_exclusions(lines, analysis.groups, config),
        notes=(*notes_of(analysis), *decision.notes, *checked.notes),
        without_rule=dict(analysis.without_rule),
        cache=_cache(analysis, removed),
        include=tuple(sorted(analysis.include)),
        budgets=tuple(spent(cap, cap.resource(analysis), removed) for cap in config.budgets)
        if config
        else (),
        config=config,
    )


def with_exclusions(
    lines: Iterable[Line], groups: Iterable[Group], config: PruningConfig | None
) -> tuple[Line, ...]:
    """Lines that say by which pattern of ``exclude=`` their groups stay whole."""
    exclude = () if config is None else config.exclude
    named = {
        group.name: next((one for one in exclude if is_excluded(group, [one])), None) for group in groups
    }
    return tuple(
        replace(line, reason="; ".join(filter(None, (line.reason, f"excluded by '{pattern}'"))))
        if (pattern := named.get(line.name)) is not None
        else line
        for line in lines
    )


def spent(cap: Cap, resource: Resource, removed: Mapping[str, int]) -> Spent:
    """How a budget was kept, where groups lose so many channel sets."""
    used = resource.used([removed.get(group.name, 0) for group in resource.groups])
    return Spent(cap.name, cap.unit, cap.allowed(resource.whole), resource.whole, used)


def counted(include: Collection[str]) -> str:
    """The groups whose weights sparsity is a fraction of."""
    return (
        "prunable, exempt and approximate groups" if APPROXIMATE in include else "prunable and exempt groups"
    )


def line_of(group: Group) -> Line:
    """The line of a group that nothing was removed from."""
    producers, consumers = (
        tuple((member.name, member.dim) for member in members)
        for members in (group.producers, group.consumers)
    )
    return Line(
        group.name,
        group.status,
        group.size,
        group.size,
        group.blocks,
        group.reason,
        producers=producers,
        consumers=consumers,
    )


def notes_of(analysis: Analysis) -> tuple[str, ...]:
    """Remarks on the capture, and what to do about operators without a rule."""
    notes = list(analysis.program.notes)
    for name, nodes in sorted(analysis.walk.without_rule.items()):
        operator = nodes[0].target
        what = (
            f'if it is pointwise, fasp_fx.patterns.register(torch.ops.{name}, "{pointwise_rule(operator)}")'
            " teaches it"
            if isinstance(operator, OpOverload)
            else "what a higher-order operator calls is not looked into"
        )
        notes.append(f"{name} has no rule and froze what it touches ({len(nodes)} times); {what}")
    return tuple(notes)


def _digest(model: nn.Module) -> str:
    """What tells the weights of a model from others."""
    return fingerprint(
        {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    )
