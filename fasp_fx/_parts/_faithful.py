"""Whether a captured program computes what the model computes when it is called: a model can ask whether it is being traced, and then do otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._capture._unchanged import rewound
from .._compat import OpOverload, pytree
from .._observe._runner import Runner
from .._program import Program
from .._warn import warn
from ..channels import results, written_names
from ..errors import CalibrationError, CaptureWarning

#: relative deviation in the 2-norm from which on two outputs are not the same up to rounding
_ALLOWED, _ALLOWED_HALF = 1e-2, 1e-1


def compared(program: Program, model: Any, args: Any, kwargs: dict[str, Any] | None) -> Program:
    """The program, with a note and a :class:`CaptureWarning` if it does not compute what the model does on the example inputs.

    Nothing is compared where there is nothing to call or to compare: exported programs, weights without values, a program on another device than its
    model, and programs that draw random numbers.
    """
    if not isinstance(model, nn.Module) or _is_elsewhere(program, model) or any(map(_is_random, program.module.graph.nodes)):
        return program
    args = args if isinstance(args, tuple) else (args,)
    # what a model compiles for itself (flex attention, say) runs uncompiled, as in the program
    with torch.no_grad(), rewound(model, written_names(program.module.graph)), torch.compiler.set_stance("force_eager"):
        expected = _copied(pytree.tree_leaves(model(*_copied(args), **_copied(kwargs or {}))))
    try:
        with torch.no_grad():
            found = _copied(_outputs(program, _copied(program.flat_inputs(args, kwargs or {}))))
    except CalibrationError as error:
        return _noted(program, f"cannot be executed on the example inputs ({error})")
    apart = [(_deviation(a, b), _ALLOWED_HALF if b.dtype.itemsize == 2 else _ALLOWED) for a, b in zip(_floats(found), _floats(expected))]
    if all(deviation <= allowed for deviation, allowed in apart):
        return program
    worst = max(deviation for deviation, _ in apart)
    return _noted(program, f"does not compute what the model does on the example inputs (an output differs by {worst:.0%})")


def _noted(program: Program, trouble: str) -> Program:
    note = f"the captured program {trouble}: the model does something else while it is traced, often for want of an optional input"
    warn(f"{note}; the pruned model follows the program", CaptureWarning)
    return replace(program, notes=(*program.notes, note))


def _is_elsewhere(program: Program, model: nn.Module) -> bool:
    devices = {tensor.device for tensor in [*program.weights().values(), *model.parameters(), *model.buffers()]}
    return len({device.type for device in devices}) > 1 or any(device.type == "meta" for device in devices)


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _copied(value: Any) -> Any:
    """Arguments that a call may write into, or outputs that can be buffers, as they are now."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def _outputs(program: Program, inputs: list[Any]) -> list[Any]:
    runner = Runner(program, [inputs])
    (output,) = program.module.graph.find_nodes(op="output")
    runner.advance(runner.index(output))
    return [next(runner.read(item)) if isinstance(item, fx.Node) else item for item in results(program.module.graph)]


def _floats(leaves: list[Any]) -> list[Tensor]:
    return [leaf.to_dense() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _deviation(found: Tensor, expected: Tensor) -> float:
    """How far two outputs are apart, relative to the second; infinite if their shapes or their finite elements are others."""
    finite = torch.isfinite(expected)
    if found.shape != expected.shape or not torch.equal(torch.isfinite(found), finite):
        return float("inf")
    a, b = found[finite].double(), expected[finite].double()
    norm = float(b.norm())
    return float((a - b).norm()) / norm if norm else float((a - b).norm())
