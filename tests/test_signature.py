"""A pruned module is called like the original: names, order, defaults, structure of the result; what was not captured is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, TwoLayers

import fasp_fx


class Out(NamedTuple):
    scaled: Tensor
    parts: dict[str, Tensor]


class ManyArguments(nn.Module):
    """Positional and keyword arguments, defaults, an optional tensor, a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TwoLayers()

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 2.0, *, mask: Tensor | None = None, mode: str = "plain") -> Out:
        hidden = self.inner(x) * scale
        if y is not None:
            hidden = hidden + y
        if mask is not None:
            hidden = hidden * mask
        return Out(hidden, {"double": hidden * 2, "mode": hidden + (1.0 if mode == "plain" else 0.0)})


def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[nn.Module, fasp_fx.Result]:
    torch.manual_seed(0)
    model = ManyArguments().eval()
    plan_free = fasp_fx.prune(model, args, kwargs, sparsity=0.3, score="random", restore=None)
    return model, plan_free


def close(found: Out, expected: Out, result: fasp_fx.Result) -> None:
    assert isinstance(found, Out)
    assert list(found.parts) == list(expected.parts)
    assert found.scaled.shape == expected.scaled.shape


X, Y, MASK = torch.randn(3, 12), torch.randn(3, 12), torch.ones(3, 12)


def test_same_signature() -> None:
    model, result = make((X,), {"mask": MASK})
    assert str(inspect.signature(result.module.forward)).split(" ->")[0].replace("typing.", "")
    names = list(inspect.signature(model.forward).parameters)
    assert list(inspect.signature(result.module.forward).parameters) == names
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    assert [p.kind for p in inspect.signature(result.module.forward).parameters.values()] == kinds
    defaults = [p.default for p in inspect.signature(model.forward).parameters.values()]
    assert [p.default for p in inspect.signature(result.module.forward).parameters.values()] == defaults


def test_positional_and_keyword_calls_agree() -> None:
    model, result = make((X, Y), {})
    other_x, other_y = torch.randn(5, 12), torch.randn(5, 12)
    expected = result.module(other_x, other_y)
    for found in (
        result.module(x=other_x, y=other_y),
        result.module(other_x, y=other_y),
        result.module(y=other_y, x=other_x),
        result.module(other_x, other_y, 2.0, mode="plain"),
        result.module(other_x, other_y, scale=2.0, mask=None),
    ):
        close(found, model(other_x, other_y), result)
        assert torch.equal(found.scaled, expected.scaled)
        assert torch.equal(found.parts["double"], expected.parts["double"])


@pytest.mark.parametrize(
    ("args", "kwargs", "word"),
    [
        ((X, Y, 3.0), {}, "scale"),
        ((X, Y), {"scale": 3.0}, "scale"),
        ((X, Y), {"mode": "other"}, "mode"),
        ((X, Y), {"mask": MASK}, "mask"),
        ((X,), {}, "y"),
        ((X, None), {}, "y"),
    ],
)
def test_what_was_not_captured_is_refused(args: tuple[Any, ...], kwargs: dict[str, Any], word: str) -> None:
    _, result = make((X, Y), {})
    with pytest.raises(fasp_fx.CallError, match=f"'{word}'"):
        result.module(*args, **kwargs)


def test_a_call_that_does_not_fit_python() -> None:
    _, result = make((X, Y), {})
    with pytest.raises(TypeError):
        result.module(X, Y, nonsense=1)
    with pytest.raises(TypeError):
        result.module()


def test_constants_other_than_the_defaults() -> None:
    model, result = make((X,), {"scale": 0.5, "mode": "other"})
    assert torch.equal(result.module(X, None, 0.5, mode="other").scaled, result.module(X).scaled)
    with pytest.raises(fasp_fx.CallError, match="'scale'"):
        result.module(X, scale=0.25)
    assert result.module(X).scaled.shape == model(X).scaled.shape


class Gathered(nn.Module):
    """Variable positional and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TwoLayers()

    def forward(self, *parts: Tensor, **named: Tensor) -> Tensor:
        return self.inner(sum(parts) + named["extra"])


def test_variable_arguments() -> None:
    model = Gathered().eval()
    result = fasp_fx.prune(model, (X, Y), {"extra": MASK}, sparsity=0.3, score="random", restore=None)
    assert result.module(X, Y, extra=MASK).shape == X.shape
    assert torch.equal(result.module(X, Y, extra=MASK), result.module(Y, X, extra=MASK))
    for count in (1, 3):
        with pytest.raises(fasp_fx.CallError, match=r"\*parts"):
            result.module(*[X] * count, extra=MASK)
    with pytest.raises(fasp_fx.CallError, match="extra"):
        result.module(X, Y)
    with pytest.raises(fasp_fx.CallError, match="other"):
        result.module(X, Y, extra=MASK, other=MASK)


@pytest.mark.parametrize("name", ["opt"])
def test_a_hugging_face_model(name: str, zoo_model: Callable[[str], nn.Module]) -> None:
    entry, model = ZOO[name], zoo_model(name)
    result = fasp_fx.prune(model, (), entry.example(), sparsity=0.3, score="random", restore=None)
    ids = entry.inputs(3, 5)["input_ids"]
    found = result.module(ids)
    assert type(found) is type(model(ids, use_cache=False))
    assert torch.equal(found.logits, result.module(input_ids=ids, use_cache=False).logits)
    for wrong in ({"use_cache": True}, {"attention_mask": torch.ones_like(ids)}, {"output_attentions": True}):
        with pytest.raises(fasp_fx.CallError, match=next(iter(wrong))):
            result.module(ids, **wrong)
    assert list(inspect.signature(result.module.forward).parameters) == list(inspect.signature(model.forward).parameters)


class ByPosition(nn.Module):
    """Arguments that only go by position, a constant and an ordinary one among them, before a variable number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TwoLayers()

    def forward(self, x: Tensor, factor: float, /, y: Tensor, *rest: Tensor) -> Tensor:
        return self.inner(x * factor + y + sum(rest))


def test_positional_arguments() -> None:
    model = ByPosition().eval()
    result = fasp_fx.prune(model, (X, 2.0, Y, MASK), calibration=[(X, 2.0, Y, MASK)] * 10, sparsity=0.3)
    assert result.module(X, 2.0, Y, MASK).shape == X.shape
    assert not torch.equal(result.module(X, 2.0, Y, MASK), result.module(Y, 2.0, Y, MASK))
    for wrong in ((X, 3.0, Y, MASK), (X, 2.0, Y), (X, 2.0, Y, MASK, MASK)):
        with pytest.raises(fasp_fx.CallError):
            result.module(*wrong)


def test_an_exported_program_with_constants() -> None:
    model = ManyArguments().eval()
    exported = torch.export.export(model, (X, None, 2.0), {"mask": MASK}, strict=False)
    for given in (exported, exported.module()):
        result = fasp_fx.prune(given, (X, None, 2.0), {"mask": MASK}, sparsity=0.3, score="random", restore=None)
        assert result.module(X, None, 2.0, mask=MASK).scaled.shape == X.shape
        with pytest.raises(fasp_fx.CallError):
            result.module(X, None, 3.0, mask=MASK)
