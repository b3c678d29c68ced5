"""The verifier catches faulty passes: each test seeds one fault, and the pipeline must refuse the program,
naming the pass.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import Spec, build, tokens
from oracle import TOLERANCE, assert_exact, error, zeroed
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn.utils.fusion import fuse_conv_bn_weights

import fasp_fx
from fasp_fx.analysis import Analysis, analyze_program
from fasp_fx.capturing import WRITTEN_BY, Program, attribute, capture, set_weight
from fasp_fx.passes import Pipeline, Prune, _run, remove, split_fused, verify

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


def put_in(graph: fx.Graph, operator: Any, *given: Any) -> None:
    """Let an operator change what the last layer of a feed-forward block reads."""
    product = next(
        node
        for node in calls_of(graph, ATEN.mul.Tensor)
        if any("silu" in str(n.target) for n in node.all_input_nodes)
    )
    (user,) = product.users
    with graph.inserting_before(user):
        user.replace_input_with(product, graph.call_function(operator, (product, *given)))


def put_between(operator: Any, *given: Any) -> Change:
    return lambda program, analysis, kind: put_in(program.module.graph, operator, *given)


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
    next(iter(program.module.graph.find_nodes(op="get_attr"))).target = "nowhere.weight"


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


# --- our passes in other people's pipelines, and other people's passes in ours


SPEC = Spec(hidden=8, kv_heads=1, repeat=2, head_dim=6, ffn=12, bias=True, gated=True)


class Case:
    """A model, its export and a plan for it."""

    def __init__(self, model: nn.Module, example: Tensor, other: Tensor, dynamic: Any) -> None:
        self.model, self.example, self.other = model, example, other
        self.exported = torch.export.export(model, (example,), dynamic_shapes=dynamic, strict=False)
        self.plan = fasp_fx.prune(self.exported, score="magnitude", restore=None, sparsity=0.2).plan

    def check(self, program: ExportedProgram) -> None:
        """Hold a program against the masked dense model, at the example's sizes and at others."""
        masked, module = zeroed(self.model, self.plan), program.module()
        smaller = sum(tensor.numel() for tensor in program.state_dict.values()) < sum(
            tensor.numel() for tensor in self.model.parameters()
        )
        assert smaller, "nothing was removed"
        for inputs in (self.example, self.other):
            assert error(module(inputs), masked(inputs)) <= TOLERANCE


@pytest.fixture(scope="module")
def decoder() -> Case:
    return Case(build(SPEC), tokens(2, 4), tokens(3, 4), ({0: torch.export.Dim.AUTO},))


@pytest.fixture(scope="module")
def images() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
    ).eval()
    with torch.no_grad():
        for tensor in (model[1].weight, model[1].bias, model[1].running_mean):
            tensor.copy_(torch.randn(8))
        model[1].running_var.copy_(torch.rand(8) + 0.5)
    return Case(model, torch.randn(2, 3, 9, 9), torch.randn(5, 3, 9, 9), ({0: torch.export.Dim.AUTO},))


def calls_of(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=target)


def written(program: ExportedProgram) -> set[str]:
    return {node.meta[WRITTEN_BY] for node in program.graph.nodes if WRITTEN_BY in node.meta}


# --- foreign passes


