"""What a check of a program says, and the error it raises."""

from __future__ import annotations

from dataclasses import dataclass

from fasp_fx.errors import FaspError


@dataclass(frozen=True)
class Broken:
    """One invariant that does not hold, and how that shows."""

    invariant: str
    message: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.message}"


@dataclass(frozen=True)
class ProgramVerdict:
    """What was checked on one model.

    Attributes:
        model: the name of its class.
        checked: the invariants that were held against it, in order.
        skipped: invariants that say nothing of this model, with the reason.
        broken: those that do not hold.
        removed: how many channel sets the plan took.
        sparsity: the sparsity that this is.
        calls: how many calls, of how many input shapes, the pruned program was compared on.
        error: the largest relative error against the masked dense model.
        seen: the smallest relative change that masking makes to the outputs of a call; where it is 0 the
            comparison proves little.
        seed: what the choice of channels was drawn with.

    Examples:
        >>> verdict = fasp_fx.testing.check_program(model, (x,), invariants=("mask-exact",))
        >>> verdict.ok, verdict.checked
        (True, ('mask-exact',))
    """

    model: str
    checked: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    broken: tuple[Broken, ...] = ()
    removed: int = 0
    sparsity: float = 0.0
    calls: int = 0
    error: float = 0.0
    seen: float = 0.0
    seed: int = 0

    @property
    def ok(self) -> bool:
        """Whether everything that was checked holds."""
        return not self.broken

    def __str__(self) -> str:
        if self.broken:
            return f"{self.model} (seed {self.seed}) breaks " + "; ".join(map(str, self.broken))
        left = (
            f"; skipped {', '.join(f'{name} ({why})' for name, why in self.skipped)}" if self.skipped else ""
        )
        return (
            f"{self.model}: {', '.join(self.checked)} hold; {self.removed} channel sets removed"
            f" ({self.sparsity:.1%}), error {self.error:.1e} over {self.calls} calls{left}"
        )


class CheckFailed(FaspError, AssertionError):
    """A check found something broken; ``verdict`` says what."""

    def __init__(self, verdict: object) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict


class Violation(Exception):
    """Raised inside a check: the invariant does not hold."""


class Skipped(Exception):
    """Raised inside a check: the invariant says nothing of this model."""


def hold(condition: bool, message: str) -> None:
    """Raise :class:`Violation` unless the condition holds."""
    if not condition:
        raise Violation(message)
