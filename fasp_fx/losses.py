"""What a model is judged by while it is measured: the scalar whose gradients say how much an error at a consumer matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from .errors import ArgumentError, CalibrationError

#: a loss maps what the model returned, and the arguments of the call by name, to its terms: one value for each prediction, or their sum
Loss = Callable[[Any, Mapping[str, Any]], Tensor]

#: what an argument with the tokens that a model predicts is called, most telling first
_TOKENS = ("decoder_input_ids", "input_ids")


def next_token(outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of each token given those before it, shape ``[predictions]``.

    Args:
        outputs: what the model returned; the first floating-point tensor ``[batch, tokens, vocabulary]`` in it holds the logits.
        inputs: the arguments of the call; ``decoder_input_ids``, ``input_ids``, or the first integers ``[batch, tokens]`` among them are the tokens.
            Tokens whose ``attention_mask`` is zero are not predicted, nor is anything from them.

    Raises:
        CalibrationError: there are no such tensors.
    """
    tokens = next((inputs[name] for name in _TOKENS if isinstance(inputs.get(name), Tensor)), None)
    if tokens is None:
        tokens = next((leaf for leaf in output_tensors(inputs) if leaf.dim() == 2 and not leaf.is_floating_point() and leaf.dtype != torch.bool), None)
    logits = next((leaf for leaf in output_tensors(outputs) if leaf.dim() == 3 and leaf.is_floating_point()), None)
    if tokens is None or logits is None or logits.shape[:2] != tokens.shape or tokens.shape[1] < 2:
        raise CalibrationError(
            "loss='next-token' needs integers [batch, tokens] among the arguments, at least two tokens long, and logits [batch, tokens, vocabulary] among the "
            "outputs; pass a loss of your own, or loss='outputs'"
        )
    terms = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().long(), reduction="none")
    mask = token_mask(inputs, tokens.shape)
    return terms if mask is None else terms[(mask[:, 1:] & mask[:, :-1]).flatten()]


class Outputs:
    """Random combinations of the outputs, whose squared gradients are in expectation the curvature of the squared error of all outputs.

    Each floating-point output is divided by its root mean square on the first call. With v drawn from the normal
    distribution, ``E[(Jᵀv)(Jᵀv)ᵀ] = JᵀJ`` (the estimator of Hutchinson, 1989), the Gauss-Newton matrix of
    ``½‖output − dense output‖²``.

    Args:
        seed: of the combinations.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._generators: dict[int, torch.Generator] = {}
        self._sizes: dict[int, Tensor] = {}

    def __call__(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """One term for each element of the outputs, shape ``[elements]``.

        Raises:
            CalibrationError: no output is a floating-point tensor.
        """
        found = [leaf for leaf in output_tensors(outputs) if leaf.is_floating_point() and leaf.numel()]
        if not found:
            raise CalibrationError("loss='outputs' needs a floating-point output; pass a loss of your own, or loss=None")
        terms = []
        for index, leaf in enumerate(found):
            if index not in self._sizes:
                self._sizes[index] = leaf.detach().float().square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            terms.append((leaf.float() * self._drawn(index, leaf) / self._sizes[index]).flatten())
        return torch.cat(terms)

    def _drawn(self, index: int, leaf: Tensor) -> Tensor:
        """Numbers for one output, row by row, so that it does not matter how many rows come at a time."""
        generator = self._generators.setdefault(index, torch.Generator().manual_seed(self.seed + index))
        rows = [torch.randn(leaf.shape[1:], generator=generator) for _ in range(leaf.shape[0] if leaf.dim() else 1)]
        return torch.stack(rows).reshape(leaf.shape).to(leaf.device)


def resolve_loss(loss: Literal["auto", "outputs", "next-token"] | Loss) -> Loss:
    """The function of a loss given by name.

    Raises:
        ArgumentError: an unknown name.
    """
    if callable(loss):
        return loss
    if loss in ("auto", "outputs"):
        return Outputs()
    if loss == "next-token":
        return next_token
    raise ArgumentError(f"loss={loss!r} is not known; use 'outputs', 'next-token', None, or a callable from outputs and inputs to a tensor")


def token_mask(inputs: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """Where a token counts, ``[batch, tokens]``, by the mask among the arguments of a call; ``None`` if they hold none of that shape."""
    mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.shape == shape else None


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors among outputs or arguments, however these are nested."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


__all__ = ["Loss", "Outputs", "next_token", "output_tensors", "resolve_loss", "token_mask"]
