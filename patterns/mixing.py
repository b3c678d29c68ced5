"""Operators in which positions along a dimension influence one another: norms, softmax, reductions, scans."""

from __future__ import annotations

_REDUCTIONS = (
    "mean.dim",
    "sum.dim_IntList",
    "amax.default",
    "amin.default",
    "var.correction",
    "std.correction",
    "var.dim",
    "std.dim",
    "any.dim",
    "all.dim",
)
_SCANS = ("diff.default", "cumsum.default", "cumprod.default", "logcumsumexp.default")

MIXING: dict[str, str] = {
    "aten.layer_norm.default": "input[... n*], weight[n*], bias[n*] -> [... n*]; mix n*; shape normalized_shape=n*",
    "aten.rms_norm.default": "input[... n*], weight[n*] -> [... n*]; mix n*; shape normalized_shape=n*",
    "aten._fused_rms_norm.default": "input[... n*], weight[n*] -> [... n*]; mix n*; shape normalized_shape=n*",
    "aten.softmax.int": "self[...] -> [...]; mix @dim",
    "aten._softmax.default": "self[...] -> [...]; mix @dim",
    "aten.log_softmax.int": "self[...] -> [...]; mix @dim",
    "aten._log_softmax.default": "self[...] -> [...]; mix @dim",
    **{f"aten.{name}": "self[...] -> [...]; reduce @dim" for name in _REDUCTIONS},
    **{f"aten.{name}": "self[...] -> [...]; freeze @dim" for name in _SCANS},
}
