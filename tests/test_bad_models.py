"""Models that are refused with a reason, and unusual ones that work."""

from __future__ import annotations

import pytest
import torch
from refusal import BATCH, Vectors, X, refused, untouched
from torch import Tensor, nn

import fasp_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.usefixtures("no_files"),
]


class Branch(Vectors):
    """Its inputs decide what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_data_dependent_control_flow() -> None:
    line = r"at 'return super\(\).forward\(x\) if x.sum\(\) > 0 else x' \(test_bad_models.py:\d+\)"
    refused(fasp_fx.CaptureError, rf"Branch cannot be captured.*{line}.*largest submodule", Branch().eval())


def test_analyze_looks_for_parts_as_prune_does() -> None:
    with pytest.raises(
        fasp_fx.CaptureError, match=r"Branch cannot be captured.*No submodule can be pruned by itself either"
    ):
        fasp_fx.analyze(Branch().eval(), (torch.randn(2, 6),))


def test_nothing_prunable() -> None:
    refused(
        fasp_fx.NothingPrunableError,
        "no group of this model can be pruned",
        nn.Linear(6, 6).eval(),
        calibration=[BATCH],
    )
    refused(fasp_fx.NothingPrunableError, "no coupled weights", nn.ReLU().eval(), calibration=[BATCH])


def test_training_mode() -> None:
    refused(fasp_fx.CaptureError, r"Vectors is in training mode.*model\.eval\(\)", Vectors())


def test_part_of_the_model_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 24), nn.Dropout(0.5), nn.Linear(24, 6)).eval()
    model[1].train()
    refused(fasp_fx.CaptureError, r"'1'.*training mode.*eval\(\)", model)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Vectors().eval()
    refused(fasp_fx.ArgumentError, r"'up\.weight' is on the meta device.*analyze\(\)", model)
    assert fasp_fx.analyze(model, (X,)).max_sparsity > 0.5


def test_an_error_inside_the_model() -> None:
    class Broken(Vectors):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("lost")

    refused(fasp_fx.ArgumentError, r"does not run on the example inputs: KeyError: 'lost'", Broken().eval())


# --- unusual, and fine


def test_bfloat16_end_to_end() -> None:
    model = Vectors().eval().bfloat16()
    with untouched(model):
        result = fasp_fx.prune(model, (X.bfloat16(),), calibration=[BATCH.bfloat16()], sparsity=0.3)
    assert {p.dtype for p in result.module.parameters()} == {torch.bfloat16}
    assert result.module(X.bfloat16()).dtype is torch.bfloat16
    assert torch.isfinite(result.module(X.bfloat16())).all()
    assert result.report.lines


def test_frozen_parameters_stay_frozen() -> None:
    model = Vectors().eval()
    model.up.weight.requires_grad_(False)
    model.down.bias.requires_grad_(False)
    with untouched(model):
        result = fasp_fx.prune(model, (X,), calibration=[BATCH], sparsity=0.3)
    found = {name: parameter.requires_grad for name, parameter in result.module.named_parameters()}
    assert found == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    result.module(X).sum().backward()
    assert result.module.get_parameter("up.weight").grad is None
    assert result.module.get_parameter("down.weight").grad is not None


class Shared(nn.Module):
    """One block run twice, and one weight used by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Vectors()
        self.first, self.second, self.out = nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(24, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(x))
        return self.out(torch.relu(self.first(x)) + torch.tanh(self.second(x)))


def test_shared_modules_and_weights_are_mask_exact() -> None:
    model = Shared().eval()
    with untouched(model):
        result = fasp_fx.prune(model, (X,), calibration=[BATCH], restore=None, sparsity=0.3)
    slices = {part.name: list(part.removed) for group in result.plan.groups for part in group.consumers}
    assert slices
    hooks = []
    for name, removed in slices.items():
        keep = torch.ones(model.get_parameter(name).shape[1])
        keep[removed] = 0
        hooks.append(
            model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
                lambda module, inputs, keep=keep: (inputs[0] * keep,)
            )
        )
    expected = model(X)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(result.module(X), expected, rtol=1e-5, atol=1e-6)
    shrunk = dict(result.module.named_parameters(remove_duplicate=False))
    assert shrunk["first.weight"] is shrunk["second.weight"]
    assert fasp_fx.prune(model, (X,), calibration=[BATCH], sparsity=0.3).plan.groups
