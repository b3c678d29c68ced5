from ._grammar import (
    ORDINALS as ORDINALS,  # how a clause counts results
    Alternative as Alternative,  # One reading of the operator: its operands and results by letter
    Clause as Clause,  # A keyword and its words
    Dims as Dims,  # the dimensions of one tensor; two letters in brackets are a tuple
    Rule as Rule,  # What one operator does to channels
    letters_of as letters_of,  # All letters of a tensor, those in brackets included
    parse as parse,  # Parse one rule
)
from ._reading import (
    DoesNotApplyError as DoesNotApplyError,  # A rule does not serve for this call of its operator; says why
    Reading as Reading,  # A rule, read for one call
    read as read,  # Read a rule for a call
)
from ._registry import (
    Affine as Affine,  # An operator that sums products of its operands, and at most adds a bias
    affine as affine,  # What an operator is if it is linear in each of its operands but for a bias; else None
    argument_names as argument_names,  # The names of an operator's arguments in order, with their defaults
    builtin as builtin,  # Every built-in rule that is written out (not derived), by operator name
    find_composites as find_composites,  # For every node that is part of a composite, the composite's name
    lookup as lookup,  # The rule of an operator
    register as register,  # Teach the analysis what an operator does to channels, in one line
    unregister as unregister,  # Forget a rule given to register; a built-in rule that it had replaced is in force again
)
from ._rules import (
    CASTS as CASTS,  # pointwise operators that change the type or the place of self and nothing else
    CHECKS as CHECKS,  # operators that only assert something, or read a size
    ONE_WIDTH as ONE_WIDTH,  # letters whose sizes the passes make one, padding what is narrower
    RESHAPES as RESHAPES,  # operators that give the same elements in the same order another shape
    TOLD as TOLD,  # operators that are given graphs, and along which letters these are told positions
    VANISHING as VANISHING,  # pointwise operators whose result is zero wherever one of these arguments is
    pointwise_rule as pointwise_rule,  # The rule of a pointwise operator, derived from its schema
)

__all__ = ["builtin", "lookup", "register", "unregister"]
