"""What a model is judged by while it is measured: the scalar whose gradients say how much an error at a
consumer matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fasp_fx.base import generator_of, tensors_in, unfilled
from fasp_fx.errors import CalibrationError

from ._statistics import precise

#: a loss maps what the model returned, and the arguments of the call by name, to its terms: one value for
#: each prediction, or their sum
Loss = Callable[[Any, Mapping[str, Any]], Tensor]

#: says of an output which of its tokens are padding, ``[batch, tokens]``; ``None``: it has no tokens that the
#: mask is for
Padding = Callable[[Tensor], Tensor | None]

#: so many elements of an output tell how large it is
SETTLED = 1024

#: what an argument with the tokens that a model predicts is called, most telling first
_TOKENS = ("decoder_input_ids", "input_ids")


def next_token(outputs: Any, inputs: Mapping[str, Any], padding: Padding = lambda leaf: None) -> Tensor:
    """Cross-entropy of each token given those before it, shape ``[predictions]``.

    Args:
        outputs: what the model returned; the first floating-point tensor ``[batch, tokens, vocabulary]`` in
            it holds the logits.
        inputs: the arguments of the call; ``decoder_input_ids``, ``input_ids``, or the first integers
            ``[batch, tokens]`` among them are the tokens. Tokens whose ``attention_mask`` is zero are not
            predicted, nor is anything from them.
        padding: says of the logits which of their tokens are padding besides.

    Raises:
        CalibrationError: there are no such tensors.

    Examples:
        >>> from fasp_fx.calibration import next_token
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> logits = nn.functional.one_hot(torch.tensor([[2, 3, 0]]), 4) * 100.0  # right of both
        >>> next_token(logits, {"input_ids": ids}).abs()
        tensor([0., 0.])
    """
    logits, tokens, counts = predictions(outputs, inputs, padding)
    terms = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().long(), reduction="none"
    )
    return terms[(counts[:, 1:] & counts[:, :-1]).flatten()]


def predictions(
    outputs: Any, inputs: Mapping[str, Any], padding: Padding = lambda leaf: None
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits ``[batch, tokens, vocabulary]``, the tokens ``[batch, tokens]``, and which of them count;
    arguments and errors as for :func:`next_token`.
    """
    named = [inputs[name] for name in _TOKENS if isinstance(inputs.get(name), Tensor)]
    others = [
        leaf
        for leaf in tensors_in(inputs)
        if leaf.dim() == 2 and not leaf.is_floating_point() and leaf.dtype != torch.bool
    ]
    tokens = next(iter([*named, *others]), None)
    logits = next(
        (leaf for leaf in tensors_in(outputs) if leaf.dim() == 3 and leaf.is_floating_point()), None
    )
    if tokens is None or logits is None or logits.shape[:2] != tokens.shape or tokens.shape[1] < 2:
        raise CalibrationError(
            "loss='next-token' needs integers [batch, tokens] among the arguments, at least two tokens long,"
            " and logits [batch, tokens, vocabulary] among the outputs; pass a loss of your own, or"
            " loss='outputs'"
        )
    counts = torch.ones_like(tokens, dtype=torch.bool)
    if (mask := token_mask(inputs, tokens.shape)) is not None:
        counts &= mask
    if (filling := padding(logits)) is not None:
        counts &= ~filling.to(counts.device)
    return logits, tokens, counts


