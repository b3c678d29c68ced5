"""Prune a module at random, several times from one capture, and hold each smaller program against the masked
dense module at several sizes.

Nothing of the result's wrapping is tested here: programs run as the passes leave them, which takes a tenth of
the time of a whole ``prune``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from oracle import zeroed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fasp_fx.analysis import Analysis, analyze_program
from fasp_fx.calibration import Decision
from fasp_fx.capturing import capture
from fasp_fx.errors import CallError
from fasp_fx.passes import finish, remove, split_fused
from fasp_fx.pruning import make_plan

#: another batch and another length than the example's, shorter and longer
SIZES = ((2, 6), (3, 7), (5, 4))


def inputs(sizes: Sequence[tuple[int, ...]] = SIZES, width: int = 8) -> list[tuple[Tensor, ...]]:
    """One call for each size."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(*size, width, generator=generator, dtype=torch.float64),) for size in sizes]


def hold(model: nn.Module, calls: Sequence[tuple[Any, ...]], seeds: int = 2, times: int = 1) -> Analysis:
    """Prune by random choices, a few channels and nearly all in turn; each program equals the masked dense
    module.

    Args:
        calls: arguments; the first are the example.
        times: how often each call is repeated, where the model remembers calls.

    Returns:
        The analysis, for what is expected of its groups.
    """
    model = model.double().eval()
    program = capture(model, calls[0])
    analysis = analyze_program(program, split_fused)
    captured = finish(program)
    compared = 0
    for seed in range(seeds):
        gone = _choice(analysis, seed)
        plan = make_plan(program, analysis, Decision(gone))
        smaller, dense = remove(analysis, gone).module, zeroed(model, plan)
        for call in calls:
            for _ in range(times):
                with torch.no_grad():
                    try:
                        expected = dense(*call)
                        captured(*_copy(call))
                    except (RuntimeError, IndexError, AssertionError, CallError):
                        continue  # the dense module takes no such size, or its capture
                    found = smaller(*program.flat_inputs(_copy(call), {}))
                compared += 1
                for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
                    assert a.shape == b.shape
                    worst = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
                    assert worst <= 1e-9, (
                        f"off by {worst:.1e} on {[tuple(leaf.shape) for leaf in call]}; plan:\n{plan}"
                    )
    assert compared
    return analysis


def _copy(call: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in call)


def _choice(analysis: Analysis, seed: int) -> np.ndarray:
    generator, share = np.random.default_rng(seed), (0.3, 0.9)[seed % 2]
    gone = np.zeros(analysis.numbering.total, dtype=bool)
    for group in analysis.chosen:
        width = group.size // group.blocks
        for block in np.unique(group.block_of):
            members = generator.permutation(group.sets[group.block_of == block])
            gone |= np.isin(analysis.labels, members[: min(width - 1, max(1, int(width * share)))])
    return gone


def sets_of(analysis: Analysis, name: str, dim: int = 0) -> list[tuple[str, int, int]]:
    """Status, channel sets and blocks of the groups that hold rows of a weight."""
    return [
        (group.status, group.size, group.blocks)
        for group in analysis.groups
        if any(member.name == name and member.dim == dim for member in (*group.producers, *group.consumers))
    ]
