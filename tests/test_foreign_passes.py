"""Our passes in other people's pipelines, and other people's passes in ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import Spec, block, build, tokens, wide
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn.utils.fusion import fuse_conv_bn_weights

import fasp_fx
from fasp_fx.capturing import WRITTEN_BY, attribute
from fasp_fx.passes import Pipeline, Prune

ATEN = torch.ops.aten
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
        with torch.no_grad():
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


def nodes(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=target)


def written(program: ExportedProgram) -> set[str]:
    return {node.meta[WRITTEN_BY] for node in program.graph.nodes if WRITTEN_BY in node.meta}


# --- foreign passes


class UnfoldLinear(PassBase):
    """``linear`` as a product with a transposed weight and an addition."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in nodes(graph_module.graph, ATEN.linear.default):
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
    for node in nodes(module.graph, ATEN.silu.default):
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
    assert not nodes(smaller.graph, ATEN.linear.default)
    assert {
        "UnfoldLinear",
        "silu_in_torch",
        "remove_channels",
        "pin_attention_scale",
        "pad_value_heads",
    } <= written(smaller)
    assert all(node.meta[WRITTEN_BY] == "UnfoldLinear" for node in nodes(smaller.graph, ATEN.matmul.default))


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
    product = next(
        node
        for node in nodes(module.graph, ATEN.mul.Tensor)
        if any("silu" in str(n.target) for n in node.all_input_nodes)
    )
    (user,) = product.users
    with module.graph.inserting_before(user):
        unknown = module.graph.call_function(ATEN.renorm.default, (product, 2, 0, 1e9))
        user.replace_input_with(product, unknown)


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


def returning_nothing(module: fx.GraphModule) -> None:
    pass


FAULTS: dict[Callable[[Any], Any], str] = {
    other_values: "output 0 differs",
    fewer_rows: r"'blocks.0.ffn.up.weight' had shape \(12, 8\)",
    raising: "KeyError: 'whatever'",
    returning_a_string: "returned str",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_foreign_fault_is_caught_with_its_name(decoder: Case, fault: Callable[[Any], Any]) -> None:
    with pytest.raises(
        fasp_fx.VerificationError, match=rf"pass '{fault.__name__}' failed: (?s:.*){FAULTS[fault]}"
    ):
        Pipeline([fault])(decoder.exported)


def test_what_no_value_shows_stands_in_the_way_of_the_plan(decoder: Case) -> None:
    with pytest.raises(fasp_fx.PlanError, match="which cannot be pruned"):
        Pipeline([unknown_between, Prune(decoder.plan)])(decoder.exported)


def test_new_values_on_purpose(images: Case) -> None:
    with pytest.raises(fasp_fx.VerificationError, match="pass 'other_values' failed: output 0 differs"):
        Pipeline([other_values])(images.exported)
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


def answers_of(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Numbers of several kinds; calls are counted in a buffer."""
    self.calls.add_(1)
    y = block(self, x)
    return y * self.calls, y.argmax(-1), torch.complex(y, y * 2), y > 0


def _turned(before: Any, after: Any) -> Callable[[fx.GraphModule], None]:
    def turned(module: fx.GraphModule) -> None:
        for node in module.graph.find_nodes(op="call_function", target=before):
            node.target = after

    return turned


def _doubled(module: fx.GraphModule) -> None:
    with torch.no_grad():
        module.get_submodule("down").weight.mul_(2)


@pytest.fixture(scope="module")
def answers() -> tuple[nn.Module, ExportedProgram, fasp_fx.PruningPlan]:
    torch.manual_seed(0)
    model, x = wide(answers_of, hidden=16, calls=torch.zeros(())), torch.randn(5, 6)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    plan = fasp_fx.prune(exported, score="magnitude", restore=None, sparsity=0.3).plan
    return model, exported, plan


@pytest.mark.parametrize(
    ("foreign", "says"),
    [
        (_turned(ATEN.argmax.default, ATEN.argmin.default), "output 1 differs"),
        (_turned(ATEN.gt.Scalar, ATEN.lt.Scalar), "output 3 differs"),
        (_turned(ATEN.mul.Tensor, ATEN.add.Tensor), "output 0 differs|output 2 differs"),
        (_doubled, "output 0 differs"),
    ],
    ids=["integers", "booleans", "products", "in place"],
)
def test_other_answers_are_caught_and_nothing_of_the_callers_changes(
    answers: tuple[nn.Module, ExportedProgram, fasp_fx.PruningPlan], foreign: Any, says: str
) -> None:
    model, exported, plan = answers
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(fasp_fx.VerificationError, match=says):
        Pipeline([Prune(plan), foreign])(exported)
    for held in (model.state_dict(), exported.state_dict):
        assert all(torch.equal(held[name], value) for name, value in before.items())
    assert float(Pipeline([returning_nothing, Prune(plan)])(exported).state_dict["calls"]) == 0
