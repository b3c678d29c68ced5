"""Everything that is measured of one model of a zoo: a record that goes into the table."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from _masked import error, find_called, leaves, masked
from torch import Tensor, nn

import fasp_fx
from fasp_fx.capturing import capture
from fasp_fx.capturing._program import Program
from fasp_fx.errors import CaptureError, NothingPrunableError, SparsityError
from fasp_fx.pruning._deciding import decide
from fasp_fx.pruning._rewriting import Timings, analyze_for
from fasp_fx.pruning._subject import Whole

from ._copies import CHANNELS, copies, wrong
from ._entry import Entry
from ._shares import shares
from ._weights import centring, randomise

SPARSITY = 0.30
#: tried in turn on models pruned in parts, which do not say beforehand how much they allow
LESS = (0.2, 0.1, 0.05, 0.02)
#: how all are pruned
DRAWN = fasp_fx.PruningConfig(sparsity=SPARSITY, score="random", restore=None)
TOLERANCE, TOLERANCE_DOUBLE = 1e-3, 1e-6

Record = dict[str, Any]


def measure(entry: Entry, analyze_only: bool = False) -> Record:
    """Build, run, capture, analyse, prune and compare; what fails is recorded with its stage and
    its message.
    """
    record: Record = {
        "name": entry.name,
        "kind": entry.kind,
        "captured": False,
        "ok": None,
        "seconds": {},
        "tolerance": TOLERANCE_DOUBLE if entry.double else TOLERANCE,
        "parts": None,
        "only_analysed": analyze_only,
    }
    try:
        _measure(entry, analyze_only, record)
    except Exception as failure:
        record["ok"] = False
        record["error"] = f"{type(failure).__name__}: {failure}"[:2000]
        record["where"] = [
            f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"
            for frame in traceback.extract_tb(failure.__traceback__)[-4:]
        ]
    return record


def _measure(entry: Entry, analyze_only: bool, record: Record) -> None:
    with _stage(record, "build"):
        model = randomise(entry.make())
        record["layers"] = sum(
            any(True for _ in module.parameters(recurse=False)) for module in model.modules()
        )
        record["parameters"] = record["parameters_before"] = _parameters(model)
    with _stage(record, "warm up"), centring(model):
        _call(model, entry, entry.batches[0])
    with _stage(record, "forward"), find_called(model):
        dense = _call(model, entry, entry.batches[0])
    program = _analyse(model, entry, record)
    if analyze_only:
        if not record["captured"]:
            raise record.pop("refusal")
        return
    record.pop("refusal", None)
    with _stage(record, "prune"):
        result = (
            _prune(program, DRAWN, record["requested"])
            if program is not None
            else _prune_in_parts(model, entry, record)
        )
    if result is None:
        record["error"], record["stage"] = "nothing to prune", None
        return
    record |= {"sparsity": result.plan.sparsity, "parameters_after": _parameters(result.module)}
    unseen = program is not None and _batch_is_dynamic(program) and entry.batches[1] != entry.batches[0]
    with _stage(record, "compare"):
        record["mask_error"], record["difference"] = _compare(
            model, result.module, result.plan, entry, entry.batches[0], dense
        )
        if unseen:
            record["mask_error_unseen"], _ = _compare(
                model, result.module, result.plan, entry, entry.batches[1], None
            )
    with _stage(record, "copy"):
        record["copies"] = copies(
            model,
            lambda way, kept: (
                result
                if way == CHANNELS
                else _prune_by(
                    replace(DRAWN, sparsity=record["requested"], granularity=way, exclude=kept),
                    model,
                    program,
                    entry,
                )
            ),
            lambda copy, plan: max(
                _compare(model, copy, plan, entry, batch, None)[0] for batch in entry.batches[: 1 + unseen]
            ),
        )
    worst = max(record["mask_error"], record.get("mask_error_unseen", 0.0))
    record |= {
        "ok": worst <= record["tolerance"] and not wrong(record),
        "visible": record["difference"] > 100 * record["tolerance"],
        "stage": None,
    }


def _analyse(model: nn.Module, entry: Entry, record: Record) -> Program | None:
    """Capture and analysis, timed; ``None`` if the model cannot be captured as a whole."""
    args, kwargs = entry.inputs(entry.batches[0])
    try:
        with _stage(record, "capture"):
            program = capture(model, args, kwargs)
    except CaptureError as refusal:
        record |= {"refusal": refusal, "not_captured": str(refusal)[:1000]}
        return None
    record["captured"], record["notes"] = True, list(program.notes)
    with _stage(record, "analysis"):
        analysis = analyze_for(program, fasp_fx.PruningConfig())
    record |= shares(program, analysis)
    record |= {
        "without_rule": analysis.without_rule,
        "max_sparsity": analysis.max_sparsity,
        "requested": min(SPARSITY, analysis.max_sparsity),
        "parameters_before": _parameters(program.module),
        "stage": None,
    }
    return program


def _prune(program: Program, config: fasp_fx.PruningConfig, most: float) -> Any:
    """What :func:`fasp_fx.prune` makes of the program, which is captured already, or of as much as it can
    lose; ``None`` if nothing can be pruned.
    """
    if most == 0:
        return None
    config = replace(config, sparsity=min(config.sparsity, most))
    subject, clock = Whole(program), Timings()
    for path, decision in decide(subject, config, None):
        subject.put(path, decision, config, clock)
    return subject.result(config, clock)


def _prune_by(config: fasp_fx.PruningConfig, model: nn.Module, program: Program | None, entry: Entry) -> Any:
    """The model pruned in another way than the one that is measured, by less if that does not allow as much;
    ``None`` if nothing of it can be.
    """
    if program is None:
        return _as_much_as_goes(config, lambda less: _prune_whole_or_in_parts(model, entry, less))
    most = analyze_for(program, config).max_sparsity  # without what is excluded, which shows only later
    return _as_much_as_goes(config, lambda less: _prune(program, less, most))


def _prune_in_parts(model: nn.Module, entry: Entry, record: Record) -> Any:
    """The model pruned by its submodules, by less if they cannot lose as much; ``None`` if nothing of them
    can be pruned.
    """
    try:
        result = _as_much_as_goes(DRAWN, lambda less: _prune_whole_or_in_parts(model, entry, less))
    except NothingPrunableError:
        record["max_sparsity"] = 0.0
        return None
    record |= {
        "requested": result.report.config.sparsity,
        "parts": {path: part.plan.sparsity for path, part in result.parts.items()},
        "left": dict(result.left),
    }
    return result


def _prune_whole_or_in_parts(model: nn.Module, entry: Entry, config: fasp_fx.PruningConfig) -> Any:
    args, kwargs = entry.inputs(entry.batches[0])
    return fasp_fx.prune(model, args, kwargs, config=config)


def _as_much_as_goes(config: fasp_fx.PruningConfig, prune: Callable[[fasp_fx.PruningConfig], Any]) -> Any:
    """What comes of the first sparsity that is in reach: the asked one, or a lesser.

    Raises:
        SparsityError: not even the least is.
    """
    *before, last = config.sparsity, *LESS
    for sparsity in before:
        with suppress(SparsityError):
            return prune(replace(config, sparsity=sparsity))
    return prune(replace(config, sparsity=last))


@contextmanager
def _stage(record: Record, name: str) -> Iterator[None]:
    record["stage"] = name
    start = time.perf_counter()
    try:
        yield
    finally:
        record["seconds"][name] = round(time.perf_counter() - start, 3)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _call(model: nn.Module, entry: Entry, batch: int) -> Any:
    args, kwargs = entry.inputs(batch)
    torch.manual_seed(0)
    # what a model compiles for itself (flex attention, say) runs uncompiled: the kernels made for some
    # processors are wrong
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(*args, **kwargs)


def _compare(
    model: nn.Module, smaller: nn.Module, plan: Any, entry: Entry, batch: int, dense: Any
) -> tuple[float, float]:
    """A smaller module's error against the masked dense model, and how far that is from the dense one."""
    if dense is None:
        dense = _call(model, entry, batch)
    with masked(model, plan):
        expected = _call(model, entry, batch)
    found = _call(smaller, entry, batch)
    shapes, before = ([leaf.shape for leaf, _ in leaves(output)] for output in (expected, dense))
    # how much a model finds (keypoints, say) can itself depend on what is masked
    return error(found, expected), error(expected, dense) if shapes == before else math.inf


def _batch_is_dynamic(program: Any) -> bool:
    """Whether the capture leaves the first dimension of every tensor input free."""
    tensors = [node.meta.get("val") for node in program.placeholders()]
    first = [value.shape[0] for value in tensors if isinstance(value, Tensor) and value.dim()]
    # A symbol that the capture settled is one still.
    return all(isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None for size in first)
