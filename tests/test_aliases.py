"""A parameter that forward reads by another way than its attribute is the same parameter in the graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import zeroed
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import randomise

import fasp_fx

X = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).double()


class Listed(nn.Module):
    """Reads a weight from a list, a buffer from a dict, and a part of another from a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = (
            nn.Linear(*sizes, dtype=torch.float64) for sizes in ((5, 12), (12, 12), (12, 2))
        )
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("shift", torch.arange(6.0, dtype=torch.float64))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 12, dtype=torch.float64))
        self.weights = [self.middle.weight]
        self.scales = {"all": self.scale, "some": (self.shift[2:4],)}

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(self.up(x).relu(), self.weights[0], self.middle.bias).tanh() * self.scales["all"]
        found: Tensor = self.down(hidden) + self.scales["some"][0]
        return found


@pytest.fixture(scope="module", params=["module", "program"])
def case(request: Any) -> tuple[Any, fasp_fx.Result]:
    model = randomise(Listed())
    given: Any = torch.export.export(model, (X,), strict=False) if request.param == "program" else model
    options: Any = {"sparsity": 0.3, "score": "magnitude", "restore": None}
    result = fasp_fx.prune(given, (X,) if given is model else (), **options)
    if given is not model:
        assert any(node.name.startswith("c_lifted") for node in given.graph.nodes), (
            "the caller's stays as it is"
        )
    return model, result


def test_it_is_pruned_as_the_parameter_that_it_is(case: tuple[Any, fasp_fx.Result]) -> None:
    model, result = case
    assert not any("sets the attribute" in note for note in result.report.notes)
    assert {group.name for group in result.plan.groups} == {"middle.weight", "down.weight"}
    torch.testing.assert_close(result.module(X), zeroed(model, result.plan)(X), rtol=1e-9, atol=1e-9)
    assert {name for name, _ in result.module.named_buffers()} == {"scale", "shift"}


def test_its_gradients_are_those_of_the_dense_model(case: tuple[Any, fasp_fx.Result]) -> None:
    model, result = case
    dense: Any = zeroed(model, result.plan)
    module = copy.deepcopy(result.module)
    dense(X).square().sum().backward()
    module(X).square().sum().backward()
    rows, columns = (
        [index for index in range(12) if index not in group.consumers[0].removed]
        for group in (
            next(group for group in result.plan.groups if group.name == name)
            for name in ("down.weight", "middle.weight")
        )
    )
    torch.testing.assert_close(
        module.get_parameter("middle.weight").grad, dense.middle.weight.grad[rows][:, columns]
    )


def test_a_copy_takes_other_values(case: tuple[Any, fasp_fx.Result]) -> None:
    model, result = case
    module = copy.deepcopy(result.module)
    changed = {name: value * 1.5 for name, value in module.state_dict().items()}
    module.load_state_dict(changed)
    dense = zeroed(model, result.plan)
    with torch.no_grad():
        for value in dense.state_dict().values():
            value.mul_(1.5)
    torch.testing.assert_close(module(X), dense(X), rtol=1e-9, atol=1e-9)


def test_what_shares_no_memory_stays_a_constant() -> None:
    model = randomise(Listed())
    model.weights = [model.middle.weight.detach().clone()]
    names = {name for name, _ in fasp_fx.capture(model, (X,)).program.module.named_buffers()}
    assert len(names - {"scale", "shift"}) == 1
