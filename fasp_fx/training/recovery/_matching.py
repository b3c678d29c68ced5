"""How far the outputs of a pruned model are from those of the dense one, by a loss of ours or the user's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from ...calibration.losses import output_tensors, token_mask
from ...errors import ArgumentError, CalibrationError


@runtime_checkable
class Match(Protocol):
    """A loss between what two models return for the same batch, of which the dense model's part is kept on
    disk.
    """

    def targets(self, outputs: Any) -> dict[str, Tensor]:
        """What is kept of the dense model's outputs for one batch."""

    def terms(self, outputs: Any, targets: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """The terms of the loss for one batch, of which the mean is taken; zero where the two agree, and none
        for a batch of which nothing counts, which is refused.

        Args:
            outputs: what the pruned model returned, with gradients.
            targets: what was kept of the dense model's outputs.
            inputs: the arguments of the call by name.
        """


class Divergence:
    """The Kullback-Leibler divergence of the pruned model's predictions from the dense model's, one term for
    each prediction.

    Predictions are distributions over the last dimension of the first floating-point output of two dimensions
    or more (the logits). The dense model's ``top_k`` largest probabilities count one by one and all others
    together, which bounds the whole divergence from below and is zero only where these agree. Tokens that an
    ``attention_mask`` hides are left out.

    Args:
        top_k: how many probabilities of each prediction are kept.
    """

    def __init__(self, top_k: int = 256) -> None:
        self.top_k = top_k

    def targets(self, outputs: Any) -> dict[str, Tensor]:
        """The largest log-probabilities, float16, and where they are, int32: ``[..., top_k]`` each."""
        logits = _logits(outputs)
        places = logits.topk(min(self.top_k, logits.shape[-1]), -1).indices
        values: Tensor = _LogProbabilities.apply(logits, places)
        return {"log_probabilities": values.half(), "places": places.int()}

    def terms(self, outputs: Any, targets: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """One term for each prediction, ``[predictions]``."""
        logits = _logits(outputs)
        dense, places = targets["log_probabilities"].float(), targets["places"].long()
        if logits.shape[:-1] != dense.shape[:-1]:
            raise ArgumentError(
                f"the logits of the pruned model have the shape {list(logits.shape)}, and predictions of the"
                f" dense model {list(dense.shape[:-1])}; give the model that was pruned"
            )
        pruned: Tensor = _LogProbabilities.apply(logits, places)
        likely = dense.exp()
        terms = (
            functional.kl_div(pruned, dense, log_target=True, reduction="none").where(likely > 0, 0.0).sum(-1)
        )
        if places.shape[-1] < logits.shape[-1]:
            least = torch.finfo(torch.float32).eps
            other, found = (1 - part.sum(-1) for part in (likely, pruned.exp()))
            other, found = other.clamp_min(least), found.clamp_min(least)
            terms = terms + other * (other.log() - found.log())
        mask = token_mask(inputs, terms.shape)
        return terms.flatten() if mask is None else terms[mask]


class _LogProbabilities(torch.autograd.Function):
    """``logits.float().log_softmax(-1).gather(-1, places)`` block by block, without a tensor of the size of
    the logits but their gradient.

    At vocabularies of 50,000 and more, memory for the whole softmax and its gradient takes longer to get than
    the rest of a step takes.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, places: Tensor) -> Tensor:
        total = torch.cat([rows.float().logsumexp(-1, keepdim=True) for rows in _blocks(logits)]).reshape(
            *logits.shape[:-1], 1
        )
        context.save_for_backward(logits, total, places)
        return logits.gather(-1, places).float() - total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, total, places = context.saved_tensors
        found = torch.empty_like(logits, memory_format=torch.contiguous_format)
        parts = (
            _blocks(found),
            _blocks(logits),
            total.flatten().split(_rows(logits)),
            *(_blocks(part, _rows(logits)) for part in (places, gradient)),
        )
        for into, rows, sums, where, own in zip(*parts):
            likely = (rows.float() - sums[:, None]).exp_().mul_(-own.sum(-1, keepdim=True))
            into.copy_(likely.scatter_add_(-1, where, own))
        return found, None


def _rows(logits: Tensor) -> int:
    """How many predictions are looked at together: on a CPU those that fit its nearest caches in float32 (a
    quarter of a megabyte), by which it takes a third to a fifth of the time; elsewhere some 16 MB.
    """
    return max(1, 2 ** (16 if logits.device.type == "cpu" else 22) // logits.shape[-1])


def _blocks(tensor: Tensor, rows: int | None = None) -> tuple[Tensor, ...]:
    """``[..., width]`` as blocks ``[rows, width]``."""
    return tensor.reshape(-1, tensor.shape[-1]).split(rows or _rows(tensor))


class SquaredError:
    """The squared error of every floating-point output, relative to the mean square of the dense model's: one
    term for each output.

    Outputs that are narrower than the dense model's, such as a cache, cannot be compared and are left out.
    Tokens that an ``attention_mask`` hides are left out of outputs ``[batch, tokens, width]``.
    """

    def targets(self, outputs: Any) -> dict[str, Tensor]:
        """The outputs, in their dtype, by their number."""
        return {
            str(index): leaf.detach()
            for index, leaf in enumerate(output_tensors(outputs))
            if leaf.is_floating_point()
        }

    def terms(self, outputs: Any, targets: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """One term for each output that can be compared and of which something counts, ``[outputs]``."""
        found = dict(enumerate(output_tensors(outputs)))
        terms, hidden = [], False
        for index, dense in targets.items():
            leaf = found.get(int(index))
            if leaf is None or leaf.shape != dense.shape or not leaf.numel():
                continue
            mask = token_mask(inputs, leaf.shape[:2]) if leaf.dim() == 3 else None
            if mask is not None and not bool(mask.any()):
                hidden = True
                continue
            pruned, wanted = (
                (leaf.float(), dense.float()) if mask is None else (leaf.float()[mask], dense.float()[mask])
            )
            terms.append(
                (pruned - wanted).square().mean()
                / wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
            )
        if not terms and hidden:
            return torch.zeros(0)
        if not terms:
            raise ArgumentError(
                "no output of the pruned model has the shape of the dense model's; pass a loss= of your own"
            )
        return torch.stack(terms)


def _logits(outputs: Any) -> Tensor:
    found = next(
        (leaf for leaf in output_tensors(outputs) if leaf.is_floating_point() and leaf.dim() >= 2), None
    )
    if found is None:
        raise ArgumentError(
            "loss='divergence' needs a floating-point output of two dimensions or more, the logits; use"
            " loss='outputs'"
        )
    return found


def targets_of(match: Match, outputs: Any) -> dict[str, Tensor]:
    """What a loss keeps of the dense model's outputs for a batch.

    Raises:
        ArgumentError: it returns something else than tensors by name.
    """
    found: Any = match.targets(outputs)
    if not (
        isinstance(found, Mapping) and found and all(isinstance(held, Tensor) for held in found.values())
    ):
        raise ArgumentError(
            f"loss={type(match).__name__}: targets() returned a {type(found).__name__}; return a dict of"
            " tensors by name, at least one"
        )
    return dict(found)


def terms_of(
    match: Match, outputs: Any, targets: Mapping[str, Tensor], inputs: Mapping[str, Any], index: int
) -> Tensor:
    """The terms of a loss for a batch, at least one, with gradients where these are taken.

    Args:
        index: the number of the batch.

    Raises:
        ArgumentError: the loss returns something else than terms.
        CalibrationError: nothing of the batch counts.
    """
    found: Any = match.terms(outputs, targets, inputs)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ArgumentError(
            f"loss={type(match).__name__}: terms() returned a {type(found).__name__}; return a floating-point"
            " tensor, of which the mean is taken"
        )
    if not found.numel():
        raise CalibrationError(
            f"nothing of batch {index} counts, as where its attention_mask hides every token; leave it out"
        )
    if torch.is_grad_enabled() and not found.requires_grad:
        raise ArgumentError(
            f"loss={type(match).__name__}: terms() for batch {index} leads to no parameter that is trained;"
            " compute it from the outputs as they are given, and train parameters that take part in these"
        )
    return found


__all__ = ["Divergence", "Match", "SquaredError", "targets_of", "terms_of"]
