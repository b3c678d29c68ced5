"""The harness for those who write rules, passes or models: hold the library against its own promises.

* :func:`check_program` prunes a model and holds every invariant of the library against the result.
* :func:`check_rule` holds a rule against the operator it describes, by brute force.
* :mod:`fasp_fx.testing.specs` describes small models as data; :func:`build` makes a module of a description,
  :func:`example` inputs for it.
* :func:`programs` and the strategies of the families draw such descriptions with hypothesis (the extra
  ``fasp_fx[testing]``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fasp_fx.errors import FaspError

from ._case import Broken, CheckFailed, ProgramVerdict
from ._net import build, example
from .oracle import Masked
from .program import INVARIANTS, check_program, program_test
from .rule import CounterExample, RuleVerdict, assert_rule, check_rule

if TYPE_CHECKING:
    from .strategies import (
        attention_nets,
        chains,
        concatenating,
        convolutional,
        decoders,
        experts,
        gated,
        mixing,
        multi_input,
        multi_output,
        odd_nets,
        programs,
        residual,
        splitting,
        tied,
    )

__all__ = [
    "INVARIANTS",
    "Broken",
    "CheckFailed",
    "CounterExample",
    "Masked",
    "MissingExtraError",
    "ProgramVerdict",
    "RuleVerdict",
    "assert_rule",
    "attention_nets",
    "build",
    "chains",
    "check_program",
    "check_rule",
    "concatenating",
    "convolutional",
    "decoders",
    "example",
    "experts",
    "gated",
    "mixing",
    "multi_input",
    "multi_output",
    "odd_nets",
    "program_test",
    "programs",
    "residual",
    "splitting",
    "tied",
]


class MissingExtraError(FaspError, ImportError):
    """A part of the harness needs a package that is not installed."""


def __getattr__(name: str) -> Any:
    """Strategies are imported when they are asked for: only they need hypothesis."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import strategies
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != "hypothesis":
            raise
        raise MissingExtraError(
            f"fasp_fx.testing.{name} draws with hypothesis, which is not installed; install fasp_fx[testing]"
        ) from error
    return getattr(strategies, name)
