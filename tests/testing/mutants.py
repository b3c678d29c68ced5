"""Seeded faults in rules and passes, each with a model or a rule on which it shows.

A fault is applied by monkeypatching and must be caught by the harness: by
:func:`fasp_fx.testing.check_program` on the net, or by :func:`fasp_fx.testing.check_rule` on the operator.
The nets are healthy without the fault.
"""

import math
import pkgutil
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fasp_fx import patterns
from fasp_fx.analysis.channels import _moves
from fasp_fx.passes import finish, remove
from fasp_fx.passes._remove_channels import _REWRITES
from fasp_fx.patterns._registry import _USER
from fasp_fx.pruning.check import Checked, Checker
from fasp_fx.testing.specs import (
    Across,
    Activation,
    Attention,
    Branches,
    Collapse,
    Conv,
    Foreign,
    Fused,
    Images,
    Linear,
    Move,
    Net,
    Norm,
    Odd,
    Regroup,
    Remember,
    Residual,
    Sequences,
    Sized,
    Split,
    Tied,
)

Patch = Callable[[pytest.MonkeyPatch], None]
ATEN = torch.ops.aten


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: what is wrong.
        patch: puts it into the library.
        net: the model on which it shows, or ``None``.
        invariants: the ones it is held against; ``mask-exact`` where nothing else is said.
        operator: the operator whose rule shows it, where no net does.
        seed: with what the channels to remove are drawn.
    """

    name: str
    patch: Patch
    net: Net | None = None
    invariants: tuple[str, ...] = ("mask-exact",)
    operator: Any = None
    seed: int = 0

    def __str__(self) -> str:
        return self.name


CHAIN = Net((Linear(6), Activation(), Linear(4)))
SQUARE = Net((Linear(4), Activation("tanh"), Linear(4)))
SLICED = Net((Linear(8), Split(((Activation("tanh"),), (Activation("silu"),)), "slice"), Linear(3)))
HEADS = Net((Attention(kv_heads=2, head_dim=4), Linear(2)), (Sequences(4),))
GROUPED = Net((Attention(kv_heads=2, repeat=2, head_dim=4, sharing="interleave"), Linear(2)), (Sequences(4),))
STREAM = Net((Linear(6), Residual((Linear(6), Activation())), Linear(2)))
IMAGES = Net(
    (Conv(4), Norm("batch"), Activation(), Conv(4, groups=2), Collapse("mean"), Linear(2)), (Images(),)
)
JOINED = Net(
    (Linear(3), Branches(((Linear(4), Activation("tanh")), (Linear(4), Activation("silu")))), Linear(2))
)


def not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library return what it makes without running it beside the masked dense program."""

    def run(own: Checker, strict: bool) -> Checked:
        gone, weights = own.decision.gone, own.decision.weights
        return Checked(
            own.decision, finish(remove(own.analysis, gone, weights) if gone.any() else own.program)
        )

    monkeypatch.setattr(Checker, "run", run)


def rule(operator: Any, text: str) -> Patch:
    """Another rule for an operator."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(_USER, operator, patterns.parse(text))

    return patch


def without_clause(operator: Any, keyword: str) -> Patch:
    """The operator's rule without its clauses of one kind."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        found = patterns.lookup(operator)
        assert found is not None
        left = ";".join(part for part in str(found).split(";") if part.split()[0] != keyword)
        monkeypatch.setitem(_USER, operator, patterns.parse(left))

    return patch


