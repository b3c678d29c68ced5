"""Prune to what a model's own config can say, so that the result is an ordinary checkpoint."""

from __future__ import annotations

import copy
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..allocation import Allocation, Budget, CostAllocation, validate
from ..allocation._allocation import Search
from ..allocation._limits import joined
from ..allocation.costs import Costs
from ..analysis._analysis import Analysis
from ..analysis.groups import PRUNABLE, Group
from ..analysis.plan import PruningPlan
from ..base._device import device_of
from ..base._progress import Shown
from ..base._tolerable import tolerable
from ..base._undisturbed import generator_of
from ..base.compare import distance, tolerance
from ..base.compat._transformers import quiet
from ..calibration._calibration import as_calls, check_calibration
from ..calibration._ranks import ended_together
from ..calibration.losses import output_tensors
from ..capturing._capture import capture_whole
from ..errors import ArgumentError, NothingPrunableError, SparsityError, VerificationError, first_line
from ..pruning._prune import prune
from ..pruning._result import Result
from ..pruning.config import PruningConfig, PruningOptions
from ..pruning.eager import fused_weights
from ..pruning.report import Report

#: tokens of an example where there is no calibration data to take one from
_EXAMPLE = (2, 8)


@ended_together
def prune_plain(
    model: nn.Module,
    *,
    calibration: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    costs: Costs | None = None,
    device: torch.device | str | None = None,
    progress: Shown = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    group: dist.ProcessGroup | None = None,
    checkpoint: str | pathlib.Path | None = None,
    **options: Unpack[PruningOptions],
) -> tuple[PreTrainedModel, PruningPlan, Report]:
    """Prune a transformers model by what its config can say: the result is a smaller model of the same class,
    with the plan and the report.

    Which fields of the config shrink which groups is found by building the class at other sizes on the meta
    device. Groups that no field shrinks alone are left whole; the report says why. The result is compared
    with the pruned program before it is handed out.

    Args:
        model: a transformers model in evaluation mode; it is left as it was.
        calibration, costs, device, progress, on_analysis, group, checkpoint: as for :func:`fasp_fx.prune`.
        config, options: as for :func:`fasp_fx.prune`, for channels only, without ``include`` and ``exclude``,
            with one sparsity. An allocation sees one group for each field.

    Raises:
        ArgumentError: the model is not one of transformers', or its config does not describe it or what the
            options ask for.
        NothingPrunableError: its config can say nothing; the message says what stands in the way.
        SparsityError: its config cannot say enough; the message says how much it can.
        VerificationError: no model built from the smaller config computes what the pruned program computes.
        CalibrationError, CaptureError: as for :func:`fasp_fx.prune`.
    """
    asked = PruningConfig.of(config, options)
    experiments, settings, own = plain_config(model, asked)
    assert isinstance(model, PreTrainedModel)
    if asked.needs_data:
        check_calibration(calibration)
    calibration, example = _batches(model, calibration)
    result = prune(
        capture_whole(model, (), example, device=device),
        calibration=calibration,
        config=own,
        costs=costs,
        progress=progress,
        on_analysis=on_analysis,
        group=group,
        checkpoint=checkpoint,
    )
    smaller = _built(model, experiments, settings.assignment, smaller_weights(model, result))
    _check_equal(smaller, model, result, example)
    lines = tuple(
        replace(line, reason=f"left whole: {settings.whole[line.name]}")
        if line.status == PRUNABLE and line.name in settings.whole
        else line
        for line in result.report.lines
    )
    said = (
        f"{written(path)} {experiments.values[path]} -> {value}"
        for path, value in settings.assignment.items()
    )
    note = f"the config says it with {', '.join(said)}"
    # The settings are no allocation of the caller's.
    report = replace(result.report, lines=lines, notes=(note, *result.report.notes), config=asked)
    made: Any = smaller
    return made.to(device_of(model)), result.plan, report


def plain_config(model: nn.Module, asked: PruningConfig) -> tuple[Experiments, Settings, PruningConfig]:
    """The configuration with which a model is pruned to a plain checkpoint.

    Raises:
        ArgumentError: as for :func:`prune_plain`.
    """
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(
            f"a plain checkpoint is made of a transformers model, not of a {type(model).__name__}"
        )
    vain = {
        "include": asked.include,
        "exclude": asked.exclude,
        "budget": asked.budget,
        "granularity": asked.granularity != PruningConfig.granularity,
        "sparsity by pattern": isinstance(asked.sparsity, Mapping),
        "allocation by trial": isinstance(asked.allocator, Search),
    }
    for name in (name for name, given in vain.items() if given):
        raise ArgumentError(
            f"{name}= cannot be had in a plain checkpoint, whose config says one width for many layers; leave"
            " it out, or prune without plain"
        )
    experiments = Experiments(model)
    kind = CostSettings if isinstance(asked.allocator, CostAllocation) else Settings
    settings = kind(experiments, asked.allocator)
    own = replace(
        asked,
        allocation=settings,
        loss="next-token" if asked.loss == "auto" and cast(Any, model).can_generate() else asked.loss,
    )
    return experiments, settings, own


