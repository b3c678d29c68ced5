"""The caller's own module, smaller: held against modules pruned by hand and against dense ones with masked
weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import zeroed
from torch import Tensor, nn
from zoo import randomise

import fasp_fx
from fasp_fx.errors import ArgumentError, EagerError, PlanError
from fasp_fx.pruning.eager._copy import keep_from_saving
from fasp_fx.testing import build, example, programs
from fasp_fx.testing._case import Case
from fasp_fx.testing._verdict import Skipped
from fasp_fx.testing.oracle import Masked, error

pytestmark = pytest.mark.usefixtures("shared_captures")

TOLERANCE = 1e-5


def pruned(model: nn.Module, *args: Any, sparsity: float = 0.3, **options: Any) -> fasp_fx.Result:
    """The model without channels drawn at random."""
    chosen = {"score": "random", "restore": None, "allocation": "uniform", **options}
    return fasp_fx.prune(model.eval(), args, sparsity=sparsity, **chosen)


def without(plan: fasp_fx.PruningPlan, name: str, weight: Tensor) -> Tensor:
    """A weight without the rows and columns that a plan takes from it, by hand."""
    for (own, dim), gone in plan.slices().items():
        if own == name:
            kept = sorted(set(range(weight.shape[dim])) - {index for _, index in gone})
            weight = weight.index_select(dim, torch.tensor(kept))
    return weight


def snapshot(model: nn.Module) -> dict[str, Any]:
    """The values of all tensors of a model, and its plain attributes."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    plain = {
        (path, name): value
        for path, inner in model.named_modules()
        for name, value in vars(inner).items()
        if isinstance(value, (int, tuple, float))
    }
    return {**tensors, **plain}


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(a, after[k]) if isinstance(a, Tensor) else a == after[k] for k, a in before.items()
    )


def storages(module: nn.Module) -> set[int]:
    return {
        tensor.untyped_storage().data_ptr()
        for tensor in [*module.parameters(), *module.buffers()]
        if tensor.numel()
    }


@torch.no_grad()
def apart(
    found: nn.Module | Callable[..., Any], expected: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any
) -> float:
    """How far the outputs of two modules are apart, by the largest value."""
    return error(found(*args, **kwargs), expected(*args, **kwargs))


# --- feed-forward


class Mlp(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, width), nn.Linear(width, 4)
        self.hidden, self.longest, self.seen = width, width, 0
        self.register_buffer("gate", torch.rand(width))
        self.bend = torch.rand(width)  # a tensor that is no buffer

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) <= self.longest
        return self.fc2(F.relu(self.fc1(x) * self.gate + self.bend))


def test_mlp_equals_one_pruned_by_hand() -> None:
    torch.manual_seed(0)
    model, x = Mlp().eval(), torch.randn(3, 8)
    before = snapshot(model)
    result = pruned(model, x)
    small = result.eager(model)
    by_hand = Mlp(small.fc1.out_features)
    by_hand.load_state_dict(
        {name: without(result.plan, name, tensor) for name, tensor in model.state_dict().items()}
    )
    # Its positions go with those of the bias.
    by_hand.bend = without(result.plan, "fc1.bias", model.bend.clone())
    assert type(small) is Mlp
    assert apart(small, by_hand, torch.randn(7, 8)) < TOLERANCE
    assert str(small) == str(by_hand)
    assert small.fc1.out_features == small.fc2.in_features == len(small.gate) == len(small.bend) < 32
    assert same(before, snapshot(model))
    assert not storages(small) & (storages(model) | storages(result.module))


def test_attributes_that_no_graph_needs_stay_what_they_were() -> None:
    model = Mlp()
    small = pruned(model, torch.randn(3, 8)).eager(model)
    assert small.hidden == small.longest == 32
    assert small.fc1.out_features < 32, "torch's classes say the sizes of their weights"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    model, x = (
        nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3)).to(
            dtype
        ),
        torch.randn(5, 8, dtype=dtype),
    )
    result = pruned(model, x)
    small = result.eager(model)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert apart(small, zeroed(model, result.plan), x) < (1e-9 if dtype == torch.float64 else 3e-2)


# --- convolutions


