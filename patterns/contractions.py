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


#: operators that add a bias to every token of their output: the arguments that hold the weight and the bias
BIASES: dict[str, tuple[str, str]] = {
    "aten.linear.default": ("weight", "bias"),
    "aten.addmm.default": ("mat2", "self"),
    **{
        f"aten.conv{rank}d.{overload}": ("weight", "bias")
        for rank in _SPATIAL
        for overload in ("default", "padding")
    },
}

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
        "; mix k; repeat g h; freeze b; freeze q; freeze k; told h score_mod third; told h block_mask second"
    ),
    **{
        f"aten.conv{rank}d.{overload}": _convolution(rank)
        for rank in _SPATIAL
        for overload in ("default", "padding")
    },
    "aten.conv_transpose1d.default": _transposed(1),
    "aten.conv_transpose2d.input": _transposed(2),
    "aten.conv_transpose3d.input": _transposed(3),
    "transformers.grouped_mm_fallback.default": (
        "input[t k], weight[e k n], offs[e] -> [t n]; route t e; freeze t"
    ),
    "aten.embedding.default": "weight[v c], indices[...] -> [... c]; freeze v",
}
