"""The caller's own module, smaller: held against dense ones with masked weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import EXAMPLES
from corpus.forking import Forks, X
from hypothesis import given, settings, strategies as st
from models import block, made, randomise, wide
from oracle import zeroed
from torch import Tensor, nn

import fasp_fx
from fasp_fx.errors import ArgumentError, EagerError, PlanError
from fasp_fx.testing import build, example, programs
from fasp_fx.testing._case import Case
from fasp_fx.testing._verdict import Skipped
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


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, vocab_size=96, **SIZES))


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(vocab_size=96, **SIZES))


def held() -> nn.Module:
    """Keeps a function that holds on to the module itself, which a copy of the module has as well."""
    gain = nn.Parameter(torch.rand(8) + 1)
    model = wide(lambda m, x: m.change(block(m, x)), 8, 32, gain=gain, calls=torch.zeros(()))

    def change(found: Tensor) -> Tensor:
        model.calls += 1
        return found * model.gain

    model.change = change
    return model


def language_model() -> nn.Module:
    """Its states begin with zeros of its own sizes."""

    def forward(m: Any, ids: Tensor) -> Tensor:
        states = (torch.zeros(m.layers, ids.shape[1], m.hidden) for _ in range(2))
        return m.decoder(m.lstm(m.table(ids), tuple(states))[0])

    layers = {"table": nn.Embedding(20, 12), "lstm": nn.LSTM(12, 16, 2), "decoder": nn.Linear(16, 20)}
    return made(forward, **layers, layers=2, hidden=16)


class Single(nn.Sequential):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise TypeError("there is only one")


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(8, 32)), nn.ReLU(), nn.Linear(32, 4))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)


# --- copies


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(shape[0]))


ROWS, SEQUENCE = (drawn(3, 8), drawn(7, 8)), (drawn(2, 5, 32), drawn(3, 7, 32))
TEXTS = ({"input_ids": ids(2, 7)}, {"input_ids": ids(3, 9)})


def counting() -> nn.Module:
    """Remembers how often it was called."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return block(m, x) * m.calls

    return wide(forward, 8, 32, calls=torch.zeros(()))


#: models, an example and another input, and options
COPIES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, Any], dict[str, Any]]] = {
    "vectors": (mlp, ROWS, {}),
    "what remembers": (counting, ROWS, {}),
    "brain floats": (
        lambda: nn.Sequential(
            nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 3)
        ).bfloat16(),
        (drawn(3, 8).bfloat16(), drawn(7, 8).bfloat16()),
        {},
    ),
    "recurrent": (
        lambda: made(
            lambda m, x: m.down(m.lstm(m.up(x))[0]),
            up=nn.Linear(8, 16),
            lstm=nn.LSTM(16, 24, num_layers=2, batch_first=True),
            down=nn.Linear(24, 5),
        ),
        (drawn(2, 5, 8), drawn(3, 3, 8)),
        {},
    ),
    "a module without weights": (lambda: nn.Sequential(divided(), nn.LayerNorm(32)), SEQUENCE, HEADS),
    "a language model": (language_model, (ids(5, 2), ids(7, 3)), {}),
    "heads unflattened": (lambda: attention(_unflattened, num_heads=4, width=8), SEQUENCE, HEADS),
    "bags": (
        lambda: nn.Sequential(nn.EmbeddingBag(20, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)),
        (ids(4, 6), ids(5, 7)),
        {},
    ),
    "an exponent of a size": (
        lambda: wide(
            lambda m, x: m.down(m.up(x).view(-1, m.width) * x.shape[0] ** m.power), 8, power=2, width=24
        ),
        ROWS,
        {},
    ),
    "torch's encoder layer": (
        encoder,
        (drawn(2, 5, 32),) * 2,
        {"exclude": ("self_attn",), "sparsity": 0.15},
    ),
    "ties": (tied, (ids(2, 5), ids(3, 7)), {}),
    "llama": (llama, ({**TEXTS[0], "use_cache": False}, {**TEXTS[1], "use_cache": False}), HEADS),
}


@pytest.mark.parametrize("name", COPIES)
def test_sizes_are_found_wherever_a_class_has_them(name: str) -> None:
    make, inputs, options = COPIES[name]
    model = randomise(make(), std=0.1 if isinstance(inputs[0], dict) else 0.2)
    before = snapshot(model)
    result = pruned(model, inputs[0], **options)
    small, masked = result.eager(model), Masked(model, result.plan)
    tolerance = 3e-2 if name == "brain floats" else 1e-4 if isinstance(inputs[0], dict) else TOLERANCE
    for x in inputs:
        assert apart(small, masked, x) < tolerance
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
NORMS = nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm, nn.utils.weight_norm
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
    "heads of a language model": (bert, TEXTS[0], {}, r"\(BertSelfAttention\) fails.*prune whole heads"),
    "narrower heads, an implicit scale": (attention, SEQUENCE[0], EXEMPT, "scaled_dot_product_attention"),
    "heads of torch's encoder layer": (
        encoder,
        SEQUENCE[0],
        {"granularity": ("head",), "sparsity": 0.1},
        r"'self_attn' \(MultiheadAttention\) fails",
    ),
    **{
        f"computed in every call, {index}": (
            lambda norm=norm: normed(norm),
            ROWS[0],
            {},
            r"'0.*fails.*use result.module",
        )
        for index, norm in enumerate(NORMS)
    },
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
    with pytest.raises(PlanError, match="another model"):
        result.eager(mlp())
    small = result.eager(model)
    with pytest.raises(PlanError, match="already applied"):
        result.eager(small)
    with pytest.raises(ArgumentError, match="must be the nn"):
        result.eager(result.program)  # type: ignore[arg-type]


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
    with torch.no_grad():
        result.module.get_parameter("3.weight").mul_(2)
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


def test_a_model_pruned_in_parts() -> None:
    """No graph holds it whole."""
    model = Forks().eval()
    before = snapshot(model)
    result = pruned(model, X)
    with torch.no_grad():
        result.module.get_parameter("out.weight").mul_(2)
    small = result.eager(model)
    assert type(small.first) is type(model.first)
    assert small.first.up.out_features < model.first.up.out_features
    assert torch.equal(small.out.weight, 2 * model.out.weight)
    assert apart(small, result.module, X) < TOLERANCE
    assert same(before, snapshot(model))
    with pytest.raises(PlanError, match="another model"):
        result.eager(Forks())


# --- any net


@settings(max_examples=EXAMPLES // 3)
@given(net=programs(), seed=st.integers(0, 99))
def test_any_net_is_made_smaller_or_refused(net: Any, seed: int) -> None:
    model = build(net, seed)
    case = Case(model, example(net, 2, seed), {}, None, (), {}, 1e-4, seed)
    try:
        small = case.result.eager(model)
    except (Skipped, EagerError):
        return
    for call in case.calls[:2]:
        assert error(case.run(small, call), case.run(case.masked, call)) < 1e-4
