"""Operators that only move elements: the operator itself, applied to the channel numbers, is the rule.

The clauses name the arguments that speak of sizes, so that one rewriter can adapt them.
"""

from __future__ import annotations

#: operators that place or choose elements one by one: understood, but no channel can be taken out of them
_ONE_BY_ONE = (
    "index_put.default",
    "masked_scatter.default",
    "slice_scatter.default",
    "select_scatter.default",
)

#: operators that give the same elements in the same order another shape; a capture has no views left
RESHAPES: frozenset[str] = frozenset({"aten.reshape.default", "aten.flatten.using_ints"})

#: differentiable operators that give each element of their first argument once, there or elsewhere
REARRANGEMENTS: frozenset[str] = RESHAPES | {
    f"aten.{name}"
    for name in (
        *(
            "squeeze.dim",
            "squeeze.dims",
            "unsqueeze.default",
            "t.default",
            "transpose.int",
            "permute.default",
        ),
        *("numpy_T.default", "mT.default", "movedim.int", "movedim.intlist", "swapaxes.default"),
        *("alias.default", "clone.default", "contiguous.default", "flip.default", "roll.default"),
    )
}

MOVEMENT: dict[str, str] = {
    # the same elements under another shape
    "aten.reshape.default": "move self; shape shape",
    "aten.flatten.using_ints": "move self",
    "aten.squeeze.dim": "move self; freeze @dim",
    "aten.squeeze.dims": "move self; freeze @dim",
    "aten.unsqueeze.default": "move self",
    "aten.t.default": "move self",
    "aten.transpose.int": "move self",
    "aten.permute.default": "move self",
    "aten.numpy_T.default": "move self",
    "aten.mT.default": "move self",
    "aten.movedim.int": "move self",
    "aten.movedim.intlist": "move self",
    "aten.swapaxes.default": "move self",
    # copies
    "aten.alias.default": "move self",
    "aten.clone.default": "move self",
    "aten.contiguous.default": "move self",
    "aten.detach.default": "move self",
    "aten.lift_fresh_copy.default": "move self",
    "aten.expand.default": "move self; shape size",
    "aten.broadcast_to.default": "move self; shape size",
    "aten.repeat.default": "move self",
    "aten.repeat_interleave.self_int": "move self",
    "aten.flip.default": "move self",
    # real and imaginary parts, beside one another in a dimension more
    "aten.view_as_real.default": "self[...] -> [... r]",
    "aten.view_as_complex.default": "self[... r] -> [...]; freeze r",
    # parts
    "aten.slice.Tensor": "move self; part dim start end",
    "aten.select.int": "move self; part dim index",
    "aten.unbind.int": "move self",
    "aten.split.Tensor": "move self; part dim split_size",
    "aten.unsafe_split.Tensor": "move self; part dim split_size",
    "aten.split_with_sizes.default": "move self; part dim split_sizes",
    "aten.chunk.default": "move self; part dim chunks",
    "aten.index.Tensor": "move self; freeze @indices",
    "aten.index_select.default": "move self; freeze @dim",
    "aten.unfold.default": "move self; freeze @dimension",
    "aten.diagonal.default": "move self; freeze @dim1; freeze @dim2",
    # joins
    "aten.cat.default": "move tensors",
    "aten.stack.default": "move tensors",
    **{f"aten.{name}": "self[...] -> [...]; window ..." for name in _ONE_BY_ONE},
    # positions come to places of others that integers name
    **{
        f"aten.{name}": "self[a*], index[a*], src[a*] -> [a*]; place a* dim"
        for name in ("scatter.src", "scatter_add.default", "scatter_reduce.two")
    },
    "aten.index_fill.int_Scalar": "self[a*] -> [a*]; window @dim",
    "aten.scatter.value": "self[a*], index[a*] -> [a*]; place a* dim",
    "aten.index_add.default": "self[a*], source[a*] -> [a*]; place a* dim",
    "aten.index_copy.default": "self[a*], source[a*] -> [a*]; place a* dim",
    "aten.gather.default": "self[a*], index[a*] -> [a*]; place a* dim; window @dim; index @dim index",
    # a weight computed from its direction and length: every element depends on all of a slice
    "aten._weight_norm_interface.default": "v[...], g[...] -> [...], [...]; window ...",
    # borders: what is added is not a channel
    "aten.constant_pad_nd.default": "move self",
    "aten.pad.default": "move self",
}
