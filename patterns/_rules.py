"""What operators do to channels: the rules, a line each, as the grammar reads them (``_grammar.py``).

Most pointwise operators carry ``torch.Tag.pointwise``, from which their rule is derived: channels that meet,
under broadcasting, are coupled.
"""

from __future__ import annotations

from fasp_fx.base import OpOverload, schema_of

# --- What the rules below are made of.

_SPATIAL = {1: ("x", "u"), 2: ("y x", "v u"), 3: ("z y x", "w v u")}


def _convolution(rank: int) -> str:
    positions, window = _SPATIAL[rank]
    slides = "; ".join(
        f"slide {x} {u} stride padding dilation"
        for x, u in zip(positions.split(), window.split(), strict=True)
    )
    return (
        f"input[... (g i) {positions}], weight[(g o) i {window}], bias[(g o)] -> [... (g o) {positions}];"
        f" factor g groups; {slides}"
    )


def _transposed(rank: int) -> str:
    positions, window = _SPATIAL[rank]
    windows = "; ".join(f"window {letter}" for letter in (*positions.split(), *window.split()))
    return (
        f"input[... (g i) {positions}], weight[(g i) o {window}], bias[(g o)] -> [... (g o) {positions}];"
        f" factor g groups; {windows}"
    )


_EXPERTS = "route t e; freeze t; align k 8; align n 8"
_WEIGHTS = "input[x y i], params.0[(g h) i], params.1[(g h) k], params.2[(g h)], params.3[(g h)]"
_CELLS = "input[x y i], params.0[(g c) i], params.1[(g c) k]"
_PROJECTED = "hx.0[l b h], hx.1[l b c] -> [x y h], [l b h], [l b c]"
_SINGLE = "freeze x; freeze y; freeze b; only num_layers 1; only bidirectional 0"

_REDUCTIONS = (
    "mean.dim",
    "prod.dim_int",
    "amax.default",
    "amin.default",
    "logsumexp.default",
    "linalg_vector_norm.default",
    "var.correction",
    "std.correction",
    "var.dim",
    "std.dim",
    "any.dim",
    "all.dim",
)
#: of a whole tensor one number
_TOTALS = (
    "mean.default",
    "sum.default",
    "prod.default",
    "max.default",
    "min.default",
    "median.default",
    "any.default",
    "all.default",
)


def _windowed(argument: str, rank: int, results: int = 1) -> str:
    """Every channel by itself; positions are resampled."""
    positions, _ = _SPATIAL[rank]
    windows = "; ".join(f"window {letter}" for letter in positions.split())
    return f"{argument}[... {positions}] -> {', '.join([f'[... {positions}]'] * results)}; {windows}"


#: dimensions of what is resampled
_RESAMPLERS = {
    "nearest1d": 1,
    "nearest2d": 2,
    "nearest3d": 3,
    "linear1d": 1,
    "bilinear2d": 2,
    "bicubic2d": 2,
    "trilinear3d": 3,
}
_BATCH_NORM = "input[n c x*], weight[c], bias[c]"
_STATISTICS = "running_mean[c], running_var[c]"

#: operators that only assert something, or read a size
CHECKS: tuple[str, ...] = (
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten._assert_async.msg",
    "aten.sym_constrain_range_for_size.default",
    "aten.sym_size.int",
)

