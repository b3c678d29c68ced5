"""Odd models: pruned right, held against the dense model with the removed columns of its inputs masked, or
left whole with a reason.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from models import block, made, parameter, stack, wide
from oracle import zeroed
from refusal import BATCH, Vectors, X
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils import _pytree as pytree

import fasp_fx

pytestmark = [
    pytest.mark.usefixtures("shared_captures"),
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning"),
    pytest.mark.usefixtures("no_files"),
]

TOLERANCE = 1e-5


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Same tensors, same values, same attributes, whatever kind of tensor they are."""

    def state() -> tuple[dict[str, int], list[Any]]:
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        attributes = [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]
        return {name: id(tensor) for name, tensor in named}, attributes

    def values() -> list[Tensor]:
        found = [*model.parameters(), *model.buffers()]
        known = [tensor.detach() for tensor in found if not nn.parameter.is_lazy(tensor)]
        return [tensor.dequantize() if tensor.is_quantized else tensor.to_dense().clone() for tensor in known]

    before, kept = state(), values()
    try:
        yield
    finally:
        assert state() == before
        assert all(map(torch.equal, values(), kept))


def _prune(
    model: nn.Module, args: tuple[Any, ...] = (X,), calibration: Any = None, **options: Any
) -> fasp_fx.Result:
    # The score would take channels that are always zero, and show nothing.
    options = {"restore": None, "score": "random", "sparsity": 0.3, **options}
    with _untouched(model):
        return fasp_fx.prune(
            model, args, calibration=[BATCH] if calibration is None else calibration, **options
        )


def _leaves(output: Any) -> list[Any]:
    return [
        torch.view_as_real(leaf) if isinstance(leaf, Tensor) and leaf.is_complex() else leaf
        for leaf in pytree.tree_leaves(output)
    ]


