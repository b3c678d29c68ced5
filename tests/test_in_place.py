"""What models write into their inputs stays theirs, and callers' programs and tensors stay as they are.
Models that write are in corpus/movements.py.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from corpus.movements import ENTRIES, FUNCTIONS, IN_PLACE, behind
from models import between_layers, made
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import fasp_fx
from fasp_fx.capturing import by_shapes
from fasp_fx.capturing._shapes import _FAKES
from fasp_fx.storage import _untrusted

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return between_layers(function).double()


def _loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda function: function.__name__)
def test_no_operator_of_a_program_writes(function: Callable[[Tensor], Tensor]) -> None:
    """Of a model, of a program that somebody exported, and of one that was loaded, whose recorded values
    share no memory any more.
    """
    model = between(function)
    exported = export(model, (X,))
    for source in (model, exported, _loaded(exported)):
        program = fasp_fx.capture(source, (X,)).program
        (found,) = pytree.tree_leaves(program.module(X))
        assert torch.allclose(found, model(X), rtol=1e-12, atol=1e-12)
        assert not any(
            node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)
            for node in program.module.graph.nodes
        )


def test_norms_of_a_program_that_writes_stay_whole() -> None:
    """Quantisers look for a convolution with its batch norm; every node says where it comes from."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.Flatten()
    ).eval()
    images = torch.randn(2, 3, 8, 8)
    with mock.patch.object(torch.fx.config, "do_not_emit_stack_traces", False):
        exported = export(model, (images,), dynamic_shapes=({0: Dim("batch", max=9)},))
        for source in (exported, _loaded(exported), model):
            result = fasp_fx.prune(source, (images,), score="magnitude", restore=None, sparsity=0.3)
            graph = result.program.graph
            assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)) == 1
            for node in graph.nodes:
                said = {"nn_module_stack", "stack_trace", "from_node"} - node.meta.keys()
                assert node.op != "call_function" or not said, (node, said)
            if source is not model:
                assert [*result.program.range_constraints.values()] == [*exported.range_constraints.values()]


def test_operators_that_are_taken_apart_copy_where_no_view_can_be() -> None:
    """A cast that does nothing lies in memory as what it casts, where a trace makes a copy (XLNet)."""
    graph = fasp_fx.capture(between(FUNCTIONS["an outer product"]), (X,)).program.module.graph
    assert graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default)
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)


def test_the_callers_program_stays_as_it_is() -> None:
    exported = torch.export.export(between(IN_PLACE[1]), (X,), strict=False)
    before = str(exported.graph)
    fasp_fx.prune(exported, score="magnitude", restore=None, sparsity=0.3)
    assert str(exported.graph) == before


def test_a_number_of_channels_read_in_the_graph_keeps_them() -> None:
    """The exporter writes a fixed width out; in a graph that somebody else has written, it can be read."""
    exported = torch.export.export(between(lambda h: h / 12), (X,))
    (division,) = exported.graph.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor)
    with exported.graph.inserting_before(division):
        count = exported.graph.call_function(torch.ops.aten.sym_size.int, (division.args[0], 2))
        count.meta["val"] = 12
    division.args = (division.args[0], count)
    kept = [str(group) for group in fasp_fx.analyze(exported).groups if group.status == "frozen"]
    assert any("first.weight[0]" in group for group in kept)


def _shifted(in_place: bool) -> nn.Module:
    """Begins by moving its input, in its place or beside it, which is the same function."""
    torch.manual_seed(0)
    layers = (nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 4))
    return made(
        lambda self, x: self.layers(x.sub_(self.shift).mul_(3.0) if in_place else (x - self.shift) * 3.0),
        layers=nn.Sequential(*layers),
        shift=torch.ones(()),
    )


@pytest.mark.parametrize("options", [{"quality": "best"}, {"allocation": "search"}], ids=str)
def test_pruned_as_the_model_that_writes_nothing(options: dict[str, Any]) -> None:
    """What is computed of a batch does not depend on who ran it before."""
    batches = list(torch.randn(8, 64, 6, generator=torch.Generator().manual_seed(1)))
    written, beside = (
        fasp_fx.prune(
            _shifted(in_place),
            (batches[0].clone(),),
            calibration=[batch.clone() for batch in batches],
            sparsity=0.4,
            **options,
        )
        for in_place in (True, False)
    )
    assert written.plan.groups == beside.plan.groups
    torch.testing.assert_close(*(dict(each.module.named_parameters()) for each in (written, beside)))


def test_the_callers_batches_stay_as_they_are() -> None:
    batches = list(torch.ones(4, 64, 6))
    fasp_fx.prune(_shifted(True), (batches[0],), calibration=batches, sparsity=0.4)
    assert all(torch.equal(batch, torch.ones(64, 6)) for batch in batches)


# --- sizes that vary from call to call beside channels


QUICK = {"score": "random", "restore": None, "sparsity": 0.2}


