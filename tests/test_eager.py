"""The caller's own module, smaller: held against dense ones with masked weights."""

import contextlib
import copy
import random
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROFILE
from models import block, made, randomise, wide
from oracle import zeroed
from torch import Tensor, nn

import fasp_fx
from fasp_fx.capturing import capture
from fasp_fx.errors import ArgumentError, CallError, EagerError, NothingPrunableError, PlanError
from fasp_fx.passes import finish
from fasp_fx.pruning._eager import first_difference
from fasp_fx.testing.oracle import Masked, error

TOLERANCE = 1e-5
HEADS: dict[str, Any] = {"granularity": ("channel", "head")}


def pruned(model: nn.Module, x: Any, sparsity: float = 0.3, **options: Any) -> fasp_fx.Result:
    """The model without channels drawn at random; ``x`` is its input, or a mapping of inputs by name."""
    chosen = {"score": "random", "restore": None, "allocation": "uniform", **options}
    args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
    return fasp_fx.prune(model.eval(), args, kwargs, sparsity=sparsity, **chosen)


def snapshot(model: nn.Module) -> dict[Any, Any]:
    """The values of all tensors of a model, and its plain attributes."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    plain = {
        (path, name): value
        for path, inner in model.named_modules()
        for name, value in vars(inner).items()
        if isinstance(value, (int, tuple, float))
    }
    return {**tensors, **plain}


def same(before: dict[Any, Any], after: dict[Any, Any]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(a, after[k]) if isinstance(a, Tensor) else a == after[k] for k, a in before.items()
    )


def storages(module: nn.Module) -> set[int]:
    tensors = [*module.parameters(), *module.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def apart(found: Callable[..., Any], expected: Callable[..., Any], x: Any) -> float:
    """How far the outputs of two modules are apart, by the largest value."""
    if isinstance(x, dict):
        return error(found(**x), expected(**x))
    return error(found(x), expected(x))


# --- models


def _view(m: Any, made: Tensor, x: Tensor) -> Tensor:
    return made.view(*made.shape[:2], m.num_heads, -1).transpose(1, 2)


def _divided(m: Any, made: Tensor, x: Tensor) -> Tensor:
    return m.divide(made)


def _fixed(m: Any, made: Tensor, x: Tensor) -> Tensor:
    """One width for queries and values."""
    return made.view(*made.shape[:2], m.num_heads, 8).transpose(1, 2)


def _unflattened(m: Any, made: Tensor, x: Tensor) -> Tensor:
    return made.unflatten(-1, (m.num_heads, m.width)).transpose(1, 2)


def _derived(m: Any, made: Tensor, x: Tensor) -> Tensor:
    """As in torchvision's Swin: the width of a head is that of the input over the number of heads."""
    return made.view(*made.shape[:2], m.num_heads, x.shape[-1] // m.num_heads).transpose(1, 2)


def attention(heads: Callable[..., Tensor] = _view, **held: Any) -> nn.Module:
    """Its views go wrong in silence where the number of heads is not that of the channels."""

    def forward(m: Any, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*(heads(m, part(x), x) for part in (m.q, m.k, m.v)))
        return m.o(mixed.transpose(1, 2).reshape(*x.shape[:2], m.inner))

    layers = {name: nn.Linear(32, 32) for name in "qkvo"}
    return made(forward, **layers, inner=32, **(held or {"num_heads": 4}))


def divided() -> nn.Module:
    """A module has the size, and no weight."""
    divide = made(lambda m, x: x.view(*x.shape[:2], m.parts, -1).transpose(1, 2), parts=4)
    return attention(_divided, divide=divide)


def residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + m.attention(m.norm(x))
        return x + m.mlp(x)

    layers = nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 32)
    return made(forward, norm=nn.LayerNorm(32), attention=attention(), mlp=nn.Sequential(*layers))


def mlp() -> nn.Module:
    """With a buffer, a tensor that is none, and numbers of the hidden width that no graph needs."""

    def forward(m: Any, x: Tensor) -> Tensor:
        assert len(x) <= m.longest
        return m.down(F.relu(m.up(x) * m.gate + m.bend))

    model = wide(forward, size=8, hidden=32, gate=torch.rand(32), longest=32)
    model.bend = torch.rand(32)
    return model


