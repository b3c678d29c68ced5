"""What one walk over a program finds out about its channels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, fx

from ._value import NONE


@dataclass(frozen=True)
class Use:
    """One use of a weight that contracts its columns with an activation.

    Attributes:
        node: the contracting node.
        weight: name of the 2-D weight.
        activation: the node whose value is contracted with it.
        activation_dim: the contracted dimension of the activation.
        columns: the weight's channel numbers in the order of ``activation_dim``.
    """

    node: fx.Node
    weight: str
    activation: fx.Node
    activation_dim: int
    columns: np.ndarray


@dataclass(frozen=True)
class Remark:
    """Something said of a set of channel numbers, by a node."""

    numbers: np.ndarray
    reason: str
    node: fx.Node | None


@dataclass
class Facts:
    """Couplings, and remarks on channel numbers, in the order found."""

    pairs: list[tuple[np.ndarray, np.ndarray, fx.Node]] = field(default_factory=list)
    frozen: list[Remark] = field(default_factory=list)
    mixed: list[Remark] = field(default_factory=list)
    exempt: list[Remark] = field(default_factory=list)
    produced: list[np.ndarray] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    boxes: dict[bytes, tuple[np.ndarray, fx.Node]] = field(default_factory=dict)

    def couple(self, a: Tensor, b: Tensor, node: fx.Node) -> None:
        """Channels at equal positions of two broadcastable tensors of numbers go together; one that meets a non-channel stays."""
        shape = np.broadcast_shapes(tuple(a.shape), tuple(b.shape))
        first, second = a.expand(shape).reshape(-1).numpy(), b.expand(shape).reshape(-1).numpy()
        both = (first != NONE) & (second != NONE)
        alone = np.concatenate([first[~both & (first != NONE)], second[~both & (second != NONE)]])
        if alone.size:
            self.frozen.append(Remark(np.unique(alone), "meets a position that is not a channel", node))
        first, second = first[both], second[both]
        differ = first != second
        if differ.any():
            self.pairs.append((first[differ], second[differ], node))

    def say(self, remarks: list[Remark], numbers: Tensor, reason: str, node: fx.Node | None) -> None:
        """Append a remark on these numbers."""
        flat = np.unique(numbers.reshape(-1).numpy())
        remarks.append(Remark(flat[flat != NONE], reason, node))

    def box(self, numbers: Tensor, dim: int, node: fx.Node) -> None:
        """Record that removing channels must leave equal counts in every row of these numbers along ``dim``."""
        rows = numbers.movedim(dim, -1).reshape(-1, numbers.shape[dim]).numpy()
        self.boxes.setdefault(rows.tobytes() + rows.shape[0].to_bytes(8, "little"), (rows, node))