class Images(nn.Module):
    """Batch norms, a residual, a grouped and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.grouped, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.BatchNorm2d(16)
        self.wide, self.depthwise, self.norm3 = (
            nn.Conv2d(16, 24, 1),
            nn.Conv2d(24, 24, 3, padding=1, groups=24),
            nn.BatchNorm2d(24),
        )
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.relu(self.norm2(self.grouped(x)))
        return self.head(F.relu(self.norm3(self.depthwise(self.wide(x)))).mean((2, 3)))


class Bottleneck(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(width, inner, 1, bias=False),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.Conv2d(inner, width, 1, bias=False),
        )
        self.na, self.nb, self.nc = nn.BatchNorm2d(inner), nn.BatchNorm2d(inner), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.nc(self.c(F.relu(self.nb(self.b(F.relu(self.na(self.a(x)))))))))


def test_a_bottleneck_network_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        *(Bottleneck(32, 16) for _ in range(2)),
    )
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 4))
    small = pruned(model, torch.randn(2, 3, 8, 8), sparsity=0.4).eager(model)
    images = torch.randn(32, 3, 6, 6)
    classes = (images.mean((2, 3)) @ torch.randn(3, 4)).argmax(-1)
    small.train()
    means = small[0][1].running_mean.clone()
    optimizer, losses = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(20):
        loss = F.cross_entropy(small(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(np.isfinite(losses))
    assert losses[-1] < 0.6 * losses[0]
    assert not torch.equal(means, small[0][1].running_mean)
    again = copy.deepcopy(small)
    again.load_state_dict(small.state_dict())
    assert apart(again.eval(), small.eval(), images) == 0


# --- recurrent


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.lstm, self.down = (
            nn.Linear(8, 16),
            nn.LSTM(16, 24, num_layers=2, batch_first=True),
            nn.Linear(24, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.lstm(self.up(x))[0])


# --- attention


class Attention(nn.Module):
    """Its views go wrong in silence where the number of heads is not that of the channels."""

    def __init__(self, width: int = 32, heads: int = 4, inner: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.inner = heads, width if inner is None else inner
        self.q, self.k, self.v = (
            nn.Linear(width, self.inner),
            nn.Linear(width, self.inner),
            nn.Linear(width, self.inner),
        )
        self.o = nn.Linear(self.inner, width)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(
            self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        )
        return self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], self.inner))


class Block(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, inner: int | None = None, neurons: int = 64) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads, inner)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, neurons),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(neurons, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


def test_whole_heads_equal_blocks_pruned_by_hand() -> None:
    """Every block loses another number of heads."""
    model, x = randomise(nn.Sequential(*(Block() for _ in range(3)))), torch.randn(2, 5, 32)
    captured = fasp_fx.capture(model, (x,))
    groups = [
        group
        for group in fasp_fx.analyze(captured, granularity=("channel", "head")).groups
        if group.status == "prunable"
    ]
    lost = {
        "0.attention.o.weight": [1],
        "1.attention.o.weight": [0, 3, 2],
        "0.mlp.4.weight": range(7),
        "2.mlp.4.weight": range(20, 50),
    }
    assert lost.keys() <= {group.name for group in groups}
    plan = fasp_fx.plan_from_sets(captured, lost, granularity=("channel", "head"))
    small = fasp_fx.apply(captured, plan).eager(model)
    by_hand = nn.Sequential(Block(32, 3, 24, 57), Block(32, 1, 8), Block(32, 4, 32, 34)).eval()
    by_hand.load_state_dict(
        {name: without(plan, name, tensor) for name, tensor in model.state_dict().items()}
    )
    assert [block.attention.num_heads for block in small] == [3, 1, 4]
    assert [block.attention.inner for block in small] == [24, 8, 32]
    for tokens in (5, 9):
        assert apart(small, by_hand, torch.randn(3, tokens, 32)) < TOLERANCE
    assert str(small) == str(by_hand)


class Divide(nn.Module):
    """Has a size, and no weight."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.parts, -1).transpose(1, 2)


class Divided(Attention):
    def __init__(self) -> None:
        super().__init__()
        del self.num_heads
        self.divide = Divide(4)

    def heads(self, x: Tensor) -> Tensor:
        return self.divide(x)


