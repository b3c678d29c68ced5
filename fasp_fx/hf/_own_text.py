"""Text that a language model writes itself, to calibrate on where there is no other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fasp_fx.base import Shown, advance_of, device_of, one_at_a_time, shows
from fasp_fx.errors import ArgumentError, CalibrationError

from ._stages import CausalStages, stages_of

#: texts that are written at once
_TOGETHER = 64

#: what texts that a model writes begin with, in turn, so that they are of many kinds: from nothing it writes
#: mostly of what it saw most
_OPENINGS = (
    "",
    "The ",
    "def ",
    "Question: ",
    "Once upon a time",
    "Abstract: ",
    '"I ',
    "1. ",
    "import ",
    "In 19",
    "He ",
    "To solve this, ",
    "class ",
    "Dear ",
    "We investigated ",
    "How many ",
)


@shows("writing")
@one_at_a_time
def write_texts(
    model: Any,
    tokenizer: Any = None,
    count: int = 64,
    length: int = 256,
    *,
    seed: int = 0,
    progress: Shown = None,
) -> Tensor:
    """Have a language model write text: drawn from what it predicts, past the end of a document, too.

    Pruning calibrates on it where no other text is at hand (arXiv 2410.17170), and trains on it afterwards.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: that of the model; the texts then begin in sixteen ways, as prose, code, questions and
            others do. ``None``: from nothing.
        count, length: how many texts of how many tokens.
        seed: the same one gives the same texts on the same machine; the global random state stays as it was.
        progress: as for :func:`fasp_fx.prune`.

    Returns:
        Tokens ``[count, length]``, on the model's device.

    Raises:
        ArgumentError: it is another kind of model.
        CalibrationError: no token is named that begins a text, or the model predicts nothing finite.

    Examples:
        >>> own = hf.write_texts(llama, count=16, length=32)
        >>> pruned = hf.prune(llama, calibration=own.split(1), sparsity=0.2)
    """
    if not isinstance(stages_of(model), CausalStages):
        raise ArgumentError(f"{type(model).__name__} writes only what a source asks for; give text of yours")
    if count < 1 or length < 2:
        raise ArgumentError(f"count={count}, length={length}; a model writes one text of two tokens at least")
    begun = [] if tokenizer is None else [tokenizer(one, add_special_tokens=False) for one in _OPENINGS]
    openings = [one["input_ids"] for one in begun]
    start, advance = start_token(model, tokenizer), advance_of(progress)
    return sample(model, start, count, length, openings=openings, seed=seed, progress=advance)


def start_token(model: Any, tokenizer: Any) -> int:
    """The token a text begins with.

    Raises:
        CalibrationError: neither model nor tokenizer names one that the model knows.
    """
    size = model.config.get_text_config().vocab_size
    for holder in (tokenizer, model.generation_config, model.config):
        for name in ("bos_token_id", "eos_token_id"):
            named = getattr(holder, name, None)
            token = named[0] if isinstance(named, list) and named else named
            if isinstance(token, int) and 0 <= token < size:
                return token
    raise CalibrationError(
        "no token that begins a text of this model is named, or none that the model knows, so it cannot write"
        " its own; give the tokenizer that belongs to it, or text of yours"
    )


def sample(
    model: Any,
    start: int,
    count: int,
    length: int,
    *,
    openings: Sequence[Sequence[int]] = (),
    seed: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Tensor:
    """Texts as of :func:`write_texts`.

    Args:
        start: the first token of each text, included in its length.
        openings: tokens that follow it, of one text after another in turn.
        seed: the same seed gives the same texts on the same machine; the global random state is left as it
            was.
        progress: called with the fraction done.

    Returns:
        Tokens ``[count, length]``.

    Raises:
        CalibrationError: the model predicts nothing finite.
    """
    device = device_of(model)
    texts: list[Tensor] = []

    class Draw(LogitsProcessor):
        """Leaves the one token that is drawn: where the running sum of the probabilities passes a uniform
        number.

        One number for each text is needed for this; ``torch.multinomial``, which ``generate`` would use,
        draws one for each word of the vocabulary.
        """

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            passed = scores.softmax(-1, dtype=torch.float32).cumsum_(-1)
            total = passed[:, -1:]
            if not torch.isfinite(total).all():
                raise CalibrationError(
                    f"what the model predicts is not finite any more after {input_ids.shape[1]} tokens of its"
                    " own; give text of yours"
                )
            drawn = torch.searchsorted(
                passed, torch.rand(len(scores), 1, device=scores.device) * total, right=True
            )
            first, place = sum(map(len, texts)), input_ids.shape[1] - 1
            for row in range(len(drawn)):
                begun = openings[(first + row) % len(openings)] if openings else ()
                if place < len(begun):
                    drawn[row] = begun[place]
            progress((sum(map(len, texts)) + len(input_ids) * (input_ids.shape[1] + 1) / length) / count)
            return scores.fill_(-torch.inf).scatter_(-1, drawn.clamp_max(scores.shape[-1] - 1), 0.0)

    settings = GenerationConfig(
        do_sample=False, max_length=length, bos_token_id=start, eos_token_id=None, pad_token_id=start
    )
    # What a model brings along (an end token, a temperature) would be merged into settings given by call.
    speaker = copy.copy(model)
    speaker.generation_config = settings
    with (
        torch.no_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        for first in range(0, count, _TOGETHER):
            prompt = torch.full((min(_TOGETHER, count - first), 1), start, device=device)
            texts.append(
                speaker.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    logits_processor=LogitsProcessorList([Draw()]),
                )
            )
    return torch.cat(texts)
