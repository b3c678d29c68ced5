"""Compiler writer: our passes between foreign ones, the result packaged ahead of time; and the same plan as a
backend of torch.compile.
"""

import argparse

import torch
from torch import fx, nn
from torch.fx.passes.dialect.common.cse_pass import CSEPass

import fasp_fx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--package", default="smaller.pt2", help="what AOTInductor writes; '' leaves it out")
parser.add_argument("--inner", default="inductor", help="the backend that compiles the smaller graph")
options = parser.parse_args()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 96), nn.Linear(96, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The product is computed twice, which CSEPass sees.
        changed: torch.Tensor = self.down(self.up(x) * torch.sigmoid(self.up(x)))
        return x + changed


def count(module: fx.GraphModule) -> None:
    print(
        len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)),
        "linear operators",
    )


model, x = Net().eval(), torch.randn(64, 16)
exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
plan = fasp_fx.prune(exported, calibration=[x], sparsity=0.4).plan
# Verified after each.
smaller = fasp_fx.passes.Pipeline([count, CSEPass(), fasp_fx.passes.Prune(plan), count])(exported)
print({name: tuple(weight.shape) for name, weight in smaller.state_dict.items()})
if options.package:
    print("packaged in", torch._inductor.aoti_compile_and_package(smaller, package_path=options.package))
# The whole weights stay, the time goes.
fast = torch.compile(model, backend=fasp_fx.backend(plan, inner=options.inner))
with torch.no_grad():
    print("largest difference", float((fast(x) - smaller.module()(x)).abs().max()))
