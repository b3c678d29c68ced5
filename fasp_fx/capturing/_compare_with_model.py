"""Whether a captured program computes what the model computes when it is called: a model can ask whether it
is being traced, and then do otherwise.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..base._tolerable import tolerable
from ..base._undisturbed import drawing_alike
from ..base._warn import warn
from ..base.compare import distance, tolerance
from ..base.compat import pytree
from ..errors import CalibrationError, CaptureError, CaptureWarning
from . import lower_bound
from ._fx import draws, results, written_names
from ._program import Program
from ._runner import Runner
from ._sizes import is_dynamic
from ._unchanged import copied, rewound

#: relative deviation in the 2-norm that rounding accounts for in float32 where factors are rounded, as
#: convolutions on CUDA do by default
_ALLOWED_ROUNDED = 1e-2

#: the bound that an exporter has in mind for any size that varies, though one is let pass
_LEAST = 2

_OTHERWISE = "does not compute what the model does"
_TRACED = "the model does something else while it is traced, often for want of an optional input"


def compared(
    program: Program,
    model: Any,
    args: Any,
    kwargs: dict[str, Any] | None,
    recapture: Callable[..., Program] | None = None,
) -> Program:
    """The program, with a note and a :class:`CaptureWarning` if it does not compute what the model does.

    They are compared on the example inputs; where forward sets attributes, once more after a call; and with
    every size that varies at one, for which an exporter takes the way of larger sizes.

    A program of two samples in the place of one can differ where forward asks how many there are; it is
    captured once more, as it was given, by ``recapture``.

    Nothing is compared where there is nothing to call or to compare: exported programs, weights without
    values, a program on another device than its model, and one that draws random numbers.
    """
    drawn = any(map(draws, program.module.graph.nodes))
    if not isinstance(model, nn.Module) or drawn or _is_elsewhere(program, model):
        return program
    args, kwargs = args if isinstance(args, tuple) else (args,), kwargs or {}
    expected, changed = called(program, model, args, kwargs)
    try:
        trouble = trouble_with(program, expected, args, kwargs)
    except tolerable(CalibrationError) as error:
        trouble = f"cannot be executed on the example inputs ({error})"
    if trouble is not None and recapture is not None and program.doubled:
        with contextlib.suppress(CaptureError):  # then what there is will have to do
            return compared(recapture(model, args, kwargs), model, args, kwargs)
    if trouble is not None:
        return _noted(program, f"{trouble}: {_TRACED}")
    if changed and not written_names(program.module.graph):
        again, _ = called(program, model, args, kwargs, calls=2)
        worst = _difference(program, again, args, kwargs)
        if worst:
            names = ", ".join(f"'{name}'" for name in changed[:3])
            return _noted(
                program,
                f"{_OTHERWISE} in the second of two calls (an output differs by {_shown(worst)}): forward"
                f" keeps something in {names}, and a graph only in buffers",
            )
    least = _at_one(program, args, kwargs)
    if least is not None:
        try:
            expected, _ = called(program, model, *least)
            worst = _difference(program, expected, *least)
        except tolerable(Exception):  # either may refuse such sizes as it likes, when it is called
            return program
        if worst:
            return _noted(
                program,
                f"{_OTHERWISE} where sizes are one (an output differs by {_shown(worst)}): forward asks for"
                " such a size, which no exporter sees",
            )
    return program


def called(
    program: Program, model: nn.Module, args: Any, kwargs: dict[str, Any], calls: int = 1
) -> tuple[list[Any], list[str]]:
    """What the last of some calls of the model returns, and which attributes they set; the model and its
    inputs are left as they were.
    """
    # what a model compiles for itself (flex attention, say) runs uncompiled, as in the program
    with (
        torch.no_grad(),
        rewound(model, written_names(program.module.graph)) as changed,
        torch.compiler.set_stance("force_eager"),
    ):
        for _ in range(calls):
            own_args, own_kwargs = copied((args, kwargs))
            expected = copied(pytree.tree_leaves(model(*own_args, **own_kwargs)))
    return expected, changed


def trouble_with(program: Program, expected: list[Any], args: Any, kwargs: dict[str, Any]) -> str | None:
    """What is wrong with what a program computes, in words, where its model computes what is expected.

    Raises:
        CalibrationError: the program does not run on these inputs.
    """
    worst = _difference(program, expected, args, kwargs)
    return f"{_OTHERWISE} on the example inputs (an output differs by {_shown(worst)})" if worst else None


def _difference(program: Program, expected: list[Any], args: Any, kwargs: dict[str, Any]) -> float:
    """How far the outputs of the program are from those expected; zero if no further than rounding.

    Raises:
        CalibrationError: the program does not run on these inputs.
    """
    with torch.no_grad(), drawing_alike(program.weights().values(), seed=1):
        found = _outputs(program, copied(program.flat_inputs(args, kwargs)))
    return _apart(found, expected, _allowed(program))


def _allowed(program: Program) -> float:
    """What rounding can make of the outputs."""
    coarse = coarsest(program)
    is_rounded = program.device().type != "cpu" or torch.get_float32_matmul_precision() != "highest"
    return _ALLOWED_ROUNDED if coarse == torch.float32 and is_rounded else tolerance("capture", coarse)


def _apart(found: list[Any], expected: list[Any], allowed: float) -> float:
    """How far outputs are from those expected; zero if no further than rounding.

    Where a program does not return what its model does leaf for leaf (classes of the caller's that hold
    tensors, say), numbers of floating point are compared alone, in order.
    """
    pairs = zip(found, expected) if len(found) == len(expected) else zip(_floats(found), _floats(expected))
    return max((seen for seen in (_distance(*pair) for pair in pairs) if not seen <= allowed), default=0.0)


def _distance(found: Any, expected: Any) -> float:
    """How far one output is from another: relative in the 2-norm, of integers the part that differs; infinite
    where shapes do, or plain numbers.
    """
    if isinstance(expected, (bool, int, float)) and isinstance(found, (bool, int, float)):
        same = found == expected or (found != found and expected != expected)
        return 0.0 if same or math.isclose(found, expected, rel_tol=1e-3) else math.inf
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor)):
        return 0.0  # what no graph returns
    if found.shape != expected.shape:
        return math.inf
    found, expected = _plain(found), _plain(expected)
    if expected.is_floating_point() and found.is_floating_point():
        return distance(found, expected)
    return float((found != expected).double().mean()) if expected.numel() else 0.0


def _plain(tensor: Tensor) -> Tensor:
    """A dense tensor of real numbers or integers with the same values."""
    tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _shown(worst: float) -> str:
    return f"{worst:.0%}" if worst >= 0.01 else f"{worst:.1e} of its size"


def _at_one(program: Program, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """The first entry of the example inputs along every dimension that varies and may be as small; ``None``
    if none does, or some vary together with others.
    """
    cut: dict[int, Tensor] = {}
    for node, leaf in zip(program.placeholders(), program.flat_inputs(args, kwargs), strict=True):
        recorded = node.meta.get("val")
        if not (isinstance(leaf, Tensor) and isinstance(recorded, Tensor)):
            continue
        for dim in (dim for dim, size in enumerate(recorded.shape) if is_dynamic(size)):
            size: Any = recorded.shape[dim]
            if not str(size).isidentifier():
                return None
            if lower_bound(size) > _LEAST:
                continue  # a call with a size of one is refused
            cut[id(leaf)] = cut.get(id(leaf), leaf).narrow(dim, 0, min(1, leaf.shape[dim]))
    if not cut:
        return None
    found: tuple[Any, dict[str, Any]] = pytree.tree_map(lambda leaf: cut.get(id(leaf), leaf), (args, kwargs))
    return found


def _noted(program: Program, trouble: str) -> Program:
    note = f"the captured program {trouble}"
    warn(f"{note}; the pruned model follows the program", CaptureWarning)
    return replace(program, notes=(*program.notes, note))


def _is_elsewhere(program: Program, model: nn.Module) -> bool:
    devices = {
        tensor.device for tensor in [*program.weights().values(), *model.parameters(), *model.buffers()]
    }
    return len({device.type for device in devices}) > 1 or any(device.type == "meta" for device in devices)


def _outputs(program: Program, inputs: list[Any]) -> list[Any]:
    runner = Runner(program, [inputs])
    (output,) = program.module.graph.find_nodes(op="output")
    runner.advance(runner.index(output))
    return [
        next(runner.read(item)) if isinstance(item, fx.Node) else item
        for item in results(program.module.graph)
    ]


def _floats(leaves: list[Any]) -> list[Tensor]:
    return [leaf.to_dense() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def coarsest(program: Program) -> torch.dtype:
    """The floating-point type of the lowest precision among all that the program computes."""
    recorded = [
        value for node in program.module.graph.nodes for value in pytree.tree_leaves(node.meta.get("val"))
    ]
    types = {
        value.dtype.to_real()
        for value in recorded
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    }
    return max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
