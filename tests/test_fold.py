"""Weights that a model computes from parameters: folded into parameters and pruned, held against the dense
model with the consumers' inputs masked.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import parameter, wide
from oracle import TOLERANCE, error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

import fasp_fx
import fasp_fx.hf
import fasp_fx.testing
from fasp_fx.capturing import capture
from fasp_fx.testing.oracle import Masked

pytestmark = [
    pytest.mark.usefixtures("shared_captures"),
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ROWS, IMAGES, SOUNDS = torch.randn(5, 6), torch.randn(3, 3, 9, 9), torch.randn(3, 4, 20)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def _symmetric(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def _sounds(first: Callable[[nn.Module], nn.Module], second: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layers = first(nn.Conv1d(4, 16, 3, padding=1)), second(nn.Conv1d(16, 16, 4, padding=2, groups=2))
    return nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), nn.Conv1d(16, 5, 1))


def _rows(up: nn.Module, down: nn.Module) -> nn.Module:
    return nn.Sequential(up, nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), down)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str]]] = {
    "weight norm by rows and by positions": (
        lambda: _sounds(
            parametrizations.weight_norm, lambda layer: parametrizations.weight_norm(layer, dim=2)
        ),
        SOUNDS,
        {"0.weight", "2.weight"},
    ),
    "weight and spectral norm by hooks": (
        lambda: _sounds(nn.utils.weight_norm, nn.utils.spectral_norm),
        SOUNDS,
        {"0.weight", "2.weight"},
    ),
    "weight standardisation": (
        lambda: nn.Sequential(
            WeightStandardizedConv2d(3, 12, 3),
            nn.ReLU(),
            WeightStandardizedConv2d(12, 10, 3),
            nn.ReLU(),
            nn.Conv2d(10, 4, 1),
        ),
        IMAGES,
        {"0.weight", "2.weight"},
    ),
    "symmetric": (
        lambda: nn.Sequential(
            nn.Linear(6, 16),
            nn.Tanh(),
            _symmetric(nn.Linear(16, 16)),
            nn.Tanh(),
            nn.Linear(16, 6),
        ),
        ROWS,
        {"2.weight"},
    ),
    "spectral norm": (
        lambda: _rows(
            parametrizations.spectral_norm(nn.Linear(6, 16)), parametrizations.spectral_norm(nn.Linear(16, 6))
        ),
        ROWS,
        {"0.weight", "4.weight"},
    ),
    "by constants that forward makes": (
        lambda: functional(lambda m, x: m.w * torch.tensor(2.0) + torch.tensor([0.5] * 16), w=SQUARE),
        ROWS,
        {"w"},
    ),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _prune(model: nn.Module, x: Tensor, **options: Any) -> fasp_fx.Result:
    options = {"restore": None, "score": "random", **options}
    return fasp_fx.prune(model, (x,), calibration=[x], sparsity=0.3, **options)


def _assert_exact(model: nn.Module, result: fasp_fx.Result, x: Tensor) -> None:
    nothing = fasp_fx.PruningPlan(result.plan.fingerprint, (), 0.0)
    folded = fasp_fx.apply(model, nothing, (x,)).module
    with torch.no_grad():
        dense = model(x)
        assert error(folded(x), dense) <= TOLERANCE
        expected, found = Masked(folded, result.plan)(x), result.module(x)
    assert error(expected, dense) > 100 * TOLERANCE
    assert error(found, expected) <= TOLERANCE


def _names(plan: fasp_fx.PruningPlan) -> set[str]:
    return {name for name, _ in plan.slices()}


@functools.cache
def pruned(name: str) -> tuple[nn.Module, fasp_fx.Result, Tensor]:
    torch.manual_seed(0)
    make, x, _ = MODELS[name]
    model = make().eval()
    return model, _prune(model, x), x


@pytest.mark.parametrize("name", MODELS)
def test_folded_weights_are_pruned_exactly(name: str) -> None:
    model, result, x = pruned(name)
    expected = MODELS[name][2]
    assert {weight.name for weight in result.plan.folds} == expected
    assert expected <= _names(result.plan)
    _assert_exact(model, result, x)
    own = dict(result.module.named_parameters())
    sources = {source for weight in result.plan.folds for source in weight.sources} - expected
    assert not sources & own.keys()
    assert not sources & {name for name, _ in result.module.named_buffers()}
    assert all(own[weight].requires_grad for weight in expected)
    gradients = torch.autograd.grad(result.module(x).square().mean(), [own[weight] for weight in expected])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_folded_programs_are_replayed_exported_and_left_alone() -> None:
    """And where nothing goes, they compute what they did, to the bit."""
    model, result, x = pruned("spectral norm")
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    exported = torch.export.export(model, (x,))
    nothing = fasp_fx.PruningPlan(result.plan.fingerprint, (), 0.0)
    with torch.no_grad():
        expected = result.module(x)
        same, again = (fasp_fx.apply(model, plan, (x,)) for plan in (nothing, result.plan))
        assert torch.equal(same.module(x), capture(model, (x,), fold=False).module(x))
        assert torch.equal(again.module(x), expected)
        assert torch.equal(fasp_fx.apply(exported, result.plan).module(x), expected)
        assert torch.equal(fasp_fx.passes.Prune(result.plan)(exported).module()(x), expected)
    assert again.plan.folds == result.plan.folds
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(fasp_fx.PlanError, match="already applied"):
        fasp_fx.apply(result.module, result.plan, (x,))
    with pytest.raises(fasp_fx.PlanError, match=r"\.weight"):
        fasp_fx.backend(result.plan)


def test_the_notes_and_the_plan_say_what_was_folded(tmp_path: Any) -> None:
    model, result, x = pruned("weight norm by rows and by positions")
    note = next(note for note in result.report.notes if "folded" in note)
    for word in ("'0.weight'", "'2.parametrizations.weight.original1'", "training"):
        assert word in note
    assert result.report.parameters[0] == sum(parameter.numel() for parameter in model.parameters())
    read = fasp_fx.PruningPlan.from_json(result.plan.to_json())
    assert read == result.plan
    loaded = fasp_fx.load(result.save(tmp_path / "saved"))
    assert loaded.plan == result.plan
    with torch.no_grad():
        assert torch.equal(loaded.module(x), result.module(x))


# --- what is not folded


def functional(compute: Callable[..., Tensor], **weights: Tensor) -> nn.Module:
    """Two linear layers, and between them one with a weight that is computed, of the module and the input."""
    held = {
        name: nn.Parameter(tensor.clone()) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    return wide(
        lambda self, x: self.down(F.linear(self.up(x).tanh(), compute(self, x)).tanh()), hidden=16, **held
    )


SQUARE = torch.randn(16, 16) / 4


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: m.w.t(),
        lambda m, x: m.w.double().float(),
        lambda m, x: m.w.flip(0).reshape(4, 4, 16).reshape(16, 16),
        lambda m, x: m.w.bfloat16().float(),
    ],
    ids=["transposed", "cast", "moved", "rounded"],
)
def test_moved_and_cast_weights_stay_the_parameters_they_were(compute: Callable[[Any], Tensor]) -> None:
    model = functional(compute, w=SQUARE)
    result = _prune(model, ROWS)
    assert not result.plan.folds
    assert {("w", 0), ("w", 1)} <= result.plan.slices().keys()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for part in (part for group in result.plan.groups for part in group.consumers):
            reference.get_parameter(part.name).index_fill_(part.dim, torch.tensor(part.removed), 0)
        assert error(result.module(ROWS), reference(ROWS)) <= TOLERANCE


def counting(model: Any, x: Tensor) -> Tensor:
    model.count.add_(1)
    return model.w * model.count


def counted(compute: Callable[..., Tensor]) -> nn.Module:
    model = functional(compute, w=SQUARE)
    model.register_buffer("count", torch.ones(()))
    return model


#: what is not folded, and the note that says why, if there is one
NOT_FOLDED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "low rank": (
        lambda: functional(lambda m, x: m.u @ m.v, u=torch.randn(16, 2), v=torch.randn(2, 16)),
        "1,024 bytes instead of 256",
    ),
    "integers": (
        lambda: functional(
            lambda m, x: m.q.float() * m.scale,
            q=torch.randint(-9, 9, (16, 16), dtype=torch.int8),
            scale=torch.rand(16, 1),
        ),
        "1,024 bytes instead of 320",
    ),
    "needed elsewhere": (
        lambda: wide(
            lambda self, x: self.down(
                F.linear(F.linear(self.up(x).tanh(), F.normalize(self.w)).tanh(), self.w).tanh()
            ),
            hidden=16,
            w=nn.Parameter(SQUARE.clone()),
        ),
        "needed elsewhere",
    ),
    "a buffer that changes": (lambda: counted(counting), ""),
    "a fixed transform": (
        lambda: counted(lambda m, x: torch.outer(m.count.expand(16), torch.ones(16)).cos()),
        "",
    ),
    "chance": (lambda: counted(lambda m, x: m.w * torch.rand(16, 16)), ""),
    "an input": (lambda: counted(lambda m, x: m.w * x.mean()), ""),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_what_is_larger_or_not_of_parameters_alone_is_not_folded(name: str) -> None:
    make, reason = NOT_FOLDED[name]
    analysis = fasp_fx.analyze(make(), (ROWS,))
    assert not analysis.program.folds
    assert not reason or any(reason in note for note in analysis.program.notes)
    if reason.startswith("1,024"):
        assert any(reason in group.reason for group in analysis.groups)


# --- ties and names


def gained() -> nn.Module:
    """A gain is part of a weight, and stands elsewhere under another name."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.middle.weight * self.gain[:, None]
        return self.down(F.linear((self.up(x) * self.again).tanh(), weight, self.middle.bias).tanh())

    gain = parameter(16)
    return wide(forward, hidden=16, middle=nn.Linear(16, 16), gain=gain, again=gain)


