"""Detector: prune a detector of torchvision in parts, train what is left by its own losses, run it.

`python detector.py` draws its images; the weights are random, or those of `--weights file.pth`.
"""

import argparse
from typing import Any

import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import box_iou

import fasp_fx
from fasp_fx.allocation import Macs

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--weights", help="a state dict")
parser.add_argument("--macs", type=float, default=0.5, help="the share of multiply-accumulates that stays")
parser.add_argument("--size", type=int, default=128, help="of images")
parser.add_argument("--steps", type=int, default=60, help="of the dense model; the smaller one gets half")
parser.add_argument("--out", default="detector.pt")
options = parser.parse_args()
Targets = list[dict[str, torch.Tensor]]


def draw(count: int) -> tuple[list[torch.Tensor], Targets]:
    """Images of one box each, bright or dark, and where it is."""
    images, targets = [], []
    for _ in range(count):
        image, kind = 0.4 + 0.2 * torch.rand(3, options.size, options.size), int(torch.randint(2, ()))
        left, top = torch.randint(options.size // 2, (2,)).tolist()
        side = options.size // 4 + int(torch.randint(options.size // 4, ()))
        image[:, top : top + side, left : left + side] = float(kind)
        box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        images.append(image)
        targets.append({"boxes": box, "labels": torch.tensor([1 + kind])})
    return images, targets


def train(model: torch.nn.Module, steps: int) -> None:
    """By the detector's own losses; it is in evaluation mode afterwards."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(steps):
        loss = torch.stack(list(model(*draw(4)).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.no_grad()
def overlap(model: torch.nn.Module) -> float:
    """The mean overlap of the drawn box and the most certain one found, over 16 images."""
    torch.manual_seed(1)
    images, targets = draw(16)
    found = [one["boxes"][:1] for one in model(images)]
    return sum(float(box_iou(a, b["boxes"]).sum()) for a, b in zip(found, targets, strict=True)) / 16


torch.manual_seed(0)
model = fasterrcnn_mobilenet_v3_large_320_fpn(
    weights=None, weights_backbone=None, num_classes=3, min_size=options.size, max_size=options.size
)
if options.weights:
    model.load_state_dict(torch.load(options.weights, weights_only=True))
train(model, options.steps)
images, _ = draw(16)
calls: list[Any] = [(images[at : at + 4],) for at in range(0, 16, 4)]  # a batch is a list of images
result = fasp_fx.prune(
    model, calls[0], calibration=calls, budget=Macs(options.macs), round_to=8, allocation="uniform"
)
print(result.report)
print(f"parts: {', '.join(result.parts)}; left as they are: {', '.join(result.left)}")

small = result.eager(model)
overlaps = {"dense": overlap(model), "pruned": overlap(small)}
train(small, options.steps // 2)
overlaps["fine-tuned"] = overlap(small)
for name, value in overlaps.items():
    print(f"{name}: mean overlap {value:.2f}")
torch.save(small, options.out)
again = torch.load(options.out, weights_only=False)
with torch.no_grad():
    assert torch.equal(again(images)[0]["boxes"], small(images)[0]["boxes"])
