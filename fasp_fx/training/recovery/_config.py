"""What a distillation is asked for: every option with its default, checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from ...base._options import configured, is_number
from ...errors import ArgumentError
from ._matching import Match
from ._trained import PARTS, Part

_POSITIVE = (lambda value: type(value) is int and value > 0), "a positive integer"
#: of each option: whether a value is one, and what it ought to be
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": _POSITIVE,
    "accumulate": _POSITIVE,
    "rank": _POSITIVE,
    "top_k": _POSITIVE,
    "evaluations": _POSITIVE,
    "patience": (lambda value: value is None or _POSITIVE[0](value), "a positive integer or None"),
    "seed": (lambda value: type(value) is int and 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1"),
    "learning_rate": (
        lambda value: is_number(value) and value > 0,
        "a positive number; 3e-5 is a good start",
    ),
    "warmup": (
        lambda value: is_number(value) and 0 <= value <= 1,
        "in [0, 1]; it is a fraction of the steps",
    ),
    "held_out": (
        lambda value: is_number(value) and 0 < value < 1,
        "in (0, 1); it is the fraction of the batches that judges",
    ),
    "train": (lambda value: value in PARTS, f"known; use one of {', '.join(map(repr, PARTS))}"),
    "precision": (
        lambda value: value in ("auto", "weights", "bfloat16"),
        "known; use 'auto', 'weights' or 'bfloat16'",
    ),
    "loss": (
        lambda value: value in ("auto", "divergence", "outputs") or isinstance(value, Match),
        "known; use 'auto', 'divergence', 'outputs', or an object with targets() and terms()"
        " (fasp_fx.recovery.Match)",
    ),
    "key": (lambda value: value is None or isinstance(value, str), "a text"),
}


class DistillationOptions(TypedDict, total=False):
    """The fields of :class:`DistillationConfig` as keyword arguments, for type checkers."""

    epochs: int
    learning_rate: float
    warmup: float
    accumulate: int
    train: Part
    rank: int
    loss: Literal["auto", "divergence", "outputs"] | Match
    top_k: int
    held_out: float
    evaluations: int
    patience: int | None
    precision: Literal["auto", "weights", "bfloat16"]
    seed: int
    key: str | None


@dataclass(frozen=True)
class DistillationConfig:
    """The options of one distillation. :func:`fasp_fx.distil` takes each as a keyword, or all of them as
    ``config=``.

    Attributes:
        epochs: how often each training batch is seen, in an order drawn anew each time.
        learning_rate: the highest, of AdamW without weight decay; it rises over the first steps and falls to
            zero at the last, both linearly. For a language model and some dozen steps 1e-4 is too much: each
            step moves every weight about as far, and most of that is noise.
        warmup: the fraction of all steps over which the learning rate rises.
        accumulate: batches whose gradients make one step. A step on some 1,000 tokens does well.
        train: ``"all"``: every parameter that requires a gradient; ``"vectors"``: those of one dimension, the
            biases and the gains of norms; ``"low-rank"``: a product of two matrices of ``rank`` columns is
            learned for each other parameter and added to it (LoRA, arXiv 2106.09685), which takes little
            memory for the optimiser.
        rank: of ``train="low-rank"``.
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
        patience: so many evaluations in a row that are not better than the best end the training. ``None``:
            it goes on, since much is gained only when the learning rate falls.
        precision: ``"weights"``: compute in the dtype of the weights; ``"bfloat16"``: products of both models
            in bfloat16 by autocast while training; ``"auto"``: that where the device multiplies bfloat16 in
            hardware. Held-out batches are judged in the dtype of the weights, and weights of 16 bits trained
            by way of copies in float32, in any case.
        seed: of the order of the batches, of the first low-rank matrices, and of what the model draws itself
            (dropout that is always on).
        key: of a loss of your own: a text that says which it is and what it was made with. A checkpoint goes
            on where the text is the same, and there is none of such a loss without one.

    Raises:
        ArgumentError: an option is out of range or not known.
    """

    epochs: int = 2
    learning_rate: float = 3e-5
    warmup: float = 0.1
    accumulate: int = 1
    train: Part = "all"
    rank: int = 16
    loss: Literal["auto", "divergence", "outputs"] | Match = "auto"
    top_k: int = 256
    held_out: float = 0.1
    evaluations: int = 4
    patience: int | None = None
    precision: Literal["auto", "weights", "bfloat16"] = "auto"
    seed: int = 0
    key: str | None = None

    def __post_init__(self) -> None:
        for name, (fits, said) in _RULES.items():
            if not fits(value := getattr(self, name)):
                raise ArgumentError(f"{name}={value!r:.80} is not {said}")

    @classmethod
    def of(cls, config: DistillationConfig | None, options: Mapping[str, Any]) -> DistillationConfig:
        """A configuration with some options in the place of its own; ``None`` stands for the defaults.

        Raises:
            ArgumentError: an option is not known, out of range, or ``config`` is no configuration.
        """
        return configured(cls, config, options)

    def to_json(self) -> str:
        """The options as JSON; a loss of the user's is named by its class."""
        loss = self.loss if isinstance(self.loss, str) else type(self.loss).__name__
        return json.dumps(vars(self) | {"loss": loss})


__all__ = ["DistillationConfig", "DistillationOptions"]
