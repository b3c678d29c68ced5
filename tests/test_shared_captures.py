"""Captures that tests share: of equal models alone, and over the weights of the model that is asked for."""

from __future__ import annotations

import pytest
import torch
from captures import equal_captures
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fasp_fx
from fasp_fx.capturing import _capture

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """Of a factor, a buffer, and a weight that is computed of others if it is folded."""

    def __init__(self, factor: float = 2.0, seed: int = 0, folded: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down, self.factor = nn.Linear(5, 8), nn.Linear(8, 3), factor
        self.register_buffer("shift", torch.randn(8))
        if folded:
            parametrizations.weight_norm(self.up)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) * self.factor + self.shift).relu())


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were really captured."""
    found: list[nn.Module] = []
    original = _capture.capture

    def noted(model: nn.Module, *args: object, **options: object) -> object:
        found.append(model)
        return original(model, *args, **options)

    monkeypatch.setattr(_capture, "capture", noted)
    return found


def test_equal_models_are_captured_once_and_each_keeps_its_weights(captured: list[nn.Module]) -> None:
    first, second, other = Scaled(3.0), Scaled(3.0), torch.randn(3, 5)
    with torch.no_grad():
        second.down.weight.mul_(3)
    with equal_captures():
        one, two = fasp_fx.capture(first, (X,)), fasp_fx.capture(second, (other,))
    assert captured == [first]
    for model, found, x in ((first, one, X), (second, two, other)):
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert all(found.program.weights()[name] is tensor for name, tensor in own.items())
        assert torch.equal(found.program.example[0][0], x)
        assert torch.equal(found.program.module(other), model(other))
    with torch.no_grad():
        second.up.weight.mul_(2)
    with pytest.raises(fasp_fx.ArgumentError, match=r"'up.weight' has changed"):
        two.checked()
    one.checked()


def test_what_differs_is_captured_anew(captured: list[nn.Module]) -> None:
    computed = [Scaled(5.0, folded=True), Scaled(5.0, folded=True)]
    models = [Scaled(5.0), Scaled(6.0), Scaled(5.0, seed=1), *computed]
    with torch.no_grad():
        computed[1].up.parametrizations.weight.original0.mul_(2)
    with equal_captures():
        for model in models:
            assert fasp_fx.capture(model, (X,)).program.module(X).allclose(model(X))
        assert captured == models
        with torch.no_grad():
            models[0].get_buffer("shift").add_(1)
        fasp_fx.capture(models[0], (X,))
    assert captured == [*models, models[0]]