def _assert_same(found: Any, expected: Any) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for a, b in zip(_leaves(found), _leaves(expected), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        else:
            assert a == b


def _differ(found: Any, dense: Any) -> bool:
    return any(
        isinstance(a, Tensor) and not torch.allclose(a, b, atol=100 * TOLERANCE)
        for a, b in zip(_leaves(found), _leaves(dense))
    )


def _exact(
    model: nn.Module, *calls: tuple[Any, ...], args: tuple[Any, ...] | None = None, **options: Any
) -> fasp_fx.Result:
    """Prune and compare several calls in a row with the dense model whose consumers' removed columns are
    zero: outputs, effects on the arguments, and buffers.
    """
    calls = calls or (args or (X,),)
    result = _prune(model, args or calls[0], **options)
    assert result.plan.groups
    dense, reference = copy.deepcopy(model), zeroed(model, result.plan)
    differs = False
    with torch.no_grad():
        for call in calls:
            mine, theirs = copy.deepcopy(call), copy.deepcopy(call)
            expected = reference(*theirs)
            _assert_same(result.module(*mine), expected)
            _assert_same(mine, theirs)
            differs |= _differ(expected, dense(*copy.deepcopy(call)))
    assert differs, "masking changes nothing that can be seen"
    own = dict(result.module.named_buffers())
    for name, buffer in reference.named_buffers():
        if name in own and own[name].shape == buffer.shape:
            torch.testing.assert_close(own[name], buffer)
    return result


# --- one table of models, and what becomes of each


class Odd(NamedTuple):
    """A model that is pruned exactly; ``reason``: or left whole with this one."""

    make: Callable[[], nn.Module]
    args: tuple[Any, ...] = (X,)
    batch: tuple[Any, ...] = (BATCH,)
    calls: tuple[Any, ...] = ()
    reason: str | None = None


def _with(model: nn.Module, *changes: Callable[[Any], Any]) -> nn.Module:
    for change in changes:
        change(model)
    return model.eval()


def _run(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model(X)
    return model


def _double(*given: Any) -> Any:
    return 2 * given[-1]


def _halve(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] / 2,)


def _averages(self: Any, x: Tensor) -> Tensor:
    """A count and a running mean of what it saw."""
    self.count.add_(1)
    self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
    return block(self, x + self.mean) * self.count


def _hidden_mean(self: Any, x: Tensor) -> Tensor:
    """A buffer as wide as the hidden layer."""
    hidden = torch.relu(self.up(x))
    self.mean.mul_(0.9).add_(hidden.mean(0) * 0.1)
    return self.down(hidden - self.mean)


def _regions(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = self.up(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        hidden = torch.relu(hidden)
    return torch.utils.checkpoint.checkpoint(self.down, hidden, use_reentrant=False)


def _loops(self: Any, x: Tensor) -> Tensor:
    """A loop of which export makes one operator, beside a layer that can be pruned."""

    def step(count: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return count + 1, self.inside(state).tanh()

    looped = torch._higher_order_ops.while_loop(lambda count, _: count < 3, step, (torch.tensor(0), x))
    return looped[1] + block(self, x)


def _complex(inside: bool) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = self.up(x.to(torch.complex64))
        out = self.down(hidden * hidden)
        return out.real if inside else out

    return wide(
        forward,
        up=nn.Linear(6, 24, dtype=torch.complex64),
        down=nn.Linear(24, 6, dtype=torch.complex64),
    )


class Mode(enum.Enum):
    RELU = 1
    TANH = 2


class Pair(NamedTuple):
    value: Tensor
    extra: Tensor | None


def _options(
    self: Any,
    x: Tensor,
    mode: Mode = Mode.RELU,
    scale: float = 2.0,
    function: Any = torch.relu,
    *,
    count: int | None = None,
) -> Tensor:
    hidden = self.up(x) * scale
    return self.down(function(hidden) if mode is Mode.RELU else torch.tanh(hidden))[:count]


def _nested(self: Any, data: dict[str, Any]) -> Tensor:
    return block(self, data["x"]) * data.get("k", 1)


def _images(self: Any, images: list[Tensor]) -> list[Tensor]:
    return [block(self, image) for image in images]


def _returning(wrap: Callable[[Tensor], Any]) -> nn.Module:
    return wide(lambda self, x: wrap(block(self, x)))


COMPLEX = {count: torch.randn(count, 6, dtype=torch.complex64) for count in (4, 40, 2000)}
OPTIONS = [(), (Mode.TANH, 3), (Mode.TANH, 3.0), (Mode.RELU, 2.0, torch.sigmoid)]
CALLS = ((X,), (2 * X,), (X - 1,))
ODD: dict[str, Odd] = {
    "lazy, run once": Odd(lambda: _run(stack(nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(6)))),
    "lazy norm, run once": Odd(
        lambda: _run(stack(nn.LazyLinear(24), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(6))),
        reason="no rule",
    ),
    "hook after the model": Odd(
        lambda: _with(Vectors(), lambda m: m.register_forward_hook(_double, with_kwargs=True))
    ),
    "hook that is always called": Odd(
        lambda: _with(Vectors(), lambda m: m.register_forward_hook(_double, always_call=True))
    ),
    "hook before the model": Odd(
        lambda: _with(
            Vectors(),
            lambda m: m.register_forward_pre_hook(lambda m, a, k: ((a[0] / 2,), k), with_kwargs=True),
        )
    ),
    "hooks of the layers": Odd(
        lambda: _with(
            Vectors(),
            lambda m: m.up.register_forward_hook(_double),
            lambda m: m.down.register_forward_pre_hook(_halve),
        )
    ),
    "hooks of other things": Odd(
        lambda: _with(
            Vectors(),
            lambda m: m.up.register_full_backward_hook(lambda *given: None),
            lambda m: m.register_state_dict_post_hook(lambda *given: None),
        )
    ),
    "orthogonal": Odd(lambda: _with(Vectors(), lambda m: parametrizations.orthogonal(m.up)), reason="aten."),
    "weights masked in a hook": Odd(
        lambda: _run(_with(Vectors(), lambda m: prune.random_unstructured(m.up, "weight", 0.3))),
        reason="aten.",
    ),
    "eight bits": Odd(
        lambda: wide(
            lambda self, x: F.linear(torch.relu(self.up(x)), self.table.float() * self.scale),
            table=torch.randint(-128, 127, (6, 24), dtype=torch.int8),
            scale=torch.rand(6, 1) / 128,
        ),
        reason="computed from weights",
    ),
    "complex": Odd(lambda: _complex(False), (COMPLEX[4],), (COMPLEX[40],)),
    "complex inside": Odd(lambda: _complex(True)),
    "scales its input": Odd(lambda: wide(lambda self, x: block(self, x.mul_(2)))),
    "writes into its input": Odd(lambda: wide(lambda self, x: x.add_(block(self, x)))),
    "returns its input": Odd(lambda: wide(lambda self, x: (x, block(self, x)))),
    "a buffer of hidden channels": Odd(
        lambda: wide(_hidden_mean, mean=torch.zeros(24)), calls=CALLS[:2], reason=""
    ),
    "running mean": Odd(lambda: wide(_averages, count=torch.zeros(1), mean=torch.zeros(6)), calls=CALLS),
    **{
        f"options {number}": Odd(lambda: wide(_options), (X, *options), ((BATCH, *options),))
        for number, options in enumerate(OPTIONS)
    },
    "a list": Odd(lambda: wide(_images), ([X, X[:2]],), (([BATCH, BATCH],),)),
    "a dict": Odd(lambda: wide(_nested), ({"x": X, "k": 2},), (({"x": BATCH, "k": 2},),)),
    "returns constants": Odd(
        lambda: _returning(
            lambda out: {"out": out, "none": None, "n": 3, "text": "text", "nested": [1, (out.sum(),)]}
        )
    ),
    "returns a pair": Odd(lambda: _returning(lambda out: Pair(out, None))),
    "regions of gradient, autocast and checkpointing": Odd(lambda: wide(_regions)),
    "a loop": Odd(lambda: wide(_loops, inside=nn.Linear(6, 6)), calls=((X,), (torch.randn(5, 6),))),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_pruned_exactly_or_left_for_a_reason(name: str) -> None:
    odd = ODD[name]
    model = odd.make()
    given = copy.deepcopy((odd.args, odd.batch))
    reason = ""
    try:
        _exact(model, *odd.calls, args=odd.args, calibration=[*odd.batch])
    except fasp_fx.NothingPrunableError as error:
        if odd.reason is None:
            raise
        reason = str(error)
    assert not reason or str(odd.reason) in reason
    _assert_same((odd.args, odd.batch), given)


# --- models that are refused


@dataclasses.dataclass
class Unknown:
    value: Tensor


#: what makes the model, the error, and what it says
REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str | None]] = {
    "lazy": (
        lambda: stack(nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(6)),
        fasp_fx.FaspError,
        "uninitialized",
    ),
    "lazy norm": (
        lambda: stack(nn.Linear(6, 24), nn.LazyBatchNorm1d(), nn.Linear(24, 6)),
        fasp_fx.FaspError,
        "uninitialized",
    ),
    "output of an unknown class": (lambda: _returning(Unknown), fasp_fx.CaptureError, "Unknown"),
    "returns hidden channels": (
        lambda: wide(lambda self, x: (hidden := torch.relu(self.up(x)), self.down(hidden))),
        fasp_fx.NothingPrunableError,
        "reaches output 0",
    ),
    "returns a weight": (
        lambda: wide(lambda self, x: (self.up.weight, block(self, x))),
        fasp_fx.NothingPrunableError,
        "reaches output 0",
    ),
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


# --- calls that are refused


class Settings:
    """Says nothing of when two are equal."""

    def __init__(self, scale: float, steps: list[Any]) -> None:
        self.scale, self.steps = scale, steps


def _set(self: Any, x: Tensor, settings: Any = None) -> Tensor:
    hidden = self.up(x).relu() * settings.scale
    for step in settings.steps:
        hidden = hidden.tanh() if step is True else hidden * step
    return self.down(hidden)


ONE, TWO = {"x": X}, {"x": X, "k": 2}
#: forward, example, calls that are refused, and what the refusal says
CALLED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[tuple[Any, ...]], str | None]] = {
    "options": (
        _options,
        (X, Mode.TANH, 3.0),
        [(X, Mode.RELU, 2.5), (X, Mode.TANH, 2.5), (X, Mode.TANH, 3.0, torch.tanh)],
        "captured with",
    ),
    "a list": (_images, ([X, X[:2]],), [([X, X, X],), ([X],), (X,)], None),
    "a dict": (_nested, (ONE,), [({"x": X, "k": 3},), ({"y": X},)], None),
    "a dict with a constant": (_nested, (TWO,), [({"x": X, "k": 3},)], None),
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
    result = _prune(wide(forward), example, [pytree.tree_map(lambda leaf: leaf, example)])
    result.module(*example)
    for other in others:
        with pytest.raises(fasp_fx.CallError, match=says):
            result.module(*other)
    if forward is _set:
        example[-1].scale = 3.0  # the caller changes what is inside of a constant
        with pytest.raises(fasp_fx.CallError, match="captured with"):
            result.module(*example)


def _lenient(self: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Reads a mask of any kind, each in its own way."""
    hidden = self.up(x).relu()
    masked = hidden.masked_fill(mask[:, None], 0.5) if mask.dtype == torch.bool else hidden + mask[:, None]
    return self.down(masked)


@pytest.mark.parametrize("example", [torch.bool, torch.int64, torch.float32])
def test_tensors_of_another_kind_are_refused(example: torch.dtype) -> None:
    masks = [(torch.arange(len(x)) % 2).to(example) for x in (X, BATCH)]
    result = _prune(wide(_lenient), (X, masks[0]), [(BATCH, masks[1])])
    for call in (result.module, torch.compile(result.module, backend="eager")):
        call(X, masks[0])
        for other in {torch.bool, torch.int64, torch.float32} - {example}:
            with pytest.raises(fasp_fx.CallError, match=f"'mask' is a tensor of .*{other}"):
                call(X, masks[0].to(other))


# --- weights that no module multiplies


def _assigns(self: Any, x: Tensor) -> Tensor:
    """Values are assigned to positions of a sequence, wherever a mask is true, and to channels of an empty
    tensor.
    """
    hidden = self.up(x).clone()
    hidden[:, 1:] += self.mix(hidden[:, :-1])
    hidden[:, 0] = hidden[:, 0] * 2
    hidden[:, -1] = 0
    hidden[hidden > 1] = 0.5
    hidden[x.sum(-1) > 3] = 1
    shifted = torch.zeros_like(hidden)
    shifted[:, 1:, :4] = hidden[:, :-1, :4]
    shifted[:, :, 4:] = hidden[:, :, 4:]
    return self.down(torch.relu(shifted))


def _modes(self: Any, x: Tensor) -> Tensor:
    """The lowest frequencies are mixed by complex weights and assigned to an empty spectrum."""
    spectrum = torch.fft.rfft(self.up(x).transpose(1, 2))
    out = torch.zeros_like(spectrum)
    out[..., :3] = torch.einsum("bim,iom->bom", spectrum[..., :3], self.weight)
    return self.down(F.gelu(torch.fft.irfft(out, n=x.shape[1]).transpose(1, 2)))


def _mixed_by_head(self: Any, x: Tensor) -> Tensor:
    """Tokens mixed by a matrix for every head, each scaled by a factor."""
    heads = self.up(x).unflatten(-1, (3, 4))
    return self.down((torch.einsum("hts,bshd->bthd", self.mix, heads) * self.scale).flatten(-2))


class Cut(NamedTuple):
    """A model, calls of it, the options, and names that are among what loses rows or columns."""

    make: Callable[[], nn.Module]
    calls: tuple[tuple[int, ...], ...]
    names: set[str]
    options: Mapping[str, Any] = types.MappingProxyType({})


WEIGHTS: dict[str, Cut] = {
    "a matrix for every position of a plane": Cut(
        lambda: made(
            lambda self, x: self.last(
                torch.relu(torch.einsum("bixy,ioxy->boxy", self.first(x).relu(), self.weight))
            ),
            first=nn.Conv2d(3, 6, 1),
            last=nn.Conv2d(8, 2, 1),
            weight=parameter(6, 8, 3, 3),
        ),
        ((2, 3, 3, 3), (4, 3, 3, 3)),
        set(),
    ),
    "assignments to slices": Cut(
        lambda: wide(_assigns, hidden=12, mix=nn.Linear(12, 12)),
        ((3, 5, 6), (2, 7, 6)),
        {"mix.weight", "down.weight"},
    ),
    "a bilinear layer": Cut(
        lambda: made(
            lambda self, x: self.down(torch.relu(self.both(x, x.tanh()))),
            both=nn.Bilinear(6, 6, 12),
            down=nn.Linear(12, 6),
        ),
        ((3, 6), (7, 6)),
        {"both.weight", "both.bias"},
    ),
    "a Fourier layer": Cut(
        lambda: wide(_modes, hidden=8, weight=parameter(8, 8, 3, scale=1 / 3, dtype=torch.complex64)),
        ((3, 8, 6), (2, 8, 6)),
        {"down.weight"},
    ),
    **{
        f"heads, {sparsity} of each gone": Cut(
            lambda: wide(_mixed_by_head, hidden=12, mix=parameter(3, 5, 5), scale=parameter(3, 1)),
            ((3, 5, 6), (2, 5, 6)),
            set(),
            {"sparsity": sparsity},
        )
        for sparsity in (0.75, 0.5)
    },
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_no_module_multiplies(name: str) -> None:
    make, calls, names, options = WEIGHTS[name]
    model, given = make(), [(torch.randn(*shape),) for shape in calls]
    result = _exact(model, *given, **options)
    parts = [part for group in result.plan.groups for part in (*group.producers, *group.consumers)]
    assert {part.name for part in parts} >= names
    if name.startswith("heads"):  # one channel is left of each
        assert result.plan.sparsity == pytest.approx(options["sparsity"])
