"""Every model of the corpus in every way: what may go of it, what it computes without that, at other sizes,
and of tensors that lie otherwise; saved and loaded, by its plan alone, as the caller's own class, and
compiled.

The oracle is the dense model in which what goes is zero (tests/oracle.py). What else is expected of a model
stands in ``golden/corpus``, a line each.
"""

from __future__ import annotations

import copy
import os
import re
import zlib
from collections.abc import Callable
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import Call, Entry
from oracle import zeroed
from patched import DAY, PROFILE
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = [
    pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore::fasp_fx.CaptureWarning"),
]

FILES = ("movements", "layers", "blocks", "attention", "indices", "oddities", "forking", "language")
TABLE: dict[str, Entry] = {
    f"{file}/{name}": entry
    for file in FILES
    for name, entry in import_module(f"corpus.{file}").ENTRIES.items()
}
GOLDEN = Path(__file__).parent / "golden" / "corpus"
COMPILER = "aot_eager" if PROFILE == "slow" else "eager"
REGENERATE = os.environ.get("FASP_FX_REGENERATE") == "1"
#: of what can be asked for; the most is all but the last channel of each block
SHARES = (0.4, 1.0)
#: what takes longest: outside of the slow profile each model has its turn with one of them, another each day
DEAR = ("saved", "replayed", "eager", "compiled", "most")
#: what a model may raise where it does not take a call
REFUSALS = (RuntimeError, IndexError, AssertionError, fasp_fx.CallError)


def is_tried(name: str, what: str) -> bool:
    """Whether a model is tried in this way in this profile."""
    return (
        PROFILE == "slow" or what not in DEAR or DEAR[(zlib.crc32(name.encode()) + DAY) % len(DEAR)] == what
    )


class Subject:
    """An entry, and what is made of it: once, for all runs."""

    def __init__(self, name: str) -> None:
        self.name, self.entry = name, TABLE[name]
        self.model, self.calls = self.entry.build(), self.entry.inputs()
        self.before = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        self.attributes = attributes(self.model)
        self.deep = is_tried(name, "most")
        self.tolerance = 1e-9 if self.entry.double else 1e-4

    @cached_property
    def captured(self) -> fasp_fx.Captured:
        args, kwargs = self.calls[0]
        return fasp_fx.capture(self.model, args, kwargs)

    @cached_property
    def analysis(self) -> fasp_fx.Analysis:
        return fasp_fx.analyze(self.captured, **self.entry.options)

    def applied(self, plan: fasp_fx.PruningPlan) -> fasp_fx.Result:
        return fasp_fx.apply(self.captured, plan)

    @cached_property
    def untouched(self) -> fasp_fx.Result:
        return self.applied(fasp_fx.plan_from_sets(self.captured, {}, **self.entry.options))

    @cached_property
    def results(self) -> list[fasp_fx.Result]:
        """Pruned by a few channels and, where it is tried or few are none, by nearly all (by whole blocks,
        where these can go); by none, where none can.
        """
        asked: dict[str, Any] = {"score": "random", "restore": None, "round_to": 1, **self.entry.options}
        most = self.analysis.max_sparsity
        shares, results = [share * most for share in SHARES if 0 < share * most < 1], []
        for share in shares:
            results.append(fasp_fx.prune(self.captured, sparsity=share, **asked))
            if results[-1].plan.groups and not self.deep:
                break
        if most == 1:
            whole = {group.name: range(group.size) for group in self.analysis.chosen}
            results.append(self.applied(fasp_fx.plan_from_sets(self.captured, whole, **self.entry.options)))
        return results or [self.untouched]

    def reference(self, plan: fasp_fx.PruningPlan) -> nn.Module:
        """The dense model without what a plan takes; with its weights as they were folded."""
        names = {part.name for group in plan.groups for part in (*group.producers, *group.consumers)}
        tensors = (self.model.named_parameters, self.model.named_buffers)
        own = {name for named in tensors for name, _ in named(remove_duplicate=False)}
        model = self.model if names <= own and not plan.folds else self.untouched.module
        return (self.entry.reference or zeroed)(model, plan, **self.entry.masking)

    def run(self, module: Any, calls: list[Call], stance: str = "force_eager") -> list[Any]:
        """What calls in a row return, with what they leave of their arguments, or why one is refused.

        Args:
            stance: of the compiler: flexible attention compiles itself wherever it may.
        """
        outcomes: list[Any] = []
        for args, kwargs in (copy.deepcopy(call) for call in calls for _ in range(self.entry.times)):
            torch.manual_seed(1)
            try:
                with torch.no_grad(), torch.compiler.set_stance(stance):
                    output = module(*args, **kwargs)
                outcomes.append((output, args, kwargs))
            except REFUSALS as refusal:
                outcomes.append(refusal)
        return outcomes

    @cached_property
    def dense(self) -> list[Any]:
        return self.run(self.entry.build(), self.calls)

    @cached_property
    def pruned(self) -> list[list[Any]]:
        """What each result computes."""
        return [self.run(copy.deepcopy(result.module), self.calls) for result in self.results]

    @cached_property
    def masked(self) -> list[list[Any]]:
        """What each should compute."""
        return [self.run(self.reference(result.plan), self.calls) for result in self.results]

    def allowed(self, kind: str, call: Callable[[], Any]) -> Any:
        """What a call returns; ``None`` where it is refused, which is expected then."""
        try:
            made = call()
        except (fasp_fx.StoreError, fasp_fx.EagerError, fasp_fx.ArgumentError) as refusal:
            self.expect(kind, [f"{kind}: {type(refusal).__name__}"])
            return None
        self.expect(kind, [])
        return made

    def expect(self, kind: str, lines: list[str]) -> None:
        """Hold what was found against the lines of this kind in the golden file."""
        file, _, name = self.name.partition("/")
        path, title = GOLDEN / f"{file}.txt", f"# {name}"
        text = path.read_text() if path.exists() else ""
        sections = {part.partition("\n")[0]: part.splitlines()[1:] for part in text.split("\n\n") if part}
        expected = [line for line in sections.get(title, []) if _kind(line) == kind]
        if REGENERATE and lines != expected:
            others = [line for line in sections.get(title, []) if _kind(line) != kind]
            sections[title] = sorted([*others, *lines], key=lambda line: KINDS.index(_kind(line)))
            path.write_text("\n".join("\n".join([head, *body, ""]) for head, body in sections.items()))
            return
        assert lines == expected, (
            "it is not as expected; if that is meant, FASP_FX_REGENERATE=1 writes it anew"
        )


