"""Hold programs against the model at sizes that a capture takes for special: one token, an empty cache,
padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..base._tolerable import tolerable
from ..base.compat import pytree
from ..base.compat._transformers import CACHE
from ..capturing._program import Program
from ..capturing._unchanged import rewound
from ..errors import CaptureError
from . import _caches
from ._flat import FlatProgram
from ._habits import Habits, called, counts_items, far, keeps_texts_apart, loss_of_labels
from ._labels import POSITIONS
from ._stages import CausalStages, Seq2SeqStages

#: sequences, new tokens, cached tokens, tokens of padding
_SIZES = ((2, 3, 5, 2), (1, 4, 0, 0), (3, 4, 0, 2), (1, 1, 1, 0), (2, 1, 4, 1), (1, 1, 0, 0), (2, 2, 3, 0))


def _shown(output: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Logits of the positions that are no padding."""
    mask = arguments.get("attention_mask")
    if mask is None or "decoder_input_ids" in arguments:
        return output
    return output[mask[:, -output.shape[1] :].bool()]


def _calls(stages: CausalStages | Seq2SeqStages) -> Iterator[tuple[str, dict[str, Any]]]:
    for batch, new, past, padding in _SIZES:
        yield (
            f"{batch} sequences, {new} new and {past} cached tokens, {padding} of padding",
            stages.arguments(batch=batch, new=new, past=past, padding=padding),
        )


def habits_of(stages: CausalStages | Seq2SeqStages, program: Program) -> Habits:
    """Check that a captured decoder computes what its model does, and find how the model reads what it is
    called with.

    Raises:
        CaptureError: at some size the program computes something else than the model; names the size.
    """
    loss, way = loss_of_labels(stages)
    items = counts_items(stages, loss)
    if not isinstance(stages, CausalStages):
        return Habits(loss=loss, labels_moved=way, counts_items=items)
    flat, device = FlatProgram.of(program.module), program.device()
    for size, arguments in _calls(stages):
        values = _values(flat, arguments)
        expected = stages.run(arguments)  # extends the cache, whose tensors it leaves
        try:
            with torch.no_grad(), rewound(program.module):
                moved = {name: tensor.to(device) for name, tensor in values.items()}
                found = flat(program.module, moved)["logits"].to(expected.logits.device)
        except tolerable(RuntimeError, AssertionError, IndexError):
            # A check of the capture, which the served program does not have; that one is held against the
            # model below.
            found = None
        if found is not None and far(_shown(found, arguments), _shown(expected.logits, arguments)):
            raise CaptureError(
                f"the program captured of {type(stages.model).__name__} computes something else than the"
                f" model for {size}; it cannot be served"
            )
    if "position_ids" not in flat.inputs:
        return Habits(loss=loss, counts_items=items)
    return Habits(
        _counting(stages),
        _table(program.module, flat),
        loss,
        counts_items=items,
        packs=keeps_texts_apart(stages),
    )


def _values(flat: FlatProgram, arguments: dict[str, Any]) -> dict[str, Tensor]:
    values = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    recorded = next(
        node.meta["val"]
        for node, name in zip(flat.graph.find_nodes(op="placeholder"), flat.inputs, strict=True)
        if name.startswith("cache.")
    )
    like = torch.empty(0, dtype=recorded.dtype, device=recorded.device)
    return values | _caches.read(arguments[CACHE], flat.cache_sizes(), len(arguments["input_ids"]), like)


def _counting(stages: CausalStages) -> str:
    """How the model counts positions that it is not given: by experiment, on a padded prompt; for padding as
    well, where some way gives the same there.
    """
    padded = stages.arguments(batch=2, new=6, past=0, padding=3)
    padded.pop("logits_to_keep", None)
    own, mask = (
        stages.run({**padded, "position_ids": None, CACHE: None}).logits,
        padded.get("attention_mask", stages.ones(2, 6)),
    )
    fitting = []
    for name, count in POSITIONS.items():
        output = called(stages, {**padded, "position_ids": count(mask)})
        if output is not None and not far(_shown(output.logits, padded), _shown(own, padded)):
            fitting.append((name, far(output.logits, own)))
    if not fitting:
        raise CaptureError(
            f"{type(stages.model).__name__} counts positions in a way that is neither one after the other nor"
            " along the mask; it cannot be served"
        )
    return min(fitting, key=lambda item: item[1])[0]