def tied() -> nn.Module:
    table, down = nn.Embedding(20, 16), nn.Linear(32, 16)
    head = nn.Linear(16, 20, bias=False)
    head.weight = table.weight

    def forward(m: Any, ids: Tensor) -> Tensor:
        x = m.table(ids)
        return m.head(x + m.again(F.relu(m.up(x + m.down(F.relu(m.up(x)))))))

    return made(forward, table=table, up=nn.Linear(16, 32), down=down, head=head, again=down)


def held() -> nn.Module:
    """Keeps a function that holds on to the module itself, which a copy of the module has as well."""
    gain = nn.Parameter(torch.rand(8) + 1)
    model = wide(lambda m, x: m.change(block(m, x)), 8, 32, gain=gain, calls=torch.zeros(()))

    def change(found: Tensor) -> Tensor:
        model.calls += 1
        return found * model.gain

    model.change = change
    return model


class Single(nn.Sequential):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise TypeError("there is only one")


# --- copies


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(shape[0]))


ROWS, SEQUENCE = (drawn(3, 8), drawn(7, 8)), (drawn(2, 5, 32), drawn(3, 7, 32))
#: models, an example and another input, and options
COPIES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, Any], dict[str, Any]]] = {
    "vectors": (mlp, ROWS, {}),
    "a module without weights": (lambda: nn.Sequential(divided(), nn.LayerNorm(32)), SEQUENCE, HEADS),
    "heads unflattened": (lambda: attention(_unflattened, num_heads=4, width=8), SEQUENCE, HEADS),
    "ties": (tied, (ids(2, 5), ids(3, 7)), {}),
}


@pytest.mark.parametrize("name", COPIES)
def test_sizes_are_found_wherever_a_class_has_them(name: str) -> None:
    make, inputs, options = COPIES[name]
    model = randomise(make())
    before = snapshot(model)
    result = pruned(model, inputs[0], **options)
    small, masked = result.eager(model), Masked(model, result.plan)
    for x in inputs:
        assert apart(small, masked, x) < TOLERANCE
    assert type(small) is type(model)
    assert size(small) == size(result.module) < size(model)
    assert same(before, snapshot(model))
    assert not storages(small) & (storages(model) | storages(result.module))
    again = copy.deepcopy(small)
    again.load_state_dict(small.state_dict())
    assert apart(again, small, inputs[1]) < 1e-6
    if isinstance(inputs[1], Tensor):
        small.train()(inputs[1]).sum().backward()
    if name == "vectors":
        assert small.up.out_features == small.down.in_features == len(small.gate) == len(small.bend) < 32
        assert small.longest == 32, "no graph needs it"
    if name == "ties":
        assert small.table.weight is small.head.weight
        assert small.again is small.down
        assert small.table.embedding_dim == small.head.in_features == small.table.weight.shape[1]


def test_blocks_lose_heads_of_their_own_and_a_loaded_result_says_so_too(tmp_path: Path) -> None:
    """Every block loses another number of heads."""
    model, x = randomise(nn.Sequential(*(residual() for _ in range(2)))), torch.randn(2, 5, 32)
    captured = fasp_fx.capture(model, (x,))
    lost = {
        "0.attention.o.weight": [1],
        "1.attention.o.weight": [0, 3, 2],
        "0.mlp.4.weight": range(7),
    }
    plan = fasp_fx.plan_from_sets(captured, lost, **HEADS)
    loaded = fasp_fx.load(fasp_fx.apply(captured, plan).save(tmp_path / "out"))
    small, masked = loaded.eager(model), zeroed(model, plan)
    assert [each.attention.num_heads for each in small] == [3, 1]
    assert [each.attention.inner for each in small] == [24, 8]
    assert small[0].mlp[1].out_features == small[0].mlp[4].in_features == 57
    for tokens in (5, 9):
        assert apart(small, masked, torch.randn(3, tokens, 32)) < TOLERANCE


