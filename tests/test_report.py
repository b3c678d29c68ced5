"""What a report says in words, and that a failing capture says nothing else."""

from __future__ import annotations

import pytest
import torch
from fasp_fx.report import Report
from torch import Tensor, nn
from zoo import randomise

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")


class Normed(nn.Module):
    """A stream through a norm, and neurons beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.up, self.down, self.out = (
            nn.Linear(4, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 20),
            nn.Linear(20, 16),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        stream = self.into(x)
        return self.out(stream + self.down(self.up(self.norm(stream)).relu()))


@pytest.mark.parametrize(
    ("include", "says", "counted"),
    [
        ((), "prunable and exempt groups", ("up", "down")),
        (("approximate",), "prunable, exempt and approximate groups", ("into", "up", "down", "out")),
    ],
)
def test_sparsity_is_a_fraction_of_what_the_report_says(
    include: tuple[str, ...], says: str, counted: tuple[str, ...]
) -> None:
    model = randomise(Normed())
    result = fasp_fx.prune(
        model, (torch.randn(3, 4),), score="random", restore=None, sparsity=0.3, include=include
    )
    line = str(result.report).splitlines()[0]
    assert line.endswith(f"of the weights of linear, convolution and recurrent operators in {says}")
    before, after = (
        sum(dict(module.named_parameters())[f"{name}.weight"].numel() for name in counted)
        for module in (model, result.module)
    )
    assert f"{1 - after / before:.2%} " in line
    assert str(Report.from_json(result.report.to_json())) == str(result.report)


class Decides(nn.Module):
    """What it computes depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if bool(x.sum() > 0) else x


def test_a_capture_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(fasp_fx.CaptureError):
        fasp_fx.analyze(Decides().eval(), (torch.ones(3, 4),))
    assert capfd.readouterr() == ("", "")
