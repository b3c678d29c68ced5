"""Prune a generating model of transformers: one plan, carried out in every program that generation needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, Unpack, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..allocation.budgets import Latency
from ..allocation.costs import Costs
from ..analysis import plan as plans
from ..analysis._analysis import Analysis
from ..analysis.plan import PruningPlan
from ..base._options import check_callable, path_of
from ..base._undisturbed import check_default_device, in_usual_modes, one_at_a_time
from ..base._version import __version__
from ..calibration.observe._calibration import check_calibration
from ..calibration.observe._ranks import Ranks, ended_together
from ..errors import ArgumentError
from ..passes._pruned_module import PrunedModule
from ..pruning._pipeline import Timings, decide, make_plan, rewrite
from ..pruning._result import Result
from ..pruning.config import PruningConfig, PruningOptions
from ..pruning.report import Report, make_report, notes_of, said_whole
from ._config import PrunedConfig
from ._convention import CallConvention, check_served, convention_of
from ._flat import FlatProgram
from ._held import Parts, StoredProgram, Written
from ._model import PrunedModel
from ._programs import Planned, Served, carry_out_in_all, one_set, program_for, served_by
from ._stages import CausalStages, Seq2SeqStages, stages_of


@dataclass(frozen=True)
class Pruned:
    """What :func:`fasp_fx.hf.prune` returns.

    Attributes:
        model: the smaller model; generates, trains and saves like the original.
        plan: what was removed.
        report: what it cost; ``report.cache`` says how much narrower the key-value cache became.
        tokenizer: the tokenizer that was given, saved along with the model.
    """

    model: Any
    plan: PruningPlan
    report: Report
    tokenizer: Any = None

    def with_report(self, **fields: Any) -> Self:
        """The same, sharing its model, with some fields of its report replaced, which is saved along."""
        report = replace(self.report, **fields)
        if isinstance(self.model, PrunedModel):
            self.model.report = report
        return replace(self, report=report)

    def loading(self, folder: str | Path) -> list[str]:
        """Lines of Python that load the model from the folder it was saved in."""
        from ._card import loading as loading_pruned
        from ._plain_folder import loading

        return (
            loading_pruned(self.model, str(folder))
            if isinstance(self.model, PrunedModel)
            else loading(self.model, str(folder))
        )

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write model and tokenizer to a new folder, whole or not at all.

        Args:
            folder: the folder to make.
            overwrite: replace an earlier save (and nothing else) of that name.

        Returns:
            The folder, as ``AutoModelForCausalLM.from_pretrained`` reads it once fasp_fx is imported.

        Raises:
            StoreError: the path is taken or cannot be written.
        """
        from ._folder import save
        from ._plain_folder import save_plain

        if not isinstance(self.model, PrunedModel):
            return save_plain(self.model, self.tokenizer, self.plan, self.report, folder, overwrite=overwrite)
        return save(self.model, path_of(folder, "folder"), self.tokenizer, overwrite=overwrite)


@one_at_a_time
@in_usual_modes
@ended_together
def prune(
    model: Any,
    tokenizer: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    costs: Costs | None = None,
    plain: bool = False,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    group: dist.ProcessGroup | None = None,
    checkpoint: str | Path | None = None,
    **options: Unpack[PruningOptions],
) -> Pruned:
    """Make a generating model of transformers smaller, so that it still generates; the caller's model is not
    touched.

    Args:
        model: a causal language model or an encoder-decoder, in evaluation mode.
        tokenizer: kept and saved with the result.
        calibration: an iterable of batches: token numbers ``[batch, tokens]``, or dicts with ``input_ids``
            and, where needed, ``attention_mask``; for an encoder-decoder also ``decoder_input_ids``. Tokens
            that the mask hides enter neither scores nor repairs.
        config: the options; ``None``: the defaults.
        costs: as for :func:`fasp_fx.prune`; not with ``plain``.
        plain: keep to what the architecture's own configuration can say, and return a model of the original
            class.
        device: where to capture and calibrate; ``None``: the model's device.
        progress, on_analysis, group, checkpoint: as for :func:`fasp_fx.prune`.
        options: fields of :class:`fasp_fx.PruningConfig` (``sparsity=0.2``, ``score="fasp"``, …) in the place
            of those of ``config``; the padding mask is that of the batches.

    Returns:
        A :class:`Pruned`.

    Raises:
        ArgumentError: the model does not generate, or an option is not known.
        CaptureError: the model cannot be captured, or its program does not compute what the model does at
            some size.
        PlanError: the plan cannot be carried out in one of the programs.
        FaspError: see :func:`fasp_fx.prune`.
    """
    check_default_device()
    check_callable(progress=progress, on_analysis=on_analysis)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ArgumentError(
            f"tokenizer is a {type(tokenizer).__name__}; pass one of transformers, and batches as"
            " calibration="
        )
    if plain:
        from ._plain import prune_plain

        if costs is not None:
            raise ArgumentError(
                "a plain checkpoint measures its own costs, field by field of its config; leave costs= out"
            )
        shared: dict[str, Any] = {
            "device": device,
            "progress": progress,
            "on_analysis": on_analysis,
            "group": group,
            "checkpoint": checkpoint,
        }
        found = prune_plain(model, calibration=calibration, config=config, **shared, **options)
        return Pruned(found.model, found.result.plan, found.report, tokenizer)
    stages = stages_of(model)
    asked = _asked(stages, config, options)
    if asked.needs_data:
        check_calibration(calibration)
    ranks, clock = Ranks.of(group), Timings()
    stage = stages.planned()
    program = program_for(stage, device)
    convention = convention_of(stages, program)
    where = None if device is None else torch.device(device)
    batches = None
    if calibration is not None:
        batches = stages.batches(calibration, FlatProgram.of(program.module).cache_sizes())
    analysis, decision = decide(
        program,
        asked,
        batches,
        device=where,
        progress=progress,
        on_analysis=on_analysis,
        costs=costs,
        loss="next-token",
        ranks=ranks,
        checkpoint=checkpoint,
        clock=clock,
    )
    planned = Planned(program, analysis, decision)
    served = [served_by(other, device, asked) for other in stages.served()]
    results, plan, report = (
        _together(model, planned, served, asked, clock)
        if served
        else _alone(stage.name, planned, asked, clock)
    )
    programs = {name: _stored(result.module) for name, result in results.items()}
    constants = {name: _constants(result.module) for name, result in results.items()}
    made = _model(model, Parts(programs, one_set(model, results), constants, plan, report), convention)
    check_served(made, stages)
    return Pruned(made, plan, report, tokenizer)