class Outputs:
    """Random combinations of the outputs, whose squared gradients are in expectation the curvature of the
    squared error of all outputs.

    Each floating-point output is divided by its root mean square, on what :meth:`settle` was shown, or else
    on the first call; one that was zero there throughout has no size, and no say, nor have fillings (masked
    scores of -1e9, say). With v drawn from the
    normal distribution, ``E[(Jᵀv)(Jᵀv)ᵀ] = JᵀJ`` (the estimator of Hutchinson, 1989), the Gauss-Newton matrix
    of ``½‖output − dense output‖²``.

    Args:
        seed: of the combinations.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed, self._first, self._rows = seed, 0, 0
        self._seen: dict[int, tuple[float, int]] = {}

    def settle(self, outputs: Any, padding: Padding = lambda leaf: None) -> bool:
        """Let outputs tell how large they are; whether enough of each was seen by now.

        Args:
            padding: says of each output which tokens do not count.

        Raises:
            CalibrationError: no output is a floating-point tensor.
        """
        for index, leaf in enumerate(number_outputs(outputs)):
            counted = without_padding(leaf.detach(), padding(leaf))[0]
            counted = unfilled(counted, counted)
            squares, count = self._seen.get(index, (0.0, 0))
            more = float(counted.to(precise(counted.device)).square().sum())
            self._seen[index] = squares + more, count + counted.numel()
        return all(count >= SETTLED and squares > 0 for squares, count in self._seen.values())

    def begin(self, first: int, rows: int) -> None:
        """Say which sequences the next outputs are of: what is drawn for one does not depend on what comes
        before it, nor on which process sees it.

        Args:
            first: the number of the first.
            rows: how many there are.
        """
        self._first, self._rows = first, rows

    @property
    def has_size(self) -> bool:
        """Whether any output was more than zero by now."""
        return any(squares > 0 for squares, _ in self._seen.values())

    def __call__(
        self, outputs: Any, inputs: Mapping[str, Any], padding: Padding = lambda leaf: None
    ) -> Tensor:
        """One term for each element of the outputs that is no filling, shape ``[elements]``.

        Args:
            padding: as for :meth:`settle`.

        Raises:
            CalibrationError: no output is a floating-point tensor.
        """
        terms = []
        for index, leaf in enumerate(number_outputs(outputs)):
            counted, rows = without_padding(leaf, padding(leaf))
            squares, count = self._seen.get(index, (0.0, 1))
            size = math.sqrt(squares / max(count, 1))
            wide = counted if counted.dtype == torch.float64 else counted.float()
            products = wide / size * self._drawn(index, counted, rows) if size > 0 else wide * 0
            terms.append(unfilled(products, counted).flatten())
        return torch.cat(terms)

    def _drawn(self, index: int, counted: Tensor, rows: list[int]) -> Tensor:
        """Numbers for one output, row by row, so that it does not matter how many rows come at a time, nor
        how far they are padded.
        """
        # Rows that are no sequences are counted in each piece anew.
        alike = len(rows) == self._rows
        places = [(self._first + row,) if alike else (self._first, row, 0) for row in range(len(rows))]
        generators = (generator_of(self.seed, index, *place) for place in places)
        drawn = [
            torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
            for size, generator in zip(rows, generators, strict=True)
        ]
        return torch.cat(drawn).reshape(counted.shape).to(counted.device)


def evaluated(loss: Loss, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> Tensor:
    """The terms of a loss; those of this module leave padding out, one of the user's sees to it by itself."""
    return loss(outputs, inputs, *((padding,) if isinstance(loss, Outputs) or loss is next_token else ()))


def resolve_loss(loss: Literal["auto", "outputs", "next-token"] | Loss) -> Loss:
    """The function of a loss given by name."""
    return loss if callable(loss) else next_token if loss == "next-token" else Outputs()


def number_outputs(outputs: Any) -> list[Tensor]:
    """The outputs that have a squared error.

    Raises:
        CalibrationError: there are none.
    """
    numbers = [leaf for leaf in tensors_in(outputs) if leaf.is_floating_point() and leaf.numel()]
    if not numbers:
        raise CalibrationError(
            "loss='outputs' needs a floating-point output; pass a loss of your own, or loss=None"
        )
    return numbers


def without_padding(leaf: Tensor, padding: Tensor | None) -> tuple[Tensor, list[int]]:
    """What counts of an output, and how many elements of it each row holds; all of it where it has no tokens
    that could be padding.
    """
    if padding is not None:
        counts, each = ~padding.to(leaf.device), math.prod(leaf.shape[2:])
        return leaf[counts], [count * each for count in counts.sum(1).tolist()]
    rows = leaf.shape[0] if leaf.dim() else 1
    return leaf, [leaf.numel() // rows] * rows


def token_mask(inputs: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """Where a token counts, ``[batch, tokens]``, by the mask among the arguments of a call; ``None`` if they
    hold none of that shape.
    """
    mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.shape == shape else None
