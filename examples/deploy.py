"""Deploy: prune a model of one's own, save it, load it where its class is unknown, compile it. `python
deploy.py --help` lists the options.
"""

import argparse

import torch
from torch import nn

import fasp_fx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", default="smaller", help="a new folder")
parser.add_argument("--sparsity", type=float, default=0.4)
parser.add_argument("--backend", default="inductor", help="of torch.compile")
options = parser.parse_args()


class Net(nn.Module):
    """Any module will do; this one joins two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.wide, self.deep = (
            nn.Conv2d(32, 32, 1),
            nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 32, 1)),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        logits: torch.Tensor = self.head(torch.cat([self.wide(x), self.deep(x)], dim=1).mean((2, 3)))
        return logits


torch.manual_seed(0)
model = Net().eval()
calibration = [torch.randn(16, 3, 32, 32) for _ in range(4)]
result = fasp_fx.prune(model, (calibration[0],), calibration=calibration, sparsity=options.sparsity)
print(result.report)
result.save(options.out)
loaded = fasp_fx.load(options.out)
assert isinstance(loaded, fasp_fx.Result)  # not a language model of fasp_fx.hf
smaller = torch.compile(loaded.module, backend=options.backend)
with torch.no_grad():
    print(f"logits of three images: {tuple(smaller(torch.randn(3, 3, 32, 32)).shape)}")
