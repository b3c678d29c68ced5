"""Captures that tests share: of equal models alone, and over the weights of the model that is asked for."""

from __future__ import annotations

import pytest
import torch
from captures import equal_captures
from torch import Tensor, nn

import fasp_fx
from fasp_fx import _captured

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
