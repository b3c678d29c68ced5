"""Operators that sum over channels against a weight or another activation."""

from __future__ import annotations

CONTRACTIONS: dict[str, str] = {
    "aten.linear.default": "input[... i], weight[o i], bias[o] -> [... o]",
    "aten.mm.default": "self[m k], mat2[k n] -> [m n]",
    "aten.bmm.default": "self[b m k], mat2[b k n] -> [b m n]",
    "aten.addmm.default": "self[m n], mat1[m k], mat2[k n] -> [m n]",
    "aten.baddbmm.default": "self[b m n], batch1[b m k], batch2[b k n] -> [b m n]",
    "aten.matmul.default": (
        "self[... m k], other[... k n] -> [... m n] | self[k], other[... k n] -> [... n] | self[... m k], other[k] -> [... m] | self[k], other[k] -> []"
    ),
    "aten.scaled_dot_product_attention.default": (
        "query[... h q d], key[... g k d], value[... g k c], attn_mask[... h q k] -> [... h q c] if enable_gqa"
        " | query[... q d], key[... k d], value[... k c], attn_mask[... q k] -> [... q c]"
        "; mix k; repeat g h"
    ),
    "aten.embedding.default": "weight[v c], indices[...] -> [... c]; freeze v",
}
