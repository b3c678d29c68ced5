"""How a generating model is captured: which programs, on which example inputs; how it reads what it is called
with beside its tokens (positions, labels), by experiment, never by its name; and whether programs compute
what the model does at sizes that a capture takes for special: one token, an empty cache, padding.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from fasp_fx.base import CACHE, deviation, tolerable, tolerance
from fasp_fx.calibration import all_of, as_calls
from fasp_fx.capturing import Program, rewound
from fasp_fx.errors import ArgumentError, CalibrationError, CaptureError, first_line

from ._model import PrunedModel
from ._program import (
    LEFT_OUT,
    LOSSES,
    POSITIONS,
    FlatProgram,
    after_start,
    check_outputs,
    opened,
    read_cache,
    write_cache,
)

#: example sizes: sequences, source tokens, tokens that are already cached, new tokens; all different, and
#: none of them 1, which would be taken for a constant
BATCH, SOURCE, PAST, NEW = 2, 4, 5, 3


@dataclass(frozen=True)
class Stage:
    """One program to capture: a model whose forward is that of the program, example arguments, and arguments
    that may become narrower.
    """

    name: str
    model: Any
    example: dict[str, Any]
    state: tuple[str, ...] = ()


class Stages:
    """The programs of one model: first the one that calibration runs, and that the plan is made for, which
    may be one of those that generation runs.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.accepts = model, frozenset(inspect.signature(model.forward).parameters)

    def tokens(self, count: int, batch: int = BATCH, seed: int = 0) -> Tensor:
        """Random token numbers ``[batch, count]``."""
        vocabulary = int(getattr(self.model.config.get_text_config(), "vocab_size", 2))
        generator = torch.Generator(device="cpu").manual_seed(seed + 31 * count + batch)
        return torch.randint(0, vocabulary, (batch, count), generator=generator, device="cpu").to(
            self.model.device
        )

    def ones(self, batch: int, count: int) -> Tensor:
        """A mask that shows everything, ``[batch, count]``."""
        return torch.ones((batch, count), dtype=torch.long, device=self.model.device)

    def mask(self, ids: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The mask of a batch, which shows everything where there is none."""
        mask = arguments.get("attention_mask")
        return self.ones(*ids.shape).to(ids.device) if mask is None else mask.long()

    def optional(self, **arguments: Any) -> dict[str, Any]:
        """Those arguments that the model takes."""
        return {name: value for name, value in arguments.items() if name in self.accepts}

    def run(self, arguments: dict[str, Any]) -> Any:
        """Call the model itself, with a cache unless the arguments say otherwise.

        Raises:
            CaptureError: it fails on these arguments.
        """
        try:
            with torch.no_grad(), rewound(self.model):
                output = self.model(**{"use_cache": True, **arguments}, return_dict=True)
            if arguments.get("use_cache", True) and output.get(CACHE) is None:
                raise ValueError("it returns none")
            return output
        except tolerable(Exception) as error:
            kept = DynamicCache(config=self.model.config).layers
            others = {type(layer).__name__ for layer in kept if not isinstance(layer, DynamicLayer)}
            why = f"its layers keep a {' and a '.join(sorted(others))}" if others else first_line(error)
            raise CaptureError(
                f"{type(self.model).__name__} cannot generate with a cache that holds every token"
                f" ({', '.join(arguments)}): {why}; use fasp_fx.prune"
            ) from error


class CausalStages(Stages):
    """A decoder: one program serves a prompt, several tokens after others, and one token."""

    def arguments(
        self, batch: int = BATCH, new: int = NEW, past: int = PAST, padding: int = 0
    ) -> dict[str, Any]:
        """Arguments of a call with ``new`` tokens after ``past`` others; the first ``padding`` of the first
        sequence are padding.
        """
        mask = self.ones(batch, past + new)
        mask[0, :padding] = 0
        cache = opened(None, DynamicCache)
        if past:
            cache = self.run(self._call(self.tokens(past, batch), mask[:, :past], cache))[CACHE]
        return self._call(self.tokens(new, batch, seed=1), mask, cache)

    def _call(self, ids: Tensor, mask: Tensor, cache: Any, positions: Tensor | None = None) -> dict[str, Any]:
        """Arguments of a call with these tokens after those in a cache; the mask is over both."""
        if positions is None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :].contiguous()
        kept = torch.arange(ids.shape[1], device=ids.device)
        taken = self.optional(attention_mask=mask, position_ids=positions, logits_to_keep=kept)
        return {"input_ids": ids, **taken, CACHE: cache}

    def programs(self) -> list[Stage]:
        """The program that is calibrated and served."""
        return [Stage("decode", self.model, {**self.arguments(), "use_cache": True})]

    def batches(self, calibration: Any, caches: dict[str, tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Calibration batches as the program takes them: a whole text after an empty cache.

        Args:
            caches: heads and width of each cache tensor.
        """
        known = {"input_ids", "attention_mask", "use_cache", *self.optional(position_ids=None)}
        for ids, named in _calls(calibration, known):
            cache = opened(None, DynamicCache)
            like = torch.empty(0, dtype=self.model.dtype, device=ids.device)
            write_cache(cache, read_cache(cache, caches, len(ids), like))
            positions = named.get("position_ids")
            yield {**self._call(ids, self.mask(ids, named), cache, positions), "use_cache": True}


class Seq2SeqStages(Stages):
    """An encoder and a decoder: the plan is made on both together, and carried out in the encoder, in the
    decoder's first call, which computes keys and values of the source, and in its later calls, which find
    them in the cache."""

    def arguments(
        self, batch: int = BATCH, source: int = SOURCE, new: int = NEW, past: int = PAST, padding: int = 0
    ) -> dict[str, Any]:
        """Arguments of a call of the decoder; the last ``padding`` tokens of the first source are padding."""
        mask = self.ones(batch, source)
        mask[0, source - padding :] = 0
        with torch.no_grad(), rewound(self.model):
            encoded = _encoding(self.model)(self.tokens(source, batch), mask)
        cache = opened(None, EncoderDecoderCache)
        common = {"encoder_outputs": encoded, "attention_mask": mask}
        if past:
            shown = self.optional(decoder_attention_mask=self.ones(batch, past))
            cache = self.run(
                {**common, **shown, "decoder_input_ids": self.tokens(past, batch), CACHE: cache}
            )[CACHE]
        shown = self.optional(decoder_attention_mask=self.ones(batch, past + new))
        return {"decoder_input_ids": self.tokens(new, batch, seed=1), **common, **shown, CACHE: cache}

    def programs(self) -> list[Stage]:
        """Both parts together, without a cache, which calibration runs, and those that generation runs."""
        source = {"input_ids": self.tokens(SOURCE), "attention_mask": self.ones(BATCH, SOURCE)}
        decoded = {"decoder_input_ids": self.tokens(NEW, seed=1), "use_cache": False}
        # A shallow copy: the same modules under the same names.
        alone = copy.copy(self.model)
        alone.forward = _encoding(self.model)
        state = ("encoder_outputs", "encoder_last_hidden_state")
        calls = {"first": self.arguments(past=0), "decode": self.arguments()}
        return [
            Stage("whole", self.model, {**source, **decoded}),
            Stage("encode", alone, source, ("last_hidden_state",)),
            *(Stage(name, self.model, {**call, "use_cache": True}, state) for name, call in calls.items()),
        ]

    def batches(self, calibration: Any, caches: dict[str, tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Calibration batches as the whole program takes them."""
        for ids, named in _calls(
            calibration, {"input_ids", "attention_mask", "decoder_input_ids", "use_cache"}
        ):
            if "decoder_input_ids" not in named:
                raise CalibrationError(
                    "a calibration batch of an encoder-decoder model needs 'decoder_input_ids' besides"
                    " 'input_ids'; pass dicts with both"
                )
            yield {**named, "attention_mask": self.mask(ids, named), "use_cache": False}


def _encoding(model: Any) -> Callable[[Tensor, Tensor], Any]:
    """The forward of an encoder: of source tokens ``[batch, source]`` and their mask."""
    encoder = model.get_encoder()

    def encode(input_ids: Tensor, attention_mask: Tensor) -> Any:
        encoded = encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return BaseModelOutput(last_hidden_state=encoded.last_hidden_state)

    return encode


def stages_of(model: Any) -> CausalStages | Seq2SeqStages:
    """How to capture this model.

    Raises:
        ArgumentError: it is no generating model of transformers, or is asked for outputs that a program does
            not have.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise ArgumentError(
            f"model is a {type(model).__name__}; fasp_fx.hf prunes models of transformers that generate,"
            " fasp_fx.prune any other"
        )
    if isinstance(model, PrunedModel):
        raise pruned_already(type(model).__name__)
    if model.main_input_name != "input_ids":
        raise ArgumentError(
            f"{type(model).__name__} takes '{model.main_input_name}'; fasp_fx.hf prunes models that take"
            " token numbers, fasp_fx.prune any other"
        )
    check_outputs(model.config)
    return Seq2SeqStages(model) if model.config.is_encoder_decoder else CausalStages(model)


def pruned_already(name: str) -> ArgumentError:
    """What is said of a model that is the result of a pruning."""
    return ArgumentError(
        f"{name} was pruned already, and its programs have fixed widths; prune the dense model again, by more"
    )


def _calls(calibration: Any, known: set[str]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each batch as its token numbers and other arguments."""
    data = all_of(calibration)
    for index, (args, named) in enumerate(as_calls(data)):
        arguments = {**named, "input_ids": args[0]} if len(args) == 1 else named
        arguments.pop("labels", None)
        unknown = sorted(set(arguments) - known)
        if unknown or not isinstance(arguments.get("input_ids"), Tensor):
            what = f"holds {', '.join(unknown)}" if unknown else "has no tensor 'input_ids'"
            raise CalibrationError(
                f"{data.place(index)} {what}; a batch holds {', '.join(sorted(known - {'use_cache'}))}"
            )
        yield arguments["input_ids"], {name: value for name, value in arguments.items() if value is not None}


AnyStages = CausalStages | Seq2SeqStages
#: what a call with a whole text is given
_TEXT = ("input_ids", "attention_mask", "position_ids", "decoder_input_ids", "decoder_attention_mask")
#: sequences, new tokens, cached tokens, tokens of padding
_SIZES = ((2, 3, 5, 2), (1, 4, 0, 0), (3, 4, 0, 2), (1, 1, 1, 0), (2, 1, 4, 1), (1, 1, 0, 0), (2, 2, 3, 0))


def convention_of(stages: AnyStages, program: Program) -> dict[str, Any]:
    """Check that a captured decoder computes what its model does, and find how the model reads what it is
    called with: fields of :class:`fasp_fx.hf.PrunedConfig`.

    Raises:
        CaptureError: at some size the program computes something else than the model; names the size.
    """
    fields = _labels(stages)
    if isinstance(stages, CausalStages):
        flat = FlatProgram.of(program.module)
        _check_captured(stages, program, flat)
        fields |= {"positions": _counting(stages)} if "position_ids" in flat.inputs else {}
    return fields


# --- what the model does


def _called(stages: Stages, arguments: dict[str, Any]) -> Any:
    """What the model gives without a cache; ``None`` where it does not take this."""
    try:
        return stages.run({**arguments, CACHE: None, "use_cache": False})
    except tolerable(CaptureError):
        return None


def _far(value: Tensor, expected: Tensor) -> bool:
    """Whether values differ by more than rounding."""
    return deviation(value.to(expected.dtype), expected) > tolerance("two ways", expected.dtype)


def _labels(stages: AnyStages) -> dict[str, Any]:
    """The key of :data:`LOSSES` by which a model reads labels, and whether an encoder-decoder makes tokens of
    them; nothing where it reads them in another way.
    """
    decoder = isinstance(stages, CausalStages)
    if "labels" not in stages.accepts:
        return {}
    labels, source = stages.tokens(6, 2, seed=7), {"input_ids": stages.tokens(6, 2)}
    if decoder and (plain := _called(stages, source)) is not None:
        labels = plain.logits.argmax(-1)  # the likeliest ones, so that each way gives a loss of its own
    labels[0, 4:] = LEFT_OUT
    labelled = _called(stages, {**source, "labels": labels})
    expected = getattr(labelled, "loss", None)
    if not isinstance(expected, Tensor) or labelled.logits.shape[:2] != labels.shape:
        return {}
    expected = expected.to(labelled.logits.dtype)  # a model may round its loss
    losses = [
        way
        for way in (LOSSES if decoder else ("same",))
        if not _far(LOSSES[way](labelled.logits, labels, None), expected)
    ]
    fields: dict[str, Any] = {"loss": losses[0] if losses else None}
    config: Any = stages.model.config
    if decoder or getattr(config, "pad_token_id", None) is None:
        return fields if decoder else {}
    read = after_start(labels, getattr(config, "decoder_start_token_id", None), config.pad_token_id)
    moved = _called(stages, {**source, "decoder_input_ids": read})
    same = moved is not None and not _far(moved.logits, labelled.logits)
    return fields | {"labels_moved": "start"} if same else {}


def _counting(stages: CausalStages) -> str:
    """How the model counts positions that it is not given, on a padded prompt; for padding as well, where
    some way gives the same there.
    """
    padded = stages.arguments(batch=2, new=6, past=0, padding=3)
    padded.pop("logits_to_keep", None)
    expected = stages.run({**padded, "position_ids": None, CACHE: None}).logits
    mask = padded.get("attention_mask", stages.ones(2, 6))
    fitting = {}
    for name, count in POSITIONS.items():
        output = _called(stages, {**padded, "position_ids": count(mask)})
        if output is not None and not _far(_shown(output.logits, padded), _shown(expected, padded)):
            fitting[name] = _far(output.logits, expected)
    if not fitting:
        raise CaptureError(
            f"{type(stages.model).__name__} counts positions in a way that is neither one after the other nor"
            " along the mask; it cannot be served"
        )
    return min(fitting, key=fitting.__getitem__)


# --- what programs do


def _shown(output: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Logits of the positions that are no padding."""
    mask = arguments.get("attention_mask")
    if mask is None or "decoder_input_ids" in arguments:
        return output
    return output[mask[:, -output.shape[1] :].bool()]


def _check_captured(stages: CausalStages, program: Program, flat: FlatProgram) -> None:
    """Hold a captured decoder against its model; errors as for :func:`convention_of`."""
    device = program.device()
    like = torch.empty(0, dtype=stages.model.dtype, device=stages.model.device)
    for batch, new, past, padding in _SIZES:
        arguments = stages.arguments(batch=batch, new=new, past=past, padding=padding)
        values = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        values |= read_cache(arguments[CACHE], flat.cache_sizes, batch, like)
        expected = stages.run(arguments).logits  # extends the cache, whose tensors it leaves
        try:
            with torch.no_grad(), rewound(program.module):
                moved = {name: tensor.to(device) for name, tensor in values.items()}
                logits = flat(program.module, moved)["logits"].to(expected.device)
        except tolerable(RuntimeError, AssertionError, IndexError):
            # A check of the capture, which the served program does not have; that one is held against the
            # model later.
            continue
        if _far(_shown(logits, arguments), _shown(expected, arguments)):
            raise CaptureError(
                f"the program captured of {type(stages.model).__name__} computes something else than the"
                f" model for {batch} sequences, {new} new and {past} cached tokens, {padding} of padding; it"
                " cannot be served"
            )


def check_served(model: Any, stages: AnyStages) -> None:
    """Hold the form in which programs are served against the one that was verified, and continued sequences
    against whole ones.

    Raises:
        CaptureError: they differ; names the size.
    """
    for batch, padding in ((1, 0), (3, 2)):
        arguments = stages.arguments(batch=batch, new=6, past=0, padding=padding)
        whole = {name: arguments[name].to(model.device) for name in _TEXT if name in arguments}
        if isinstance(stages, Seq2SeqStages):
            whole["input_ids"] = stages.tokens(SOURCE, batch).to(model.device)
        with torch.no_grad(), rewound(model):
            expected = model(**whole, use_cache=False).logits
            cache, pieces = None, []
            for piece in _pieces(whole):
                output = model(**piece, **{CACHE: cache}, use_cache=True)
                cache = output[CACHE]
                pieces.append(output.logits)
        if _far(_shown(torch.cat(pieces, 1), whole), _shown(expected, whole)):
            raise CaptureError(
                f"the pruned {type(stages.model).__name__} does not continue a sequence as it computes it at"
                f" once ({batch} sequences, {padding} tokens of padding); it cannot be served"
            )


def _pieces(whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A text in three calls: what speaks of new tokens in parts, masks up to there."""
    decoder = "decoder_input_ids" not in whole
    new = {"input_ids", "position_ids"} if decoder else {"decoder_input_ids"}
    mask = "attention_mask" if decoder else "decoder_attention_mask"
    for start, end in ((0, 3), (3, 4), (4, 6)):
        parts = {name: whole[name][:, start:end] for name in new & whole.keys()}
        yield {**whole, **parts, **({mask: whole[mask][:, :end]} if mask in whole else {})}
