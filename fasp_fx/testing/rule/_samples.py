"""Arguments for operators whose schema does not say enough: sizes that must multiply, lists that must fit,
indices that must be in range.

Each entry makes the arguments that matter; the others keep their defaults. An operator that is not listed is
called by its schema.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ._calls import Draw

Sample = Callable[[Draw], dict[str, Any]]


def _regrouped(draw: Draw) -> tuple[list[int], list[int]]:
    """A shape, and another of the same elements: neighbours merged, sizes split."""
    shape = [draw.choice([1, 2, 2, 3, 4, 6]) for _ in range(draw.integer(1, 4))]
    other = list(shape)
    for _ in range(draw.integer(0, 3)):
        at = draw.integer(0, len(other) - 1)
        if draw.flag() and len(other) > 1 and at + 1 < len(other):
            other[at : at + 2] = [other[at] * other[at + 1]]
        elif other[at] % 2 == 0:
            other[at : at + 1] = draw.order([2, other[at] // 2])
        elif draw.flag(0.3):
            other.insert(at, 1)
    if draw.flag(0.3):
        other[draw.integer(0, len(other) - 1)] = -1
    return shape, other


def _of(
    most: int, more: Callable[[Draw, list[int]], dict[str, Any]], draw: Draw, kind: str | None = None
) -> dict[str, Any]:
    """A tensor of at most so many dimensions, and what goes with its shape."""
    shape = draw.shape(most=most)
    return {"self": draw.tensor(shape, kind), **more(draw, shape)}


def _along(
    most: int, more: Callable[[Draw, list[int], int], dict[str, Any]], draw: Draw, kind: str | None = None
) -> dict[str, Any]:
    """A tensor, one of its dimensions, and what goes with both."""
    shape = draw.shape(most=most)
    dim = draw.dim(len(shape))
    return {"self": draw.tensor(shape, kind), "dim": dim, **more(draw, shape, dim)}


def _resized(shape: list[int], dim: int, size: int) -> list[int]:
    """A shape with another size along one dimension."""
    return [size if at == dim % len(shape) else old for at, old in enumerate(shape)]


def _reshape(draw: Draw) -> dict[str, Any]:
    shape, other = _regrouped(draw)
    return {"self": draw.tensor(shape), "shape": other}


def _thin(draw: Draw, most: int) -> list[int]:
    """A shape with many a dimension of size 1."""
    return [1 if draw.flag(0.4) else draw.size() for _ in range(draw.integer(1, most))]


def _expand(draw: Draw) -> dict[str, Any]:
    shape = _thin(draw, 3)
    size = [draw.size() if old == 1 else draw.choice([old, -1]) for old in shape]
    return {"self": draw.tensor(shape), "size": [draw.size() for _ in range(draw.integer(0, 1))] + size}


def _broadcast(draw: Draw) -> dict[str, Any]:
    arguments = _expand(draw)
    shape = [1] * (len(arguments["size"]) - arguments["self"].dim()) + list(arguments["self"].shape)
    return {**arguments, "size": [old if size == -1 else size for old, size in zip(shape, arguments["size"])]}


def _parts(draw: Draw, size: int) -> list[int]:
    """Sizes that add up."""
    parts: list[int] = []
    while sum(parts) < size:
        parts.append(draw.integer(1, size - sum(parts)))
    return parts


def _movedim(draw: Draw, shape: list[int]) -> dict[str, Any]:
    many = draw.integer(1, len(shape))
    return {name: draw.order(range(len(shape)))[:many] for name in ("source", "destination")}


def _squeeze(draw: Draw, dims: Callable[[Draw, int], Any]) -> dict[str, Any]:
    shape = _thin(draw, 4)
    return {"self": draw.tensor(shape), "dim": dims(draw, len(shape))}


def _index(draw: Draw, shape: list[int]) -> dict[str, Any]:
    dims = draw.some(range(len(shape)), least=1)
    many = draw.integer(1, 3)
    indices = [draw.tensor([many], "index", size) if dim in dims else None for dim, size in enumerate(shape)]
    return {"indices": indices}


_index_select = partial(
    _along, 4, lambda draw, shape, dim: {"index": draw.tensor([draw.integer(1, 4)], "index", shape[dim])}
)
_gather = partial(
    _along,
    3,
    lambda draw, shape, dim: {
        "index": draw.tensor(_resized(shape, dim, draw.integer(1, 4)), "index", shape[dim])
    },
)
_select = partial(_along, 4, lambda draw, shape, dim: {"index": draw.integer(-shape[dim], shape[dim] - 1)})


def _scatter(draw: Draw, value: str | None) -> dict[str, Any]:
    arguments = _gather(draw)
    index = arguments["index"][tuple(slice(0, size) for size in arguments["self"].shape)]
    source = {"value": draw.float()} if value is None else {value: draw.tensor(list(index.shape))}
    return {**arguments, "index": index, **source}


def _index_put(draw: Draw, shape: list[int]) -> dict[str, Any]:
    many = draw.integer(1, 3)
    indices, values = [draw.tensor([many], "index", shape[0])], draw.tensor([many, *shape[1:]])
    return {"indices": indices, "values": values, "accumulate": draw.flag()}


def _index_add(draw: Draw) -> dict[str, Any]:
    arguments = _index_select(draw)
    return {
        **arguments,
        "source": draw.tensor(
            _resized(list(arguments["self"].shape), arguments["dim"], len(arguments["index"]))
        ),
    }


def _slice_scatter(draw: Draw, shape: list[int], dim: int) -> dict[str, Any]:
    start = draw.integer(0, shape[dim] - 1)
    end = draw.integer(start + 1, shape[dim])
    return {"src": draw.tensor(_resized(shape, dim, end - start)), "start": start, "end": end}


def _select_scatter(draw: Draw) -> dict[str, Any]:
    arguments = _select(draw)
    source = list(arguments["self"].shape)
    del source[arguments["dim"]]
    return {**arguments, "src": draw.tensor(source)}


def _cat(draw: Draw) -> dict[str, Any]:
    shape = draw.shape()
    dim = draw.dim(len(shape))
    parts = [_resized(shape, dim, draw.size()) for _ in range(draw.integer(1, 3))]
    return {"tensors": [draw.tensor(part) for part in parts], "dim": dim}


def _stack(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    tensors = [draw.tensor(shape) for _ in range(draw.integer(1, 3))]
    return {"tensors": tensors, "dim": draw.integer(-len(shape) - 1, len(shape))}


_pad = partial(
    _of,
    3,
    lambda draw, shape: {
        "pad": [draw.choice([0, 0, 1, 2, -1]) for _ in range(2 * draw.integer(1, len(shape)))]
    },
)


def _pad_mode(draw: Draw) -> dict[str, Any]:
    mode = draw.choice(["constant", "reflect", "replicate", "circular"])
    if mode == "constant":
        return {**_pad(draw), "mode": mode}
    shape = [draw.size(), draw.size(), draw.integer(2, 4)]
    return {"self": draw.tensor(shape), "pad": [draw.integer(0, 1), draw.integer(0, 1)], "mode": mode}


def _roll(draw: Draw, shape: list[int]) -> dict[str, Any]:
    dims = draw.some(range(len(shape)), least=1)
    return {"shifts": [draw.integer(-2, 2) for _ in dims], "dims": dims}


def _attention(draw: Draw) -> dict[str, Any]:
    """The scale is written out, as a pass does before anything is removed; left out, it would follow the
    width of the heads.
    """
    lead = [draw.size()] if draw.flag() else []
    q, k, d, c = (draw.size() for _ in range(4))
    shared = draw.flag()
    few = draw.integer(1, 2)
    many = few * draw.integer(1, 3) if shared else few
    heads, few_heads = ([many], [few]) if shared or draw.flag() else ([], [])
    shapes = {
        "query": [*lead, *heads, q, d],
        "key": [*lead, *few_heads, k, d],
        "value": [*lead, *few_heads, k, c],
    }
    arguments: dict[str, Any] = {name: draw.tensor(shape, "real") for name, shape in shapes.items()}
    if draw.flag():
        mask = draw.tensor([*heads, q, k] if draw.flag() else [q, k], "real")
        arguments |= {"attn_mask": mask, "is_causal": False}  # both together are refused by some kernels
    return {**arguments, "enable_gqa": shared, "scale": draw.float()}


def _upsample(draw: Draw, name: str, rank: int) -> dict[str, Any]:
    source = {name: draw.tensor([draw.size() for _ in range(2 + rank)], "real")}
    sizes = [draw.integer(1, 5) for _ in range(rank)]
    if name == "input" and draw.flag():
        factors = [draw.choice([0.5, 1.5, 2.0]) for _ in range(rank)]
        return {**source, "output_size": None, "scale_factors": factors, "align_corners": False}
    return {**source, "output_size": sizes, "scale_factors": None, "align_corners": draw.flag()}


def _batch_statistics(draw: Draw) -> dict[str, Any]:
    shape = [draw.size(), draw.size(), *(draw.size() for _ in range(draw.integer(1, 2)))]
    has = draw.flag()
    weights = {name: draw.tensor(shape[1:2], "real") if has else None for name in ("weight", "bias")}
    return {"input": draw.tensor(shape, "real"), **weights, "training": True, "momentum": 0.1, "eps": 1e-5}


def _weight_norm(draw: Draw) -> dict[str, Any]:
    """The kernel trusts the sizes: with a norm of another shape it reads and writes where nothing is."""
    shape = draw.shape(least=2)
    dim = draw.choice([0, len(shape) - 1])
    norm = draw.tensor(_resized([1] * len(shape), dim, shape[dim]), "unit")
    return {"v": draw.tensor(shape, "real"), "g": norm, "dim": dim}


_any = partial(_along, 3, lambda draw, shape, dim: {"keepdim": draw.flag()}, kind="bool")


_RESAMPLERS = {
    "nearest1d": 1,
    "nearest2d": 2,
    "nearest3d": 3,
    "linear1d": 1,
    "bilinear2d": 2,
    "bicubic2d": 2,
    "trilinear3d": 3,
}
_EXACT = {f"nearest_exact{rank}d": rank for rank in (1, 2, 3)} | {"bilinear2d_aa": 2, "bicubic2d_aa": 2}


def _fft(draw: Draw, kind: str) -> dict[str, Any]:
    shape = [draw.size() for _ in range(draw.integer(1, 3))]
    dims = draw.some(range(len(shape)), least=1)
    values = draw.tensor(shape, "real" if kind == "r2c" else "complex")
    arguments = {"self": values, "dim": dims, "normalization": draw.integer(0, 2)}
    if kind == "c2r":
        return {**arguments, "last_dim_size": 2 * (shape[dims[-1]] - 1) or 1}
    return {**arguments, "onesided" if kind == "r2c" else "forward": draw.flag()}


def _grid(draw: Draw) -> dict[str, Any]:
    n, c = draw.size(), draw.size()
    grid = draw.tensor([n, draw.size(), draw.size(), 2], "unit")
    kinds = {name: draw.integer(0, 2) for name in ("interpolation_mode", "padding_mode")}
    kinds["align_corners"] = draw.flag()
    return {"input": draw.tensor([n, c, draw.size(), draw.size()], "real"), "grid": grid, **kinds}


def _grouped(draw: Draw, names: Sequence[str]) -> dict[str, Any]:
    experts, k, n = draw.integer(2, 3), draw.size(), draw.size()
    counts = [draw.integer(1, 3) for _ in range(experts)]
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    # as the kernel takes them: no float64, and rows of whole multiples of 16 bytes
    tokens = draw.tensor([sum(counts), 8 * k], "real").float()
    return dict(zip(names, (tokens, draw.tensor([experts, 8 * k, 8 * n], "real").float(), offsets)))


def _recurrent(draw: Draw, gates: int) -> dict[str, Any]:
    """One layer in one direction, with or without biases and (an LSTM) projections."""
    listed = gates == 4  # only an LSTM has two states
    steps, batch, width, hidden = (draw.size() for _ in range(4))
    second, biases = draw.flag(), draw.flag()
    projected = draw.integer(1, hidden - 1) if listed and hidden > 1 and draw.flag(0.4) else None
    state = projected or hidden
    params = [draw.tensor([gates * hidden, width], "real"), draw.tensor([gates * hidden, state], "real")]
    params += [draw.tensor([gates * hidden], "real") for _ in range(2 * biases)]
    params += [draw.tensor([state, hidden], "real")] if projected else []
    states = [draw.tensor([1, batch, size], "real") for size in ((state, hidden) if listed else (hidden,))]
    return {
        "input": draw.tensor([batch, steps, width] if second else [steps, batch, width], "real"),
        "hx": states if listed else states[0],
        "params": params,
        **{
            "has_biases": biases,
            "num_layers": 1,
            "dropout": 0.0,
            "train": False,
            "bidirectional": False,
            "batch_first": second,
        },
    }


def _tallied(draw: Draw, count: str, last: str | None) -> dict[str, Any]:
    many = draw.integer(2, 5)
    numbers = torch.randint(0, many, (draw.size(), draw.size()), generator=draw.generator)
    return (
        {"self": numbers, count: many}
        if last is None
        else {"self": numbers.double(), count: many, "min": 0, last: many - 1}
    )


SAMPLES: dict[str, Sample] = {
    "aten.lstm.input": partial(_recurrent, gates=4),
    "aten.gru.input": partial(_recurrent, gates=3),
    **{f"aten.rnn_{kind}.input": partial(_recurrent, gates=1) for kind in ("tanh", "relu")},
    "aten.histc.default": partial(_tallied, count="bins", last="max"),
    "aten.one_hot.default": partial(_tallied, count="num_classes", last=None),
    "aten.reshape.default": _reshape,
    "aten.expand.default": _expand,
    "aten.broadcast_to.default": _broadcast,
    "aten.repeat.default": partial(
        _of,
        3,
        lambda draw, shape: {"repeats": [draw.integer(1, 2) for _ in range(len(shape) + draw.integer(0, 1))]},
    ),
    "aten.repeat_interleave.self_int": partial(
        _of,
        3,
        lambda draw, shape: {"repeats": draw.integer(1, 3), "dim": draw.choice([None, draw.dim(len(shape))])},
    ),
    "aten.slice.Tensor": partial(
        _along,
        4,
        lambda draw, shape, dim: {
            "start": draw.choice([None, draw.integer(-shape[dim], shape[dim] - 1)]),
            "end": draw.choice([None, 9223372036854775807, draw.integer(-shape[dim] + 1, shape[dim])]),
            "step": draw.choice([1, 1, 2, 3]),
        },
    ),
    "aten.select.int": _select,
    "aten.split_with_sizes.default": partial(
        _along, 4, lambda draw, shape, dim: {"split_sizes": _parts(draw, shape[dim])}
    ),
    **{
        operator: partial(_along, 4, lambda draw, shape, dim, name=name: {name: draw.integer(1, 3)})  # type: ignore[misc]
        for operator, name in (
            ("aten.split.Tensor", "split_size"),
            ("aten.unsafe_split.Tensor", "split_size"),
            ("aten.chunk.default", "chunks"),
        )
    },
    "aten.permute.default": partial(
        _of,
        4,
        lambda draw, shape: {
            "dims": [dim - len(shape) if draw.flag(0.3) else dim for dim in draw.order(range(len(shape)))]
        },
    ),
    **{f"aten.{name}.default": partial(_of, 2, lambda draw, shape: {}) for name in ("t", "numpy_T")},
    "aten.mT.default": lambda draw: {"self": draw.tensor([*draw.shape(most=2), draw.size()])},
    "aten.movedim.intlist": partial(_of, 4, _movedim),
    "aten.squeeze.dim": partial(_squeeze, dims=Draw.dim),
    "aten.squeeze.dims": partial(_squeeze, dims=lambda draw, rank: draw.some(range(rank), least=1)),
    "aten.unsqueeze.default": partial(
        _of, 3, lambda draw, shape: {"dim": draw.integer(-len(shape) - 1, len(shape))}
    ),
    "aten.index.Tensor": partial(_of, 4, _index),
    "aten.index_select.default": _index_select,
    "aten.gather.default": _gather,
    "aten.scatter.src": partial(_scatter, value="src"),
    "aten.scatter.value": partial(_scatter, value=None),
    "aten.scatter_add.default": partial(_scatter, value="src"),
    "aten.scatter_reduce.two": lambda draw: {
        **_scatter(draw, "src"),
        "reduce": draw.choice(["sum", "prod", "mean", "amax", "amin"]),
        "include_self": draw.flag(),
    },
    "aten.index_put.default": partial(_of, 3, _index_put),
    "aten.index_add.default": _index_add,
    "aten.index_copy.default": _index_add,
    "aten.masked_scatter.default": partial(
        _of, 3, lambda draw, shape: {"mask": draw.tensor(shape, "bool"), "source": draw.tensor(shape)}
    ),
    "aten.slice_scatter.default": partial(_along, 3, _slice_scatter),
    "aten.select_scatter.default": _select_scatter,
    "aten.view_as_complex.default": lambda draw: {"self": draw.tensor([*draw.shape(most=2), 2], "real")},
    "aten.view_as_real.default": partial(_of, 3, lambda draw, shape: {}, kind="complex"),
    **{
        f"aten.{name}": lambda draw: {"size": draw.shape()}
        for name in ("zeros.default", "ones.default", "empty.memory_format")
    },
    "aten.full.default": lambda draw: {"size": draw.shape(), "fill_value": draw.float()},
    **{
        f"aten.{name}.default": partial(_of, 2, lambda draw, shape: {"size": draw.shape()})
        for name in ("new_empty", "new_zeros", "new_ones")
    },
    "aten.new_full.default": partial(
        _of, 2, lambda draw, shape: {"size": draw.shape(), "fill_value": draw.float()}
    ),
    "aten.to.device": partial(
        _of, 4, lambda draw, shape: {"device": torch.device("cpu"), "dtype": torch.float64}
    ),
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.constant_pad_nd.default": _pad,
    "aten.pad.default": _pad_mode,
    "aten.roll.default": partial(_of, 3, _roll),
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.grid_sampler.default": _grid,
    "aten._native_batch_norm_legit.no_stats": _batch_statistics,
    "aten._weight_norm_interface.default": _weight_norm,
    "aten.any.dim": _any,
    "aten.all.dim": _any,
    "aten._grouped_mm.default": partial(_grouped, names=("self", "mat2", "offs")),
    "transformers.grouped_mm_fallback.default": partial(_grouped, names=("input", "weight", "offs")),
    **{f"aten._fft_{kind}.default": partial(_fft, kind=kind) for kind in ("r2c", "c2r", "c2c")},
    **{
        f"aten.upsample_{name}.vec": partial(_upsample, name="input", rank=rank)
        for name, rank in _RESAMPLERS.items()
    },
    **{
        f"aten.upsample_{name}.default": partial(_upsample, name="self", rank=rank)
        for name, rank in _RESAMPLERS.items()
    },
    **{
        f"aten._upsample_{name}.vec": partial(_upsample, name="input", rank=rank)
        for name, rank in _EXACT.items()
    },
}

#: arguments that a captured program has at one value only
FIXED: dict[str, dict[str, Any]] = {
    "aten.batch_norm.default": {"cudnn_enabled": False},
    "aten.instance_norm.default": {
        "use_input_stats": True,
        "running_mean": None,
        "running_var": None,
        "cudnn_enabled": False,
    },
    "aten.group_norm.default": {"cudnn_enabled": False},
    "aten.dropout.default": {"train": False},
    "aten.rrelu.default": {"training": False},
}
