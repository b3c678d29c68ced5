"""Write a rule: teach fasp_fx an operator of one's own, hold rule and model against the promises, and prune
by a score of one's own.
"""

import torch
from torch import Tensor, nn

import fasp_fx
from fasp_fx.calibration import Columns
from fasp_fx.testing import check_program, check_rule


@torch.library.custom_op("mylib::scaled_silu", mutates_args=())
def scaled_silu(x: Tensor, scale: Tensor) -> Tensor:
    return torch.nn.functional.silu(x * scale)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = (
            nn.Linear(8, 48),
            nn.Linear(48, 8),
            nn.Parameter(torch.rand(48) + 0.5),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.ops.mylib.scaled_silu(self.up(x), self.scale))
        return y


def loudest(columns: Columns) -> Tensor:
    """Keep what is loud, whatever the weights say."""
    assert columns.norms is not None  # there are data
    return columns.norms


scaled_silu.register_fake(lambda x, scale: torch.empty_like(x))
model, x = Net().eval(), torch.randn(64, 8)
print(*fasp_fx.analyze(model, (x,)).groups, sep="\n")  # frozen: nobody has said what the operator does
rule = (  # one line: the last dimension's channels pass, and take those of scale along
    "x[... c], scale[c] -> [... c]"
)
print(check_rule(torch.ops.mylib.scaled_silu.default, rule, examples=30))
fasp_fx.patterns.register(torch.ops.mylib.scaled_silu.default, rule)
print(*fasp_fx.analyze(model, (x,)).groups, sep="\n")
# The operator has no gradient, so "alone" would not hold.
print(check_program(model, (x,), invariants=("mask-exact", "signature", "rules")))
print(fasp_fx.prune(model, (x,), calibration=[x], score=loudest, sparsity=0.25).report)
