"""Operators that sum over channels against a weight or another activation: products, attention,
convolutions.
"""

from __future__ import annotations

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

CONTRACTIONS: dict[str, str] = {
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
}


_WEIGHTS = "input[x y i], params.0[(g h) i], params.1[(g h) k], params.2[(g h)], params.3[(g h)]"
_CELLS = "input[x y i], params.0[(g c) i], params.1[(g c) k]"
_PROJECTED = "hx.0[l b h], hx.1[l b c] -> [x y h], [l b h], [l b c]"
_SINGLE = "freeze x; freeze y; freeze b; only num_layers 1; only bidirectional 0"

#: letters whose sizes the passes make one, padding what is narrower: fused kernels want values as wide as
#: keys
ONE_WIDTH: dict[str, tuple[str, str]] = {"aten.scaled_dot_product_attention.default": ("d", "c")}

#: operators that are given graphs: for each such argument a letter, and which of the graph's inputs is told
#: positions along it. They stay where the graph's result depends on that, or where a table beside the graph
#: in a list has them along the dimension of that number.
TOLD: dict[str, dict[str, tuple[str, int]]] = {
    "flex_attention": {"score_mod": ("h", 2), "block_mask": ("h", 1)}
}

RECURRENT: dict[str, str] = {
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
}