KINDS = ("group", "note", "refuses", "eager", "saved")


def _kind(line: str) -> str:
    word = line.partition(" ")[0].rstrip(":")
    return word if word in KINDS else "group"


@lru_cache(maxsize=1)
def subject(name: str) -> Subject:
    return Subject(name)


def attributes(model: nn.Module) -> list[Any]:
    """What modules hold, and whether they train."""
    return [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]


def storages(model: nn.Module) -> set[int]:
    tensors = (*model.parameters(), *model.buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def difference(outcomes: list[Any], expected: list[Any]) -> float:
    """The largest relative error; calls that one of them refuses say nothing."""
    worst = 0.0
    for found, wanted in zip(outcomes, expected, strict=True):
        if isinstance(found, fasp_fx.CallError) or isinstance(wanted, Exception):
            continue
        assert not isinstance(found, Exception), found
        leaves, others = map(pytree.tree_leaves, (found, wanted))
        for a, b in zip(leaves, others, strict=True):
            if not isinstance(b, Tensor):
                assert a == b or type(a).__eq__ is object.__eq__
            elif b.numel():
                a, b = a.detach(), b.detach()
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                a, b = (x if x.is_floating_point() or x.is_complex() else x.double() for x in (a, b))
                assert bool(torch.isfinite(b).all()), "the dense model's own output is not finite"
                worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


def equal(outcomes: list[Any], expected: list[Any]) -> None:
    assert (difference(outcomes, expected), list(map(type, outcomes))) == (0.0, list(map(type, expected)))


# --- the runs


def groups(own: Subject) -> None:
    """Groups are sound in themselves, and those that are expected; nothing goes of what has none."""
    for group in own.analysis.groups:
        assert bool(group.reason) == (group.status != "prunable"), group
        assert (len(np.unique(group.sets)), group.size % group.blocks) == (group.size, 0)
    most = own.analysis.max_sparsity
    own.expect("group", [" ".join(str(group).split()) for group in own.analysis.groups])
    # Which line of a file asks for a number, its next change would change.
    notes = [re.sub(r"(\.py), line \d+", r"\1", note) for note in own.results[0].report.notes]
    own.expect("note", [f"note: {note}" for note in notes])
    if not most:
        with pytest.raises(fasp_fx.NothingPrunableError):
            fasp_fx.prune(own.captured, score="random", restore=None, **own.entry.options)


def mask_exact(own: Subject) -> None:
    """On the example; and what goes shows, or nothing was tested. The caller's model stays as it was."""
    for outcomes, expected in zip(own.pruned, own.masked, strict=True):
        assert not isinstance(outcomes[0], Exception), outcomes[0]
        assert not isinstance(expected[0], Exception), expected[0]
        assert difference(outcomes[: own.entry.times], expected[: own.entry.times]) <= own.tolerance
    if own.analysis.max_sparsity:
        assert any(result.plan.groups for result in own.results)
        assert max(difference(expected, own.dense) for expected in own.masked) > 100 * own.tolerance
    assert all(torch.equal(tensor, own.before[name]) for name, tensor in own.model.state_dict().items())
    assert attributes(own.model) == own.attributes
    for result in own.results:
        assert storages(result.module).isdisjoint(storages(own.model))


def other_sizes(own: Subject) -> None:
    """Exact on every other call, or refused as expected."""
    for outcomes, expected in zip(own.pruned, own.masked, strict=True):
        assert difference(outcomes, expected) <= own.tolerance
    refused = [index for index, outcome in enumerate(own.pruned[0]) if isinstance(outcome, Exception)]
    shapes = [
        [" x ".join(map(str, leaf.shape)) for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
        for call in own.calls
        for _ in range(own.entry.times)
    ]
    own.expect("refuses", [f"refuses {', '.join(shapes[index])}" for index in refused])


def _reversed(leaf: Tensor) -> Tensor:
    dims = range(leaf.dim())[::-1]
    return leaf.permute([*dims]).contiguous().permute([*dims])


def _sliced(leaf: Tensor) -> Tensor:
    """Every second position of something larger."""
    return leaf.repeat_interleave(2, -1)[..., ::2] if leaf.dim() else leaf


def other_layouts(own: Subject) -> None:
    """Exact where tensors lie otherwise in memory, if the model takes them so."""
    for call in [pytree.tree_map_only(Tensor, lay, own.calls[0]) for lay in (_reversed, _sliced)]:
        for result in own.results[-1:]:
            expected = own.run(own.reference(result.plan), [call])
            outcomes = own.run(copy.deepcopy(result.module), [call])
            assert isinstance(expected[0], Exception) or not isinstance(outcomes[0], Exception), outcomes[0]
            assert difference(outcomes, expected) <= own.tolerance


def saved(own: Subject, folder: Path) -> None:
    """To the bit what it was, or refused as expected."""
    result, model = own.results[0], own.model if own.captured.programs.keys() != {""} else None
    path = own.allowed("saved", lambda: result.save(folder / "out"))
    if path is not None:
        loaded = fasp_fx.load(path, model=model)
        assert loaded.plan == result.plan
        equal(own.run(loaded.module, own.calls), own.pruned[0])


def replayed(own: Subject) -> None:
    """By its plan, written and read."""
    plan = fasp_fx.PruningPlan.from_json(own.results[0].plan.to_json())
    assert plan == own.results[0].plan
    args, kwargs = own.calls[0]
    again = fasp_fx.apply(own.entry.build(), plan, args, kwargs) if PROFILE == "slow" else own.applied(plan)
    equal(own.run(again.module, own.calls), own.pruned[0])


def eager(own: Subject) -> None:
    """In the caller's own class, where its code can be kept."""
    module = own.allowed("eager", lambda: own.results[0].eager(own.model))
    if module is not None:
        outcomes, count = own.run(module, own.calls[:1]), own.entry.times
        assert difference(outcomes, own.masked[0][:count]) <= own.tolerance


def compiled(own: Subject) -> None:
    torch.compiler.reset()
    module = torch.compile(copy.deepcopy(own.results[0].module), backend=COMPILER)
    expected = own.pruned[0][: own.entry.times]
    assert difference(own.run(module, own.calls[:1], "default"), expected) <= own.tolerance


def promised(own: Subject) -> None:
    """The invariants of :mod:`fasp_fx.testing`, which draws itself what goes, by an oracle of its own."""
    args, kwargs = own.calls[0]
    check_program(own.entry.build(), args, kwargs, invariants=own.entry.invariants, **own.entry.options)


RUNS: tuple[Callable[..., None], ...] = (
    groups,
    mask_exact,
    other_sizes,
    other_layouts,
    saved,
    replayed,
    eager,
    compiled,
    promised,
)


def is_slow(name: str, run: Callable[..., None]) -> bool:
    """What runs in the slow profile only: outside of it one model in five has its turn, another each day,
    but for those that invariants were named of.
    """
    entry = TABLE[name]
    if run is promised:
        return False
    return entry.slow or (zlib.crc32(name.encode()) + DAY) % 5 > 0 or not is_tried(name, run.__name__)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        pytest.param(
            name, run, marks=[pytest.mark.slow] if is_slow(name, run) else [], id=f"{name}-{run.__name__}"
        )
        for name, entry in TABLE.items()
        if torch.__version__ >= entry.since
        for run in RUNS
        if entry.invariants or run is not promised
    ],
)
def test_model(name: str, run: Callable[..., None], tmp_path: Path) -> None:
    run(subject(name), *([tmp_path] if run is saved else []))
