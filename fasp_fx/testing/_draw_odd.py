"""How odd blocks are drawn: which ones can follow a shape, and with which options.

Every one makes the same choices, so that none counts as simpler than the first.
"""

from __future__ import annotations

from hypothesis import strategies as st

from ._odd_blocks import (
    ACROSS,
    FOREIGN,
    FUSED,
    MEMORIES,
    PICKS,
    REGROUPS,
    REUSES,
    SIZED,
    Across,
    Foreign,
    Fused,
    Odd,
    Pick,
    Regroup,
    Remember,
    Reuse,
    Sized,
)
from ._spec import Shape

#: by class: its kinds, and the layouts that it follows; those that follow most come first, so that each stays
#: what it is in a simpler layout
_KINDS: dict[type[Odd], tuple[tuple[str, ...], tuple[str, ...]]] = {
    Across: (ACROSS, ("vector", "sequence", "image")),
    Foreign: (FOREIGN, ("vector", "sequence", "image")),
    Remember: (MEMORIES, ("vector", "sequence")),
    Reuse: (REUSES, ("vector", "sequence")),
    Pick: (PICKS, ("vector", "sequence")),
    Regroup: (REGROUPS, ("sequence",)),
    Sized: (SIZED, ("sequence",)),
    Fused: (FUSED, ("sequence",)),
}


def draw_odd(draw: st.DrawFn, shape: Shape, width: int) -> Odd:
    """An odd block behind a shape; ``width`` serves those that have channels of their own."""
    fitting = [kind for kind, (_, layouts) in _KINDS.items() if shape.layout in layouts]
    chosen = draw(st.sampled_from(fitting))
    kinds = [
        kind
        for kind in _KINDS[chosen][0]
        if (chosen, kind) != (Sized, "select") or shape.sizes[0] <= shape.channels
    ]
    kind = draw(st.sampled_from(kinds))
    blocks = draw(
        st.sampled_from([d for d in range(2, shape.channels + 1) if shape.channels % d == 0] or [1])
    )
    if chosen is Across:
        return Across(kind, blocks)
    if chosen is Regroup:
        return Regroup(kind, blocks if kind == "heads" else 2)
    if chosen is Sized:
        return Sized(kind, blocks if kind == "blocks" else 2)
    if chosen is Remember:
        return Remember(kind, blocks if kind == "blocks" else 2)
    if chosen is Foreign:
        return Foreign(kind)
    if chosen is Fused:
        return Fused(width, kind, blocks)
    return Reuse(width, kind) if chosen is Reuse else Pick(width, kind)
