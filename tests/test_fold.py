"""Weights that a model computes from parameters are folded into parameters; those that are pruned exactly are
in corpus/layers.py.
"""

from typing import Any

import pytest
import torch
from corpus.layers import ENTRIES, frozen, gained, taken
from models import parameter, wide
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers import LlamaConfig, LlamaForCausalLM

import fasp_fx
from fasp_fx.capturing import capture

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ROWS = torch.randn(5, 6)
QUICK: dict[str, Any] = {"restore": None, "score": "random", "sparsity": 0.3}


def test_folded_programs_are_replayed_exported_and_trained() -> None:
    """And where nothing goes, they compute what they did, to the bit."""
    entry = ENTRIES["spectral norm"]
    model, ((x,), _) = entry.build(), entry.inputs()[0]
    result = fasp_fx.prune(model, (x,), **QUICK)
    exported = torch.export.export(model, (x,))
    nothing = fasp_fx.PruningPlan(result.plan.fingerprint, (), 0.0)
    expected = result.module(x)
    same = fasp_fx.apply(model, nothing, (x,))
    assert torch.equal(same.module(x), capture(model, (x,), fold=False).module(x))
    assert torch.equal(fasp_fx.apply(exported, result.plan).module(x), expected)
    assert torch.equal(fasp_fx.passes.Prune(result.plan)(exported).module()(x), expected)
    folded = {weight.name: weight for weight in result.plan.folds}
    weights = dict(result.module.named_parameters())
    assert not {source for fold in folded.values() for source in fold.sources} & weights.keys()
    gradients = torch.autograd.grad(result.module(x).square().mean(), [weights[name] for name in folded])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    with pytest.raises(fasp_fx.PlanError, match="already applied"):
        fasp_fx.apply(result.module, result.plan, (x,))
    with pytest.raises(fasp_fx.PlanError, match=r"\.weight"):
        fasp_fx.backend(result.plan)


@pytest.mark.parametrize(
    ("make", "name", "kept"),
    [
        (taken, "weight_2", "weight"),
        (gained, "middle.weight", "again"),
        (lambda: parametrizations.weight_norm(nn.Linear(6, 16)), "weight", "bias"),
        (frozen, "0.weight", "4.weight"),
    ],
)
def test_what_is_folded_has_a_name_of_its_own(make: Any, name: str, kept: str) -> None:
    program = fasp_fx.capture(make().eval(), (ROWS,)).program
    assert [weight.name for weight in program.folds] == [name]
    weights = dict(program.module.named_parameters(remove_duplicate=False))
    assert {name, kept} <= weights.keys()
    if make is gained:
        assert weights["gain"] is weights["again"]
    assert {key for key, value in weights.items() if not value.requires_grad} == (
        {name} if make is frozen else set()
    )


@pytest.mark.slow
def test_generating_models_are_folded_and_have_no_plain_checkpoint() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)
    ids = torch.randint(0, 40, (4, 10))
    pruned = fasp_fx.hf.prune(model.eval(), calibration=[ids], sparsity=0.2, format="fasp-fx")
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
    dict([*model.named_parameters(), *model.named_buffers()])[name].detach().mul_(2)
    with pytest.raises(fasp_fx.ArgumentError, match=f"'{name}' has changed since the model was captured"):
        fasp_fx.prune(captured, score="magnitude", restore=None, sparsity=0.3)