class UnfoldLinear(PassBase):
    """``linear`` as a product with a transposed weight and an addition."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in calls_of(graph_module.graph, ATEN.linear.default):
            with graph_module.graph.inserting_before(node):
                swapped = graph_module.graph.call_function(ATEN.t.default, (node.args[1],))
                made = graph_module.graph.call_function(ATEN.matmul.default, (node.args[0], swapped))
                if len(node.args) > 2:
                    made = graph_module.graph.call_function(ATEN.add.Tensor, (made, node.args[2]))
            node.replace_all_uses_with(made)
            graph_module.graph.erase_node(node)
        return PassResult(graph_module, True)


def silu_in_torch(module: fx.GraphModule) -> None:
    """Write ``silu`` out, in functions of torch rather than operators."""
    for node in calls_of(module.graph, ATEN.silu.default):
        with module.graph.inserting_before(node):
            gate = module.graph.call_function(torch.sigmoid, (node.args[0],))
            product = module.graph.call_function(torch.mul, (node.args[0], gate))
        node.replace_all_uses_with(product)
        module.graph.erase_node(node)


def fold_batch_norm(module: fx.GraphModule) -> fx.GraphModule:
    """Fold batch norms into the convolutions before them; their weights get new names."""
    for norm in [node for node in module.graph.nodes if "batch_norm" in str(node.target)]:
        conv = norm.args[0]
        weight, scale, shift, mean, variance = (
            attribute(module, str(n.target)) for n in (conv.args[1], *norm.args[1:5])
        )
        made = fuse_conv_bn_weights(
            weight.detach(), None, mean, variance, 1e-5, scale.detach(), shift.detach()
        )
        for name, value in zip(("folded_weight", "folded_bias"), made, strict=True):
            module.register_parameter(name, nn.Parameter(value))
        with module.graph.inserting_before(conv):
            args = (
                conv.args[0],
                *(module.graph.get_attr(name) for name in ("folded_weight", "folded_bias")),
                *conv.args[3:],
            )
            folded = module.graph.call_function(conv.target, args)
        users = [user for user in norm.users if "getitem" in str(user.target)] or [norm]
        users[0].replace_all_uses_with(folded)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    return module


# --- foreign passes between ours


def test_ours_between_foreign_ones(decoder: Case) -> None:
    smaller = Pipeline([UnfoldLinear(), Prune(decoder.plan), silu_in_torch])(decoder.exported)
    decoder.check(smaller)
    assert not calls_of(smaller.graph, ATEN.linear.default)
    assert {
        "UnfoldLinear",
        "silu_in_torch",
        "remove_channels",
        "pin_attention_scale",
        "pad_value_heads",
    } <= written(smaller)
    assert all(
        node.meta[WRITTEN_BY] == "UnfoldLinear" for node in calls_of(smaller.graph, ATEN.matmul.default)
    )


@pytest.mark.parametrize("first", [True, False])
def test_weights_that_a_foreign_pass_brings(images: Case, first: bool) -> None:
    """A folded batch norm leaves a weight and a bias that no plan names; they go with the
    channels they meet.
    """
    steps = [fold_batch_norm, Prune(images.plan)] if first else [Prune(images.plan), fold_batch_norm]
    smaller = Pipeline(steps)(images.exported)
    images.check(smaller)
    assert not any("batch_norm" in str(node.target) for node in smaller.graph.nodes)
    assert smaller.state_dict["folded_weight"].shape[0] == smaller.state_dict["folded_bias"].shape[0] < 8
    assert "fold_batch_norm" in written(smaller)


# --- faults


def unknown_between(module: fx.GraphModule) -> None:
    """An operator without a rule before the last layer of a feed-forward block."""
    put_in(module.graph, ATEN.renorm.default, 2, 0, 1e9)


def other_values(module: fx.GraphModule) -> None:
    with torch.no_grad():
        for name, parameter in list(module.named_parameters()):
            if "ffn" in name or name == "3.weight":
                path, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(path), leaf, nn.Parameter(parameter + 0.1))


def fewer_rows(module: fx.GraphModule) -> None:
    owner = module.get_submodule("blocks.0.ffn.up")
    owner.weight = nn.Parameter(owner.weight.detach()[1:])


def raising(module: fx.GraphModule) -> None:
    raise KeyError("whatever")


def returning_a_string(module: fx.GraphModule) -> Any:
    return "done"


def doubled(module: fx.GraphModule) -> None:
    module.get_submodule("blocks.0.ffn.down").weight.detach().mul_(2)


FOREIGN: dict[Callable[[Any], Any], str] = {
    other_values: "output 0 differs",
    doubled: "output 0 differs",
    fewer_rows: r"'blocks.0.ffn.up.weight' had shape \(12, 8\)",
    raising: "KeyError: 'whatever'",
    returning_a_string: "returned str",
}


@pytest.mark.parametrize("fault", FOREIGN, ids=lambda fault: fault.__name__)
def test_a_foreign_fault_is_caught_with_its_name(decoder: Case, fault: Callable[[Any], Any]) -> None:
    with pytest.raises(
        fasp_fx.VerificationError, match=rf"pass '{fault.__name__}' failed: (?s:.*){FOREIGN[fault]}"
    ):
        Pipeline([fault])(decoder.exported)


def test_what_no_value_shows_stands_in_the_way_of_the_plan(decoder: Case) -> None:
    with pytest.raises(fasp_fx.PlanError, match="which cannot be pruned"):
        Pipeline([unknown_between, Prune(decoder.plan)])(decoder.exported)


def test_new_values_on_purpose(images: Case) -> None:
    changed = Pipeline([other_values], tolerance=0)(images.exported)
    assert error(changed.module()(images.example), images.model(images.example)) > 1e-3


def test_nothing_to_do_returns_what_was_given(images: Case) -> None:
    assert Prune(replace(images.plan, groups=()))(images.exported) is images.exported


#: steps with an image model and its plan, a decoder's program and its plan, and what is said of them
REFUSED: dict[str, tuple[Callable[[Case, Case], Any], str]] = {
    "another model": (lambda images, decoder: Prune(images.plan)(decoder.exported), "another model"),
    "applied": (
        lambda images, _: Prune(images.plan)(Prune(images.plan)(images.exported)),
        "already applied",
    ),
    "two plans": (lambda images, decoder: Pipeline([Prune(decoder.plan), Prune(images.plan)]), "one plan"),
    "no pass": (lambda images, _: Pipeline([3])(images.exported), "not callable"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", REFUSED)
def test_steps_that_make_no_sense_are_refused(images: Case, decoder: Case, name: str) -> None:
    steps, said = REFUSED[name]
    with pytest.raises(fasp_fx.FaspError, match=said):
        steps(images, decoder)


def test_sizes_that_a_capture_excludes_are_not_tried() -> None:
    """After five strides an image of a free size may not be one pixel."""
    layers = [nn.Conv2d(3 if not i else 8, 8, 3, stride=2, padding=1) for i in range(5)]
    auto = torch.export.Dim.AUTO
    model, image = nn.Sequential(*layers, nn.Hardswish()).eval(), torch.randn(2, 3, 64, 96)
    shapes = ({0: auto, 2: auto, 3: auto},)
    result = fasp_fx.prune(model, (image,), score="magnitude", restore=None, dynamic_shapes=shapes)
    assert_exact(model, result, torch.randn(1, 3, 128, 64))