def taken() -> nn.Module:
    """The name that a folded weight would have is taken."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(F.linear(self.up(x).tanh() * self.weight, F.normalize(self.weight_v)).tanh())

    return wide(forward, hidden=16, weight=parameter(16), weight_v=nn.Parameter(SQUARE.clone()))


def frozen() -> nn.Module:
    model = _rows(parametrizations.weight_norm(nn.Linear(6, 16)), nn.Linear(16, 6))
    for own in model[0].parametrizations.parameters():
        own.requires_grad_(False)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "name", "kept"),
    [
        (taken, "weight_2", "weight"),
        (gained, "middle.weight", "again"),
        (lambda: parametrizations.weight_norm(nn.Linear(6, 16)).eval(), "weight", "bias"),
        (frozen, "0.weight", "4.weight"),
    ],
)
def test_what_is_folded_has_a_name_of_its_own(make: Any, name: str, kept: str) -> None:
    program = fasp_fx.analyze(make(), (ROWS,)).program
    assert [weight.name for weight in program.folds] == [name]
    own = dict(program.module.named_parameters(remove_duplicate=False))
    assert {name, kept} <= own.keys()
    if make is gained:
        assert own["gain"] is own["again"]
    assert {key for key, value in own.items() if not value.requires_grad} == (
        {name} if make is frozen else set()
    )


# --- elsewhere


@pytest.mark.slow
def test_generating_models_are_folded_and_have_no_plain_checkpoint() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)
    model.eval()
    ids = torch.randint(0, 40, (4, 10))
    pruned = fasp_fx.hf.prune(model, calibration=[ids], sparsity=0.2)
    assert [weight.name for weight in pruned.plan.folds] == ["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(fasp_fx.FaspError, match="down_proj"):
        fasp_fx.hf.prune(model, calibration=[ids], sparsity=0.2, format="plain")


def lowered(self: Any, x: Tensor) -> Tensor:
    """A weight with an adapter, scaled by a buffer."""
    weight = self.up.weight + self.scale * (self.left @ self.right)
    return self.down(F.linear(x, weight, self.up.bias).relu())


@pytest.mark.parametrize("name", ["left", "scale", "up.weight"])
def test_what_weights_were_computed_of_may_not_change_after_the_capture(name: str) -> None:
    model = wide(lowered, hidden=16, left=parameter(16, 2), right=parameter(2, 6), scale=torch.tensor(0.5))
    captured = fasp_fx.capture(model, (ROWS,))
    assert captured.program.folds
    with torch.no_grad():
        dict([*model.named_parameters(), *model.named_buffers()])[name].mul_(2)
    with pytest.raises(fasp_fx.ArgumentError, match=f"'{name}' has changed since the model was captured"):
        fasp_fx.prune(captured, score="magnitude", restore=None, sparsity=0.3)