def _asked(
    stages: CausalStages | Seq2SeqStages, config: PruningConfig | None, options: PruningOptions
) -> PruningConfig:
    """The options, with the padding mask of the batches.

    Raises:
        ArgumentError: one is not for models that generate.
    """
    asked = PruningConfig.of(config, options)
    mask = "attention_mask" if "attention_mask" in stages.accepts else None
    if asked.padding_mask not in (None, mask):
        raise ArgumentError(
            f"padding_mask={asked.padding_mask!r} is not for fasp_fx.hf.prune, which takes the mask of the"
            f" batches{'' if mask is None else f', {mask!r}'}; leave it out"
        )
    asked = replace(asked, padding_mask=mask)
    if any(isinstance(cap, Latency) for cap in asked.caps):
        raise ArgumentError(
            "a latency is that of example inputs, which a model that generates has none of; give them to"
            " fasp_fx.prune, or another budget"
        )
    return asked


def _alone(
    name: str, planned: Planned, config: PruningConfig, clock: Timings
) -> tuple[dict[str, Result], PruningPlan, Report]:
    """The one program that serves all of generation, smaller."""
    result = rewrite(planned.program, planned.analysis, planned.decision, config, clock)
    return {name: result}, result.plan, result.report


def _together(
    model: nn.Module, planned: Planned, served: list[Served], config: PruningConfig, clock: Timings
) -> tuple[dict[str, Result], PruningPlan, Report]:
    """The programs that serve generation, smaller by one plan, and a report of all of them."""
    program, analysis = planned.program, planned.analysis
    decision, results, left = carry_out_in_all(served, planned)
    weights = one_set(model, results)
    plan = make_plan(program, analysis, decision)
    plan = replace(
        plan,
        result=plans.fingerprint(
            {name: tensor for name, tensor in weights.items() if isinstance(tensor, nn.Parameter)}
        ),
    )
    report = make_report(analysis, plan, decision, program.parameters(), weights, config, clock.seconds, left)
    found_out = [
        note for other in served for note in results[other.name].report.notes[len(notes_of(other.analysis)) :]
    ]
    notes = tuple(
        dict.fromkeys([*report.notes, *found_out, *(said_whole(name, seen) for name, seen in left.items())])
    )
    cache = next((found.report.cache for found in results.values() if found.report.cache is not None), None)
    return results, plan, replace(report, notes=notes, cache=cache)


def _stored(module: nn.Module) -> StoredProgram:
    assert isinstance(module, PrunedModule)
    origin = module.fasp_fx_origin
    return StoredProgram(Written(origin), FlatProgram.of_graph(*origin.body()))


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not in the state dict, constants among them."""
    stored = module.state_dict().keys()
    return {
        name: value.detach().clone()
        for name, value in module.named_buffers(remove_duplicate=False)
        if name not in stored
    }


def _model(original: Any, parts: Parts, convention: CallConvention) -> PrunedModel:
    from ._causal import PrunedForCausalLM
    from ._seq2seq import PrunedForSeq2SeqLM

    config = original.config
    kind: Any = PrunedForSeq2SeqLM if config.is_encoder_decoder else PrunedForCausalLM
    made = kind(
        PrunedConfig(
            original=_plain(config.to_dict()),
            **asdict(convention),
            fasp_fx_version=__version__,
            is_encoder_decoder=bool(config.is_encoder_decoder),
            architectures=[kind.__name__],
            dtype=original.dtype,
        ),
        parts,
    )
    made.generation_config = copy.deepcopy(original.generation_config)
    made.name_or_path = original.name_or_path
    return cast(PrunedModel, made)


def _plain(value: Any) -> Any:
    """A configuration as JSON takes it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


__all__ = ["Pruned", "prune"]