class Settings:
    """An allocation (see :data:`fasp_fx.allocation.Allocation`) that stays within what a config can say.

    Args:
        experiments: builds the model's class.
        allocate: how the channels share what is to go; it sees one group for each field.

    Attributes:
        whole: for each group that no field can shrink alone, why; known once the allocation was made.
        assignment: the values of the config's fields that say what was allocated; likewise.
    """

    def __init__(self, experiments: Experiments, allocate: Allocation) -> None:
        self.experiments, self.allocate = experiments, allocate
        self.whole: dict[str, str] = {}
        self.assignment: dict[Path, Any] = {}

    def __call__(self, budget: Budget, round_to: int, costs: Costs | None = None) -> list[int]:
        """Channel sets lost per block of each group.

        Raises:
            NothingPrunableError: the config can say nothing.
            SparsityError: it cannot say enough, or its smallest step is too large.
        """
        knobs, places = self._knobs(budget)
        narrowed, given = budget.narrowed(places), []
        if costs is not None:
            shrunk = [group for group, place in zip(budget.groups, places, strict=True) if place is not None]
            numbers = [place for place in places if place is not None]
            given.append(joined(costs, shrunk, numbers))
        allocate: Any = self.allocate
        lost = validate(allocate(narrowed, round_to, *given), narrowed)
        self.assignment = {
            knob.path: knob.lowered(steps) for knob, steps in zip(knobs, lost, strict=True) if steps
        }
        if not self.assignment:
            raise SparsityError(
                f"the sparsity is less than half a step of what {self.experiments.name} can say; ask for more"
            )
        return narrowed.spread(lost, budget)

    def _knobs(self, budget: Budget) -> tuple[list[Knob], list[int | None]]:
        """What can be turned, and which of it shrinks each group of the budget; errors as for a call."""
        knobs, self.whole = find_knobs(self.experiments, budget.groups)
        if not knobs:
            raise NothingPrunableError("; ".join(dict.fromkeys(self.whole.values())))
        number = {name: place for place, knob in enumerate(knobs) for name in knob.groups}
        return knobs, [number.get(group.name) for group in budget.groups]


class CostSettings(Settings, CostAllocation):
    """Settings whose channels are shared out by what they cost."""

    def check(self, budget: Budget, round_to: int) -> None:
        """Refuse what the config cannot say; errors as for a call."""
        cast(CostAllocation, self.allocate).check(budget.narrowed(self._knobs(budget)[1]), round_to)


def _batches(
    model: PreTrainedModel, calibration: Iterable[Any] | None
) -> tuple[Iterable[Any] | None, dict[str, Any]]:
    """The calibration data, and keyword arguments like its first batch to capture with, without a cache."""
    if calibration is None:
        tokens = torch.zeros(_EXAMPLE, dtype=torch.long, device=device_of(model))
        decoded = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        return None, {"input_ids": tokens, **decoded, "use_cache": False}
    batches = iter(calibration)
    first = list(itertools.islice(batches, 1))
    args, kwargs = next(as_calls(first))
    named = {"input_ids": args[0]} if args else kwargs
    return itertools.chain(first, batches), {**named, "use_cache": False}