def fused() -> nn.Module:
    """Queries, keys and values in one matrix, head by head."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(*x.shape[:2], -1, 3, m.head_dim).permute(3, 0, 2, 1, 4)
        return m.o(F.scaled_dot_product_attention(q, k, v, scale=m.scale).transpose(1, 2).flatten(2))

    return made(forward, qkv=nn.Linear(32, 96), o=nn.Linear(32, 32), head_dim=8, scale=8**-0.5)


@pytest.mark.parametrize("equal", [True, False])
def test_a_fused_weight_is_put_together_where_its_parts_lose_equally(equal: bool) -> None:
    model, x = randomise(fused()), torch.randn(2, 5, 32)
    captured = fasp_fx.capture(model, (x,))
    analysis = fasp_fx.analyze(captured, include=("exempt",))
    groups = [group for group in analysis.groups if group.status in ("prunable", "exempt")]
    assert len(groups) == 2
    lost = {
        group.name: np.concatenate(
            [np.flatnonzero(group.block_of == block)[:count] for block in np.unique(group.block_of)]
        ).tolist()
        for group, count in zip(groups, [3, 3 if equal else 2])
    }
    plan = fasp_fx.plan_from_sets(captured, lost, include=("exempt",))
    result = fasp_fx.apply(captured, plan)
    assert result.plan.splits
    if not equal:
        with pytest.raises(EagerError, match="whole heads"):
            result.eager(model)
        return
    small = result.eager(model)
    assert (small.head_dim, small.qkv.out_features) == (5, 60)
    assert apart(small, zeroed(model, plan, producers=True), x) < TOLERANCE


# --- what is refused

READS = r"of the given model.*make it a method"
APPROXIMATE, EXEMPT = {"include": ("approximate",)}, {"include": ("exempt",), "sparsity": 0.4}
#: models, an example, options and what is said
REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "heads of two widths": (
        lambda: attention(_fixed),
        SEQUENCE[0],
        {},
        r"of <made> .*RuntimeError: shape .* use result.module, prune whole heads",
    ),
    "heads whose width follows from the input": (
        lambda: nn.Sequential(attention(_derived), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 4)),
        SEQUENCE[0],
        HEADS,
        r"'0' .*exclude=",
    ),
    "narrower heads, an implicit scale": (attention, SEQUENCE[0], EXEMPT, "scaled_dot_product_attention"),
    "computed in every call": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(8, 32)), nn.ReLU(), nn.Linear(32, 4)
        ),
        ROWS[0],
        {},
        r"'0.*fails.*use result.module",
    ),
    "a mean over the dense count": (
        lambda: nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 4)),
        ROWS[0],
        APPROXIMATE,
        "layer_norm",
    ),
    # It computes what it should, until either of them is trained.
    "a function of the model": (held, ROWS[0], {}, f"read '(calls|gain)' {READS}"),
    "no copy": (
        lambda: Single(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)),
        ROWS[0],
        {},
        r"cannot be copied .*there is only one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_copy_that_would_be_wrong_is_refused(name: str) -> None:
    make, x, options, said = REFUSED[name]
    model = make().eval()
    before = snapshot(model)
    result = pruned(model, x, **options)
    with pytest.raises(EagerError, match=said):
        result.eager(model)
    assert same(before, snapshot(model))


def test_another_model_is_refused() -> None:
    model = mlp()
    result = pruned(model, ROWS[0])
    given: list[tuple[Any, type[Exception], str]] = [
        (wide(lambda m, x: x, 8, 31), PlanError, "another model"),
        (result.eager(model), PlanError, "already applied"),
        (result.program, ArgumentError, "pass the module that was pruned"),
    ]
    for other, kind, said in given:
        with pytest.raises(kind, match=said):
            result.eager(other)


# --- the result as it is now, and whose it is


class Marked(nn.Parameter):
    """A parameter of the user's own class."""


