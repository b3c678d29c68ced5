"""Captures that tests share: of equal models alone, and over the weights of the model that is asked for."""

from __future__ import annotations

import pytest
import torch
from captures import equal_captures
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fasp_fx
from fasp_fx.capturing import _captured

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    def __init__(self, factor: float = 2.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down, self.factor = nn.Linear(5, 8), nn.Linear(8, 3), factor
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) * self.factor + self.shift).relu())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were really captured."""
    found: list[nn.Module] = []
    original = _captured.capture_program

    def noted(model: nn.Module, *args: object, **options: object) -> object:
        found.append(model)
        return original(model, *args, **options)

    monkeypatch.setattr(_captured, "capture_program", noted)
    return found


def test_equal_models_are_captured_once_and_each_keeps_its_weights(made: list[nn.Module]) -> None:
    first, second = Scaled(3.0).eval(), Scaled(3.0).eval()
    with equal_captures():
        one, two = (fasp_fx.capture(model, (X,)) for model in (first, second))
    assert made == [first]
    for model, captured in ((first, one), (second, two)):
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert captured.program.weights().keys() == own.keys()
        assert all(captured.program.weights()[name] is tensor for name, tensor in own.items())
    with torch.no_grad():
        second.up.weight.mul_(2)
    with pytest.raises(fasp_fx.ArgumentError, match=r"'up.weight' has changed"):
        two.checked()
    one.checked()


def test_values_of_parameters_and_inputs_are_those_of_each_model(made: list[nn.Module]) -> None:
    first, second, other = Scaled(4.0).eval(), Scaled(4.0).eval(), torch.randn(3, 5)
    with torch.no_grad():
        second.down.weight.mul_(3)
    with equal_captures():
        one, two = fasp_fx.capture(first, (X,)), fasp_fx.capture(second, (other,))
    assert made == [first]
    assert two.program.weights()["down.weight"] is second.down.weight
    for captured, model, x in ((one, first, X), (two, second, other)):
        assert torch.equal(captured.program.example[0][0], x)
        assert torch.equal(captured.program.module(other), model(other))


class Folded(nn.Module):
    """A weight that is computed of others, and an input of one sample, which is doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.rand(8, 1)), nn.Parameter(torch.randn(8, 5))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.linear(x, self.weight * self.scale).relu())


def test_values_that_a_capture_has_computed_are_not_anothers(made: list[nn.Module]) -> None:
    first, second, samples = Folded().eval(), Folded().eval(), torch.randn(2, 1, 5)
    with equal_captures():
        for model in (first, second, second):
            assert fasp_fx.capture(model, (X,)).program.module(X).allclose(model(X))
        assert made == [first, second]
        for x in samples:
            model = Scaled(7.0).eval()
            assert torch.equal(fasp_fx.capture(model, (x,)).program.example[0][0], torch.cat([x, x]))
            assert made[-1] is model


def test_what_surrounds_a_call_is_part_of_it(made: list[nn.Module]) -> None:
    models = [Scaled(9.0).eval() for _ in range(3)]
    with equal_captures():
        one = fasp_fx.capture(models[0], (X,))
        one.program.module.graph.erase_node(one.program.module.graph.output_node())  # its holder's business
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: 2 * output if isinstance(module, nn.Linear) else None
        )
        try:
            hooked = fasp_fx.capture(models[1], (X,))
            assert hooked.program.module(X).allclose(models[1](X))
        finally:
            handle.remove()
        assert fasp_fx.capture(models[2], (X,)).program.module(X).allclose(models[2](X))
    assert made == models[:2]


def test_parametrised_models_are_captured_once(made: list[nn.Module]) -> None:
    first, second = Scaled(8.0).eval(), Scaled(8.0).eval()
    for model in (first, second):
        parametrizations.weight_norm(model.up).eval()
    with equal_captures():
        for model in (first, second):
            captured = fasp_fx.capture(model, (X,))
            assert captured.program.module(X).allclose(model(X))
        assert made == [first]
        with torch.no_grad():
            second.up.parametrizations.weight.original0.mul_(2)
        assert fasp_fx.capture(second, (X,)).program.module(X).allclose(second(X))
    assert made == [first, second]


def test_what_differs_is_captured_anew(made: list[nn.Module]) -> None:
    models = [Scaled(5.0).eval(), Scaled(6.0).eval(), Scaled(5.0, seed=1).eval()]
    with equal_captures():
        for model in models:
            fasp_fx.capture(model, (X,))
        fasp_fx.capture(models[0], (X[:2],))
        assert made == [*models, models[0]]
        with torch.no_grad():
            models[0].get_buffer("shift").add_(1)
        fasp_fx.capture(models[0], (X,))
        fasp_fx.capture(last := Scaled(5.0).eval(), (X,))  # equal to what the first one was
    assert made == [*models, models[0], models[0], last]
    fasp_fx.capture(last, (X,))
    assert made[-2:] == [last, last]


def test_a_model_of_a_class_without_a_name_is_equal_to_itself_alone(made: list[nn.Module]) -> None:
    class Inner(Scaled):
        pass

    class Other(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    Other.__qualname__ = Inner.__qualname__
    first, second = Inner().eval(), Other().eval()
    with equal_captures():
        for model in (first, second, first):
            fasp_fx.capture(model, (X,))
    assert made == [first, second]