def _built(
    model: PreTrainedModel, experiments: Experiments, assignment: Assignment, weights: dict[str, Tensor]
) -> PreTrainedModel:
    """A model of the caller's class with a smaller config and the smaller weights.

    Raises:
        VerificationError: the class does not take them.
    """
    config = experiments.config(assignment)
    config._name_or_path = ""
    if hasattr(config, "quantization_config"):
        # Of the file that the model came from: what is pruned are the weights it was expanded to.
        del config.quantization_config
    attention = getattr(model.config, "_attn_implementation", None)
    options = {} if attention is None else {"attn_implementation": attention}
    options |= {"config": config, "state_dict": dict(weights), "dtype": model.dtype}
    kind: Any = type(model)
    try:
        with quiet():
            made, info = kind.from_pretrained(None, output_loading_info=True, **options)
    except tolerable(Exception) as error:
        raise _other(kind, f"its weights cannot be loaded: {first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise _other(kind, f"{problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[0]}")
    for name, parameter in model.named_parameters():
        made.get_parameter(name).requires_grad_(parameter.requires_grad)
    made.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return made.eval().to(next(iter(weights.values())).device)


def _other(kind: type, fault: str) -> VerificationError:
    return VerificationError(
        f"{kind.__name__} built from the smaller config is not the pruned program: {fault}; nothing is"
        " returned; prune it without plain"
    )


def _check_equal(
    smaller: PreTrainedModel, model: PreTrainedModel, result: Result, example: Mapping[str, Any]
) -> None:
    """Hold a model that was built from a config against the program that it ought to compute, on random
    tokens: zeros, say, would look alike wherever they stand.

    Raises:
        VerificationError: they differ, or it does not run.
    """
    device, table = device_of(result.module), model.get_input_embeddings()
    given = {name: own.to(device) if isinstance(own, Tensor) else own for name, own in example.items()}
    if isinstance(given.get("input_ids"), Tensor) and isinstance(table, nn.Embedding):
        shape = tuple(given["input_ids"].shape)
        generator = generator_of("plain")
        drawn = torch.randint(0, table.num_embeddings, shape, generator=generator, device="cpu")
        given["input_ids"] = drawn.to(given["input_ids"])
    expected = _outputs(result.module, given)
    try:
        found = _outputs(smaller, given)
    except tolerable(Exception) as error:  # some kernels take widths of whole 16 bytes alone
        raise _other(
            type(model),
            f"it does not run: {first_line(error)}; widths that are multiples of 8 or 16 (round_to=) may be"
            " served",
        ) from error
    if not expected or [output.shape for output in found] != [output.shape for output in expected]:
        raise _other(type(model), "its outputs are others")
    deviation = max(distance(own, other) for own, other in zip(found, expected, strict=True))
    if not deviation <= max(tolerance("checkpoint", output.dtype) for output in expected):
        raise _other(type(model), f"its outputs differ by {deviation:.1e}")


def _outputs(module: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The floating-point outputs of a call."""
    with torch.no_grad():
        return [leaf for leaf in output_tensors(module(**inputs)) if leaf.is_floating_point()]


def smaller_weights(model: nn.Module, result: Result) -> dict[str, Tensor]:
    """The smaller parameters of ``model`` and its persistent buffers, under all their names; none shares
    storage with ``model``.

    A fused weight that the program holds in parts is put together again. A parameter that the program does
    not use is as it was.
    """
    pruned = dict(result.module.named_parameters(remove_duplicate=False))
    made = pruned | fused_weights(result.plan, pruned)
    return {
        name: made[name].detach() if name in made else tensor.detach().clone()
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


# --- Which fields of a config shrink which groups, found by building the model's class at other sizes.


#: where a value stands in a config: keys of nested configs, positions of lists
Path = tuple[str | int, ...]
#: values to put in places of a config
Assignment = Mapping[Path, Any]
Shapes = dict[str, tuple[int, ...]]
#: by how much dimensions of parameters and buffers shrink
Losses = dict[tuple[str, int], int]


def written(path: Path) -> str:
    """A place as text: ``text_config.intermediate_size[3]``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


class Experiments:
    """Builds a model's class from changed configs on the meta device and compares shapes.

    Buffers count: half as many heads and heads of half the size have the same weights, but not the same table
    of positions. Every config goes through its own text form on the way, as it will when it is loaded from a
    file.

    Args:
        model: the model, of the shapes that its config says.

    Attributes:
        base: the config as a dictionary.
        values: what stands at each place of it.
        shapes: of the parameters and buffers that the class makes of the config, under all their names.

    Raises:
        ArgumentError: the class cannot be built from the config.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        self._class: Any = type(model)
        self._config: PreTrainedConfig = config
        self.base: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        self.values = dict(_leaves(self.base))
        self._found: dict[str, Shapes | str] = {}
        found = self.build({})
        if isinstance(found, str):
            raise ArgumentError(
                f"{self._class.__name__} cannot be built from its own config: {found}; a plain checkpoint"
                " needs that"
            )
        self.shapes = found

    @property
    def name(self) -> str:
        """The name of the config's class."""
        return type(self._config).__name__

    def config(self, values: Assignment) -> PreTrainedConfig:
        """The config with other values in some places, as it will come back from a file."""
        made = copy.deepcopy(self.base)
        for path, value in values.items():
            held: Any = made
            for step in path[:-1]:
                held = held[step]
            held[path[-1]] = value
        first = type(self._config).from_dict(made)
        return type(self._config).from_dict(json.loads(first.to_json_string()))

    def build(self, assignment: Assignment) -> Shapes | str:
        """The shapes that the class gives its parameters and buffers, or why it cannot be built."""
        key = repr(sorted(assignment.items(), key=repr))
        if key not in self._found:
            with quiet(), torch.random.fork_rng(devices=[]):
                try:
                    config = self.config(assignment)
                    with torch.device("meta"):
                        made = self._class(config)
                    named = (
                        made.named_parameters(remove_duplicate=False),
                        made.named_buffers(remove_duplicate=False),
                    )
                    self._found[key] = {name: tuple(own.shape) for part in named for name, own in part}
                except tolerable(Exception) as error:  # a class raises what it likes about sizes
                    self._found[key] = first_line(error)
        return self._found[key]

    def losses(self, assignment: Assignment) -> Losses | None:
        """By how much each dimension of each parameter and buffer shrinks, where it does; ``None`` where
        that cannot be said.
        """
        found = self.build(assignment)
        if isinstance(found, str) or found.keys() != self.shapes.keys():
            return None
        pairs = {name: (shape, found[name]) for name, shape in self.shapes.items()}
        if any(len(old) != len(new) for old, new in pairs.values()):
            return None
        return {
            (name, dim): was - now
            for name, (old, new) in pairs.items()
            for dim, (was, now) in enumerate(zip(old, new, strict=True))
            if was != now
        }


@dataclass(frozen=True)
class Knob:
    """A field that, when it is lowered, shrinks some groups alike and nothing else.

    Attributes:
        path: where it stands.
        value: what it says of the dense model, a multiple of ``width``.
        width: channel sets per block of each of the groups.
        groups: the names of what it shrinks.
    """

    path: Path
    value: int
    width: int
    groups: frozenset[str] = frozenset()

    def lowered(self, steps: int) -> int:
        """What it says when each block has lost so many channel sets."""
        return self.value * (self.width - steps) // self.width


def find_knobs(experiments: Experiments, groups: Sequence[Group]) -> tuple[list[Knob], dict[str, str]]:
    """What the fields of a config shrink.

    Args:
        groups: the groups that may be pruned; their members are named as in ``experiments.shapes``.

    Returns:
        Knobs, no group in two of them; and for each group that none shrinks, why.
    """
    # By how much each dimension of each member shrinks for each set that every block of a group loses.
    units = {
        group.name: {
            (member.name, member.dim): len(member.indices) // (group.width * member.blocks)
            for member in (*group.producers, *group.consumers)
        }
        for group in groups
    }
    knobs: list[Knob] = []
    whole: dict[str, str] = {}
    for group in groups:
        if any(group.name in knob.groups for knob in knobs):
            continue
        found = (_turned(experiments, units, knob) for knob in _candidates(experiments, group))
        knob = next((knob for knob in found if group.name in knob.groups), None)
        if knob is None:
            whole[group.name] = f"no field of {experiments.name} shrinks it and nothing else"
        else:
            knobs.append(knob)
    return knobs, whole


def _candidates(experiments: Experiments, group: Group) -> Iterator[Knob]:
    """Fields that may shrink a group: numbers that are multiples of its width, and fields that are not set,
    which then stand for it.
    """
    for path, value in experiments.values.items():
        if type(value) is int and value > 0 and value % group.width == 0:
            yield Knob(path, value, group.width)
    for path, value in experiments.values.items():
        if value is None:
            yield Knob(path, group.width, group.width)


def _turned(experiments: Experiments, units: Mapping[str, Losses], knob: Knob) -> Knob:
    """A field with the groups that it shrinks alike at every step that can be built; with none if it shrinks
    anything else.
    """
    shrunk: set[frozenset[str]] = set()
    for steps in (knob.width // 2, 1):
        lost = experiments.losses({knob.path: knob.lowered(steps)})
        if lost is not None:
            names = frozenset(
                name
                for name, own in units.items()
                if all(lost.get(place) == unit * steps for place, unit in own.items())
            )
            if lost != {place: unit * steps for name in names for place, unit in units[name].items()}:
                return knob
            shrunk.add(names)
    return replace(knob, groups=shrunk.pop()) if len(shrunk) == 1 else knob


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))
    else:
        yield path, value
