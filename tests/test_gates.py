"""Learned gates: closed ones are removed channels, on any model, and in the end they meet the budget."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import linear, made, parameter, randomise, stack, wide
from rank import llama, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.allocation import Macs, Parameters
from fasp_fx.training import Gates, attach_gates

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def half() -> nn.Module:
    """A hidden layer of which one half says nothing of the output."""
    model = randomise(made(lambda m, x: m.down(m.up(x).tanh()), **linear(up=(6, 16), down=(16, 3))))
    model.down.weight.detach()[:, ::2] = 0  # type: ignore[index, operator, union-attr]
    return model


def grouped() -> nn.Module:
    return made(
        lambda m, x: m.head(m.grouped(m.norm(m.stem(x)).relu()).relu().mean((2, 3))),
        norm=nn.BatchNorm2d(12),
        stem=nn.Conv2d(3, 12, 3),
        grouped=nn.Conv2d(12, 8, 3, groups=2),
        head=nn.Linear(8, 4),
    )


def added(width: int) -> nn.Module:
    return wide(lambda self, x: x + self.down(self.up(x).tanh()), hidden=width)


def in_turn() -> nn.Module:
    return stack(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


def raw() -> nn.Module:
    """Weights that one module holds."""

    return made(
        lambda m, x: F.linear(F.linear(F.linear(x, m.w1).tanh(), m.w2).tanh(), m.w3),
        w1=parameter(20, 6),
        w2=parameter(20, 20),
        w3=parameter(3, 20),
    )


IDS = {"input_ids": tokens()[0], "use_cache": False}
#: models and what they are called with, of which llama loses whole heads
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "half": (half, (X,), {}),
    "grouped": (grouped, (torch.randn(4, 3, 9, 9),), {}),
    "called in turn": (in_turn, (X,), {}),
    "weights of one module": (raw, (X,), {}),
    "names": (lambda: Named().eval(), (X,), {}),
    "llama": (lambda: llama(1), (), IDS),
}


def spread(gates: Gates, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for scores in gates.scores:  # by what no counter of versions tells
        scores.data.copy_(torch.randn(scores.shape, generator=generator) * 2)


@pytest.mark.parametrize("name", MODELS)
def test_closed_gates_are_removed_channels(name: str) -> None:
    """In evaluation mode the model with gates computes what the pruned one does, which the plan of its scores
    as they are makes of the model without; which is as it was, but for what was trained along.
    """
    torch.manual_seed(0)
    make, args, kwargs = MODELS[name]
    model = make()
    before, left = copy.deepcopy(model.state_dict()), traces(model)
    gates = attach_gates(model, args, kwargs, sparsity=0.4, granularity=("channel", "head"))
    gates.plan()  # of other scores
    spread(gates)
    if name in ("weights of one module", "names"):
        with torch.no_grad():
            for weight in gates.original_parameters().values():
                weight.mul_(1.1)  # trained along: the plan is for the weights as they are
    with torch.no_grad():
        found = model(*args, **kwargs)
    plan = gates.plan()
    gates.detach()
    assert traces(model) == left
    if name not in ("weights of one module", "names"):
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    result = fasp_fx.apply(model, plan, args, kwargs)
    expected = result.module(*args, **kwargs)
    own, other = (one if isinstance(one, Tensor) else one["logits"] for one in (found, expected))
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert abs(result.report.sparsity - 0.4) < 0.1


def train(gates: Gates, model: nn.Module, dense: nn.Module, steps: int = 300) -> None:
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.05)
    model.train()
    for step in range(steps):
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - dense(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def test_what_says_nothing_goes() -> None:
    torch.manual_seed(0)
    model = half()
    dense = copy.deepcopy(model).requires_grad_(False)
    gates = attach_gates(model, (X,), sparsity=0.5)
    model.requires_grad_(False)
    gates.requires_grad_(True)
    train(gates, model, dense)
    plan = gates.plan()
    assert set(plan.groups[0].consumers[0].removed) == set(range(0, 16, 2))
    gates.detach()
    result = fasp_fx.apply(model, plan, (X,), calibration=list(X.split(16)))
    torch.testing.assert_close(result.module(X), dense(X), rtol=1e-3, atol=1e-4)


def test_several_budgets_are_all_met() -> None:
    model = in_turn()
    gates = attach_gates(model, (X,), budget=(Macs(0.9), Parameters(0.5)), round_to=4)
    plan = gates.plan()
    gates.detach()
    whole, spent = fasp_fx.apply(model, plan, (X,)).report.parameters
    assert spent <= 0.5 * whole


def test_gates_are_saved_once_and_a_copy_has_its_own() -> None:
    torch.manual_seed(0)
    model = half()
    gates = attach_gates(model, (X,), sparsity=0.4)
    assert sum("scores" in name for name in model.state_dict()) == len(gates.scores)
    copied = copy.deepcopy(model).eval()
    before = copied(X)
    spread(gates)
    assert torch.equal(copied(X), before), "a copy has gates of its own"
    assert not torch.equal(model.eval()(X), before)


def shut() -> nn.Module:
    last = nn.utils.parametrizations.weight_norm(nn.Linear(40, 100))
    return stack(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 40), nn.Tanh(), last)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 0.99}, "out of reach"),
        ({"exclude": ("*",)}, "exclude"),
        ({"quality": "worst"}, "quality="),
        ({"score": "obs"}, "score="),
        ({"restore": None}, "restore="),
        ({"granularity": ("expert",)}, "expert"),
        ({"include": ("approximate",)}, "norm"),
        (shut, "has none"),
    ],
)
def test_bad_input(options: Any, said: str) -> None:
    model = options() if callable(options) else half()
    before = traces(model)
    with pytest.raises(fasp_fx.FaspError, match=said):
        attach_gates(model, (X,), **{"sparsity": 0.3, **({} if callable(options) else options)})
    assert traces(model) == before, "nothing half-attached is left"


def test_scores_that_are_nan_are_named() -> None:
    model = in_turn()
    gates = attach_gates(model, (X,), sparsity=0.3)
    gates.scores[1].detach()[3] = float("nan")
    with pytest.raises(fasp_fx.ArgumentError, match=r"'4\.weight'.* NaN"):
        model(X)


def listed() -> nn.Module:
    """Reads one weight from a list, where no parametrization reaches it."""
    layers = linear(a=(6, 16), b=(16, 12), c=(12, 8), d=(8, 3))
    return made(
        lambda m, x: m.d(m.c(F.linear(m.a(x).relu(), m.weights[0]).relu()).relu()),
        weights=[layers["b"].weight],
        **layers,
    )


def traces(model: nn.Module) -> list[Any]:
    """What gates could leave behind in a model."""
    return [
        list(model.state_dict()),
        [id(parameter) for parameter in model.parameters()],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        [type(module).__name__ for module in model.modules()],
    ]


def test_gates_without_effect_are_refused() -> None:
    model = randomise(listed())
    before, expected = traces(model), model(X)
    with pytest.raises(fasp_fx.ArgumentError, match=r"of 'b\.weight' are not .* exclude="):
        attach_gates(model, (X,), sparsity=0.3)
    assert traces(model) == before, "the model is as it was"
    assert torch.equal(model(X), expected)
    gates = attach_gates(model, (X,), sparsity=0.2, exclude=("b.weight",))
    assert "b.weight" not in gates.names, "what stays is not counted on, nor does it close in training"
    spread(gates)
    expected, plan = model(X), gates.plan()
    gates.detach()
    torch.testing.assert_close(fasp_fx.apply(model, plan, (X,)).module(X), expected, rtol=1e-4, atol=1e-5)


class Named(nn.Module):
    """A block under two names, and a weight with a parametrization of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
        self.again = self.first
        self.normed, self.head = nn.utils.parametrizations.weight_norm(nn.Linear(6, 12)), nn.Linear(12, 4)

    def encode(self, x: Tensor) -> Tensor:
        return x + self.first(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.normed(self.again(self.encode(x))).tanh())


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_computes_anew_has_the_same_gates(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = half()
    gates = attach_gates(model, (X,), sparsity=0.4)
    model.train()(X).sum().backward()
    expected, gates.scores[0].grad = gates.scores[0].grad, None
    checkpoint(model, X.clone().requires_grad_(True), use_reentrant=reentrant).sum().backward()
    assert torch.equal(gates.scores[0].grad, expected)


def test_gates_are_those_of_the_scores_where_a_part_is_called() -> None:
    torch.manual_seed(0)
    model = Named().eval()
    gates = attach_gates(model, (X,), sparsity=0.4)
    first = model.encode(X)
    assert torch.equal(model.encode(X), first)
    with torch.no_grad():
        for scores in gates.scores:
            scores.copy_(torch.randn(scores.shape))
    assert not torch.equal(model.encode(X), first)


def test_parametrizations_of_others_are_not_taken_off() -> None:
    model = half()
    gates = attach_gates(model, (X,), sparsity=0.4)
    nn.utils.parametrize.register_parametrization(model.down, "weight", nn.Tanh())  # type: ignore[arg-type]
    expected = model(X)
    with pytest.raises(fasp_fx.ArgumentError, match=r"'weight' of a .*Linear"):
        gates.detach()
    assert torch.equal(model(X), expected)


def test_a_model_with_gates_is_not_pruned() -> None:
    model = in_turn()
    attach_gates(model, (X,), sparsity=0.3)
    for call in (fasp_fx.analyze, fasp_fx.capture, attach_gates):
        for part, x in ((model, X), (model[4], torch.randn(8, 12))):  # type: ignore[index]
            with pytest.raises(fasp_fx.FaspError, match="detach"):
                call(part, (x,))  # type: ignore[operator]
