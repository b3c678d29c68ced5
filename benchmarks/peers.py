"""Ten networks of torchvision beside Torch-Pruning: what half of their multiply-accumulates cost, in seconds
of a processor and in accuracy, right away and after the same fine-tuning. Resumes where it was stopped.

    pip install torchvision scikit-learn; pip install --no-deps torch-pruning

Each network is trained from scratch on four fifths of scikit-learn's 1,797 handwritten digits, enlarged to
32 x 32; the last fifth measures. Torch-Pruning removes the same part of each layer, by magnitudes; the part
is searched for, and the seconds are those of the last try.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torchvision
from _protocol import Results, arguments, descend, macs
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import fasp_fx

NETWORKS = (
    *("resnet50", "densenet121", "mobilenet_v2", "mobilenet_v3_large", "googlenet", "efficientnet_b0"),
    *("regnet_y_400mf", "convnext_tiny", "vgg16_bn", "vit_b_16"),
)
ARGUMENTS = {
    "vit_b_16": {"image_size": 32},
    "googlenet": {"aux_logits": False, "init_weights": True},
    "mobilenet_v3_large": {"norm_layer": nn.BatchNorm2d},  # its own statistics take thousands of steps
}
#: how fasp_fx is asked, by the name of the method
OPTIONS = {"magnitudes": {"score": "magnitude", "restore": None}, "default": {}}
TRAINING, TUNING = 200, 30


def main() -> None:
    results = Results(arguments(__doc__, text=False, out=True).parse_args().out)
    torch.backends.mha.set_fastpath_enabled(False)  # in which torch counts nothing
    (fitted, measured), (taught, asked) = digits()
    for name in NETWORKS:
        if results.has({"network": name}):
            continue
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, num_classes=10, **ARGUMENTS.get(name, {}))
        train(model, fitted, taught, TRAINING, 1e-3)
        found = {"network": name, "dense": accuracy(model, measured, asked)}
        for method in ("torch-pruning", *OPTIONS):
            seconds, pruned = prune(model, method, fitted[:256])
            found[method] = {
                "seconds": seconds,
                "left": counted(pruned) / counted(model),
                "accuracy": accuracy(pruned, measured, asked),
            }
            train(pruned, fitted, taught, TUNING, 1e-4)
            found[method]["tuned"] = accuracy(pruned, measured, asked)
        results.add(found)


def digits() -> list[list[Tensor]]:
    """Images and labels, each of four fifths and of the last."""
    images, labels = (torch.from_numpy(found) for found in load_digits(return_X_y=True))
    images = (images.float() / 8 - 1).reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    images = functional.interpolate(images, (32, 32), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split(1437)
    return [[tensors[part] for part in order] for tensors in (images, labels)]


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, rate: float) -> None:
    """Train on batches of 64, and leave in evaluation mode."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    descend(model, images, labels, steps, optimizer, schedule)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """How often the likeliest class is the right one."""
    found = torch.cat([model(batch).argmax(1) for batch in images.split(64)])
    return float((found == labels).double().mean())


def counted(model: nn.Module) -> float:
    """Multiply-accumulates of two images."""
    return macs(lambda: model(torch.zeros(2, 3, 32, 32)))


def prune(model: nn.Module, method: str, images: Tensor) -> tuple[float, nn.Module]:
    """Processor seconds, and the model with half of its multiply-accumulates."""
    if method == "torch-pruning":
        return halved(model, images[:1])
    how: dict[str, Any] = {"calibration": images.split(64), "progress": False, **OPTIONS[method]}
    start = time.process_time()
    result = fasp_fx.prune(model, (images[:2],), budget=fasp_fx.allocation.Macs(0.5), **how)
    seconds = time.process_time() - start
    try:
        return seconds, result.eager(model)  # whose batch norms can be trained
    except fasp_fx.EagerError:
        return seconds, result.module


def halved(model: nn.Module, example: Tensor) -> tuple[float, nn.Module]:
    """The same with Torch-Pruning, as near to a half as bisection gets."""
    import torch_pruning as tp

    low, high = 0.0, 1.0
    while True:
        part, pruned = (low + high) / 2, copy.deepcopy(model)
        layers = list(pruned.modules())
        how = {
            "importance": tp.importance.GroupMagnitudeImportance(),
            "ignored_layers": [own for own in layers if getattr(own, "out_features", 0) == 10],
            "num_heads": {own: own.num_heads for own in layers if isinstance(own, nn.MultiheadAttention)},
        }
        start = time.process_time()
        tp.MetaPruner(pruned, example, pruning_ratio=part, **how).step()
        seconds, left = time.process_time() - start, counted(pruned) / counted(model)
        if abs(left - 0.5) < 0.01 or high - low < 0.01:
            return seconds, pruned
        low, high = (part, high) if left > 0.5 else (low, part)


if __name__ == "__main__":
    main()
