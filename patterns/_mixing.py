"""Operators in which positions along a dimension influence one another: norms, softmax, reductions, scans,
pooling, resampling.
"""

from __future__ import annotations

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
_SCANS = ("cumprod.default", "logcumsumexp.default")

_POSITIONS = {1: "x", 2: "y x", 3: "z y x"}


def _windowed(argument: str, rank: int, results: int = 1) -> str:
    """Every channel by itself; positions are resampled."""
    positions = _POSITIONS[rank]
    windows = "; ".join(f"window {letter}" for letter in positions.split())
    return f"{argument}[... {positions}] -> {', '.join([f'[... {positions}]'] * results)}; {windows}"


_POOLS = {
    **{
        f"{kind}{rank}d.default": _windowed("self", rank)
        for kind in ("max_pool", "avg_pool", "adaptive_avg_pool")
        for rank in _POSITIONS
    },
    **{f"adaptive_max_pool{rank}d.default": _windowed("self", rank, results=2) for rank in _POSITIONS},
    **{f"max_pool{rank}d_with_indices.default": _windowed("self", rank, results=2) for rank in _POSITIONS},
}
_RESAMPLERS = {
    "nearest1d": 1,
    "nearest2d": 2,
    "nearest3d": 3,
    "linear1d": 1,
    "bilinear2d": 2,
    "bicubic2d": 2,
    "trilinear3d": 3,
}
_UPSAMPLE = {f"upsample_{name}.vec": _windowed("input", rank) for name, rank in _RESAMPLERS.items()}
_UPSAMPLE |= {f"upsample_{name}.default": _windowed("self", rank) for name, rank in _RESAMPLERS.items()}
_UPSAMPLE |= {f"_upsample_{name}_aa.vec": _windowed("input", 2) for name in ("bilinear2d", "bicubic2d")}
_UPSAMPLE |= {f"_upsample_nearest_exact{rank}d.vec": _windowed("input", rank) for rank in _POSITIONS}

_BATCH_NORM = "input[n c x*], weight[c], bias[c]"
_STATISTICS = "running_mean[c], running_var[c]"

MIXING: dict[str, str] = {
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
    **{f"aten.{name}": "self[...] -> [...]; freeze @dim" for name in _SCANS},
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
    **{f"aten.{name}": rule for name, rule in _POOLS.items()},
    **{f"aten.{name}": rule for name, rule in _UPSAMPLE.items()},
    "aten.grid_sampler.default": "input[n c y x], grid[n a b t] -> [n c a b]; window y; window x; window t",
}
