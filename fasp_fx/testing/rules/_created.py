"""What ``create`` claims: the elements of the result are all alike, so that any of them can go."""

from __future__ import annotations

from torch import Tensor

from ._calls import Call, same
from ._claims import Lie


def creates(call: Call, results: list[Tensor]) -> Lie | None:
    """Hold a creating rule against the operator on one call; what memory happens to hold (``empty``) says
    nothing.
    """
    if "empty" in str(call.operator):
        return None
    for index, result in enumerate(results):
        flat = result.reshape(-1)
        if flat.numel() and not same(flat, flat[:1].expand_as(flat)):
            return Lie(
                call,
                "the elements of the result are all alike",
                f"result {index} holds {flat[0].item()} and {flat[flat != flat[0]][0].item()}",
            )
    return None
