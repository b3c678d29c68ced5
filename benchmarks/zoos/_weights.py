"""Random weights under which a deep network stays finite and every term of it can be seen."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

#: parameters that scale a branch and start near zero, so that at first the branch cannot be seen
_SCALES = re.compile(r"(gamma|layer_scale|layerscale|lambda|\bls\d?\b|scale)", re.IGNORECASE)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw the weights anew, in place, and put the module in evaluation mode.

    Matrices and kernels are normal with a variance of one over their fan-in, biases small, norm weights and
    the scales of branches around one, running statistics near those of a standard normal. A parameter whose
    value has a meaning of its own (the decay rates of a state space, say) keeps it, with a little noise.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if id(parameter) not in done and parameter.is_floating_point():
                    done.add(id(parameter))
                    parameter.copy_(_drawn(owner, name, parameter, generator))
            _statistics(owner, generator)
    return module.eval()


def _drawn(owner: nn.Module, name: str, value: Tensor, generator: Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
    if isinstance(owner, nn.Embedding):
        return noise * 0.5
    if value.numel() == 0:
        return noise
    if value.dim() >= 2 and name == "weight":
        return noise / math.sqrt(_fan_in(owner, value))
    if _SCALES.search(name) or (value.dim() == 1 and name == "weight"):
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.2 * noise
    alone = not value.dim() or value.numel() == value.shape[-1]
    if alone or (value.numel() < 4096 and value.std() > 0.3):
        return value + 0.1 * noise
    # a table of positions or tokens, or stacked matrices whose orientation is unknown
    return noise / math.sqrt(max(value.shape[-2:]))


def _fan_in(owner: nn.Module, weight: Tensor) -> int:
    transposed = isinstance(owner, _ConvTransposeNd) or type(owner).__name__ == "Conv1D"
    return max(weight.numel() // weight.shape[1 if transposed else 0], 1)


def _statistics(owner: nn.Module, generator: Generator) -> None:
    buffers = owner._buffers
    mean, variance = buffers.get("running_mean"), buffers.get("running_var")
    if mean is not None and variance is not None:
        mean.copy_(0.1 * torch.randn(mean.shape, generator=generator))
        variance.copy_(1 + 0.2 * torch.rand(variance.shape, generator=generator))
    if not isinstance(owner, _BatchNorm) and mean is not None:
        # A frozen batch norm keeps its affine part in buffers.
        for name, centre in (("weight", 1.0), ("bias", 0.0)):
            held = buffers.get(name)
            if held is not None:
                held.copy_(centre + 0.2 * torch.randn(held.shape, generator=generator))


@contextlib.contextmanager
def centring(model: nn.Module) -> Iterator[None]:
    """While the model runs once inside the block, centre what it normalises and convolves on what it sees.

    Behind rectifiers all activations are positive, so a channel of a deep random network tends to have the
    same sign everywhere: half of the channels are dead, and a mistake in one of them shows nowhere. Running
    statistics are set to those of the input, and the bias of a convolution so that its output is near zero on
    average.
    """
    seen: set[int] = set()
    handles = []

    def normalise(module: nn.Module, args: tuple[Any, ...]) -> None:
        if id(module) not in seen and args and args[0].dim() >= 2:
            seen.add(id(module))
            spread, mean = torch.var_mean(args[0].transpose(0, 1).flatten(1), dim=1, correction=0)
            module.running_mean.copy_(mean)
            module.running_var.copy_(spread + 0.1 * spread.mean() + 1e-3)

    def centre(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        if (
            id(module) in seen
            or not isinstance(output, Tensor)
            or output.dim() != len(module.kernel_size) + 2
            or output.shape[1] != module.bias.numel()
        ):
            return None
        seen.add(id(module))
        shift = 0.8 * output.transpose(0, 1).flatten(1).mean(dim=1)
        module.bias.sub_(shift)
        return output - shift.reshape(-1, *[1] * len(module.kernel_size))

    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor) and isinstance(
            getattr(module, "running_var", None), Tensor
        ):
            handles.append(module.register_forward_pre_hook(normalise))
        elif isinstance(module, _ConvNd) and module.bias is not None:
            handles.append(module.register_forward_hook(centre))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
