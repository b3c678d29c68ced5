"""What a distillation is asked for, every option with its default, checked; and how far the outputs of a
pruned model are from those of the dense one, by a loss of ours or the user's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fasp_fx.base import Options, is_number, tensors_in
from fasp_fx.calibration import token_mask
from fasp_fx.errors import ArgumentError


@runtime_checkable
class Match(Protocol):
    """A loss between what two models return for the same batch, of which the dense model's part is kept on
    disk.

    Examples:
        >>> class Absolute:  # the mean absolute difference
        ...     def targets(self, outputs):
        ...         return {"outputs": outputs}
        ...     def terms(self, outputs, targets, inputs):
        ...         return (outputs - targets["outputs"]).abs().flatten()
        >>> trained = fasp_fx.distil(result, model, batches, epochs=1, loss=Absolute())
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
        values: Tensor = _log_probabilities(logits, places)
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
        pruned: Tensor = _log_probabilities(logits, places)
        likely = dense.exp()
        terms = (
            functional.kl_div(pruned, dense, log_target=True, reduction="none").where(likely > 0, 0.0).sum(-1)
        )
        if places.shape[-1] < logits.shape[-1]:
            least = torch.finfo(torch.float32).eps
            other, its_other = (1 - part.sum(-1) for part in (likely, pruned.exp()))
            other, its_other = other.clamp_min(least), its_other.clamp_min(least)
            terms = terms + other * (other.log() - its_other.log())
        mask = token_mask(inputs, terms.shape)
        return terms.flatten() if mask is None else terms[mask]


#: how many predictions are looked at together
_ROWS = 64


