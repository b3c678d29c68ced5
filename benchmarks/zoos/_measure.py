"""Everything that is measured of one model of a zoo: a record that goes into the table."""

from __future__ import annotations

import math
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from x.benchmarks.zoos import Entry
from x.benchmarks.zoos._table import STATUSES, Record
from x.benchmarks.zoos._weights import centring, randomise

import fasp_fx
from fasp_fx.capturing import Captured, capture_whole
from fasp_fx.errors import CaptureError, EagerError, NothingPrunableError, SparsityError
from fasp_fx.testing.oracle import Masked, error, floats

SPARSITY = 0.30
#: tried in turn on models pruned in parts, which do not say beforehand how much they allow
LESS = (0.2, 0.1, 0.05, 0.02)
#: how all are pruned
DRAWN = fasp_fx.PruningConfig(sparsity=SPARSITY, score="random", restore=None)
TOLERANCE, TOLERANCE_DOUBLE = 1e-3, 1e-6


def measure(entry: Entry) -> Record:
    """Build, run, capture, analyse, prune and compare; what fails is recorded with its stage and
    its message.
    """
    record: Record = {"name": entry.name, "kind": entry.kind, "captured": False, "ok": None, "seconds": {}}
    record["tolerance"] = TOLERANCE_DOUBLE if entry.double else TOLERANCE
    try:
        _measure(entry, record)
    except Exception as failure:
        record |= {"ok": False, "error": f"{type(failure).__name__}: {failure}"[:2000]}
        record["where"] = [
            f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"
            for frame in traceback.extract_tb(failure.__traceback__)[-4:]
        ]
    return record


def _measure(entry: Entry, record: Record) -> None:
    with _stage(record, "build"):
        model = randomise(entry.make())
        record["layers"] = sum(any(True for _ in m.parameters(recurse=False)) for m in model.modules())
        record["parameters"] = record["parameters_before"] = _parameters(model)
    with _stage(record, "warm up"), centring(model):
        _call(model, entry, entry.batches[0])
    captured = _analyse(model, entry, record)
    program = None if captured is None else captured.program
    with _stage(record, "prune"):
        if captured is None:
            result = _prune_in_parts(model, entry, record)
        elif most := record["requested"]:
            result = fasp_fx.prune(captured, config=replace(DRAWN, sparsity=most))
        else:
            result = None
    if result is None:
        record |= {"error": "nothing to prune", "stage": None}
        return
    record |= {"sparsity": result.plan.sparsity, "parameters_after": _parameters(result.module)}
    unseen = program is not None and _batch_is_dynamic(program) and entry.batches[1] != entry.batches[0]
    with _stage(record, "compare"):
        reference = (
            model  # weights that are folded at capture, only what removes nothing holds under their names
        )
        if program is not None and program.folds:
            args, kwargs = entry.inputs(entry.batches[0])
            nothing = replace(result.plan, groups=(), folds=(), splits=())
            reference = fasp_fx.apply(model, nothing, args, kwargs).module
        masked, worst = Masked(reference, result.plan), 0.0
        for batch in entry.batches[: 1 + unseen]:
            expected, dense = _call(masked, entry, batch), _call(model, entry, batch)
            worst = max(worst, error(_call(result.module, entry, batch), expected))
        shapes, before = ([leaf.shape for leaf in floats(output)] for output in (expected, dense))
        # how much a model finds (keypoints, say) can itself depend on what is masked
        difference = error(expected, dense) if shapes == before else math.inf
    record |= {"mask_error": worst, "difference": difference, "copy": "", "copy_error": 0.0}
    with _stage(record, "copy"):
        try:
            record["copy_error"] = error(_call(result.eager(model), entry, batch), expected)
        except EagerError as refusal:
            record["copy"] = str(refusal)[:1000]
    record |= {
        "ok": max(worst, record["copy_error"]) <= record["tolerance"],
        "visible": difference > 100 * record["tolerance"],
        "stage": None,
    }


def _analyse(model: nn.Module, entry: Entry, record: Record) -> Captured | None:
    """Capture and analysis, timed; ``None`` if the model cannot be captured as a whole."""
    args, kwargs = entry.inputs(entry.batches[0])
    try:
        with _stage(record, "capture"):
            captured = capture_whole(model, args, kwargs)
    except CaptureError as refusal:
        record["not_captured"] = str(refusal)[:1000]
        return None
    program = captured.program
    record["captured"], record["notes"] = True, list(program.notes)
    with _stage(record, "analysis"):
        analysis = fasp_fx.analyze(captured)
    record |= shares(program, analysis)
    record |= {
        "without_rule": analysis.without_rule,
        "max_sparsity": analysis.max_sparsity,
        "requested": min(SPARSITY, analysis.max_sparsity),
        "parameters_before": _parameters(program.module),
        "stage": None,
    }
    return captured