def _table(module: fx.GraphModule, flat: FlatProgram) -> int | None:
    """The number of positions that the tables looked up by position can take: rows, less what the model adds
    to a position.
    """
    source = flat.graph.find_nodes(op="placeholder")[flat.inputs.index("position_ids")]
    limits = []
    for node in flat.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        chain = _chain(node.args[1], source)
        if chain is not None:
            value: Any = torch.zeros((1, 1), dtype=torch.long)
            for step in chain:
                value = _applied(step, value)
            limits.append(node.args[0].meta["val"].shape[0] - int(value))
    return min(limits, default=None)


def _applied(step: fx.Node, value: Any) -> Any:
    """An operation with one input, on another value than the graph's."""
    target: Any = step.target
    args: Any = fx.map_arg(step.args, lambda argument: value)
    return target(*args, **step.kwargs)


def _chain(node: Any, source: fx.Node) -> list[fx.Node] | None:
    """The operations between the positions and a lookup, if each has one input."""
    steps: list[fx.Node] = []
    while node is not source:
        if not isinstance(node, fx.Node) or node.op != "call_function" or len(node.all_input_nodes) != 1:
            return None
        steps.append(node)
        node = node.all_input_nodes[0]
    return steps[::-1]


def check_served(model: Any, stages: CausalStages | Seq2SeqStages) -> None:
    """Hold the form in which programs are served against the one that was verified, and continued sequences
    against whole ones.

    Raises:
        CaptureError: they differ; names the size.
    """
    for size, arguments in _served_calls(model, stages):
        whole, pieces = arguments
        with torch.no_grad(), rewound(model):
            expected = model(**whole, use_cache=False).logits
            cache, found = None, []
            for piece in pieces:
                output = model(**piece, **{CACHE: cache}, use_cache=True)
                cache = output[CACHE]
                found.append(output.logits)
        if far(_shown(torch.cat(found, 1), whole), _shown(expected, whole)):
            raise CaptureError(
                f"the pruned {type(stages.model).__name__} does not continue a sequence as it computes it at"
                f" once ({size}); it cannot be served"
            )


def _served_calls(
    model: Any, stages: CausalStages | Seq2SeqStages
) -> Iterator[tuple[str, tuple[dict[str, Any], list[dict[str, Any]]]]]:
    for batch, padding in ((1, 0), (3, 2)):
        if isinstance(stages, CausalStages):
            whole = stages.arguments(batch=batch, new=6, past=0, padding=padding)
            whole = {
                name: whole[name]
                for name in ("input_ids", "attention_mask", "position_ids")
                if name in whole and name in stages.accepts
            }
        else:
            given = stages.arguments(batch=batch, new=6, past=0, padding=padding)
            shown = stages.optional(decoder_attention_mask=given.get("decoder_attention_mask"))
            source = stages.tokens(given["attention_mask"].shape[1], batch)
            whole = {
                "input_ids": source,
                "attention_mask": given["attention_mask"],
                "decoder_input_ids": given["decoder_input_ids"],
                **shown,
            }
        whole = pytree.tree_map(
            lambda leaf: leaf.to(model.device) if isinstance(leaf, Tensor) else leaf, whole
        )
        mask = whole.get("attention_mask")
        name = "input_ids" if isinstance(stages, CausalStages) else "decoder_input_ids"
        pieces = []
        for start, end in ((0, 3), (3, 4), (4, 6)):
            piece = {**whole, name: whole[name][:, start:end]}
            if isinstance(stages, CausalStages):
                if mask is not None:
                    piece["attention_mask"] = mask[:, :end]
                if "position_ids" in whole:
                    piece["position_ids"] = whole["position_ids"][:, start:end]
            elif "decoder_attention_mask" in whole:
                piece["decoder_attention_mask"] = whole["decoder_attention_mask"][:, :end]
            pieces.append(piece)
        yield f"{batch} sequences, {padding} tokens of padding", (whole, pieces)


__all__ = ["check_served", "habits_of"]