RULES: dict[str, str] = {
    # --- Products, attention and convolutions sum over channels against a weight or another activation.
    "aten.linear.default": "input[... i], weight[o i], bias[o] -> [... o]",
    "aten.bilinear.default": "input1[... i], input2[... j], weight[o i j], bias[o] -> [... o]",
    "aten.mm.default": "self[m k], mat2[k n] -> [m n]",
    "aten.mv.default": "self[m k], vec[k] -> [m]",
    "aten.addmv.default": "self[m], mat[m k], vec[k] -> [m]",
    "aten.dot.default": "self[k], tensor[k] -> []",
    "aten.outer.default": "self[m], vec2[n] -> [m n]",
    "aten.bmm.default": "self[b m k], mat2[b k n] -> [b m n]",
    "aten.addmm.default": "self[m n], mat1[m k], mat2[k n] -> [m n]",
    "aten.baddbmm.default": "self[b m n], batch1[b m k], batch2[b k n] -> [b m n]",
    "aten.matmul.default": (
        "self[... m k], other[... k n] -> [... m n] | self[k], other[... k n] -> [... n] | self[... m k],"
        " other[k] -> [... m] | self[k], other[k] -> []"
    ),
    "aten.scaled_dot_product_attention.default": (
        "query[... h q d], key[... g k d], value[... g k c], attn_mask[... h q k] -> [... h q c] if"
        " enable_gqa | query[... h q d], key[... g k d], value[... g k c], attn_mask[q k] -> [... h q c] if"
        " enable_gqa | query[... q d], key[... k d], value[... k c], attn_mask[... q k] -> [... q c]; mix k;"
        " repeat g h; freeze q if is_causal; freeze k if is_causal"
    ),
    "higher_order.flex_attention": (
        "query[b h q d], key[b g k d], value[b g k c] -> [b h q c], [b h q], [b h q]"
        "; mix k; repeat g h; freeze b; freeze q; freeze k"
    ),
    **{
        f"aten.conv{rank}d.{overload}": _convolution(rank)
        for rank in _SPATIAL
        for overload in ("default", "padding")
    },
    "aten.conv_transpose1d.default": _transposed(1),
    "aten.conv_transpose2d.input": _transposed(2),
    "aten.conv_transpose3d.input": _transposed(3),
    # The kernel takes rows of whole 16 bytes. The other stands for it where transformers is traced.
    "aten._grouped_mm.default": f"self[t k], mat2[e k n], offs[e] -> [t n]; {_EXPERTS}",
    "transformers.grouped_mm_fallback.default": f"input[t k], weight[e k n], offs[e] -> [t n]; {_EXPERTS}",
    "aten.embedding.default": "weight[v c], indices[...] -> [... c]; freeze v",
    "aten.lstm.input": (
        f"{_CELLS}, params.2[(g c)], params.3[(g c)], params.4[h c], {_PROJECTED} if params.4"
        f" | {_WEIGHTS}, hx.0[l b h], hx.1[l b h] -> [x y h], [l b h], [l b h]"
        f" | {_CELLS}, params.2[h c], {_PROJECTED}"
        f"; gates g 4; recur k h hx.0 batch_first; freeze c; {_SINGLE}"
    ),
    "aten.gru.input": (
        f"{_WEIGHTS}, hx[l b h] -> [x y h], [l b h]; gates g 3; recur k h hx batch_first; {_SINGLE}"
    ),
    **{
        f"aten.rnn_{kind}.input": (
            "input[x y i], params.0[h i], params.1[h k], params.2[h], params.3[h], hx[l b h] -> [x y h], [l"
            f" b h]; recur k h hx batch_first; {_SINGLE}"
        )
        for kind in ("tanh", "relu")
    },
    # --- Positions along a dimension influence one another.
    "aten.layer_norm.default": (
        "input[... n*], weight[n*], bias[n*] -> [... n*]; mix n*; shape normalized_shape=n*"
    ),
    "aten.rms_norm.default": "input[... n*], weight[n*] -> [... n*]; mix n*; shape normalized_shape=n*",
    "aten.softmax.int": "self[...] -> [...]; mix @dim; choose @dim",
    "aten._softmax.default": "self[...] -> [...]; mix @dim; choose @dim",
    "aten.log_softmax.int": "self[...] -> [...]; mix @dim",
    "aten._log_softmax.default": "self[...] -> [...]; mix @dim",
    # norms that keep channels apart
    "aten.batch_norm.default": (
        "input[m c z*], weight[c], bias[c], running_mean[c], running_var[c] -> [m c z*] if training |"
        f" {_BATCH_NORM}, {_STATISTICS} -> [n c x*]; mix m; mix z*"
    ),
    "aten._native_batch_norm_legit_no_training.default": f"{_BATCH_NORM}, {_STATISTICS} -> [n c x*], [], []",
    "aten._native_batch_norm_legit.no_stats": f"{_BATCH_NORM} -> [n c x*], [c], [c]; mix n; mix x*",
    "aten.instance_norm.default": f"{_BATCH_NORM}, {_STATISTICS} -> [n c x*]; mix x*",
    "aten.group_norm.default": (
        "input[n (g c) x*], weight[(g c)], bias[(g c)] -> [n (g c) x*]; mix c; mix x*; factor g num_groups"
    ),
    **{f"aten.{name}": "self[...] -> [...]; reduce @dim" for name in _REDUCTIONS},
    "aten.sum.dim_IntList": "self[...] -> [...]; reduce @dim; add @dim",
    **{f"aten.{name}": "self[...] -> []" for name in _TOTALS},
    "aten.argmin.default": "self[...] -> [...]; reduce @dim; index @dim first",
    "aten.argmax.default": "self[...] -> [...]; reduce @dim; choose @dim first",
    "aten.max.dim": "self[...] -> [...], [...]; reduce @dim; choose @dim second",
    **{
        f"aten.{name}.dim": "self[...] -> [...], [...]; reduce @dim; index @dim second"
        for name in ("min", "median")
    },
    **{
        f"aten.{name}.correction": "self[...] -> [...], [...]; reduce @dim"
        for name in ("var_mean", "std_mean")
    },
    "aten.cumsum.default": "self[...] -> [...]; freeze @dim; add @dim",
    **{
        f"aten.{name}": "self[...] -> [...]; freeze @dim"
        for name in ("cumprod.default", "logcumsumexp.default")
    },
    **{f"aten.{name}.default": "self[...] -> [...], [...]; freeze @dim" for name in ("cummax", "cummin")},
    # order and choice
    "aten.sort.default": "self[...] -> [...], [...]; freeze @dim; pass self first",
    "aten.sort.stable": "self[...] -> [...], [...]; freeze @dim; pass self first",
    "aten.argsort.default": "self[...] -> [...]; freeze @dim",
    "aten.topk.default": "self[...] -> [...], [...]; window @dim; choose @dim second",
    "aten.histc.default": "tally self; count bins; count max 1; only min 0",
    "aten.one_hot.default": "tally self; count num_classes",
    "aten.roll.default": "self[...] -> [...]; freeze @dims",
    "aten.tril.default": "self[... i j] -> [... i j]; freeze i; freeze j",
    "aten.triu.default": "self[... i j] -> [... i j]; freeze i; freeze j",
    # another basis
    "aten._fft_r2c.default": "self[...] -> [...]; window @dim",
    "aten._fft_c2r.default": "self[...] -> [...]; window @dim",
    "aten._fft_c2c.default": "self[...] -> [...]; freeze @dim",
    # windows over positions
    **{
        f"aten.{kind}{rank}d.default": _windowed("self", rank)
        for kind in ("max_pool", "avg_pool", "adaptive_avg_pool")
        for rank in _SPATIAL
    },
    **{f"aten.adaptive_max_pool{rank}d.default": _windowed("self", rank, results=2) for rank in _SPATIAL},
    **{f"aten.max_pool{rank}d_with_indices.default": _windowed("self", rank, results=2) for rank in _SPATIAL},
    **{f"aten.upsample_{name}.vec": _windowed("input", rank) for name, rank in _RESAMPLERS.items()},
    **{f"aten.upsample_{name}.default": _windowed("self", rank) for name, rank in _RESAMPLERS.items()},
    **{f"aten._upsample_{name}_aa.vec": _windowed("input", 2) for name in ("bilinear2d", "bicubic2d")},
    **{f"aten._upsample_nearest_exact{rank}d.vec": _windowed("input", rank) for rank in _SPATIAL},
    "aten.grid_sampler.default": "input[n c y x], grid[n a b t] -> [n c a b]; window y; window x; window t",
    # --- Data moves: the operator itself, applied to the channel numbers, is the rule; clauses name the
    # arguments that speak of sizes.
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
    # elements are placed or chosen one by one: understood, but no channel can be taken out
    **{
        f"aten.{name}.default": "self[...] -> [...]; window ..."
        for name in ("index_put", "masked_scatter", "slice_scatter", "select_scatter")
    },
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
    # --- The second operand does not broadcast against the first.
    "aten.prelu.default": "self[n c x*], weight[c] -> [n c x*]",
    "aten.type_as.default": "self[...] -> [...]; pass self first",
    "aten._to_copy.default": "self[...] -> [...]; pass self first",
    "aten.to.dtype": "self[...] -> [...]; pass self first",
    # --- All elements of what is made are alike, so that any of them can go.
    **{
        f"aten.{name}.default": "create; shape size"
        for name in ("full", "zeros", "ones", "new_empty", "new_zeros", "new_ones", "new_full")
    },
    "aten.empty.memory_format": "create; shape size",
    # --- Nothing but an assertion, or a size.
    **dict.fromkeys(CHECKS, "check"),
}

