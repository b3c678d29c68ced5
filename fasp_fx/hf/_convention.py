"""How a generating model reads what it is called with beside its tokens (positions, labels), by experiment,
never by its name; and whether programs compute what the model does at sizes that a capture takes for special:
one token, an empty cache, padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fasp_fx.base import CACHE, deviation, tolerable, tolerance
from fasp_fx.capturing import Program, rewound
from fasp_fx.errors import CaptureError

from ._arguments import LEFT_OUT, LOSSES, POSITIONS, after_start, read_cache
from ._flat import FlatProgram
from ._stages import SOURCE, CausalStages, Seq2SeqStages

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
    if not isinstance(stages, CausalStages):
        return _labels(stages)
    flat = FlatProgram.of(program.module)
    _check_captured(stages, program, flat)
    return _labels(stages) | ({"positions": _counting(stages)} if "position_ids" in flat.inputs else {})


# --- what the model does


def _called(stages: AnyStages, arguments: dict[str, Any]) -> Any:
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
    labels, source = stages.tokens(6, 2, seed=7), {"input_ids": stages.tokens(6, 2)}
    if "labels" not in stages.accepts:
        return {}
    if decoder and (plain := _called(stages, source)) is not None:
        labels = plain.logits.argmax(-1)  # the likeliest ones, so that each way gives a loss of its own
    labels[0, 4:] = LEFT_OUT
    labelled = _called(stages, {**source, "labels": labels})
    expected = getattr(labelled, "loss", None)
    if not isinstance(expected, Tensor) or labelled.logits.shape[:2] != labels.shape:
        return {}
    expected = expected.to(labelled.logits.dtype)  # a model may round its loss
    ways = LOSSES if decoder else ("same",)
    losses = [way for way in ways if not _far(LOSSES[way](labelled.logits, labels, None), expected)]
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
        values |= read_cache(arguments[CACHE], flat.cache_sizes(), batch, like)
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
