"""Odd models that are refused, and odd calls of those that are not (corpus/oddities.py)."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from corpus.oddities import Mode, lenient, nested, options, pictures, returning
from models import Vectors, X, made, parameter, stack, wide
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = [
    pytest.mark.usefixtures("no_files"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]


def _prune(model: nn.Module, args: tuple[Any, ...] = (X,)) -> fasp_fx.Result:
    return fasp_fx.prune(model, args, restore=None, score="random", sparsity=0.3)


@dataclasses.dataclass
class Unknown:
    value: Tensor


#: what makes the model, the error, and what it says
REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str | None]] = {
    "lazy": (lambda: stack(nn.LazyLinear(24), nn.ReLU()), fasp_fx.FaspError, "uninitialized"),
    "lazy norm": (
        lambda: stack(nn.Linear(6, 24), nn.LazyBatchNorm1d(), nn.Linear(24, 6)),
        fasp_fx.FaspError,
        "uninitialized",
    ),
    "output of an unknown class": (lambda: returning(Unknown), fasp_fx.CaptureError, "Unknown"),
    "scripted": (lambda: torch.jit.script(Vectors().eval()), fasp_fx.CaptureError, "ScriptModule"),
    "traced": (lambda: torch.jit.trace(Vectors().eval(), X), fasp_fx.CaptureError, None),
    "quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(
            stack(Vectors(), nn.ReLU(), Vectors()), {nn.Linear}, dtype=torch.qint8
        ),
        fasp_fx.FaspError,
        None,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pruned_is_refused(name: str) -> None:
    make, kind, says = REFUSED[name]
    with pytest.raises(kind, match=says):
        _prune(make())


def test_dropout_that_is_always_on_stays_on() -> None:
    result = _prune(wide(lambda self, x: self.down(F.dropout(torch.relu(self.up(x)), 0.5, training=True))))
    assert result.plan.groups
    assert not torch.equal(result.module(X), result.module(X))


class Settings:
    """Says nothing of when two are equal."""

    def __init__(self, scale: float, steps: list[Any]) -> None:
        self.scale, self.steps = scale, steps


def _set(self: Any, x: Tensor, settings: Any = None) -> Tensor:
    hidden = self.up(x).relu() * settings.scale
    for step in settings.steps:
        hidden = hidden.tanh() if step is True else hidden * step
    return self.down(hidden)


#: forward, example, calls that are refused, and what the refusal says
CALLED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[tuple[Any, ...]], str | None]] = {
    "options": (
        options,
        (X, Mode.TANH, 3.0),
        [(X, Mode.RELU, 2.5), (X, Mode.TANH, 2.5), (X, Mode.TANH, 3.0, torch.tanh)],
        "captured with",
    ),
    "a list": (pictures, ([X, X[:2]],), [([X, X, X],), ([X],), (X,)], None),
    "a dict": (nested, ({"x": X},), [({"x": X, "k": 3},), ({"y": X},)], None),
    "a dict with a constant": (nested, ({"x": X, "k": 2},), [({"x": X, "k": 3},)], None),
    **{
        kind.__name__: (
            _set,
            (X, kind(scale=2.0, steps=[1])),
            [(X, kind(scale=scale, steps=steps)) for scale, steps in ((3.0, [1]), (2.0, [2]), (2.0, [1, 1]))],
            "captured with",
        )
        for kind in (Settings, types.SimpleNamespace)
    },
}


@pytest.mark.parametrize("name", CALLED)
def test_calls_of_another_structure_or_with_other_constants_are_refused(name: str) -> None:
    forward, example, others, says = CALLED[name]
    result = _prune(wide(forward), example)
    result.module(*example)
    for other in others:
        with pytest.raises(fasp_fx.CallError, match=says):
            result.module(*other)
    if forward is _set:
        example[-1].scale = 3.0  # the caller changes what is inside of a constant
        with pytest.raises(fasp_fx.CallError, match="captured with"):
            result.module(*example)


KINDS = (torch.bool, torch.int64, torch.float32)


@pytest.mark.parametrize("example", KINDS, ids=str)
def test_tensors_of_another_kind_are_refused(example: torch.dtype) -> None:
    mask = (torch.arange(len(X)) % 2).to(example)
    result = _prune(wide(lenient), (X, mask))
    for call in (result.module, torch.compile(result.module, backend="eager")):
        call(X, mask)
        for other in (kind for kind in KINDS if kind != example):
            with pytest.raises(fasp_fx.CallError, match=f"'mask' is a tensor of .*{other}"):
                call(X, mask.to(other))


# --- names that are taken


IMAGE = torch.randn(2, 3, 8, 8)


def image(argument: str, name: str) -> nn.Module:
    """An argument, a parameter and a node all want one name."""

    def run(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(x, self.first)), getattr(self, name))

    def called_weight(this: Any, weight: Tensor) -> Tensor:
        return run(this, weight)

    forward = run if argument == "x" else called_weight
    return made(forward, **{"first": parameter(12, 3, 3, 3, scale=0.3), name: parameter(4, 12, 3, 3)})


@pytest.mark.parametrize("names", [("x", "x"), ("weight", "weight"), ("x", "conv2d"), ("x", "self")], ids=str)
def test_an_argument_or_node_called_like_a_parameter(names: tuple[str, str]) -> None:
    model = image(*names)
    check_program(model, (IMAGE,), invariants=("mask-exact", "signature"))
    if "self" not in names:  # torch itself cannot run an exported program with such a parameter
        assert fasp_fx.analyze(torch.export.export(model, (IMAGE,))).select("prunable")


def fused(name: str, taken: Any, before: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Queries, keys and values of one weight, head by head; something else has the name of one of
    the parts.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        x = before(self.qkv, x)
        parts = self.qkv(x).view(*x.shape[:2], 4, 3, 4).permute(3, 0, 2, 1, 4)
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape))

    model: Any = made(forward, qkv=nn.Linear(16, 48), out=nn.Linear(16, 16))
    if type(taken) is Tensor:
        model.qkv.register_buffer(name, taken)
    else:
        setattr(model.qkv, name, taken)
    return model.eval()  # type: ignore[no-any-return]


SPLIT: dict[str, Callable[[], nn.Module]] = {
    "submodule": lambda: fused("weight_0", nn.Linear(16, 16), lambda qkv, x: qkv.weight_0(x)),
    "unused": lambda: fused("weight_0", nn.Linear(16, 16), lambda qkv, x: x),
    "parameter": lambda: fused("weight_1", parameter(16), lambda qkv, x: x + qkv.weight_1),
    "buffer": lambda: fused("bias_2", torch.randn(16), lambda qkv, x: x + qkv.bias_2),
}


@pytest.mark.parametrize("name", SPLIT)
def test_parts_of_a_split_weight_take_names_that_are_free(name: str) -> None:
    model, x = SPLIT[name](), torch.randn(2, 5, 16)
    plan = fasp_fx.prune(model, (x,), score="magnitude", restore=None, sparsity=0.1).plan
    names = {own for own, _ in model.named_modules()} | model.state_dict().keys()
    assert plan.splits
    assert not names & {part.name for part in plan.splits}
    check_program(model, (x,), invariants=("mask-exact",), sparsity=0.1)


@pytest.mark.parametrize("name", ["graph", "code", "meta", "_graph", "range_constraints"])
@pytest.mark.parametrize("kind", ["buffer", "submodule"])
def test_names_that_a_graph_cannot_hold_are_refused(name: str, kind: str) -> None:
    """Those that are attributes of every graph module."""

    def forward(self: Any, x: Tensor) -> Tensor:
        held = (self._modules if kind == "submodule" else self._buffers)[name]
        return self.down(F.relu(self.up(held(x) if kind == "submodule" else x + held)))

    model = wide(forward)
    if kind == "submodule":
        model.add_module(name, nn.Linear(6, 6))
    else:
        model.register_buffer(name, torch.randn(6))
    model.eval()
    with pytest.raises(fasp_fx.CaptureError, match=f"the model holds '{name}.*rename '{name}'"):
        fasp_fx.analyze(model, (torch.randn(3, 6),))
