"""The verifier catches faulty passes: each test seeds one fault, and the pipeline must refuse the program,
naming the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import Spec, build, tokens
from torch import fx

import fasp_fx
from fasp_fx.analysis import Analysis, analyze_program
from fasp_fx.capturing import Program, attribute, capture, set_weight
from fasp_fx.passes import _run, remove, split_fused, verify

ATEN = torch.ops.aten
Change = Callable[[Program, Analysis, str], None]

FUSED = Spec(
    hidden=8,
    kv_heads=2,
    repeat=2,
    head_dim=6,
    ffn=12,
    bias=True,
    gated=True,
    fused_gate=True,
    projection="fused",
    positions="rope",
)
SEPARATE = Spec(
    hidden=8,
    kv_heads=2,
    repeat=2,
    head_dim=6,
    ffn=12,
    bias=True,
    gated=True,
    positions="rope",
    attention="eager",
)
SPECS = {"fused": FUSED, "separate": SEPARATE}
VALUE_ROWS = {"fused": ("blocks.0.attention.qkv", 36), "separate": ("blocks.0.attention.v", 0)}


@pytest.fixture(scope="module", params=SPECS)
def analysed(request: pytest.FixtureRequest) -> tuple[str, Analysis]:
    program = capture(build(SPECS[request.param]), (tokens(2, 4),))
    return request.param, analyze_program(program, split_fused)


def gone_of(analysis: Analysis, lost: int = 2) -> np.ndarray:
    """Remove the first ``lost`` channel sets of each block of every prunable group."""
    chosen = [
        group.sets[group.block_of == block][:lost]
        for group in analysis.select("prunable")
        for block in np.unique(group.block_of)
    ]
    return np.isin(analysis.labels, np.concatenate(chosen))


def removed(analysis: Analysis) -> Program:
    return remove(analysis, gone_of(analysis))


def changed(program: Program, analysis: Analysis, change: Callable[[Program], None]) -> None:
    """Change a copy of a program, and hold it against the analysis of its origin."""
    with _run._named("faulty_pass"):
        program = program.copy()
        change(program)
        _run._verified(program, analysis)


def must_be_refused(program: Program, analysis: Analysis, change: Callable[[Program], None]) -> str:
    with pytest.raises(fasp_fx.VerificationError, match="faulty_pass") as caught:
        changed(program, analysis, change)
    return str(caught.value)


def take(program: Program, analysis: Analysis, name: str, dim: int, rows: list[int]) -> None:
    """Give a weight these rows of the original one, and say so."""
    original = attribute(analysis.program.module, name)
    numbers = program.numbers.get(name) or [
        analysis.numbering.numbers(name, d) for d in range(original.dim())
    ]
    whole = analysis.numbering.numbers(name, dim)
    index = torch.tensor(rows)
    current = attribute(program.module, name)
    weight = original.detach()
    for other in range(original.dim()):
        if other != dim and current.shape[other] != original.shape[other]:
            weight = weight.index_select(other, numbers[other] - analysis.numbering.get(name, other).base)
    set_weight(program.module, name, weight.index_select(dim, index))
    program.numbers[name] = [whole[index] if d == dim else numbers[d] for d in range(original.dim())]


def kept_rows(program: Program, analysis: Analysis, name: str, dim: int) -> list[int]:
    return (program.numbers[name][dim] - analysis.numbering.get(name, dim).base).tolist()


def nodes(program: Program, operator: str) -> list[fx.Node]:
    return [
        node
        for node in program.module.graph.nodes
        if node.op == "call_function" and operator in str(node.target)
    ]


def test_correct_passes_are_accepted_and_mark_what_they_write(analysed: tuple[str, Analysis]) -> None:
    _, analysis = analysed
    verify(analysis.program, analysis)
    before = str(analysis.program.module.graph)
    program = removed(analysis)
    assert str(analysis.program.module.graph) == before
    changed(program, analysis, lambda program: None)
    marks = {node.meta.get(fasp_fx.capturing.WRITTEN_BY) for node in program.module.graph.nodes}
    assert "remove_channels" in marks
    assert {"pin_attention_scale", "pad_value_heads"} <= marks or not nodes(
        program, "scaled_dot_product_attention"
    )


def put_between(operator: Any, *given: Any) -> Change:
    """Let an operator change what the last layer of a feed-forward block reads."""

    def change(program: Program, analysis: Analysis, kind: str) -> None:
        product = next(
            node
            for node in nodes(program, "aten.mul.Tensor")
            if any("silu" in str(n.target) for n in node.all_input_nodes)
        )
        (user,) = product.users
        with program.module.graph.inserting_before(user):
            user.replace_input_with(product, program.module.graph.call_function(operator, (product, *given)))

    return change


def reordered(name: str | None, dim: int, order: Callable[[list[int]], list[int]]) -> Change:
    """Take other rows or columns of a weight than are left; ``None``: of the values of an attention, with
    their bias.
    """

    def change(program: Program, analysis: Analysis, kind: str) -> None:
        module, first = VALUE_ROWS[kind]
        for own in [name] if name is not None else [f"{module}.weight", f"{module}.bias"]:
            rows = kept_rows(program, analysis, own, dim)
            start = first if name is None else 0
            moved = order([row for row in rows if row >= start])
            take(program, analysis, own, dim, [*[row for row in rows if row < start], *moved])

    return change


def bias_left_whole(program: Program, analysis: Analysis, kind: str) -> None:
    whole = attribute(analysis.program.module, "blocks.0.ffn.up.bias")
    set_weight(program.module, "blocks.0.ffn.up.bias", whole.detach().clone())
    del program.numbers["blocks.0.ffn.up.bias"]


def weights_left_whole(program: Program, analysis: Analysis, kind: str) -> None:
    for name in list(program.numbers):
        set_weight(program.module, name, attribute(analysis.program.module, name).detach().clone())
    program.numbers.clear()


def output_sliced(program: Program, analysis: Analysis, kind: str) -> None:
    output = next(iter(program.module.graph.find_nodes(op="output")))
    (result,) = output.args[0]
    with program.module.graph.inserting_before(output):
        output.args = ((program.module.graph.call_function(ATEN.slice.Tensor, (result, 2, 0, 5)),),)


def wrong_size(program: Program, analysis: Analysis, kind: str) -> None:
    view = nodes(program, "aten.reshape")[-1]
    *sizes, last = view.args[1]  # type: ignore[misc]
    view.update_arg(1, [*sizes, last + 1] if isinstance(last, int) and last > 0 else [*sizes, 1])


def broken_graph(program: Program, analysis: Analysis, kind: str) -> None:
    weight: Any = next(iter(program.module.graph.find_nodes(op="get_attr")))
    weight.target = "nowhere.weight"


def gate_beside_up(program: Program, analysis: Analysis, kind: str) -> None:
    """Gate and up channels of one neuron are coupled, so only shifting one against the other is a fault."""
    for part in ("weight", "bias"):
        rows = kept_rows(program, analysis, f"blocks.0.ffn.up.{part}", 0)
        half = len(rows) if len(rows) <= 10 else len(rows) // 2
        take(program, analysis, f"blocks.0.ffn.up.{part}", 0, [*rows[1:half], rows[0], *rows[half:]])


UP, DOWN, OUT = "blocks.0.ffn.up", "blocks.0.ffn.down.weight", "blocks.0.attention.out.weight"
#: what a pass does wrong to a pruned program, and what is said of it
FAULTS: dict[str, tuple[Change, str]] = {
    "a producer cut at wrong rows": (
        reordered(None, 0, lambda rows: [rows[0], *(row - 1 for row in rows[1:])]),
        "not coupled",
    ),
    "one wrong row": (reordered(f"{UP}.weight", 0, lambda rows: [rows[0] - 1, *rows[1:]]), UP),
    "a bias cut at wrong rows": (reordered(f"{UP}.bias", 0, lambda rows: [*rows[1:], rows[0]]), ""),
    "wrong columns of a layer": (reordered(DOWN, 1, lambda rows: [rows[0] - 1, *rows[1:]]), ""),
    "wrong columns of heads": (reordered(OUT, 1, lambda rows: [rows[0] - 1, *rows[1:]]), ""),
    "swapped heads": (
        reordered(None, 0, lambda rows: [*rows[len(rows) // 2 :], *rows[: len(rows) // 2]]),
        "",
    ),
    "gates beside what they gate": (gate_beside_up, ""),
    "a bias left whole": (bias_left_whole, "no longer executes"),
    "a graph resized, and weights left whole": (weights_left_whole, ""),
    "an output sliced": (output_sliced, "output 0"),
    "a flip put between": (put_between(ATEN.flip.default, [-1]), "not coupled"),
    "a mixing operator put between": (put_between(ATEN.softmax.int, -1), ""),
    "an operator without a rule put between": (put_between(ATEN.renorm.default, 2, 0, 1.0), "no rule"),
    "a wrong size": (wrong_size, ""),
    "a broken graph": (broken_graph, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_pass_is_refused(analysed: tuple[str, Analysis], fault: str) -> None:
    kind, analysis = analysed
    change, said = FAULTS[fault]
    program = removed(analysis)
    assert said in must_be_refused(program, analysis, lambda program: change(program, analysis, kind))


def test_weights_cut_and_graph_left_alone(analysed: tuple[str, Analysis]) -> None:
    """What ``graph.lint()`` and ``ExportedProgram.validate()`` accept."""
    _, analysis = analysed
    done = removed(analysis)

    def change(program: Program) -> None:
        for name, numbers in done.numbers.items():
            set_weight(program.module, name, attribute(done.module, name))
            program.numbers[name] = numbers

    must_be_refused(analysis.program, analysis, change)


@pytest.mark.parametrize("shift", [-1, 1, None])
def test_parts_of_a_fused_product_are_told_apart(shift: int | None) -> None:
    """Cut one off, or keys and values swapped."""
    analysis = analyze_program(capture(build(FUSED), (tokens(2, 4),)), split_fused)

    def change(program: Program) -> None:
        split = next(node for node in nodes(program, "split_with_sizes") if len(node.args[1]) == 3)
        if shift is None:
            _, k, v = split.users
            k.update_arg(1, 2)
            v.update_arg(1, 1)
        else:
            q, k, v = split.args[1]
            split.update_arg(1, [q, k + shift, v - shift])

    for program in (analysis.program,) if shift is None else (analysis.program, removed(analysis)):
        must_be_refused(program, analysis, change)


def test_a_removal_that_breaks_a_box_or_cuts_through_a_set(analysed: tuple[str, Analysis]) -> None:
    """Another number of channels in each head leaves no box."""
    _, analysis = analysed
    group = next(g for g in analysis.select("prunable") if g.blocks > 1)
    of_one_head = np.isin(analysis.labels, group.sets[group.block_of == group.block_of[0]][:2])
    slot, of_producers = analysis.numbering.get("blocks.0.ffn.down.weight", 1), gone_of(analysis)
    of_producers[slot.base : slot.base + slot.size] = False
    for gone, said in ((of_one_head, r"remove_channels.*unequal"), (of_producers, "remove_channels")):
        with pytest.raises(fasp_fx.VerificationError, match=said):
            remove(analysis, gone)