#: letters whose sizes the passes make one, padding what is narrower: fused kernels want values as wide as
#: keys
ONE_WIDTH: dict[str, tuple[str, str]] = {"aten.scaled_dot_product_attention.default": ("d", "c")}

#: operators that are given graphs: for each such argument a letter, and which of the graph's inputs is told
#: positions along it. They stay where the graph's result depends on that, or where a table beside the graph
#: in a list has them along the dimension of that number.
TOLD: dict[str, dict[str, tuple[str, int]]] = {
    "flex_attention": {"score_mod": ("h", 2), "block_mask": ("h", 1)}
}

#: operators that give the same elements in the same order another shape; a capture has no views left
RESHAPES: frozenset[str] = frozenset({"aten.reshape.default", "aten.flatten.using_ints"})

#: pointwise operators that change the type or the place of ``self`` and nothing else: a weight that is cast
#: stays the weight it was
CASTS: frozenset[str] = frozenset(
    {
        "aten._to_copy.default",
        "aten.to.dtype",
        "aten.to.device",
        "aten.to.dtype_layout",
        "aten.type_as.default",
    }
)

#: pointwise operators whose result is zero wherever one of these arguments is (and the others are finite)
VANISHING: dict[str, tuple[str, ...]] = {
    "aten.mul.Tensor": ("self", "other"),
    "aten.mul.Scalar": ("self",),
    "aten.div.Tensor": ("self",),
    "aten.div.Scalar": ("self",),
}

