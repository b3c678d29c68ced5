"""Which call of a model is an outermost one, and what was drawn for it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from types import FrameType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """Gates as they were drawn for one call.

    Attributes:
        number: counts the draws.
        gates: of each group, shape ``[sets]``.
        trained: whether the model was in training mode.
        records: whether gradients were recorded.
        caller: the identity of the module whose call it was.
    """

    number: int
    gates: list[Tensor]
    trained: bool
    records: bool
    caller: int | None = None

    def detached(self) -> Draw:
        """The same, for a copy of the model: no backward leads from it to the scores of this one."""
        return replace(self, gates=[gates.detach() for gates in self.gates], caller=None)


class Calls(threading.local):
    """The calls of a model and its parts that run; each thread has its own.

    A call runs as long as its frame is on the stack, so that whatever raises, wherever, ends it: hooks are
    not told of ``KeyboardInterrupt``, nor of what a hook before them raises.

    ``torch.compile`` runs these methods as they are: it knows neither frames nor what threads have of their
    own.
    """

    _drawn: Draw | None = None
    _outermost: FrameType | None = None

    @torch.compiler.disable
    def drew(self, draw: Draw) -> None:
        """Note what was drawn in this thread."""
        self._drawn = draw

    @torch.compiler.disable
    def drawn(self) -> Draw | None:
        """What was drawn last in this thread."""
        return self._drawn

    @torch.compiler.disable
    def begin(self, frame: FrameType | None) -> bool:
        """Note that a call runs in a frame; whether it is an outermost one."""
        if self._runs(frame):
            return False
        self._outermost = frame
        return True

    @torch.compiler.disable
    def end(self, frame: FrameType | None) -> None:
        """Note that the call which ran in a frame, or was made from it, is over; what an outermost one holds
        is let go of.
        """
        if frame is self._outermost or not self._runs(frame):
            self._outermost = None

    def _runs(self, frame: FrameType | None) -> bool:
        """Whether the outermost call is one of those that led to a frame."""
        if self._outermost is None:
            return False
        while frame is not None and frame is not self._outermost:
            frame = frame.f_back
        return frame is not None


__all__ = ["Calls", "Draw"]
