"""A decision without some of its groups."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ...analysis._analysis import Analysis
from ...analysis.groups import Group
from ...calibration.observe._visit import Decision, decided


def restricted(analysis: Analysis, decision: Decision, kept: Collection[Group]) -> Decision:
    """The decision for the groups ``kept`` alone.

    A weight that was repaired for a group which stays whole now is as it was captured.
    """
    names = {group.name for group in kept}
    dropped = [group for group in decided(analysis, decision) if group.name not in names]
    if not dropped:
        return decision
    stay = np.concatenate([group.sets for group in dropped])
    unrepaired = {use.weight for group in dropped for use in group.uses}
    unrepaired |= {
        name
        for group in dropped
        if group.name in decision.products
        for name in decision.products[group.name].weights
    }
    for mended in decision.products.values():  # what is put together of several goes back together
        unrepaired |= mended.weights.keys() if unrepaired & mended.weights.keys() else set()
    unrepaired |= {bias for name, bias in decision.biases.items() if name in unrepaired}
    return Decision(
        decision.gone & ~np.isin(analysis.labels, stay),
        {name: value for name, value in decision.weights.items() if name not in unrepaired},
        {name: bias for name, bias in decision.biases.items() if name not in unrepaired},
        {name: outcome for name, outcome in decision.outcomes.items() if name not in unrepaired},
        {
            name: mended
            for name, mended in decision.products.items()
            if name in names and not unrepaired & mended.weights.keys()
        },
        notes=decision.notes,
    )


__all__ = ["restricted"]