def _prune_in_parts(model: nn.Module, entry: Entry, record: Record) -> Any:
    """The model pruned by its submodules, by less if they cannot lose as much; ``None`` if nothing of them
    can be pruned.
    """
    args, kwargs = entry.inputs(entry.batches[0])
    for sparsity in (SPARSITY, *LESS):
        try:
            result = fasp_fx.prune(model, args, kwargs, config=replace(DRAWN, sparsity=sparsity))
        except NothingPrunableError:
            record["max_sparsity"] = 0.0
            return None
        except SparsityError:
            if sparsity == LESS[-1]:
                raise
            continue
        parts = {path: part.plan.sparsity for path, part in result.parts.items()}
        record |= {"requested": sparsity, "parts": parts, "left": dict(result.left)}
        return result
    return None


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


def _call(model: Any, entry: Entry, batch: int) -> Any:
    args, kwargs = entry.inputs(batch)
    torch.manual_seed(0)
    # what a model compiles for itself (flex attention, say) runs uncompiled: the kernels made for some
    # processors are wrong
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(*args, **kwargs)


def _batch_is_dynamic(program: Any) -> bool:
    """Whether the capture leaves the first dimension of every tensor input free."""
    tensors = [node.meta.get("val") for node in program.placeholders()]
    first = [value.shape[0] for value in tensors if isinstance(value, Tensor) and value.dim()]
    # A symbol that the capture settled is one still.
    return all(isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None for size in first)


# --- what the analysis says of the weights of linear and convolution operators, as shares of their elements.
# Which weights those are is found in the captured graph by the operators' names, whether the library has a
# rule for them or not

#: linear and convolution operators, whose weight is their second argument, and others, where it may be any
_SECOND = {
    *("linear", "conv1d", "conv2d", "conv3d", "convolution", "_convolution"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
_ANY = {
    *("matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "einsum", "bilinear", "_trilinear"),
    *("_grouped_mm", "grouped_mm", "grouped_mm_fallback", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    "deform_conv2d",
}
#: operators that pick from a stacked weight with an index that is computed
_PICKS = ("index", "index_select", "gather")


def operator_weights(program: Any) -> dict[str, int]:
    """Elements of each weight that a linear or convolution operator takes, by canonical name."""
    names, tensors = program.canonical(), program.weights()
    held: dict[fx.Node, frozenset[str]] = {}
    found: dict[str, int] = {}
    for node in program.module.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            weight = isinstance(tensors.get(name), nn.Parameter) and tensors[name].dim() >= 2
            held[node] = frozenset([names[name]]) if weight else frozenset()
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            schema = getattr(node.target, "_schema", None)
            operator = getattr(node.target, "__name__", str(node.target)) if schema is None else schema.name
            operator = operator.split("::")[-1]
            if operator in _SECOND | _ANY:
                for argument in inputs if operator in _ANY else node.args[1:2]:
                    found |= {name: tensors[name].numel() for name in held.get(argument, ())}
            elif inputs and all(source in held for source in inputs):
                held[node] = frozenset().union(*(held[source] for source in inputs))
            elif operator in _PICKS and inputs and held.get(inputs[0]):
                held[node] = frozenset(name for name in held[inputs[0]] if tensors[name].dim() >= 3)
    return found


def shares(program: Any, analysis: Any) -> dict[str, Any]:
    """The number of elements of operator weights, their shares by status, and the reasons that freeze the
    most.
    """
    weights, names = operator_weights(program), program.canonical()
    best: dict[str, int] = dict.fromkeys(weights, len(STATUSES) - 1)
    frozen: Counter[str] = Counter()
    for group in analysis.groups:
        status = STATUSES.index(_status(group.status, group.reason))
        for member in (*group.producers, *group.consumers):
            name = names.get(member.name, member.name)
            if name in best:
                best[name] = min(best[name], status)
                if group.status == "frozen":
                    frozen[group.reason] += round(weights[name] * len(member.indices) / member.size)
    total = sum(weights.values())
    counted: Counter[str] = Counter()
    for name, status in best.items():
        counted[STATUSES[status]] += weights[name]
    return {
        "weights": total,
        "shares": {status: counted[status] / total if total else 0.0 for status in STATUSES},
        "reasons": [[reason, count] for reason, count in frozen.most_common(3)],
    }


def _status(status: str, reason: str) -> str:
    if status != "frozen":
        return status
    return "no rule" if "no rule" in reason else "layout" if reason.startswith("layout") else "other"
