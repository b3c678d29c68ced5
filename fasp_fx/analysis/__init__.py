"""Which channels go together: the coupled groups of a program, found on channel numbers; a plan is data."""

from __future__ import annotations

from ._analysis import Analysis, analyze_program

__all__ = ["Analysis", "analyze_program"]