class Remade(nn.Module):
    """Is copied by being made anew, as layers are that keep how they were made."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return type(self)()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def test_weights_are_those_of_the_result_and_flags_and_classes_those_of_the_model() -> None:
    layers = nn.Linear(8, 32), nn.BatchNorm1d(32), Remade(), nn.Linear(32, 4)
    model, x = nn.Sequential(*layers), torch.randn(6, 8)
    model[0].bias.requires_grad_(False)
    model[0].weight, model[3].weight.decays = Marked(model[0].weight.detach()), False
    result = pruned(model, x)
    model.train()[2].eval()
    result.module.get_parameter("3.weight").detach().mul_(2)
    small = result.eager(model)
    assert [small.training, *(layer.training for layer in small)] == [True, True, True, False, True]
    assert [p.requires_grad for p in small.parameters()] == [True, False, True, True, True, True]
    assert torch.equal(small[3].weight, result.module.get_parameter("3.weight"))
    assert apart(copy.deepcopy(small).eval(), result.module, x) < TOLERANCE
    assert int(small[1].num_batches_tracked) == 0
    assert (type(small[0].weight), type(small[3].weight)) == (Marked, nn.Parameter)
    assert small[3].weight.decays is False


def test_hooks_methods_and_unused_submodules_come_along() -> None:
    held = {"gain": nn.Parameter(torch.rand(8) + 1), "spare": nn.Linear(32, 32)}
    model: Any = wide(lambda m, x: m.change(block(m, x)), 8, 32, **held)
    model.change = MethodType(lambda m, found: found * m.gain, model)
    x, calls = torch.randn(3, 8), []
    result = pruned(model, x)
    model.up.register_forward_hook(lambda module, args, output: calls.append(module))
    small = result.eager(model)
    calls.clear()
    small(x).sum().backward()
    assert calls == [small.up]
    assert torch.equal(small.spare.weight, model.spare.weight)
    assert small.get_parameter("gain").grad is not None
    assert model.gain.grad is None


# --- any net


# --- attributes that are widths, and something else


CLOSE = 1e-4
#: widths that arrive as they are at an operator
SEEN = ("view", "norm", "expanded", "zeros", "none")
#: what reads the caller's model, and what an exporter does not assume the same of in every capture: strides
REFUSED_WAYS = ("held", "strided")
#: modules that are drawn
COUNT = 500 if PROFILE == "slow" else 8


def _widths() -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """Ways in which ``f`` is the width of the hidden layer, by name."""
    return {
        "view": lambda m, h: h.reshape(h.shape[0], -1, m.f),
        "half": lambda m, h: h.reshape(*h.shape[:2], 2, m.f // 2).flatten(2),
        "halves": lambda m, h: torch.cat(h.split([m.f // 2, m.f // 2], -1), -1),
        "norm": lambda m, h: F.layer_norm(h, (m.f,)) if m.normed else h.view(*h.shape[:-1], m.f),
        "expanded": lambda m, h: h * m.gain.expand(m.f),
        "zeros": lambda m, h: h + h.new_ones(m.f),
        "added": lambda m, h: F.pad(h, (0, 3)).view(*h.shape[:-1], m.f + 3)[..., : m.f],
        "flat": lambda m, h: h.view(h.shape[0] * m.f, -1).view(h.shape),
        "asked": lambda m, h: h if h.shape[-1] == m.f else h * 2,
        "none": lambda m, h: h,
    }


def _others() -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """What the number ``g`` is besides, by name; it is ``f`` itself, or another attribute of that value."""
    return {
        "window": lambda m, x: F.pad(x[:, -m.g :], (0, 0, 0, 2)),
        "window of a sum": lambda m, x: x[:, : m.g + 2],
        "modulus": lambda m, x: x * (torch.arange(x.shape[1]) % m.g)[:, None],
        "least": lambda m, x: x * min(x.shape[1], m.g),
        "most": lambda m, x: x[:, : max(x.shape[1] - m.g, 3)],
        "clamped": lambda m, x: (8 * x).clamp(-m.g, m.g),
        "threshold": lambda m, x: x * ((30 * x).abs() > m.g),
        "long": lambda m, x: x.flip(1) if x.shape[1] > m.g - 4 else x,
        "many": lambda m, x: x.flip(0) if x.shape[0] < m.g - 30 else x,
        "strided": lambda m, x: x[:, :: max(1, m.g // 20)],
        "scale": lambda m, x: x * m.g**-0.5,
        "divided": lambda m, x: x / m.g,
        "band": lambda m, x: torch.ones(m.g, m.g).tril()[: x.shape[1], : x.shape[1]] @ x,
        "table": lambda m, x: x + torch.arange(m.g).float()[: x.shape[1], None],
        "near": lambda m, x: (
            ((torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs() < m.g).float() @ x
        ),
        "flag": lambda m, x: x.tanh() if m.g > 40 else x,
        "equal": lambda m, x: x.tanh() if m.g == 48 else x,
        "repeated": lambda m, x: x.repeat(1, max(1, m.g // 24), 1),
        "chosen": lambda m, x: x[:, (torch.arange(3) * m.g) % x.shape[1]],
        "topped": lambda m, x: x.topk(min(m.g, x.shape[-1] // 2), -1).values.repeat(1, 1, 2),
        "held": lambda m, x: m.kept(x),
        "nothing": lambda m, x: x,
    }


class Drawn(nn.Module):
    """A feed-forward net over sequences.

    Args:
        seed: what it is drawn by.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        drawn = random.Random(seed)
        self.width, self.other = drawn.choice(sorted(_widths())), drawn.choice(sorted(_others()))
        width = drawn.choice([40, 48, 64])
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        self.gain, self.normed = nn.Parameter(torch.rand(1) + 1), False
        self.held, self.value, self.apart = drawn.random() < 0.7, width, drawn.random() < 0.4
        self.limit = width  # what g is where it is apart
        drop = drawn.random() < 0.5
        owner = self

        def kept(x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, owner.training) if drop else x * owner.gain

        self.kept = kept if self.other == "held" else None

    @property
    def f(self) -> int:
        return self.value if self.held else self.up.out_features

    @property
    def g(self) -> int:
        return self.limit if self.apart else self.f

    def forward(self, x: Tensor) -> Tensor:
        x = _others()[self.other](self, x)
        return x + self.down(_widths()[self.width](self, self.up(x).relu()))


