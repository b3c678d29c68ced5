"""How a generating model reads what it is called with beside its tokens (positions, labels, packed texts),
by experiment, never by its name; and whether programs compute what the model does at sizes that a capture
takes for special: one token, an empty cache, padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..base._tolerable import tolerable
from ..base.compare import deviation, tolerance
from ..base.compat import pytree
from ..base.compat._transformers import CACHE
from ..capturing._program import Program
from ..capturing._unchanged import rewound
from ..errors import CaptureError
from . import _caches
from ._flat import FlatProgram
from ._labels import LEFT_OUT, LOSSES, MOVES, POSITIONS
from ._stages import CausalStages, Seq2SeqStages

AnyStages = CausalStages | Seq2SeqStages
#: sequences, new tokens, cached tokens, tokens of padding
_SIZES = ((2, 3, 5, 2), (1, 4, 0, 0), (3, 4, 0, 2), (1, 1, 1, 0), (2, 1, 4, 1), (1, 1, 0, 0), (2, 2, 3, 0))


@dataclass(frozen=True)
class CallConvention:
    """How a model reads what it is called with; see :class:`fasp_fx.hf.PrunedConfig`, which keeps it."""

    positions: str | None = None
    position_limit: int | None = None
    loss: str | None = None
    labels_moved: str | None = None
    counts_items: bool = True
    packs: bool = False


def convention_of(stages: AnyStages, program: Program) -> CallConvention:
    """Check that a captured decoder computes what its model does, and find how the model reads what it is
    called with.

    Raises:
        CaptureError: at some size the program computes something else than the model; names the size.
    """
    loss, moved = _loss_of_labels(stages)
    items = _counts_items(stages, loss)
    if not isinstance(stages, CausalStages):
        return CallConvention(loss=loss, labels_moved=moved, counts_items=items)
    flat = FlatProgram.of(program.module)
    _check_captured(stages, program, flat)
    if "position_ids" not in flat.inputs:
        return CallConvention(loss=loss, counts_items=items)
    limit = _table(flat)
    return CallConvention(_counting(stages), limit, loss, None, items, _keeps_texts_apart(stages))


# --- what the model does


def _called(stages: AnyStages, arguments: dict[str, Any]) -> Any:
    """What the model gives without a cache; ``None`` where it does not take this."""
    try:
        return stages.run({**arguments, CACHE: None}, use_cache=False)
    except tolerable(CaptureError):
        return None


def _far(found: Tensor, expected: Tensor) -> bool:
    """Whether values differ by more than rounding."""
    return deviation(found.to(expected.dtype), expected) > tolerance("two ways", expected.dtype)


def _loss_of_labels(stages: AnyStages) -> tuple[str | None, str | None]:
    """The key of :data:`LOSSES`, and for an encoder-decoder of :data:`MOVES`, by which a model reads labels;
    ``None`` where it reads them in another way.
    """
    decoder = isinstance(stages, CausalStages)
    labels, source = stages.tokens(6, 2, seed=7), {"input_ids": stages.tokens(6, 2)}
    if "labels" in stages.accepts and decoder and (plain := _called(stages, source)) is not None:
        labels = plain.logits.argmax(-1)  # the likeliest ones, so that each way gives a loss of its own
    labels[0, 4:] = LEFT_OUT
    given: Any = _called(stages, {**source, "labels": labels}) if "labels" in stages.accepts else None
    expected = getattr(given, "loss", None)
    if not isinstance(expected, Tensor) or given.logits.shape[:2] != labels.shape:
        return None, None
    found = {name: LOSSES[name](given.logits, labels, None) for name in (LOSSES if decoder else ("same",))}
    nearest = min(found, key=lambda name: float((found[name] - expected).abs()))
    short = torch.finfo(given.logits.dtype).bits < 32  # a model may round its loss
    far = _far(found[nearest], expected.to(given.logits.dtype) if short else expected.float())
    loss = None if far else nearest
    padding = getattr(stages.model.config, "pad_token_id", None)
    if decoder or padding is None:
        return loss if decoder else None, None
    start = getattr(stages.model.config, "decoder_start_token_id", None)
    for name, move in MOVES.items():
        moved = _called(stages, {**source, "decoder_input_ids": move(labels, start, padding)})
        if moved is not None and not _far(moved.logits, given.logits):
            return loss, name
    return None, None


def _counts_items(stages: AnyStages, loss: str | None) -> bool:
    """Whether a model divides the loss of labels by ``num_items_in_batch``, rather than ignore it as some do
    that take any argument.
    """
    if loss is None:
        return True
    source = {"input_ids": stages.tokens(6, 2), "labels": stages.tokens(6, 2, seed=7)}
    alone = _called(stages, source)
    counted = _called(stages, {**source, "num_items_in_batch": torch.tensor(1000)})
    if alone is None or getattr(counted, "loss", None) is None:
        return True
    return _far(counted.loss.detach(), alone.loss.detach())


def _keeps_texts_apart(stages: CausalStages) -> bool:
    """Whether a model takes positions that begin again, given without a mask, for several texts
    in one row.
    """
    ids = stages.tokens(6, 1)
    packed = {"input_ids": ids, "position_ids": torch.arange(6, device=ids.device)[None] % 3}
    apart = _called(stages, packed)
    together = _called(stages, packed | stages.optional(attention_mask=torch.ones_like(ids)))
    return apart is not None and together is not None and _far(apart.logits, together.logits)


def _counting(stages: CausalStages) -> str:
    """How the model counts positions that it is not given, on a padded prompt; for padding as well, where
    some way gives the same there.
    """
    padded = stages.arguments(batch=2, new=6, past=0, padding=3)
    padded.pop("logits_to_keep", None)
    own = stages.run({**padded, "position_ids": None, CACHE: None}).logits
    mask = padded.get("attention_mask", stages.ones(2, 6))
    fitting = {}
    for name, count in POSITIONS.items():
        output = _called(stages, {**padded, "position_ids": count(mask)})
        if output is not None and not _far(_shown(output.logits, padded), _shown(own, padded)):
            fitting[name] = _far(output.logits, own)
    if not fitting:
        raise CaptureError(
            f"{type(stages.model).__name__} counts positions in a way that is neither one after the other nor"
            " along the mask; it cannot be served"
        )
    return min(fitting, key=fitting.__getitem__)


def _table(flat: FlatProgram) -> int | None:
    """The number of positions that the tables looked up by position can take: rows, less what the model adds
    to a position.
    """
    source = flat.graph.find_nodes(op="placeholder")[flat.inputs.index("position_ids")]
    limits = []
    for node in flat.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        steps: list[fx.Node] = []  # between the positions and the lookup, each with one input
        place: Any = node.args[1]
        while place is not source and place.op == "call_function" and len(place.all_input_nodes) == 1:
            steps.append(place)
            (place,) = place.all_input_nodes
        if place is source:
            first: Any = torch.zeros((1, 1), dtype=torch.long)
            for step in reversed(steps):
                target: Any = step.target
                args: Any = fx.map_arg(step.args, lambda _, value=first: value)  # type: ignore[misc]
                first = target(*args, **step.kwargs)
            limits.append(node.args[0].meta["val"].shape[0] - int(first))
    return min(limits, default=None)


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
    inputs = zip(flat.graph.find_nodes(op="placeholder"), flat.inputs, strict=True)
    recorded = next(node.meta["val"] for node, name in inputs if name.startswith("cache."))
    like = torch.empty(0, dtype=recorded.dtype, device=recorded.device)
    for batch, new, past, padding in _SIZES:
        arguments = stages.arguments(batch=batch, new=new, past=past, padding=padding)
        values = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        values |= _caches.read(arguments[CACHE], flat.cache_sizes(), batch, like)
        expected = stages.run(arguments).logits  # extends the cache, whose tensors it leaves
        try:
            with torch.no_grad(), rewound(program.module):
                moved = {name: tensor.to(device) for name, tensor in values.items()}
                found = flat(program.module, moved)["logits"].to(expected.device)
        except tolerable(RuntimeError, AssertionError, IndexError):
            # A check of the capture, which the served program does not have; that one is held against the
            # model later.
            continue
        if _far(_shown(found, arguments), _shown(expected, arguments)):
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
        whole = stages.text(batch, 6, padding)
        whole = pytree.tree_map(
            lambda leaf: leaf.to(model.device) if isinstance(leaf, Tensor) else leaf, whole
        )
        with torch.no_grad(), rewound(model):
            expected = model(**whole, use_cache=False).logits
            cache, found = None, []
            for piece in _pieces(whole):
                output = model(**piece, **{CACHE: cache}, use_cache=True)
                cache = output[CACHE]
                found.append(output.logits)
        if _far(_shown(torch.cat(found, 1), whole), _shown(expected, whole)):
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


__all__ = ["CallConvention", "check_served", "convention_of"]