def _log_probabilities(logits: Tensor, places: Tensor) -> Tensor:
    """``logits.float().log_softmax(-1).gather(-1, places)`` block by block, each computed anew for its
    gradient: at vocabularies of 50,000 and more the whole takes more memory than the rest of a step.
    """

    def block(rows: Tensor, where: Tensor) -> Tensor:
        return rows.float().log_softmax(-1).gather(-1, where)

    parts = zip(*(whole.flatten(0, -2).split(_ROWS) for whole in (logits, places)), strict=True)
    return torch.cat([checkpoint(block, *part, use_reentrant=False) for part in parts]).reshape(places.shape)


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
            for index, leaf in enumerate(tensors_in(outputs))
            if leaf.is_floating_point()
        }

    def terms(self, outputs: Any, targets: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """One term for each output that can be compared and of which something counts, ``[outputs]``."""
        leaves = {str(index): leaf for index, leaf in enumerate(tensors_in(outputs))}
        pairs = [(leaves[index], dense) for index, dense in targets.items() if index in leaves]
        alike = [(leaf, dense) for leaf, dense in pairs if leaf.shape == dense.shape and leaf.numel()]
        if not alike:
            raise ArgumentError(
                "no output of the pruned model has the shape of the dense model's; pass a loss= of your own"
            )
        terms = []
        for leaf, dense in alike:
            mask = token_mask(inputs, leaf.shape[:2]) if leaf.dim() == 3 else None
            pruned, wanted = (part.float() if mask is None else part.float()[mask] for part in (leaf, dense))
            if wanted.numel():
                size = wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
                terms.append((pruned - wanted).square().mean() / size)
        return torch.stack(terms) if terms else torch.zeros(0)


def _logits(outputs: Any) -> Tensor:
    logits = next(
        (leaf for leaf in tensors_in(outputs) if leaf.is_floating_point() and leaf.dim() >= 2), None
    )
    if logits is None:
        raise ArgumentError(
            "loss='divergence' needs a floating-point output of two dimensions or more, the logits; use"
            " loss='outputs'"
        )
    return logits


_POSITIVE = (lambda value: type(value) is int and value > 0), "a positive integer"
#: of each option: whether a value is one, and what it ought to be
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": _POSITIVE,
    "accumulate": _POSITIVE,
    "top_k": _POSITIVE,
    "evaluations": _POSITIVE,
    "seed": (lambda value: type(value) is int and 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1"),
    "learning_rate": (
        lambda value: is_number(value) and value > 0,
        "a positive number; 3e-5 is a good start",
    ),
    "held_out": (
        lambda value: is_number(value) and 0 < value < 1,
        "in (0, 1); it is the fraction of the batches that judges",
    ),
    "precision": (
        lambda value: value in ("auto", "weights", "bfloat16"),
        "known; use 'auto', 'weights' or 'bfloat16'",
    ),
    "loss": (
        lambda value: value in ("auto", "divergence", "outputs") or isinstance(value, Match),
        "known; use 'auto', 'divergence', 'outputs', or an object with targets() and terms()"
        " (fasp_fx.training.Match)",
    ),
}


class DistillationOptions(TypedDict, total=False):
    """The fields of :class:`DistillationConfig` as keyword arguments, for type checkers."""

    epochs: int
    learning_rate: float
    accumulate: int
    loss: Literal["auto", "divergence", "outputs"] | Match
    top_k: int
    held_out: float
    evaluations: int
    precision: Literal["auto", "weights", "bfloat16"]
    seed: int


@dataclass(frozen=True)
class DistillationConfig(Options):
    """The options of one distillation. :func:`fasp_fx.distil` takes each as a keyword, or all of them as
    ``config=``.

    Attributes:
        epochs: how often each training batch is seen, in an order drawn anew each time.
        learning_rate: the highest, of AdamW without weight decay; it rises over the first tenth of the steps
            and falls to zero at the last, both linearly. For a language model and some dozen steps of 1,024
            tokens 1e-4 does better than this on text of other kinds, and 2e-4 worse than nothing; for steps
            of 256 tokens halve both.
        accumulate: batches whose gradients make one step. A step on some 1,000 tokens does well.
        loss: how far outputs are from the dense model's. ``"divergence"``: :class:`Divergence`, for logits;
            ``"outputs"``: :class:`SquaredError`; or a :class:`Match` of your own. ``"auto"``:
            ``"divergence"`` for results of :func:`fasp_fx.hf.prune` and those pruned by the loss of next
            tokens, else ``"outputs"``.
        top_k: of ``loss="divergence"``: how many of the dense model's probabilities are kept of each
            prediction; the others count as one. What is kept takes six bytes each, on disk.
        held_out: the fraction of the batches that is not trained on, at least one batch; the weights that do
            best on it are kept.
        evaluations: how often the held-out batches are looked at, evenly over the steps; the last time after
            the last step.
        precision: ``"weights"``: compute in the dtype of the weights; ``"bfloat16"``: products of both models
            in bfloat16 by autocast while training; ``"auto"``: that where the device multiplies bfloat16 in
            hardware. Held-out batches are judged in the dtype of the weights, and weights of 16 bits trained
            by way of copies in float32, in any case.
        seed: of the order of the batches, and of what the model draws itself (dropout that is always on).

    Raises:
        ArgumentError: an option is out of range or not known.

    Examples:
        >>> from fasp_fx.training import DistillationConfig
        >>> config = DistillationConfig(epochs=1, learning_rate=1e-3)
        >>> trained = fasp_fx.distil(result, model, batches, config=config)
        >>> trained.report.recovery.steps
        3
    """

    epochs: int = 2
    learning_rate: float = 3e-5
    accumulate: int = 1
    loss: Literal["auto", "divergence", "outputs"] | Match = "auto"
    top_k: int = 256
    held_out: float = 0.1
    evaluations: int = 4
    precision: Literal["auto", "weights", "bfloat16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (fits, said) in _RULES.items():
            if not fits(value := getattr(self, name)):
                raise ArgumentError(f"{name}={value!r:.80} is not {said}")

    def to_json(self) -> str:
        """The options as JSON; a loss of the user's is named by its class and ``key``."""
        named = f"{type(self.loss).__name__} {getattr(self.loss, 'key', None)}"
        return json.dumps(vars(self) | {"loss": self.loss if isinstance(self.loss, str) else named})
