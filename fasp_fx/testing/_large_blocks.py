"""Attention and mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

from fasp_fx.errors import ArgumentError

from ._spec import Block, Shape, choice, positive

PROJECTIONS = ("separate", "fused", "interleaved", "stacked")
POSITIONS = ("none", "rope", "rope_pairs")
KERNELS = ("sdpa", "eager")
SHARING = ("expand", "interleave", "native")
ROUTES = ("dense", "top")
EXPERTS = ("loop", "bmm", "einsum")


@dataclass(frozen=True, repr=False)
class Attention(Block):
    """Causal self-attention, in which ``repeat`` query heads share each of ``kv_heads`` key and value heads.

    Attributes:
        projection: ``separate`` weights; one ``fused`` weight cut into [q | k | v]; one ``interleaved``
            weight viewed as [kv_heads, repeat + 2, head_dim]; one ``stacked`` weight viewed as [3, heads,
            head_dim] (for it ``repeat`` is 1).
        positions: ``rope`` turns the halves of a head together, ``rope_pairs`` neighbours.
        kernel: fused (``sdpa``) or written out (``eager``).
        sharing: how shared heads are given out: ``expand`` and reshape, ``interleave`` (repeat), or
            ``native`` to the fused kernel.
    """

    kv_heads: int = 1
    repeat: int = 1
    head_dim: int = 2
    bias: bool = False
    projection: str = "separate"
    positions: str = "none"
    kernel: str = "sdpa"
    sharing: str = "expand"

    def __post_init__(self) -> None:
        positive(kv_heads=self.kv_heads, repeat=self.repeat, head_dim=self.head_dim)
        choice(self.projection, PROJECTIONS, "projection")
        choice(self.positions, POSITIONS, "positions")
        choice(self.kernel, KERNELS, "kernel")
        choice(self.sharing, SHARING, "sharing")
        if self.projection == "stacked" and self.repeat != 1:
            raise ArgumentError(
                f"repeat={self.repeat} does not go with projection='stacked', which has as many key heads as"
                " query heads"
            )
        if self.positions != "none" and self.head_dim % 2:
            raise ArgumentError(
                f"head_dim={self.head_dim} does not go with positions={self.positions!r}, which turns pairs"
                " of channels"
            )

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.kv_heads * self.repeat

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "sequence")
        return shape


@dataclass(frozen=True, repr=False)
class Experts(Block):
    """``count`` two-layer experts of ``width`` neurons, added up by a softmax router.

    ``route``: ``dense`` computes all, ``top`` gathers the weights of the best one for every token. ``form``
    of dense experts: a ``loop`` over modules, ``bmm`` or ``einsum`` over stacked weights.
    """

    width: int
    count: int = 2
    route: str = "dense"
    form: str = "loop"

    def __post_init__(self) -> None:
        positive(width=self.width, count=self.count)
        choice(self.route, ROUTES, "route")
        choice(self.form, EXPERTS, "form")

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "vector", "sequence")
        return shape