def attribute(owner: str, name: str, make: Callable[[Any], Any]) -> Patch:
    """Another function in the place of one, made from it; the owner is a module or a class below fasp_fx."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        held = pkgutil.resolve_name(f"fasp_fx.{owner}")
        monkeypatch.setattr(held, name, make(getattr(held, name)))

    return patch


def _off_by_one(before: Any) -> Any:
    def wrong(self: Any, value: Any, dim: int, position: int) -> int:
        found = before(self, value, dim, position)
        return found + 1 if 0 < position < value.shape[dim] and 0 < found < position else found

    return wrong


def _rolled_rows(replace_weight: Any) -> Any:
    return lambda self, names, value: replace_weight(self, names, value.roll(1, 0))


def _no_bias(replace_weight: Any) -> Any:
    return lambda self, names, value: (
        None if names[0].endswith("bias") else replace_weight(self, names, value)
    )


def _one_name(replace_weight: Any) -> Any:
    return lambda self, names, value: replace_weight(self, names[:1], value)


def _wrong_channels(cut_weights: Any) -> Any:
    def wrong(program: Any, analysis: Any, gone: np.ndarray) -> None:
        shifted = gone.copy()
        for slot in analysis.numbering.slots:
            if slot.dim == 0:
                shifted[slot.base : slot.base + slot.size] = np.roll(
                    gone[slot.base : slot.base + slot.size], 1
                )
        cut_weights(program, analysis, shifted)

    return wrong


def _tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated heads are taken to come in the order a b a b instead of a a b b."""

    def wrong(numbers: torch.Tensor, repeats: int, dim: int, *_: Any) -> torch.Tensor:
        return torch.cat([numbers] * repeats, dim)

    # The capture writes the repetition as an expansion and a view.

    def wrong_view(numbers: torch.Tensor, *size: Any) -> torch.Tensor:
        (shape,) = size
        return (
            numbers.transpose(1, 2).reshape(shape)
            if numbers.dim() == 5 and len(shape) == 4
            else numbers.reshape(shape)
        )

    _run_otherwise(monkeypatch, {ATEN.repeat_interleave.self_int: wrong, ATEN.reshape.default: wrong_view})


def _run_otherwise(monkeypatch: pytest.MonkeyPatch, wrong: dict[Any, Any]) -> None:
    """Let operators move channel numbers by functions of ours."""
    run = _moves._run

    def mutated(operator: Any, numbers: Any, others: dict[str, Any]) -> Any:
        if operator not in wrong:
            return run(operator, numbers, others)
        # A view's sizes go by several names.
        return wrong[operator](numbers, *others.values())

    monkeypatch.setattr("fasp_fx.analysis.channels._moves._run", mutated)


