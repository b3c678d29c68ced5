"""The modules of blocks over images, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._image_blocks import Conv, Pool, Resize
from ._spec import Shape


def conv(block: Conv, shape: Shape) -> nn.Module:
    """A convolution whose padding keeps, halves or doubles the sizes."""
    spatial, groups = len(shape.sizes), block.groups_for(shape)
    padding = block.kernel // 2
    if block.transposed:
        kind = nn.ConvTranspose2d if spatial == 2 else nn.ConvTranspose1d
        return kind(
            shape.channels,
            block.channels,
            block.kernel,
            block.stride,
            padding,
            block.stride - 1,
            groups,
            block.bias,
        )
    return (nn.Conv2d if spatial == 2 else nn.Conv1d)(
        shape.channels, block.channels, block.kernel, block.stride, padding, groups=groups, bias=block.bias
    )


def pool(block: Pool, shape: Shape) -> nn.Module:
    """Pooling by two, or to one position less."""
    two = len(shape.sizes) == 2
    if block.kind == "max":
        return nn.MaxPool2d(2) if two else nn.MaxPool1d(2)
    if block.kind == "avg":
        return nn.AvgPool2d(2) if two else nn.AvgPool1d(2)
    sizes = tuple(size - 1 for size in shape.sizes)
    return nn.AdaptiveAvgPool2d(sizes) if two else nn.AdaptiveAvgPool1d(sizes[0])


def resize(block: Resize) -> nn.Module:
    """Twice as large."""
    return nn.PixelShuffle(2) if block.kind == "pixel_shuffle" else nn.Upsample(scale_factor=2.0)


class SqueezeExciteModule(nn.Module):
    """Channels scaled by a gate computed from their means."""

    def __init__(self, channels: int, width: int, spatial: int) -> None:
        super().__init__()
        kind = nn.Conv2d if spatial == 2 else nn.Conv1d
        self.dims = tuple(range(2, 2 + spatial))
        self.reduce, self.expand = kind(channels, width, 1), kind(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(self.dims, keepdim=True)
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(mean))))


class CollapseModule(nn.Module):
    """Images and sequences to vectors."""

    def __init__(self, kind: str, shape: Shape) -> None:
        super().__init__()
        self.kind = kind
        self.dims = (1,) if shape.layout == "sequence" else tuple(range(2, 2 + len(shape.sizes)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if self.kind == "flatten" else x.mean(self.dims)
