"""What a distillation is asked for: every option with its default, checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypedDict, get_args

from ...base._options import configured, is_number, names_of
from ...errors import ArgumentError
from ._matching import Match
from ._trained import Part

_TRAINED, _PRECISIONS, _LOSSES = (
    get_args(Part),
    ("auto", "weights", "bfloat16"),
    ("auto", "divergence", "outputs"),
)


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
    hidden: Iterable[str]
    hidden_weight: float
    held_out: float
    evaluations: int
    patience: int | None
    precision: Literal["auto", "weights", "bfloat16"]
    seed: int


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
        hidden: name patterns of weights; the activations that these read are matched beside the outputs, as
            are hidden states in CoFi (arXiv 2204.00408, section 3.2). They have to have all their channels
            still: in a transformer what queries, keys, values and the first layers of feed-forward blocks
            read. What is kept of the dense model's takes two bytes for each number, on disk.
        hidden_weight: of ``hidden``: what their error counts beside the loss of outputs; it is the mean of
            their squared errors, each relative to the dense model's mean square.
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
    hidden: Iterable[str] = ()
    hidden_weight: float = 10.0
    held_out: float = 0.1
    evaluations: int = 4
    patience: int | None = None
    precision: Literal["auto", "weights", "bfloat16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "rank", "top_k", "evaluations", "patience"):
            value = getattr(self, name)
            if value is None and name == "patience":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}={value!r} is not a positive integer")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ArgumentError(f"seed={self.seed!r} is not a whole number from 0 to 2**63 - 1")
        if not is_number(self.learning_rate) or not self.learning_rate > 0:
            raise ArgumentError(
                f"learning_rate={self.learning_rate!r} is not a positive number; 3e-5 is a good start"
            )
        if not is_number(self.warmup) or not 0 <= self.warmup <= 1:
            raise ArgumentError(f"warmup={self.warmup!r} is not in [0, 1]; it is a fraction of the steps")
        if not is_number(self.held_out) or not 0 < self.held_out < 1:
            raise ArgumentError(
                f"held_out={self.held_out!r} is not in (0, 1); it is the fraction of the batches that judges"
            )
        object.__setattr__(self, "hidden", names_of("hidden", self.hidden, None))
        if not is_number(self.hidden_weight) or not self.hidden_weight > 0:
            raise ArgumentError(
                f"hidden_weight={self.hidden_weight!r} is not a positive number; leave hidden= out to match"
                " outputs alone"
            )
        for name, known in (("train", _TRAINED), ("precision", _PRECISIONS), ("loss", _LOSSES)):
            value = getattr(self, name)
            if value not in known and not (name == "loss" and isinstance(value, Match)):
                more = (
                    ", or an object with targets() and terms() (fasp_fx.recovery.Match)"
                    if name == "loss"
                    else ""
                )
                raise ArgumentError(f"{name}={value!r} is not known; use {', '.join(map(repr, known))}{more}")

    @classmethod
    def of(cls, config: DistillationConfig | None, options: Mapping[str, Any]) -> DistillationConfig:
        """A configuration with some options in the place of its own; ``None`` stands for the defaults.

        Raises:
            ArgumentError: an option is not known, out of range, or ``config`` is no configuration.
        """
        return configured(cls, config, options)

    def to_json(self) -> str:
        """The options as JSON; a loss of the user's is named by its class."""
        return json.dumps(
            {
                **asdict(replace(self, loss="auto")),
                "loss": self.loss if isinstance(self.loss, str) else type(self.loss).__name__,
            }
        )


__all__ = ["DistillationConfig", "DistillationOptions"]