def test_what_the_caller_lets_vary_freezes_what_lies_between() -> None:
    """Widths that may trade with each other leave no fixed place for what lies between."""
    entry, shapes = ENTRIES["inputs side by side"], ({1: Dim.AUTO}, None, {1: Dim.AUTO})
    analysis = fasp_fx.analyze(entry.build(), *entry.inputs()[0], dynamic_shapes=shapes)
    reasons = {group.producers[0].name: group.reason for group in analysis.groups if group.producers}
    assert "a length known only at run time" in reasons["middle.weight"]
    assert [group.producers[0].name for group in analysis.select("prunable")] == ["out.0.weight"]


def test_sizes_in_results_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is captured again copies no more; sizes too long to be stored are refused in words."""
    x = torch.randn(2, 7, 6)
    result = fasp_fx.prune(behind(), (x,), **QUICK)
    copies = [
        len(one.program.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default))
        for one in (result, fasp_fx.prune(result.module, (x,), **QUICK))
    ]
    assert copies[0] == copies[1]
    monkeypatch.setattr(_untrusted, "PARTS", 1)
    with pytest.raises(fasp_fx.StoreError, match="longer than what is stored"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- what operators make is recorded by shapes alone as torch records it; sizes that do not fit are refused


ATEN = torch.ops.aten
#: what is laid out in several ways in memory: [any, 3, 5, 4]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "in order": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "half": Tensor.half,
}
WEIGHT = torch.rand(6, 4)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        operator.name(): lambda x, call=operator: call(x, *_more(call, x))  # type: ignore[misc]
        for operator in _FAKES
    },
    "linear": lambda x: F.linear(x, WEIGHT.to(x), WEIGHT[:, 0].to(x)),
    "linear with a vector": lambda x: F.linear(x, WEIGHT[0].to(x)),
    "matmul": lambda x: x @ x.mT,
    "matmul with a matrix": lambda x: x @ WEIGHT.T.to(x),
    "matmul of other batches": lambda x: x @ x[:1].mT,
    "layer norm": lambda x: F.layer_norm(x, (5, 4)),
    "batch norm": lambda x: F.batch_norm(x, *torch.ones(2, 3).to(x)),
    "dropout": lambda x: F.dropout(x, 0.1, False),
    "softmax": lambda x: F.softmax(x, 1),
    "softmax in another type": lambda x: F.softmax(x, -1, dtype=torch.float64),
}


def _more(call: Any, x: Tensor) -> tuple[Any, ...]:
    more: dict[Any, tuple[Any, ...]] = {
        ATEN.pow.Tensor_Scalar: (2,),
        ATEN._safe_softmax.default: (-1,),
        ATEN.grid_sampler_2d.default: (x.new_zeros(x.shape[0], 6, 2, 2), 0, 0, False),
    }
    return more.get(call, ())


def recorded(call: Callable[[Tensor], Tensor], layout: Callable[[Tensor], Tensor]) -> list[tuple[Any, ...]]:
    """What is recorded of each node."""
    program = export(
        made(lambda m, x: call(layout(x + 0))),
        (torch.rand(7, 3, 5, 4),),
        dynamic_shapes=((Dim.AUTO, *[Dim.STATIC] * 3),),
    )
    nodes: list[fx.Node] = program.graph.find_nodes(op="placeholder") + [
        node for node in program.graph.nodes if node.op == "call_function"
    ]
    values = [(str(node.target), node.meta["val"]) for node in nodes if isinstance(node.meta["val"], Tensor)]
    return [
        (target, str(tuple(value.shape)), str(value.stride()), value.dtype, value.device)
        for target, value in values
    ]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_recorded_by_shapes_is_what_is_traced(call: str, layout: str) -> None:
    if call.endswith("_") and layout == "expanded":
        pytest.skip("nothing is written into what lies in several places")
    expected = recorded(CALLS[call], LAYOUTS[layout])
    with by_shapes():
        assert recorded(CALLS[call], LAYOUTS[layout]) == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.linear(x, torch.rand(2, 3)),
        lambda x: x @ x,
        lambda x: F.layer_norm(x, (3,)),
        lambda x: F.batch_norm(x, torch.ones(2), torch.ones(2)),
        lambda x: F.grid_sample(x, torch.rand(2, 6, 2, 2)),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call: Callable[[Tensor], Tensor]) -> None:
    with by_shapes(), pytest.raises(RuntimeError, match="meet"):
        recorded(call, LAYOUTS["in order"])


@pytest.mark.parametrize("call", CALLS)
def test_values_are_computed_with_and_no_steps_are_written_down(call: str) -> None:
    """An exporter that takes an operator apart writes down what it is made of, not how its shape is found."""
    x = torch.rand(2, 3, 5, 4)
    expected = CALLS[call](x.clone())
    with by_shapes(), enable_python_dispatcher():
        torch.testing.assert_close(CALLS[call](x.clone()), expected)
        trace = make_fx(
            lambda x: CALLS[call](x), tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True
        )
        steps = trace(x.clone()).graph.nodes
    assert [str(node.target) for node in steps if "empty" in str(node.target)] == []
