"""Which rule belongs to which operator, by exact overload."""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from fasp_fx.errors import RuleError

from ._grammar import Rule, parse
from .contractions import CONTRACTIONS
from .mixing import MIXING
from .movement import MOVEMENT
from .pointwise import CHECKS, CREATIONS, UNLIKE_OPERANDS, UNTAGGED, pointwise_rule
from .recurrent import RECURRENT

_USER: dict[OpOverload, Rule] = {}
_WRITTEN: dict[str, str] = {**CONTRACTIONS, **RECURRENT, **MOVEMENT, **MIXING, **UNLIKE_OPERANDS, **CREATIONS, **CHECKS}


def _check(operator: OpOverload, rule: Rule) -> Rule:
    known = {argument.name for argument in operator._schema.arguments}
    unknown = sorted(rule.names() - known)
    if unknown:
        raise RuleError(f"rule '{rule}' for {operator} names {unknown}, but the operator's arguments are {sorted(known)}")
    return rule


def register(operator: OpOverload, text: str) -> Rule:
    """Teach the analysis what ``operator`` does to channels, in one line (see :mod:`fasp_fx.patterns`).

    Args:
        operator: an exact overload, for example ``torch.ops.mylib.scale.default``.
        text: the rule, for example ``"x[... c], weight[c] -> [... c]"``; names are those of the operator's schema.

    Returns:
        The parsed rule, whose ``str`` is the normalised line.

    Raises:
        RuleError: the text does not parse, names an argument that the schema lacks, or ``operator`` is not an overload.
    """
    if not isinstance(operator, OpOverload):
        raise RuleError(f"{operator!r} is not an exact overload; pass for example torch.ops.aten.linear.default")
    _USER[operator] = _check(operator, parse(text))
    return _USER[operator]


def unregister(operator: OpOverload) -> None:
    """Forget a rule given to :func:`register`; a built-in rule that it had replaced is in force again."""
    _USER.pop(operator, None)


def lookup(operator: object) -> Rule | None:
    """The rule of an operator: the user's, the built-in one, or one derived from ``torch.Tag.pointwise``; else ``None``."""
    if not isinstance(operator, OpOverload):
        return None
    if operator in _USER:
        return _USER[operator]
    name = str(operator)
    text = _WRITTEN.get(name)
    if text is None and (torch.Tag.pointwise in operator.tags or name in UNTAGGED):
        text = pointwise_rule(operator)
    return parse(text) if text is not None else None


def builtin() -> dict[str, str]:
    """Every built-in rule that is written out (not derived), by operator name."""
    return dict(_WRITTEN)
