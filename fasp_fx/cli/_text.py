"""Text to calibrate or train on, and to measure on: chunks of a file, or samples from the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..base._device import device_of, multiplies_bfloat16, products_in_bfloat16
from ..errors import CalibrationError
from ._console import Stages
from ._models import check_length, check_tokens

SAMPLED_TOGETHER = 64


@dataclass
class Texts:
    """The text of one command: chunks to use, and chunks to measure on, which the first do not hold.

    Attributes:
        file, batches: where chunks to use come from, and how many; ``None``: the model writes them.
        text, eval_batches: where chunks to measure on come from, and how many; ``None``: what is left of
            ``file``, and where that is nothing, the model writes them.
        length: tokens of each chunk.
        seed: of what the model writes.
        use: what the chunks are for that are not measured on.
        used, evaluation: the chunks ``[chunks, length]``, once they are read or written.
    """

    file: Path | None
    batches: int
    text: Path | None
    eval_batches: int
    length: int
    seed: int
    use: str = "calibration"
    used: Tensor | None = None
    evaluation: Tensor | None = None

    def __post_init__(self) -> None:
        self.label = (
            f"perplexity on text that the model wrote itself, not seen by this {self.use}"
            f" ({self.eval_batches} x {self.length} tokens)"
        )

    def read(self, tokenizer: Any) -> None:
        """Read what comes from files.

        Raises:
            CalibrationError: a file does not hold enough.
        """
        first = 0
        if self.file is not None:
            chunks = read_chunks(self.file, tokenizer, self.length)
            # Where no other text is given, what is measured on is of this one: what is not needed, but at
            # least a quarter.
            spare = max(len(chunks) - self.batches, len(chunks) // 4) if self.text is None else 0
            self.used = chunks[: min(self.batches, len(chunks) - spare)]
            first = len(self.used)
            if spare:
                self._measure_on(self.file, chunks, first)
        if self.text is not None:
            chunks = read_chunks(self.text, tokenizer, self.length)
            first = first if self.file is not None and self.text.samefile(self.file) else 0
            if first >= len(chunks):
                raise CalibrationError(
                    f"all {len(chunks)} chunks of '{self.text}' are used, leaving none to measure on;"
                    " use fewer --batches or a smaller --length"
                )
            self._measure_on(self.text, chunks, first)

    def _measure_on(self, file: Path, chunks: Tensor, first: int) -> None:
        self.evaluation = chunks[first : first + self.eval_batches]
        self.label = (
            f"perplexity on chunks {first} to {first + len(self.evaluation) - 1} of {file.name}"
            f" ({len(self.evaluation)} x {self.length} tokens)"
        )

    def check_against(self, model: Any) -> None:
        """Refuse text that the model does not take, and a model that does not compute.

        Raises:
            FaspError: says why.
        """
        check_length(model, self.length)
        for use, chunks in ((f"for {self.use}", self.used), ("to measure on", self.evaluation)):
            if chunks is not None:
                check_tokens(model, chunks, f"the text {use}")
                check_output(model, chunks[0])

    def write(self, model: Any, tokenizer: Any, stages: Stages) -> None:
        """Let the model write what no file gives and what it has not written yet."""
        to_use = self.batches if self.used is None else 0
        count = to_use + (self.eval_batches if self.evaluation is None else 0)
        if count:
            stages.begin(f"letting the model write {count} texts of {self.length} tokens", measured=True)
            start = start_token(model, tokenizer)
            written = sample(model, start, count, self.length, seed=self.seed, progress=stages.update)
            self.used = written[:to_use] if self.used is None else self.used
            self.evaluation = written[to_use:] if self.evaluation is None else self.evaluation


def read_chunks(file: Path, tokenizer: Any, length: int) -> Tensor:
    """A text file, tokenised whole without special tokens and cut into consecutive chunks; a shorter rest is
    dropped.

    Returns:
        Tokens ``[chunks, length]``.

    Raises:
        CalibrationError: the file is no text, or holds less than one chunk.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"'{file}' is not UTF-8 text; convert it") from error
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


def check_output(model: Any, chunk: Tensor) -> None:
    """Refuse a model that does not compute: one whose predictions for a text are not finite.

    Args:
        chunk: tokens ``[length]``.

    Raises:
        CalibrationError: says so.
    """
    with torch.no_grad():
        logits = model(input_ids=chunk[None].to(device_of(model)), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise CalibrationError(
            "what the model predicts is not finite; give an undamaged model, or another --dtype"
        )


def start_token(model: Any, tokenizer: Any) -> int:
    """The token a text begins with.

    Raises:
        CalibrationError: neither model nor tokenizer names one that the model knows.
    """
    size = model.config.get_text_config().vocab_size
    holders = (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None))
    named = [getattr(holder, name, None) for holder in holders for name in ("bos_token_id", "eos_token_id")]
    firsts = [token[0] if isinstance(token, list | tuple) and token else token for token in named]
    for token in firsts:
        if isinstance(token, int) and 0 <= token < size:
            return token
    raise CalibrationError(
        "no token that begins a text of this model is named, or none that the model knows, so it cannot write"
        " its own; give the tokenizer that belongs to it, or calibrate on a file with --calibration FILE"
    )


def sample(
    model: Any,
    start: int,
    count: int,
    length: int,
    *,
    seed: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
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
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    device = device_of(model)
    texts: list[Tensor] = []

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
            progress((sum(map(len, texts)) + len(input_ids) * (input_ids.shape[1] + 1) / length) / count)
            return torch.full_like(scores, -torch.inf).scatter_(
                -1, drawn.clamp_max(scores.shape[-1] - 1), 0.0
            )

    settings = GenerationConfig(
        do_sample=False, max_length=length, bos_token_id=start, eos_token_id=None, pad_token_id=start
    )
    with (
        # What a model brings along (an end token, a temperature) would be merged into settings given by call.
        mock.patch.object(model, "generation_config", settings),
        torch.no_grad(),
        products_in_bfloat16(device, multiplies_bfloat16(device)),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        for first in range(0, count, SAMPLED_TOGETHER):
            prompt = torch.full((min(SAMPLED_TOGETHER, count - first), 1), start, device=device)
            check_output(model, prompt[0])  # sampling from what is no distribution fails in words of its own
            own = LogitsProcessorList([Draw()])
            texts.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), logits_processor=own))
    return torch.cat(texts)
