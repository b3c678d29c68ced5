"""The scores that have a name: each is a function of one block of one consumer, and a line of
:data:`NAMED`. The command line reads the names, so nothing here needs torch before it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from ._scoring import Columns

#: what ``score=`` may be called; ``"obs"`` is of whole groups (:class:`fasp_fx.calibration.OBS`)
ScoreName = Literal["fasp", "obs", "magnitude", "random"]


def fasp(columns: Columns) -> Tensor:
    """``Σ_i |W_ij| · ‖X_j‖₂`` (FASP, arXiv 2501.09412, the column form of Wanda's metric).

    Examples:
        >>> from fasp_fx.calibration import Columns, fasp
        >>> fasp(Columns(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), norms=torch.tensor([1.0, 0.5]), gram=None))
        tensor([4., 3.])
    """
    assert columns.norms is not None
    return columns.weight.abs().sum(0, dtype=columns.norms.dtype) * columns.norms


def magnitude(columns: Columns) -> Tensor:
    """``‖W_j‖₂``: the length of the column, without data.

    Examples:
        >>> from fasp_fx.calibration import Columns, magnitude
        >>> magnitude(Columns(torch.tensor([[3.0, 0.0], [4.0, 2.0]]), norms=None, gram=None))
        tensor([5., 2.], dtype=torch.float64)
    """
    return columns.weight.abs().float().norm(dim=0).double()


def random(columns: Columns, seed: int = 0) -> Tensor:
    """Uniform random scores, reproducible: a block of a consumer always gets the same by its name, whatever
    was scored before it.
    """
    import torch

    from fasp_fx.base import generator_of

    generator = generator_of(seed, columns.name)
    drawn = torch.rand(columns.weight.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(columns.weight.device)


#: the functions by name, and whether they look at more than weights
NAMED: Mapping[str, tuple[Callable[[Columns], Tensor], bool]] = {
    "fasp": (fasp, True),
    "magnitude": (magnitude, False),
    "random": (random, False),
}
