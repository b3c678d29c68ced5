"""Text for calibration and evaluation: chunks of a file, or samples from the model itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base._device import multiplies_bfloat16, products_in_bfloat16
from ..errors import ArgumentError, CalibrationError
from ._checkpoint import vocabulary

SAMPLED_TOGETHER = 64
#: tokens that a model may be asked to write: more than eight times WikiText-2, days of work for a small one
WRITTEN = 2**24


def check_amount(chunks: Sequence[int], length: int) -> None:
    """Refuse to let a model write without end.

    Args:
        chunks: to calibrate on and to measure on, as far as the model shall write them.

    Raises:
        ArgumentError: names what is possible.
    """
    if sum(chunks) * length > WRITTEN:
        if length > WRITTEN // 2:
            raise ArgumentError(
                f"--length {length} is more than a model is let write: use at most {WRITTEN // 2}, or a text"
                " file"
            )
        most = WRITTEN // length
        option, other = ("--batches", chunks[1]) if chunks[0] >= chunks[1] else ("--eval-batches", chunks[0])
        raise ArgumentError(
            f"{option} {max(chunks)} texts of {length} tokens are more than a model is let write ({WRITTEN:,}"
            f" tokens); use at most {option} {max(most - other, most // 2)}, or a text file"
        )


def check_output(model: Any, chunk: Tensor) -> None:
    """Refuse a model that does not compute: one whose predictions for a text are not finite.

    Args:
        chunk: tokens ``[length]``.

    Raises:
        CalibrationError: says so.
    """
    with torch.no_grad():
        logits = model(input_ids=chunk[None].to(next(model.parameters()).device), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise CalibrationError(
            "what the model predicts is not finite; give an undamaged model, or another --dtype"
        )


def read_chunks(file: Path, tokenizer: Any, length: int) -> Tensor:
    """A text file, tokenised whole without special tokens and cut into consecutive chunks; a shorter rest is
    dropped.

    Returns:
        Tokens ``[chunks, length]``.

    Raises:
        CalibrationError: the file cannot be read, or holds less than one chunk.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"'{file}' is not UTF-8 text; convert it") from error
    except OSError as error:
        raise CalibrationError(
            f"'{file}' cannot be read: {error.strerror or error}; give a text file"
        ) from error
    tokens = torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
    )
    count = len(tokens) // length
    if count == 0:
        raise CalibrationError(
            f"'{file}' holds {len(tokens)} tokens, less than one chunk of {length}; use a smaller --length or"
            " more text"
        )
    return tokens[: count * length].reshape(count, length)


def start_token(model: Any, tokenizer: Any) -> int:
    """The token a text begins with.

    Raises:
        CalibrationError: neither model nor tokenizer names one that the model knows.
    """
    size = vocabulary(model)
    unknown = None
    for holder in (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(holder, name, None)
            token = token[0] if isinstance(token, (list, tuple)) and token else token
            if isinstance(token, int) and (size is None or 0 <= token < size):
                return token
            unknown = token if isinstance(token, int) and unknown is None else unknown
    if unknown is not None:
        raise CalibrationError(
            f"a text of this model begins with the token {unknown}, and it knows those from 0 to"
            f" {(size or 0) - 1}; give the tokenizer that belongs to the model, or calibrate on a file with"
            " --calibration FILE"
        )
    raise CalibrationError(
        "the model names no token that begins a text, so it cannot write its own; calibrate on a file with"
        " --calibration FILE"
    )


def sample(
    model: Any,
    start: int,
    count: int,
    length: int,
    *,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Let a language model write ``count`` texts of ``length`` tokens: plain sampling from its own
    distribution, past the end of a document too.

    Args:
        start: the first token of each text, included in its length.
        seed: the same seed gives the same texts on the same machine; the global random state is left as it
            was.
        progress: called with the fraction done.

    Returns:
        Tokens ``[count, length]``.

    Raises:
        CalibrationError: the model predicts nothing finite.
    """
    from transformers import (
        GenerationConfig,
        LogitsProcessor,
        LogitsProcessorList,
        StoppingCriteria,
        StoppingCriteriaList,
    )

    groups = [min(SAMPLED_TOGETHER, count - first) for first in range(0, count, SAMPLED_TOGETHER)]
    written = 0

    class Progress(StoppingCriteria):
        """Never stops; counts."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            if progress is not None:
                progress((written + input_ids.shape[0] * input_ids.shape[1] / length) / count)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    class Draw(LogitsProcessor):
        """Leaves the one token that is drawn: where the running sum of the probabilities passes a uniform
        number.

        One number for each text is needed for this; ``torch.multinomial``, which ``generate`` would use,
        draws one for each word of the vocabulary.
        """

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            passed = scores.softmax(-1, dtype=torch.float32).cumsum(-1)
            total = passed[:, -1:]
            if not torch.isfinite(total).all():
                raise CalibrationError(
                    f"what the model predicts is not finite any more after {input_ids.shape[1]} tokens of its"
                    " own; calibrate on a file"
                )
            drawn = torch.searchsorted(
                passed, torch.rand(len(scores), 1, device=scores.device) * total, right=True
            )
            return torch.full_like(scores, -torch.inf).scatter_(
                -1, drawn.clamp_max(scores.shape[-1] - 1), 0.0
            )

    device = next(model.parameters()).device
    settings = GenerationConfig(
        do_sample=False, max_length=length, bos_token_id=start, eos_token_id=None, pad_token_id=start
    )
    own: Any = {
        "logits_processor": LogitsProcessorList([Draw()]),
        "stopping_criteria": StoppingCriteriaList([Progress()]),
    }
    texts = []
    with (
        _settings(model, settings),
        torch.no_grad(),
        products_in_bfloat16(device, multiplies_bfloat16(device)),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        for size in groups:
            prompt = torch.full((size, 1), start, dtype=torch.long, device=device)
            check_output(model, prompt[0])  # sampling from what is no distribution fails in words of its own
            texts.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **own))
            written += size
    return torch.cat(texts)


@contextlib.contextmanager
def _settings(model: Any, settings: Any) -> Iterator[None]:
    """Generate by these settings alone: what a model brings along (an end token, a temperature) would be
    merged into those given by call.
    """
    original = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = original


def parse_slice(text: str | None) -> slice:
    """What :func:`parse_range` chooses, of however many chunks.

    Raises:
        ArgumentError: it does not parse.
    """
    if text is None:
        return slice(None)
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError("there is no colon")
        return slice(int(first) if first else None, int(last) if last else None)
    except ValueError as error:
        raise ArgumentError(
            f"'{text}' is not a range of chunks; write first:last+1, for example 100:140"
        ) from error


def parse_range(text: str | None, count: int) -> range:
    """``"a:b"``, ``"a:"``, ``":b"`` or ``None`` as a range of chunks.

    Raises:
        ArgumentError: it does not parse, or names no chunk there is.
    """
    chosen = range(count)[parse_slice(text)]
    if text is not None and not chosen:
        raise ArgumentError(
            f"the range {text} holds none of the {count} chunks of the text; chunks are 0 to {count - 1}"
        )
    return chosen


__all__ = [
    "check_amount",
    "check_output",
    "parse_range",
    "parse_slice",
    "read_chunks",
    "sample",
    "start_token",
]