def _calls() -> list[Tensor]:
    """Inputs of lengths and batches on both sides of any attribute's old and new value."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 5), (3, 7), (6, 12), (20, 30), (2, 34), (12, 44), (2, 47), (3, 61), (25, 70)]
    return [torch.randn(*size, 8, generator=generator) for size in sizes]


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_copy_is_right_wherever_it_and_the_program_run(seed: int) -> None:
    torch.manual_seed(seed)
    model = Drawn(seed).eval()
    try:
        result = fasp_fx.prune(
            model, (torch.randn(2, 6, 8),), sparsity=0.3, score="random", restore=None, round_to=2
        )
    except NothingPrunableError:
        return
    try:
        copy = result.eager(model)
    except EagerError:
        is_one_size = model.apart or model.other == "nothing"
        assert model.other in REFUSED_WAYS or model.width not in SEEN or not is_one_size
        return
    assert model.other != "held", "it reads the caller's model"
    masked, compared = Masked(model, result.plan), 0
    for x in _calls():
        with torch.no_grad(), contextlib.suppress(CallError):
            expected = result.module(x)
            compared += 1
            assert error(expected, masked(x)) < CLOSE
            assert error(copy(x), expected) < CLOSE
    assert compared


def computing(of: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """What a function makes of a layer's output and of some counts."""
    torch.manual_seed(0)
    return made(lambda m, x, counts: of(m.layer(x), counts), layer=nn.Linear(8, 12))


def _scaled(hidden: Tensor, first: Tensor, second: Tensor, which: int) -> Tensor:
    return (hidden + first + second) * (first, second)[which].item()


#: functions each of which differs from the one before it in one thing
UNLIKE: dict[str, list[Callable[[Tensor, Tensor], Tensor]]] = {
    "constant": [lambda h, n: h * 0.5, lambda h, n: h * 0.25],
    "constant of a coarse type": [
        lambda h, n, value=value: h.bfloat16() * torch.tensor(value, dtype=torch.bfloat16)
        for value in (0.25, 0.316)
    ],
    "wiring": [lambda h, n: h.sin() - h, lambda h, n: h - h.sin()],
    "operator": [lambda h, n: h.sin(), lambda h, n: h.cos()],
    "parts": [lambda h, n: h.chunk(2, -1)[0].sin(), lambda h, n: h.chunk(2, -1)[1].sin()],
    "sizes of parts": [lambda h, n: h.split([4, 8], -1)[1], lambda h, n: h.split([8, 4], -1)[1]],
    "window": [lambda h, n: h[:, -3:], lambda h, n: h[:, -2:]],
    "position": [lambda h, n: h[..., 1], lambda h, n: h[..., -1]],
    "shape": [
        lambda h, n: h.view(*h.shape[:2], 3, 4).sum(-1),
        lambda h, n: h.view(*h.shape[:2], 4, 3).sum(-1),
    ],
    "size": [lambda h, n: h * h.shape[0], lambda h, n: h * h.shape[1]],
    "number of data": [lambda h, n: _scaled(h, n[0], n[1], 0), lambda h, n: _scaled(h, n[0], n[1], 1)],
    "guard": [lambda h, n: h if h.shape[1] < 20 else h.sin(), lambda h, n: h if h.shape[1] < 19 else h.sin()],
    "new values": [lambda h, n: h + torch.ones(12), lambda h, n: h + torch.zeros(12)],
}


@pytest.mark.parametrize("what", UNLIKE)
def test_programs_that_differ_in_one_thing_are_told_apart(what: str) -> None:
    one, other, again = (
        finish(capture(computing(of), (torch.randn(2, 6, 8), torch.tensor([3, 4, 5]))))
        for of in (*UNLIKE[what], UNLIKE[what][0])
    )
    pairs = (one, again), (one, other), (other, one)
    assert [first_difference(*pair) is None for pair in pairs] == [True, False, False]
