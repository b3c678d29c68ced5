"""Arguments for operators whose schema does not say enough: sizes that must multiply, lists that must fit,
indices that must be in range.

Each entry makes the arguments that matter; the others keep their defaults. An operator that is not listed is
called by its schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._draw import Draw

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


def _view(argument: str) -> Sample:
    def sample(draw: Draw) -> dict[str, Any]:
        shape, other = _regrouped(draw)
        return {"self": draw.tensor(shape), argument: other}

    return sample


def _expand(draw: Draw) -> dict[str, Any]:
    shape = [1 if draw.flag(0.4) else draw.size() for _ in range(draw.integer(1, 3))]
    size = [draw.size() if old == 1 else draw.choice([old, -1]) for old in shape]
    return {"self": draw.tensor(shape), "size": [draw.size() for _ in range(draw.integer(0, 1))] + size}


def _broadcast(draw: Draw) -> dict[str, Any]:
    found = _expand(draw)
    lead = len(found["size"]) - found["self"].dim()
    found["size"] = [
        found["self"].shape[index - lead] if size == -1 else size for index, size in enumerate(found["size"])
    ]
    return found


def _repeat(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    return {
        "self": draw.tensor(shape),
        "repeats": [draw.integer(1, 2) for _ in range(len(shape) + draw.integer(0, 1))],
    }


def _interleave(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    return {
        "self": draw.tensor(shape),
        "repeats": draw.integer(1, 3),
        "dim": draw.choice([None, draw.dim(len(shape))]),
    }


def _slice(draw: Draw) -> dict[str, Any]:
    shape = draw.shape()
    dim = draw.dim(len(shape))
    size = shape[dim]
    start, end = (
        draw.choice([None, draw.integer(-size, size - 1)]),
        draw.choice([None, 9223372036854775807, draw.integer(-size + 1, size)]),
    )
    return {
        "self": draw.tensor(shape),
        "dim": dim,
        "start": start,
        "end": end,
        "step": draw.choice([1, 1, 2, 3]),
    }


def _select(draw: Draw) -> dict[str, Any]:
    shape = draw.shape()
    dim = draw.dim(len(shape))
    return {"self": draw.tensor(shape), "dim": dim, "index": draw.integer(-shape[dim], shape[dim] - 1)}


def _sizes(draw: Draw) -> dict[str, Any]:
    shape = draw.shape()
    dim = draw.dim(len(shape))
    parts: list[int] = []
    while sum(parts) < shape[dim]:
        parts.append(draw.integer(1, shape[dim] - sum(parts)))
    return {"self": draw.tensor(shape), "split_sizes": parts, "dim": dim}


def _split(argument: str) -> Sample:
    def sample(draw: Draw) -> dict[str, Any]:
        shape = draw.shape()
        return {"self": draw.tensor(shape), argument: draw.integer(1, 3), "dim": draw.dim(len(shape))}

    return sample


def _permute(draw: Draw) -> dict[str, Any]:
    shape = draw.shape()
    dims = draw.order(range(len(shape)))
    return {"self": draw.tensor(shape), "dims": [dim - len(shape) if draw.flag(0.3) else dim for dim in dims]}


def _matrix(draw: Draw) -> dict[str, Any]:
    return {"self": draw.tensor(draw.shape(most=2))}


def _matrices(draw: Draw) -> dict[str, Any]:
    return {"self": draw.tensor([*draw.shape(most=2), draw.size()])}


def _movedim(draw: Draw) -> dict[str, Any]:
    shape = draw.shape()
    many = draw.integer(1, len(shape))
    return {
        "self": draw.tensor(shape),
        "source": draw.order(range(len(shape)))[:many],
        "destination": draw.order(range(len(shape)))[:many],
    }


def _squeeze(draw: Draw) -> dict[str, Any]:
    shape = [1 if draw.flag(0.4) else draw.size() for _ in range(draw.integer(1, 4))]
    return {"self": draw.tensor(shape), "dim": draw.dim(len(shape))}


def _squeeze_dims(draw: Draw) -> dict[str, Any]:
    found = _squeeze(draw)
    return {**found, "dim": draw.some(range(found["self"].dim()), least=1)}


def _unsqueeze(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    return {"self": draw.tensor(shape), "dim": draw.integer(-len(shape) - 1, len(shape))}


def _unflatten(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    dim = draw.integer(0, len(shape) - 1)
    first, second = draw.integer(1, 3), draw.integer(1, 3)
    shape[dim] = first * second
    return {
        "self": draw.tensor(shape),
        "dim": draw.choice([dim, dim - len(shape)]),
        "sizes": [draw.choice([first, -1]), second],
    }


def _index(draw: Draw) -> dict[str, Any]:
    shape = draw.shape()
    dims = draw.some(range(len(shape)), least=1)
    many = draw.integer(1, 3)
    return {
        "self": draw.tensor(shape),
        "indices": [
            draw.tensor([many], "index", size) if dim in dims else None for dim, size in enumerate(shape)
        ],
    }


def _index_select(draw: Draw) -> dict[str, Any]:
    shape = draw.shape()
    dim = draw.dim(len(shape))
    return {
        "self": draw.tensor(shape),
        "dim": dim,
        "index": draw.tensor([draw.integer(1, 4)], "index", shape[dim]),
    }


def _gather(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    dim = draw.dim(len(shape))
    index = list(shape)
    index[dim] = draw.integer(1, 4)
    return {"self": draw.tensor(shape), "dim": dim, "index": draw.tensor(index, "index", shape[dim])}


def _scatter(value: str | None) -> Sample:
    def sample(draw: Draw) -> dict[str, Any]:
        found = _gather(draw)
        index = found["index"][tuple(slice(0, size) for size in found["self"].shape)]
        source = {"value": draw.float()} if value is None else {value: draw.tensor(list(index.shape))}
        return {**found, "index": index, **source}

    return sample


def _scatter_reduce(draw: Draw) -> dict[str, Any]:
    return {
        **_scatter("src")(draw),
        "reduce": draw.choice(["sum", "prod", "mean", "amax", "amin"]),
        "include_self": draw.flag(),
    }


def _index_put(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    many = draw.integer(1, 3)
    return {
        "self": draw.tensor(shape),
        "indices": [draw.tensor([many], "index", shape[0])],
        "values": draw.tensor([many, *shape[1:]]),
        "accumulate": draw.flag(),
    }


def _index_add(draw: Draw) -> dict[str, Any]:
    found = _index_select(draw)
    source = list(found["self"].shape)
    source[found["dim"]] = len(found["index"])
    return {**found, "source": draw.tensor(source)}


def _masked_scatter(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    return {"self": draw.tensor(shape), "mask": draw.tensor(shape, "bool"), "source": draw.tensor(shape)}


def _slice_scatter(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    dim = draw.dim(len(shape))
    start = draw.integer(0, shape[dim] - 1)
    end = draw.integer(start + 1, shape[dim])
    source = list(shape)
    source[dim] = end - start
    return {"self": draw.tensor(shape), "src": draw.tensor(source), "dim": dim, "start": start, "end": end}


def _select_scatter(draw: Draw) -> dict[str, Any]:
    found = _select(draw)
    source = list(found["self"].shape)
    del source[found["dim"]]
    return {**found, "src": draw.tensor(source)}


def _pairs(draw: Draw) -> dict[str, Any]:
    return {"self": draw.tensor([*draw.shape(most=2), 2], "real")}


def _complex(draw: Draw) -> dict[str, Any]:
    return {"self": draw.tensor(draw.shape(most=3), "complex")}


def _created(draw: Draw) -> dict[str, Any]:
    return {"size": draw.shape()}


def _created_like(draw: Draw) -> dict[str, Any]:
    return {"self": draw.tensor(draw.shape(most=2)), "size": draw.shape()}


def _moved(draw: Draw) -> dict[str, Any]:
    return {"self": draw.tensor(draw.shape()), "device": torch.device("cpu"), "dtype": torch.float64}


def _cat(draw: Draw) -> dict[str, Any]:
    shape = draw.shape()
    dim = draw.dim(len(shape))
    parts = [list(shape) for _ in range(draw.integer(1, 3))]
    for part in parts:
        part[dim] = draw.size()
    return {"tensors": [draw.tensor(part) for part in parts], "dim": dim}


def _stack(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    return {
        "tensors": [draw.tensor(shape) for _ in range(draw.integer(1, 3))],
        "dim": draw.integer(-len(shape) - 1, len(shape)),
    }


def _pad(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    amounts = [draw.choice([0, 0, 1, 2, -1]) for _ in range(2 * draw.integer(1, len(shape)))]
    return {"self": draw.tensor(shape), "pad": amounts}


def _pad_mode(draw: Draw) -> dict[str, Any]:
    mode = draw.choice(["constant", "reflect", "replicate", "circular"])
    if mode == "constant":
        return {**_pad(draw), "mode": mode}
    shape = [draw.size(), draw.size(), draw.integer(2, 4)]
    return {"self": draw.tensor(shape), "pad": [draw.integer(0, 1), draw.integer(0, 1)], "mode": mode}


def _roll(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    dims = draw.some(range(len(shape)), least=1)
    return {"self": draw.tensor(shape), "shifts": [draw.integer(-2, 2) for _ in dims], "dims": dims}


def _pixel_shuffle(draw: Draw) -> dict[str, Any]:
    factor = draw.integer(1, 2)
    return {
        "self": draw.tensor([*draw.shape(most=1), factor**2 * draw.integer(1, 2), draw.size(), draw.size()]),
        "upscale_factor": factor,
    }


def _pixel_unshuffle(draw: Draw) -> dict[str, Any]:
    factor = draw.integer(1, 2)
    return {
        "self": draw.tensor(
            [draw.size(), draw.size(), factor * draw.integer(1, 2), factor * draw.integer(1, 2)]
        ),
        "downscale_factor": factor,
    }


def _channel_shuffle(draw: Draw) -> dict[str, Any]:
    groups = draw.integer(1, 3)
    return {"self": draw.tensor([draw.size(), groups * draw.integer(1, 3), draw.size()]), "groups": groups}


def _attention(draw: Draw) -> dict[str, Any]:
    """The scale is written out, as a pass does before anything is removed; left out, it would follow the
    width of the heads.
    """
    lead = [draw.size()] if draw.flag() else []
    q, k, d, c = (draw.size() for _ in range(4))
    shared = draw.flag()
    few = draw.integer(1, 2)
    many = few * draw.integer(1, 3) if shared else few
    heads, own = ([many], [few]) if shared or draw.flag() else ([], [])
    found = {"query": [*lead, *heads, q, d], "key": [*lead, *own, k, d], "value": [*lead, *own, k, c]}
    arguments: dict[str, Any] = {name: draw.tensor(shape, "real") for name, shape in found.items()}
    if draw.flag():
        arguments["attn_mask"] = draw.tensor([*heads, q, k] if draw.flag() else [q, k], "real")
    return {**arguments, "enable_gqa": shared, "scale": draw.float()}


def _fake_quantised(draw: Draw) -> dict[str, Any]:
    return {
        "input": draw.tensor(draw.shape(most=3)),
        "scale": draw.float(),
        "zero_point": 0,
        "quant_min": -8,
        "quant_max": 7,
    }


def _upsample(name: str, rank: int, integers: bool) -> Sample:
    def sample(draw: Draw) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: draw.tensor([draw.size(), draw.size(), *(draw.size() for _ in range(rank))], "real")
        }
        sizes = [draw.integer(1, 5) for _ in range(rank)]
        if not integers and draw.flag():
            return {
                **found,
                "output_size": None,
                "scale_factors": [draw.choice([0.5, 1.5, 2.0]) for _ in range(rank)],
                "align_corners": False,
            }
        return {**found, "output_size": sizes, "scale_factors": None, "align_corners": draw.flag()}

    return sample


def _batch_statistics(draw: Draw) -> dict[str, Any]:
    shape = [draw.size(), draw.size(), *(draw.size() for _ in range(draw.integer(1, 2)))]
    weights = (
        {name: draw.tensor(shape[1:2], "real") for name in ("weight", "bias")}
        if draw.flag()
        else {"weight": None, "bias": None}
    )
    return {"input": draw.tensor(shape, "real"), **weights, "training": True, "momentum": 0.1, "eps": 1e-5}


def _weight_norm(draw: Draw) -> dict[str, Any]:
    """The kernel trusts the sizes: with a norm of another shape it reads and writes where nothing is."""
    shape = draw.shape(least=2)
    dim = draw.choice([0, len(shape) - 1])
    return {
        "v": draw.tensor(shape, "real"),
        "g": draw.tensor([size if at == dim else 1 for at, size in enumerate(shape)], "unit"),
        "dim": dim,
    }


def _any(draw: Draw) -> dict[str, Any]:
    shape = draw.shape(most=3)
    return {"self": draw.tensor(shape, "bool"), "dim": draw.dim(len(shape)), "keepdim": draw.flag()}


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


def _fft(kind: str) -> Sample:
    def sample(draw: Draw) -> dict[str, Any]:
        shape = [draw.size() for _ in range(draw.integer(1, 3))]
        dims = draw.some(range(len(shape)), least=1)
        found: dict[str, Any] = {
            "self": draw.tensor(shape, "real" if kind == "r2c" else "complex"),
            "dim": dims,
            "normalization": draw.integer(0, 2),
        }
        if kind == "r2c":
            return {**found, "onesided": draw.flag()}
        return (
            {**found, "last_dim_size": 2 * (shape[dims[-1]] - 1) or 1}
            if kind == "c2r"
            else {**found, "forward": draw.flag()}
        )

    return sample


def _grid(draw: Draw) -> dict[str, Any]:
    n, c = draw.size(), draw.size()
    grid = draw.tensor([n, draw.size(), draw.size(), 2], "unit")
    kinds = {
        "interpolation_mode": draw.integer(0, 2),
        "padding_mode": draw.integer(0, 2),
        "align_corners": draw.flag(),
    }
    return {"input": draw.tensor([n, c, draw.size(), draw.size()], "real"), "grid": grid, **kinds}


def _grouped(name: str, weight: str) -> Sample:
    def sample(draw: Draw) -> dict[str, Any]:
        experts, k, n = draw.integer(2, 3), draw.size(), draw.size()
        counts = [draw.integer(1, 3) for _ in range(experts)]
        offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
        # the kernel takes no float64, and rows of whole multiples of 16 bytes
        return {
            name: draw.tensor([sum(counts), 4 * k], "real").float(),
            weight: draw.tensor([experts, 4 * k, 4 * n], "real").float(),
            "offs": offsets,
        }

    return sample


def _recurrent(gates: int, listed: bool) -> Sample:
    """One layer in one direction, with or without biases and (an LSTM) projections."""

    def sample(draw: Draw) -> dict[str, Any]:
        steps, batch, width, hidden = (draw.size() for _ in range(4))
        second, biases = draw.flag(), draw.flag()
        projected = draw.integer(1, hidden - 1) if listed and hidden > 1 and draw.flag(0.4) else None
        own = projected or hidden
        params = [draw.tensor([gates * hidden, width], "real"), draw.tensor([gates * hidden, own], "real")]
        params += [draw.tensor([gates * hidden], "real") for _ in range(2 * biases)]
        params += [draw.tensor([own, hidden], "real")] if projected else []
        states = [draw.tensor([1, batch, size], "real") for size in ((own, hidden) if listed else (hidden,))]
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

    return sample


def _tallied(count: str, last: str | None) -> Sample:
    def sample(draw: Draw) -> dict[str, Any]:
        many = draw.integer(2, 5)
        numbers = torch.randint(0, many, (draw.size(), draw.size()), generator=draw.generator)
        return (
            {"self": numbers, count: many}
            if last is None
            else {"self": numbers.double(), count: many, "min": 0, last: many - 1}
        )

    return sample


SAMPLES: dict[str, Sample] = {
    "aten.lstm.input": _recurrent(4, True),
    "aten.gru.input": _recurrent(3, False),
    **{f"aten.rnn_{kind}.input": _recurrent(1, False) for kind in ("tanh", "relu")},
    "aten.histc.default": _tallied("bins", "max"),
    "aten.one_hot.default": _tallied("num_classes", None),
    "aten.view.default": _view("size"),
    "aten._unsafe_view.default": _view("size"),
    "aten.reshape.default": _view("shape"),
    "aten._reshape_copy.default": _view("size"),
    "aten.expand.default": _expand,
    "aten.broadcast_to.default": _broadcast,
    "aten.repeat.default": _repeat,
    "aten.repeat_interleave.self_int": _interleave,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.split_with_sizes.default": _sizes,
    "aten.split.sizes": lambda draw: {
        ("split_size" if name == "split_sizes" else name): value for name, value in _sizes(draw).items()
    },
    "aten.split.Tensor": _split("split_size"),
    "aten.unsafe_split.Tensor": _split("split_size"),
    "aten.chunk.default": _split("chunks"),
    "aten.tensor_split.sections": _split("sections"),
    "aten.permute.default": _permute,
    "aten.t.default": _matrix,
    "aten.numpy_T.default": _matrix,
    "aten.mT.default": _matrices,
    "aten.movedim.intlist": _movedim,
    "aten.squeeze.dim": _squeeze,
    "aten.squeeze.dims": _squeeze_dims,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.unflatten.int": _unflatten,
    "aten.index.Tensor": _index,
    "aten.index_select.default": _index_select,
    "aten.gather.default": _gather,
    "aten.scatter.src": _scatter("src"),
    "aten.scatter.value": _scatter(None),
    "aten.scatter_add.default": _scatter("src"),
    "aten.scatter_reduce.two": _scatter_reduce,
    "aten.index_put.default": _index_put,
    "aten.index_add.default": _index_add,
    "aten.index_copy.default": _index_add,
    "aten.masked_scatter.default": _masked_scatter,
    "aten.slice_scatter.default": _slice_scatter,
    "aten.select_scatter.default": _select_scatter,
    "aten.view_as_complex.default": _pairs,
    "aten.view_as_real.default": _complex,
    **{f"aten.{name}.default": _created for name in ("zeros", "ones")},
    "aten.full.default": lambda draw: {**_created(draw), "fill_value": draw.float()},
    "aten.empty.memory_format": _created,
    **{f"aten.{name}.default": _created_like for name in ("new_empty", "new_zeros", "new_ones")},
    "aten.new_full.default": lambda draw: {**_created_like(draw), "fill_value": draw.float()},
    "aten.to.device": _moved,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.constant_pad_nd.default": _pad,
    "aten.pad.default": _pad_mode,
    "aten.roll.default": _roll,
    "aten.pixel_shuffle.default": _pixel_shuffle,
    "aten.pixel_unshuffle.default": _pixel_unshuffle,
    "aten.channel_shuffle.default": _channel_shuffle,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.fake_quantize_per_tensor_affine.default": _fake_quantised,
    "aten.grid_sampler.default": _grid,
    "aten._native_batch_norm_legit.no_stats": _batch_statistics,
    "aten._weight_norm_interface.default": _weight_norm,
    "aten.any.dim": _any,
    "aten.all.dim": _any,
    "aten._grouped_mm.default": _grouped("self", "mat2"),
    "transformers.grouped_mm_fallback.default": _grouped("input", "weight"),
    **{f"aten._fft_{kind}.default": _fft(kind) for kind in ("r2c", "c2r", "c2c")},
    **{
        f"aten.{kind}{name}.vec": _upsample("input", rank, False)
        for name, rank in _RESAMPLERS.items()
        for kind in ("upsample_", "_upsample_")
    },
    **{
        f"aten.{kind}{name}.default": _upsample("self", rank, True)
        for name, rank in _RESAMPLERS.items()
        for kind in ("upsample_", "_upsample_")
    },
    **{f"aten._upsample_{name}.vec": _upsample("input", rank, False) for name, rank in _EXACT.items()},
    **{f"aten._upsample_{name}.default": _upsample("self", rank, True) for name, rank in _EXACT.items()},
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
    "aten.native_dropout.default": {"train": False},
    "aten.rrelu.default": {"training": False},
    "aten.rrelu_with_noise.default": {"training": False},
}

#: operators whose kernels take only sizes that are multiples of this
STEPS: dict[str, int] = {"aten._grouped_mm.default": 4}