def _reversed_join(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        return torch.cat(list(reversed(tensors)), dim)

    _run_otherwise(monkeypatch, {ATEN.cat.default: wrong})


def _never_couples_sums(couple: Any) -> Any:
    return lambda self, a, b, node: (
        None if node is not None and node.target is ATEN.add.Tensor else couple(self, a, b, node)
    )


def _same_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for keyword in ("shape", "part"):
        monkeypatch.setitem(_REWRITES, keyword, lambda *_: False)


def _one_block(find_blocks: Any) -> Any:
    return lambda *given: (np.zeros_like(find_blocks(*given)[0]), [])


def _transposed(call: Any) -> Any:
    def wrong(program: Any, restored: Any) -> Any:
        turned = {
            name: value.t().contiguous() if value.dim() == 2 and value.shape[0] == value.shape[1] else value
            for name, value in restored.items()
        }
        return call(program, turned)

    return wrong


def _scale_of_next_width(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = types.SimpleNamespace(prod=math.prod, sqrt=lambda width: (width + 1) ** 0.5)
    monkeypatch.setattr("fasp_fx.passes._adjust.math", wrong)


def _shifted(renumber: Any) -> Any:
    def wrong(removed: Any, before: Any) -> tuple[int, ...]:
        gone = list(before)
        found = renumber(removed, gone)
        return tuple(index + 1 for index in found) if gone else found

    return wrong


def _short_plan(planned: Any) -> Any:
    """A plan that forgets the first index of every consumer."""
    from dataclasses import replace

    def wrong(groups: Any, gone: Any, analysis: Any, *rest: Any) -> Any:
        return [
            replace(
                g,
                consumers=tuple(
                    replace(c, removed=c.removed[1:]) if c.block_dim is None else c for c in g.consumers
                ),
            )
            for g in planned(groups, gone, analysis, *rest)
        ]

    return wrong


def _everything_pointwise(lookup: Any) -> Any:
    def wrong(operator: Any) -> Any:
        found = lookup(operator)
        if found is None and "fasp_fx_testing" in str(operator):
            return patterns.parse("x[...] -> [...]")
        return found

    return wrong


MUTANTS: tuple[Mutant, ...] = (
    # rules that claim too much
    Mutant("softmax is pointwise", rule(ATEN.softmax.int, "self[...] -> [...]"), operator=ATEN.softmax.int),
    Mutant(
        "a scan is pointwise", rule(ATEN.cumsum.default, "self[...] -> [...]"), operator=ATEN.cumsum.default
    ),
    Mutant(
        "a product with swapped letters",
        rule(ATEN.mm.default, "self[m k], mat2[n k] -> [m n]"),
        operator=ATEN.mm.default,
    ),
    Mutant(
        "lookups can lose rows",
        rule(ATEN.index_select.default, "move self"),
        operator=ATEN.index_select.default,
    ),
    Mutant(
        "a sum into positions is a lookup",
        rule(ATEN.scatter_add.default, "self[...] -> [...]; window ...; index @dim index"),
        operator=ATEN.scatter_add.default,
    ),
    Mutant(
        "causal attention does not number its queries",
        without_clause(ATEN.scaled_dot_product_attention.default, "freeze"),
        operator=ATEN.scaled_dot_product_attention.default,
    ),
    Mutant(
        "layer norm mixes nothing",
        without_clause(ATEN.layer_norm.default, "mix"),
        Net((Linear(6), Norm(), Linear(2))),
    ),
    Mutant(
        "a flip is pointwise",
        rule(ATEN.flip.default, "self[...] -> [...]"),
        Net((Linear(6), Move("flip"), Linear(2))),
    ),
    Mutant("a slice without its span", rule(ATEN.slice.Tensor, "move self"), SLICED, seed=1),
    Mutant("a view without its size", rule(ATEN.reshape.default, "move self"), HEADS),
    Mutant(
        "batch norm forgets its statistics",
        rule(ATEN.batch_norm.default, "input[n c x*], weight[c], bias[c] -> [n c x*]"),
        IMAGES,
    ),
    Mutant(
        "a convolution forgets its groups",
        without_clause(ATEN.conv1d.default, "factor"),
        operator=ATEN.conv1d.default,
    ),
    # analysis
    Mutant("heads repeated in the wrong order", _tiled, GROUPED, seed=1),
    Mutant("a join in the wrong order", _reversed_join, JOINED),
    Mutant(
        "a sum couples nothing",
        attribute("analysis.channels._facts.Facts", "couple", _never_couples_sums),
        STREAM,
    ),
    Mutant(
        "a missed tie",
        attribute(
            "capturing._program.Program",
            "canonical",
            lambda _: lambda self: {name: name for name in self.weights()},
        ),
        Net((Tied(4, "pair"),), (Sequences(3),)),
        ("ties", "mask-exact"),
    ),
    Mutant(
        "boxes without blocks",
        attribute("analysis._analysis", "find_blocks", _one_block),
        HEADS,
        seed=1,
    ),
    Mutant(
        "an unseen operator is pointwise",
        attribute("analysis.channels._interpreter", "lookup", _everything_pointwise),
        CHAIN,
        ("unseen",),
    ),
    # passes
    Mutant("a slice off by one", attribute("passes._adjust.Kept", "before", _off_by_one), SLICED, seed=1),
    Mutant("sizes that are not updated", _same_sizes, HEADS),
    Mutant(
        "weights cut at the wrong rows",
        attribute("passes._remove_channels", "_cut_weights", _wrong_channels),
        CHAIN,
    ),
    Mutant(
        "rows written in another order",
        attribute("capturing._program.Program", "replace_weight", _rolled_rows),
        CHAIN,
    ),
    Mutant(
        "a forgotten bias",
        attribute("capturing._program.Program", "replace_weight", _no_bias),
        CHAIN,
    ),
    Mutant(
        "one name of a tied weight",
        attribute("capturing._program.Program", "replace_weight", _one_name),
        Net((Tied(4, "pair"),), (Sequences(3),)),
        ("ties", "mask-exact"),
    ),
    Mutant("a scale pinned at the wrong width", _scale_of_next_width, HEADS),
    Mutant(
        "restored weights transposed",
        attribute("passes._run", "restore_weights", _transposed),
        SQUARE,
        ("restored",),
    ),
    # plans and results
    Mutant(
        "plans renumbered off by one",
        attribute("analysis._plan", "_renumber", _shifted),
        Net((Linear(12), Activation(), Linear(2))),
        ("steps",),
        seed=3,
    ),
    Mutant(
        "a plan that says less than was done",
        attribute("pruning._subject", "planned", _short_plan),
        CHAIN,
        ("plan",),
    ),
    Mutant(
        "a plan for every model",
        attribute("analysis._plan", "strange_weight", lambda _: lambda plan, weights: None),
        CHAIN,
        ("plan",),
    ),
    Mutant(
        "storage shared with the caller",
        attribute("passes._pruned_module", "own_storage", lambda _: lambda program: program),
        CHAIN,
        ("alone",),
    ),
)


# --- what the analysis once did not see, put back: faults that show on odd programs alone
# There is at least one for each class of them. To each belong a net on which it shows and the kinds of blocks
# among which drawing has to find another. Weights that are read in two ways, or one by one from a stack, have
# no fault of their own: what makes them right is that a weight has its channels once, whoever reads them ("a
# missed tie").


def _around(block: Odd, width: int = 6, tokens: int = 3) -> Net:
    return Net((Linear(width), Activation("tanh"), block, Linear(3)), (Sequences(4, tokens),))


def _only_what_mixes(_: Any) -> Any:
    return property(lambda self: self.crossing | self.windowed | self.placed)


def _at_this_size(_: Any) -> Any:
    return lambda self, shape: lambda numbers: self._run(numbers.expand(shape))


ACROSS = Mutant(
    "positions that an operator orders need not be the same",
    attribute("patterns._reading.Reading", "crossed", _only_what_mixes),
    _around(Across("roll")),
)
REGROUP = Mutant(
    "a reshape holds at one size",
    attribute("analysis.channels._moves.Move", "_shift", _at_this_size),
    _around(Regroup("turned"), 12, 4),
)
REMEMBER = Mutant(
    "what calls write is constant",
    attribute("analysis.channels._interpreter", "written_names", lambda _: lambda graph: set()),
    _around(Remember("blocks")),
)
FOREIGN = Mutant(
    "what returns no tensor reads none",
    attribute("analysis.channels._interpreter.Interpreter", "_read", lambda _: lambda self, node, walk: None),
    _around(Foreign("number")),
)
SIZED = Mutant(
    "a cut by a size is the same at every size",
    attribute("analysis.channels._moves.Move", "_unsettled", lambda _: lambda *_: {}),
    _around(Sized("pad")),
    seed=1,
)
FUSED = Mutant(
    "tokens of a fused weight stay where they are at every size",
    attribute("passes._split", "_lies_along", lambda _: lambda label, recorded, size: label is not None),
    _around(Fused(2, "cut"), tokens=4),
)
SHIFTED = Mutant(
    "tokens of a fused weight are shifted by the same number at every size",
    attribute("passes._split", "_moves_alike", lambda _: lambda node, rule: True),
    _around(Fused(2, "shifted"), tokens=4),
)

#: each fault with the class of blocks on which it shows and, where it is not all, their kinds
SHOWING_ON: dict[Mutant, tuple[type[Odd], tuple[str, ...]]] = {
    ACROSS: (Across, ()),
    REGROUP: (Regroup, ()),
    REMEMBER: (Remember, ("blocks",)),
    FOREIGN: (Foreign, ("number",)),
    SIZED: (Sized, ()),
    FUSED: (Fused, ("batch", "cut")),  # in others the small sizes of the analysis show it
    SHIFTED: (Fused, ("shifted",)),
}
ODD = tuple(SHOWING_ON)
