"""Every error the library raises on purpose, and what it may make of others.

All derive from :class:`FaspError`; each message names the thing that is wrong and the remedy.
"""

from __future__ import annotations


class FaspError(Exception):
    """Base class of all errors raised by fasp_fx."""


class ArgumentError(FaspError, ValueError):
    """An argument of a public function is out of its range or of the wrong kind."""


class CaptureError(FaspError):
    """The model could not be captured as a graph."""


class ExportError(CaptureError):
    """``torch.export`` fails on the code of the model; its submodules may do better."""


class CallError(FaspError, TypeError):
    """A pruned module was called with an argument that was not captured."""


class RuleError(FaspError, ValueError):
    """An operator rule does not parse, or does not fit its operator."""


class NothingPrunableError(FaspError):
    """The analysis found no group that can be pruned."""


class SparsityError(ArgumentError):
    """The sparsity is outside (0, 1) or out of reach for this model."""


class BudgetError(ArgumentError):
    """A budget is out of reach for this model, is met by the dense one, or counts what cannot be counted of
    it.
    """


class CalibrationError(FaspError, ValueError):
    """The calibration data is missing, empty, mis-shaped, non-finite or on the wrong device."""


class PlanError(FaspError, ValueError):
    """A plan does not parse, belongs to another model, or asks for something impossible."""


class VerificationError(FaspError):
    """A pass produced a program that does not compute what its plan says; nothing is returned."""


class EagerError(FaspError):
    """No copy of the caller's module computes what the pruned program computes; nothing is returned."""


class StoreError(FaspError):
    """A saved result is missing, truncated, tampered with, or would be overwritten."""


class OffloadError(FaspError):
    """Weights cannot be kept in files: a folder cannot be written, or its disk is full."""


class TrainingMemoryError(FaspError, MemoryError):
    """A pruned model cannot be trained in the memory that is free; the message says what can."""


class RankError(FaspError):
    """Processes that prune together lost one another."""


class CaptureWarning(UserWarning):
    """The captured program does not compute what the model computes when it is called."""


class CalibrationWarning(UserWarning):
    """The calibration data is usable, but weaker than the method wants."""


class VerificationWarning(UserWarning):
    """A group stays whole, because the program without its channels does not compute what the dense one does
    with them masked.
    """


class PartialPlanWarning(UserWarning):
    """A part of a plan cannot be applied where a model is compiled; what it would remove stays."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to stand inside a sentence, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