#: pointwise operators that torch does not tag
UNTAGGED: tuple[str, ...] = (
    "aten.copy.default",
    "aten.to.device",
    "aten.__and__.Tensor",
    "aten.__or__.Tensor",
    "aten.to.dtype_layout",
    "aten.dropout.default",
    "aten.hardswish.default",
    "aten.hardsigmoid.default",
    "aten.log_sigmoid.default",
    "aten.masked_fill.Scalar",
    "aten.masked_fill.Tensor",
    "aten.fill.Scalar",
    "aten.fill.Tensor",
    "aten.complex.default",
    "aten.polar.default",
    "aten.where.ScalarOther",
    "aten.where.ScalarSelf",
    "aten.where.Scalar",
    "aten.zeros_like.default",
    "aten.ones_like.default",
    "aten.full_like.default",
)


def pointwise_rule(operator: OpOverload) -> str:
    """The rule of a pointwise operator, derived from its schema: every tensor argument broadcasts into every
    result.
    """
    tensors = [argument.name for argument in schema_of(operator).arguments if "Tensor" in str(argument.type)]
    results = max(1, sum("Tensor" in str(result.type) for result in schema_of(operator).returns))
    return f"{', '.join(f'{name}[...]' for name in tensors)} -> {', '.join(['[...]'] * results)}"
