"""The text of one command: chunks to calibrate or train on, and chunks to measure on, which the first do not
hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, CalibrationError
from . import _text
from ._arguments import check_seed, check_text
from ._checkpoint import check_tokens
from ._console import Stages


@dataclass(frozen=True)
class Wanted:
    """What text is needed.

    Attributes:
        file, batches: where chunks to use come from, and how many; ``None``: the model writes them.
        text, eval_batches: where chunks to measure on come from, and how many; ``None``: what is left of
            ``file``, and where that is nothing, the model writes them.
        length: tokens of each chunk.
        seed: of what the model writes.
    """

    file: Path | None
    batches: int
    text: Path | None
    eval_batches: int
    length: int
    seed: int

    def check(self, option: str) -> None:
        """Refuse what cannot be had, before anything is loaded.

        Args:
            option: the one that gives the file.

        Raises:
            FaspError: says which option and why.
        """
        for name, value, least in (
            ("--batches", self.batches, 1),
            ("--length", self.length, 2),
            ("--eval-batches", self.eval_batches, 1),
        ):
            if value < least:
                raise ArgumentError(f"{name} {value} is too small; use at least {least}")
        check_seed(self.seed)
        check_text(option, self.file, "give a text file, or 'self'")
        check_text("--text", self.text)
        _text.check_amount(
            (self.batches if self.file is None else 0, self.eval_batches if self.text is None else 0),
            self.length,
        )


class Texts:
    """The chunks to use and those to measure on.

    Args:
        wanted: what is needed.
        tokenizer: that of the model.
        use: what the chunks are for that are not measured on.

    Raises:
        CalibrationError: a file does not hold enough.
    """

    def __init__(self, wanted: Wanted, tokenizer: Any, use: str = "calibration") -> None:
        self.wanted, self.tokenizer = wanted, tokenizer
        self.used: Tensor | None = None
        self.evaluation: Tensor | None = None
        self.label = (
            f"perplexity on text that the model wrote itself, not seen by this {use} ({wanted.eval_batches}"
            f" x {wanted.length} tokens)"
        )
        used = 0
        if wanted.file is not None:
            chunks = _text.read_chunks(wanted.file, tokenizer, wanted.length)
            # Where no other text is given, what is measured on is of this one: what is not needed, but at
            # least a quarter.
            spare = max(len(chunks) - wanted.batches, len(chunks) // 4) if wanted.text is None else 0
            self.used = chunks[: min(wanted.batches, len(chunks) - spare)]
            used = len(self.used)
            if spare:
                self._measure_on(wanted.file, chunks, used)
        if wanted.text is not None:
            chunks = _text.read_chunks(wanted.text, tokenizer, wanted.length)
            first = used if wanted.file is not None and wanted.text.samefile(wanted.file) else 0
            if first >= len(chunks):
                raise CalibrationError(
                    f"all {len(chunks)} chunks of '{wanted.text}' are used, leaving none to measure on;"
                    " use fewer --batches or a smaller --length"
                )
            self._measure_on(wanted.text, chunks, first)

    def _measure_on(self, file: Path, chunks: Tensor, first: int) -> None:
        self.evaluation = chunks[first : first + self.wanted.eval_batches]
        self.label = (
            f"perplexity on chunks {first} to {first + len(self.evaluation) - 1} of {file.name}"
            f" ({len(self.evaluation)} x {self.wanted.length} tokens)"
        )

    def check_two(self) -> None:
        """Refuse a file of a single chunk, where one is to be held out.

        Raises:
            CalibrationError: says which file.
        """
        if self.used is not None and len(self.used) < 2:
            raise CalibrationError(
                f"'{self.wanted.file}' holds a single chunk of {self.wanted.length} tokens, and training"
                " holds one out; give more text, or a smaller --length"
            )

    def check(self, model: Any, what: str) -> None:
        """Refuse text that the model does not take, and a model that does not compute.

        Args:
            what: the text to use.

        Raises:
            CalibrationError: says why.
        """
        for name, chunks in ((what, self.used), ("the text to measure on", self.evaluation)):
            if chunks is None:
                _text.check_output(model, torch.tensor([_text.start_token(model, self.tokenizer)]))
            else:
                check_tokens(model, chunks, name)
                _text.check_output(model, chunks[0])

    def write(self, model: Any, stages: Stages) -> None:
        """Let the model write what no file gives and what it has not written yet."""
        counts = (
            self.wanted.batches if self.used is None else 0,
            self.wanted.eval_batches if self.evaluation is None else 0,
        )
        if not sum(counts):
            return
        stages.begin(
            f"letting the model write {sum(counts)} texts of {self.wanted.length} tokens", measured=True
        )
        start = _text.start_token(model, self.tokenizer)
        written = _text.sample(
            model, start, sum(counts), self.wanted.length, seed=self.wanted.seed, progress=stages.update
        )
        if self.used is None:
            self.used = written[: counts[0]]
        if self.evaluation is None:
            self.evaluation = written[counts[0] :]


__all__ = ["Texts", "Wanted"]