def test_value_channels_that_leave_heads_of_two_widths() -> None:
    """The dense views need one width for queries and values, in a class that fixes it."""

    class Fixed(Attention):
        def heads(self, x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], self.num_heads, 8).transpose(1, 2)

    model = Fixed()
    result = pruned(model, torch.randn(2, 5, 32))
    assert result.module(torch.randn(1, 4, 32)).shape == (1, 4, 32)
    with pytest.raises(
        EagerError,
        match=r"of Fixed .*RuntimeError: shape .* use result.module, or prune whole heads .*'o.weight'",
    ):
        result.eager(model)


def test_heads_whose_width_follows_from_the_input_are_named() -> None:
    """As in torchvision's Swin: the width of a head is that of the input over the number of heads."""

    class Derived(Attention):
        def forward(self, x: Tensor) -> Tensor:
            self.width = x.shape[-1] // self.num_heads
            return super().forward(x)

        def heads(self, x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], self.num_heads, self.width).transpose(1, 2)

    model, x = (
        randomise(nn.Sequential(Derived(), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 4))),
        torch.randn(2, 5, 32),
    )
    result = pruned(model, x, granularity=("channel", "head"))
    with pytest.raises(
        EagerError, match=r"keep the group '0\.o\.weight' and its like by exclude="
    ) as refused:
        result.eager(model)
    assert refused.value.group == "0.o.weight"
    result = pruned(model, x, granularity=("channel", "head"), exclude=(refused.value.group,), sparsity=0.1)
    assert apart(result.eager(model), zeroed(model, result.plan), torch.randn(3, 7, 32)) < TOLERANCE


class Parts(nn.Module):
    """Neither of three parts of a projection can become smaller alone, nor can the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)
        self.parts, self.heads = [32, 32, 32], 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.view(*x.shape[:2], self.heads, 8).transpose(1, 2)
            for part in self.qkv(x).split(self.parts, -1)
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """Queries, keys and values in one matrix, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)
        self.head_dim, self.scale = 8, 8**-0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], -1, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("equal", [True, False])
def test_a_fused_weight_is_put_together_where_its_parts_lose_equally(equal: bool) -> None:
    model, x = randomise(Fused()), torch.randn(2, 5, 32)
    captured = fasp_fx.capture(model, (x,))
    groups = [
        group
        for group in fasp_fx.analyze(captured, include=("exempt",)).groups
        if group.status in ("prunable", "exempt")
    ]
    assert len(groups) == 2
    counts = [3, 3 if equal else 2]
    lost = {
        group.name: (
            np.concatenate(
                [np.flatnonzero(group.block_of == block)[:count] for block in np.unique(group.block_of)]
            ).tolist()
        )
        for group, count in zip(groups, counts)
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


def test_narrower_heads_with_an_implicit_scale() -> None:
    model = Attention()
    with pytest.raises(EagerError, match="scaled_dot_product_attention"):
        pruned(model, torch.randn(2, 5, 32), include=("exempt",), sparsity=0.4).eager(model)


def test_heads_of_torchs_encoder_layer() -> None:
    model, x = randomise(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)), torch.randn(2, 5, 32)
    heads = pruned(model, x, granularity=("head",), sparsity=0.1)
    with pytest.raises(EagerError, match=r"'self_attn' \(MultiheadAttention\) fails"):
        heads.eager(model)


@dataclass(frozen=True)
class Config:
    heads: int = 4
    layers: int = 2


class Configured(Attention):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        del self.num_heads

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.config.heads, -1).transpose(1, 2)


# --- weights in other forms


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down, self.head = (
            nn.Embedding(20, 16),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
            nn.Linear(16, 20, bias=False),
        )
        self.head.weight = self.table.weight
        self.again = self.down

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.again(F.relu(self.up(x + self.down(F.relu(self.up(x)))))))


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.weight_norm,
    ],
)
def test_what_a_model_computes_in_every_call_is_refused(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(norm(nn.Linear(8, 32)), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(EagerError, match=r"(computes '0.weight' from|_SpectralNorm).*use result.module"):
        pruned(model, torch.randn(3, 8)).eager(model)


def test_a_norm_that_divides_by_the_dense_count() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 4))
    with pytest.raises(EagerError, match="layer_norm"):
        pruned(model, torch.randn(3, 8), include=("approximate",)).eager(model)


