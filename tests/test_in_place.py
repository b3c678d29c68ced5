"""What models write into their inputs stays theirs, and callers' programs and tensors stay as they are.
Models that write are in corpus/movements.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from corpus.movements import FUNCTIONS, IN_PLACE
from models import Between, made
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fasp_fx

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return Between(function).double().eval()


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda function: function.__name__)
def test_no_operator_of_a_program_writes(function: Callable[[Tensor], Tensor]) -> None:
    model = between(function)
    program = fasp_fx.capture(model, (X,)).program
    (found,) = pytree.tree_leaves(program.module(X))
    assert torch.allclose(found, model(X), rtol=1e-12, atol=1e-12)
    assert not any(
        node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        for node in program.module.graph.nodes
    )


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
    for name, weight in beside.module.named_parameters():
        torch.testing.assert_close(written.module.get_parameter(name), weight, msg=name)


def test_the_callers_batches_stay_as_they_are() -> None:
    batches = list(torch.ones(4, 64, 6))
    fasp_fx.prune(_shifted(True), (batches[0],), calibration=batches, sparsity=0.4)
    assert all(torch.equal(batch, torch.ones(64, 6)) for batch in batches)
