"""Whether a captured program computes what the model computes when it is called: a model can ask whether it
is being traced, and then do otherwise.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fasp_fx.base import (
    dense,
    distance,
    drawing_alike,
    laid_otherwise,
    pytree,
    tensors_in,
    tolerable,
    tolerance,
    warn,
)
from fasp_fx.errors import CalibrationError, CaptureError, CaptureWarning

from ._assemble import size_check
from ._fx import draws, weights_of, written_names
from ._program import Program
from ._runner import Runner
from ._sizes import is_dynamic, lower_bound
from ._unchanged import Call, Seen, called, copied

#: relative deviation in the 2-norm that rounding accounts for in float32 where factors are rounded, as
#: convolutions on CUDA do by default
_ALLOWED_ROUNDED = 1e-2

#: the bound that an exporter has in mind for any size that varies, though one is let pass
_LEAST = 2

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_SEEDS = (
    "draws other random numbers in each call, where the model repeats itself: forward seeds a generator,"
    " which a graph does not"
)
_TRACED = "the model does something else while it is traced, often for want of an optional input"


def compared(
    program: Program,
    model: Any,
    args: Any,
    kwargs: dict[str, Any] | None,
    recapture: Callable[..., Program] | None = None,
) -> Program:
    """The program, with a note and a :class:`CaptureWarning` if it does not compute what the model does.

    They are compared on the example inputs; where forward sets attributes, once more after a call; with every
    size that varies at one, for which an exporter takes the way of larger sizes; and on inputs that lie
    otherwise in memory. Where the program draws random numbers, it is asked whether the model does.

    A program of two samples in the place of one can differ where forward asks how many there are; it is
    captured once more, as it was given, by ``recapture``.

    Nothing is compared where there is nothing to call or to compare: exported programs, weights without
    values, and a program on another device than its model.
    """
    if not isinstance(model, nn.Module) or _is_elsewhere(program, model):
        return program
    call: Call = args if isinstance(args, tuple) else (args,), kwargs or {}
    try:
        if any(map(draws, program.module.graph.nodes)):
            return _noted(program, _SEEDS) if _seeds(program, model, call) else program
        worst, changed = _difference(program, model, call, program.seen)
        trouble = _otherwise("on the example inputs", worst)
    except tolerable(CalibrationError) as error:
        trouble = f"cannot be executed on the example inputs ({error})"
    if trouble and recapture is not None and program.doubled:
        with contextlib.suppress(CaptureError):  # then what there is will have to do
            return compared(recapture(model, *call), model, *call)
    if trouble:
        return _noted(program, f"{trouble}: {_TRACED}")
    if (
        changed
        and not written_names(program.module.graph)
        and (worst := _difference(program, model, call, calls=2)[0])
    ):
        said = _otherwise("in the second of two calls", worst)
        names = ", ".join(f"'{name}'" for name in changed[:3])
        return _noted(program, f"{said}: forward keeps something in {names}, and a graph only in buffers")
    try:
        check = size_check(program)
    except tolerable(Exception):  # no exported program can be made of it, and so no other sizes be tried
        return program
    trouble = _trouble_at_one(program, model, call, check) or _trouble_in_layouts(program, model, call, check)
    return _noted(program, trouble) if trouble else program


def _trouble_at_one(program: Program, model: nn.Module, call: Call, check: Callable[..., None]) -> str:
    """What is wrong, in words, where every size that varies is one; either may refuse such sizes as it likes,
    when it is called.
    """
    least = _cut(program, call, 1)
    if least is None:
        return ""
    try:
        check(*program.flat_inputs(*least))
        said = _otherwise("where sizes are one", _difference(program, model, least)[0])
    except tolerable(Exception):
        return ""
    return said and f"{said}: forward asks for such a size, which no exporter sees"


def _trouble_in_layouts(program: Program, model: nn.Module, example: Call, check: Callable[..., None]) -> str:
    """What is wrong, in words, where the inputs lie otherwise in memory, in the first way that the model
    takes.
    """
    calls = [call for call in (_cut(program, example, _LEAST), example) if call is not None]
    where = "where inputs lie otherwise in memory"
    for call, lie in itertools.product(calls, (_laid, _lying_apart)):
        try:
            check(*program.flat_inputs(*call))
            said = _otherwise(where, _difference(program, model, call, lie=lie)[0])
        except tolerable(CalibrationError) as error:
            said = f"cannot be executed {where} ({error})"
        except tolerable(Exception):  # of the model, which refuses what it likes, or sizes
            continue
        return said and f"{said}: an exporter leaves out what puts the example in order (contiguous)"
    return ""


def trouble_with(program: Program, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> str | None:
    """What is wrong with what a program computes, in words, where it is to be what the model does.

    Raises:
        CalibrationError: the program does not run on these inputs.
    """
    return _otherwise("on the example inputs", _difference(program, model, (args, kwargs))[0]) or None


def _otherwise(where: str, worst: float) -> str:
    shown = f"{worst:.0%}" if worst >= 0.01 else f"{worst:.1e} of its size"
    return f"does not compute what the model does {where} (an output differs by {shown})" if worst else ""


def _difference(
    program: Program,
    model: nn.Module,
    call: Call,
    seen: Seen | None = None,
    calls: int = 1,
    lie: Callable[[Tensor], Tensor] = torch.clone,
) -> tuple[float, list[str]]:
    """How far the outputs of the program are from those of the last of some calls of the model, zero if no
    further than rounding; and which attributes those calls set. The model and its inputs are left as they
    were.

    Args:
        seen: what they gave and set, if that is known.
        lie: as for :func:`copied`.

    Raises:
        CalibrationError: the program does not run on these inputs.
    """
    expected, changed = seen or called(model, call, written_names(program.module.graph), calls, lie)
    with torch.no_grad(), drawing_alike(program.weights().values(), seed=1):
        outputs = Runner(program, [copied(program.flat_inputs(*call), lie)]).outputs()
    # leaf for leaf, but where a class of the caller's holds tensors, say
    pairs = (
        zip(outputs, expected) if len(outputs) == len(expected) else zip(_floats(outputs), _floats(expected))
    )
    coarse = coarsest(program)
    is_rounded = program.device().type != "cpu" or torch.get_float32_matmul_precision() != "highest"
    allowed = _ALLOWED_ROUNDED if coarse == torch.float32 and is_rounded else tolerance("capture", coarse)
    return max((far for pair in pairs if not (far := _distance(*pair)) <= allowed), default=0.0), changed


def _distance(actual: Any, expected: Any) -> float:
    """How far one output is from another: relative in the 2-norm, of integers the part that differs; infinite
    where shapes do, or plain numbers.
    """
    if isinstance(expected, (bool, int, float)) and isinstance(actual, (bool, int, float)):
        are_nan = actual != actual and expected != expected
        return 0.0 if are_nan or math.isclose(actual, expected, rel_tol=1e-3) else math.inf
    if not (isinstance(actual, Tensor) and isinstance(expected, Tensor)):
        return 0.0  # what no graph returns
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = _plain(actual), _plain(expected)
    if expected.is_floating_point() and actual.is_floating_point():
        return distance(actual, expected)
    return float((actual != expected).double().mean()) if expected.numel() else 0.0


def _plain(tensor: Tensor) -> Tensor:
    """A dense tensor of real numbers or integers with the same values."""
    tensor = dense(tensor)
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _seeds(program: Program, model: nn.Module, call: Call) -> bool:
    """Whether a model repeats itself from any state of the random numbers where its program, which draws,
    does not.
    """
    again = []
    for seed in (1, 2):
        with torch.no_grad(), drawing_alike(program.weights().values(), seed):
            drawn = Runner(program, [copied(program.flat_inputs(*call))]).outputs()
        outputs, _ = called(model, call, written_names(program.module.graph), seed=seed)
        again.append(list(zip(drawn, outputs)))
    return any(
        _distance(drawn, other) and not _distance(outputs, repeated)
        for (drawn, outputs), (other, repeated) in zip(*again, strict=True)
    )


def _laid(tensor: Tensor) -> Tensor:
    """A copy as images lie where channels come last, which convolutions hand on; of others, in reverse
    order.
    """
    order = _CHANNELS_LAST.get(tensor.dim()) if tensor.layout == torch.strided else None
    return laid_otherwise(tensor) if order is None else tensor.clone(memory_format=order)


def _lying_apart(tensor: Tensor) -> Tensor:
    """A copy whose entries along the first dimension lie apart."""
    return torch.stack((tensor, tensor), 1)[:, 1] if tensor.dim() else tensor.clone()


def _cut(program: Program, call: Call, most: int) -> Call | None:
    """The first entries of the example inputs along every dimension that varies and may be as small; ``None``
    if there are no others, or some vary together with others.
    """
    leaves = program.flat_inputs(*call)
    shapes = {
        id(leaf): getattr(node.meta.get("val"), "shape", ())
        for node, leaf in zip(program.placeholders(), leaves, strict=True)
        if isinstance(leaf, Tensor)
    }
    varying = [size for shape in shapes.values() for size in shape if is_dynamic(size)]
    if not varying or not all(str(size).isidentifier() for size in varying):
        return None

    def cut(leaf: Any) -> Any:
        for dim, size in enumerate(shapes.get(id(leaf), ())):
            may_be_less = is_dynamic(size) and lower_bound(size) <= _LEAST  # or it is refused
            if may_be_less and leaf.shape[dim] > most:
                leaf = leaf.narrow(dim, 0, most)
        return leaf

    smaller: Call = pytree.tree_map(cut, call)
    same = map(operator.is_, pytree.tree_leaves(smaller), pytree.tree_leaves(call))
    return None if all(same) else smaller


def _noted(program: Program, trouble: str) -> Program:
    note = f"the captured program {trouble}"
    warn(f"{note}; the pruned model follows the program", CaptureWarning)
    return replace(program, notes=(*program.notes, note))


def _is_elsewhere(program: Program, model: nn.Module) -> bool:
    weights = (*program.weights().values(), *weights_of(model).values())
    return not {tensor.device.type for tensor in weights} <= {program.device().type} - {"meta"}


def _floats(leaves: list[Any]) -> list[Tensor]:
    return [leaf.to_dense() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def coarsest(program: Program) -> torch.dtype:
    """The floating-point type of the lowest precision among all that the program computes."""
    types = {
        value.dtype.to_real()
        for node in program.module.graph.nodes
        for value in tensors_in(node.meta.get("val"))
        if value.is_floating_point() or value.is_complex()
    }
    return max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