# --- transformers


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
        )
    )


def _bert() -> nn.Module:
    return hf.BertModel(
        hf.BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
        )
    )


def _resnet() -> nn.Module:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck", num_labels=5
        )
    )


@pytest.mark.parametrize(
    ("make", "granularity"),
    [
        (_llama, ("channel", "head")),
        (_bert, ("channel", "head")),
        (_resnet, ("channel",)),
    ],
)
def test_models_of_transformers(
    make: Callable[[], nn.Module], granularity: tuple[str, ...], tmp_path: Path
) -> None:
    model = randomise(make(), std=0.1)
    image = make is _resnet
    inputs: dict[str, Any] = (
        {"pixel_values": torch.randn(2, 3, 16, 16)} if image else {"input_ids": torch.randint(0, 96, (2, 7))}
    )
    if make is _llama:
        inputs["use_cache"] = False
    result = fasp_fx.prune(
        model,
        (),
        inputs,
        sparsity=0.3,
        granularity=granularity,
        score="random",
        restore=None,
        allocation="uniform",
    )
    small = result.eager(model)
    assert type(small) is type(model)
    assert (
        sum(p.numel() for p in small.parameters())
        == sum(p.numel() for p in result.module.parameters())
        < sum(p.numel() for p in model.parameters())
    )
    assert apart(small, Masked(model, result.plan), **inputs) < 1e-4
    for copied in (small, copy.deepcopy(small)):  # the configuration says the dense sizes
        with pytest.raises(EagerError, match=r"plain=True"):
            copied.save_pretrained(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_a_copy_whose_configuration_says_its_sizes_is_saved(tmp_path: Path) -> None:
    model = _llama()
    keep_from_saving(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()


def test_value_channels_of_a_language_model_are_refused_with_a_remedy() -> None:
    model = randomise(_bert())
    inputs = {"input_ids": torch.randint(0, 96, (2, 7))}
    options = {"score": "random", "restore": None, "allocation": "uniform"}
    with pytest.raises(EagerError, match=r"\(BertSelfAttention\) fails.*prune whole heads"):
        fasp_fx.prune(model, (), inputs, sparsity=0.3, **options).eager(model)


# --- the result as it is now, and whose it is


def test_weights_are_those_of_the_result_and_flags_those_of_the_model() -> None:
    model, x = (
        nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Dropout(), nn.Linear(32, 4)),
        torch.randn(6, 8),
    )
    model[0].bias.requires_grad_(False)
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


def test_a_result_that_was_saved_or_replayed(tmp_path: Path) -> None:
    model, x = randomise(nn.Sequential(Block())), torch.randn(2, 5, 32)
    result = pruned(model, x, granularity=("channel", "head"))
    expected = result.eager(model)
    for other in (fasp_fx.load(result.save(tmp_path / "out")), fasp_fx.apply(model, result.plan, (x,))):
        small = other.eager(model)
        assert str(small) == str(expected)
        assert small[0].attention.num_heads == expected[0].attention.num_heads == 3
        assert apart(small, expected, torch.randn(3, 4, 32)) < TOLERANCE


def test_another_model_is_refused() -> None:
    model, x = Mlp(), torch.randn(3, 8)
    result = pruned(model, x)
    with pytest.raises(PlanError, match="another model"):
        result.eager(Mlp())
    small = result.eager(model)
    with pytest.raises(PlanError, match="already applied"):
        result.eager(small)
    with pytest.raises(ArgumentError, match="must be the nn"):
        result.eager(result.program)  # type: ignore[arg-type]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.down(F.relu(self.up(x))) * self.calls


def test_what_a_model_remembers_is_left_alone() -> None:
    model, x = Counting(), torch.randn(3, 8)
    result = pruned(model, x)
    small = result.eager(model)
    assert float(model.calls) == float(small.calls) == 0
    masked = zeroed(model, result.plan)
    with torch.no_grad():
        for _ in range(3):
            assert error(small(x), masked(x)) < TOLERANCE


def test_hooks_and_unused_submodules_come_along() -> None:
    model, x, calls = Mlp(), torch.randn(3, 8), []
    model.spare = nn.Linear(32, 32)
    result = pruned(model, x)
    model.fc1.register_forward_hook(lambda module, args, output: calls.append(module))
    small = result.eager(model)
    calls.clear()
    small(x)
    assert calls == [small.fc1]
    assert torch.equal(small.spare.weight, model.spare.weight)


class Held(nn.Module):
    """Keeps a function that holds on to the module itself, which a copy of the module has as well."""

    def __init__(self, what: str, kept: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.gain = nn.Parameter(torch.rand(8) + 1)
        self.register_buffer("calls", torch.zeros(()))

        def change(found: Tensor) -> Tensor:
            self.calls += 1
            if what == "training":
                return F.dropout(found, 0.5, self.training)
            return found * (self.gain if what == "gain" else self.down.bias)

        self.change = (lambda found: found) if kept == "hook" else self.method if kept == "method" else change
        if kept == "hook":
            self.down.register_forward_hook(lambda module, given, found: change(found))

    def method(self, found: Tensor) -> Tensor:
        return found * self.gain

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.change(self.down(torch.relu(self.up(x))))
        return changed


@pytest.mark.parametrize(("what", "kept"), [("gain", "lambda"), ("down.bias", "hook"), ("training", "hook")])
def test_a_copy_that_would_go_on_to_read_the_models_own_weights_is_refused(what: str, kept: str) -> None:
    """It computes what it should, until either of them is trained."""
    model = Held(what, kept)
    result = pruned(model, torch.randn(4, 8))
    with pytest.raises(EagerError, match=rf"read '(calls|{what})' of the given model.*make it a method"):
        result.eager(model)
    assert model.calls == 0, "the model is left as it was"


def test_a_method_that_a_module_keeps_is_that_of_the_copy() -> None:
    model = Held("gain", "method")
    small = pruned(model, torch.randn(4, 8)).eager(model)
    small(torch.randn(2, 8)).sum().backward()
    assert small.get_parameter("gain").grad is not None
    assert model.gain.grad is None


class Padding(nn.Module):
    """Computes how much it pads of sizes that stay; others would give as much, or divide by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 16, 3, groups=16)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        beyond = self.first.kernel_size[0] - self.first.stride[0]
        left, right = beyond // 2, beyond - beyond // 2 + 7 % beyond
        return self.last(self.second(self.first(F.pad(x, (left, right, left, right))).relu()))


class Marked(nn.Parameter):
    """A parameter of the user's own class."""


class Remade(nn.Module):
    """Is copied by being made anew, as layers are that keep how they were made."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return type(self)()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def test_parameters_keep_class_and_attributes_and_submodules_their_mode() -> None:
    model, x = (
        randomise(nn.Sequential(nn.Linear(8, 32), Remade(), nn.Linear(32, 4))).eval(),
        torch.randn(3, 8),
    )
    model[0].weight, model[2].weight.decays = Marked(model[0].weight.detach()), False
    result = pruned(model, x)
    for training in (False, True):
        small = result.eager(model.train(training))
        assert [part.training for part in small.modules()] == [training] * 4
    assert type(small[0].weight) is Marked
    assert type(small[2].weight) is nn.Parameter
    assert small[2].weight.decays is False
    assert apart(small.eval(), zeroed(model, result.plan).eval(), x) < TOLERANCE


def test_a_copy_that_fails_in_training_is_refused() -> None:
    class Training(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self[0](x).relu()
            return self[1](hidden.view(-1, 32) if self.training else hidden)

    model = Training(nn.Linear(8, 32), nn.Linear(32, 4))
    result = pruned(model, torch.randn(3, 8))
    with pytest.raises(EagerError, match="fails in training mode, where the model runs: RuntimeError: shape"):
        result.eager(model)


def test_a_module_that_cannot_be_copied() -> None:
    class Single(Mlp):
        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            raise TypeError("there is only one")

    model = Single()
    result = pruned(model, torch.randn(3, 8))
    with pytest.raises(EagerError, match=r"cannot be copied .*there is only one"):
        result.eager(model)


class Branching(nn.Module):
    """No graph holds it whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (
            nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(3)
        )
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale
        return self.last(x if float(x.detach().sum()) > 0 else self.second(x))


def test_a_model_pruned_in_parts() -> None:
    torch.manual_seed(0)
    model, x = Branching().eval(), torch.randn(3, 8)
    x = x if float(model.first(x).detach().sum()) <= 0 else -x
    before = snapshot(model)
    result = pruned(model, x)
    with torch.no_grad():
        result.module.scale.mul_(2)
    small = result.eager(model)
    assert type(small.first) is nn.Sequential
    assert small.first[0].out_features < 32
    assert torch.equal(small.scale, 2 * model.scale)
    assert apart(small, result.module, x) < TOLERANCE
    assert same(before, snapshot(model))
    with pytest.raises(PlanError, match="another model"):
        result.eager(Branching())


# --- sizes of all kinds


HEADS: dict[str, Any] = {"granularity": ("head",)}
IMAGE, SEQUENCE = (2, 3, 16, 16), (2, 5, 32)
#: models, the shape of an example and of another input, and options
COPIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "convolutions": (Images, (2, 3, 8, 8), (5, 3, 8, 8), {}),
    "sizes that stay": (Padding, IMAGE, IMAGE, {}),
    "recurrent": (Recurrent, (2, 5, 8), (3, 3, 8), {}),
    "a module without weights": (
        lambda: nn.Sequential(Divided(), nn.LayerNorm(32)),
        SEQUENCE,
        (3, 7, 32),
        HEADS,
    ),
    "a list": (Parts, SEQUENCE, (3, 7, 32), HEADS),
    "a configuration": (lambda: nn.Sequential(*map(Configured, [Config()] * 2)), SEQUENCE, (1, 6, 32), HEADS),
    "torch's encoder layer": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
        SEQUENCE,
        SEQUENCE,
        {"exclude": ("self_attn",), "sparsity": 0.15},
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_sizes_are_found_wherever_a_class_has_them(name: str) -> None:
    make, shape, other, options = COPIES[name]
    model = randomise(make())
    before = snapshot(model)
    result = pruned(model, torch.randn(shape), **options)
    small = result.eager(model)
    masked = Masked(model, result.plan)
    for x in (torch.randn(shape), torch.randn(other)):
        assert apart(small, masked, x) < TOLERANCE
    assert same(before, snapshot(model))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    small.train()(torch.randn(other)).sum().backward()


def test_ties_stay() -> None:
    model, ids = randomise(Tied()), torch.randint(0, 20, (2, 5))
    result = pruned(model, ids)
    small = result.eager(model)
    assert small.table.weight is small.head.weight
    assert small.again is small.down
    assert small.table.embedding_dim == small.head.in_features == small.table.weight.shape[1]
    assert apart(small, Masked(model, result.plan), torch.randint(0, 20, (3, 7))) < TOLERANCE


# --- any net


@settings(max_examples=EXAMPLES // 2)
@given(net=programs(), seed=st.integers(0, 99))
def test_any_net_is_made_smaller_or_refused(net: Any, seed: int) -> None:
    model = build(net, seed)
    case = Case(model, example(net, 2, seed), {}, None, (), {}, 1e-4, seed)
    try:
        result = case.result
    except Skipped:
        return
    try:
        small = result.eager(model)
    except EagerError:
        return
    for call in case.calls[:2]:
        assert error(case.run(small, call), case.run(case.masked, call)) < 1e-4


class Windowed(nn.Module):
    """One attribute that is a width and the length of a window."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 64
        self.table, self.up, self.down = nn.Embedding(50, 8), nn.Linear(8, 64), nn.Linear(64, 50)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.up(self.table(ids)).relu().reshape(ids.shape[0], -1, self.hidden)
        near = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])[None] < self.hidden
        return self.down(near.to(hidden) @ hidden / ids.shape[1])


def test_a_width_that_is_a_length_as_well_is_found_out() -> None:
    model, ids = Windowed().eval(), torch.randint(0, 50, (2, 6))
    result = fasp_fx.prune(model, (ids,), sparsity=0.4, score="random", restore=None)
    with pytest.raises(EagerError, match=r"'hidden' has to be one number in 'lt' and another in 'reshape'"):
        result.eager(model)
