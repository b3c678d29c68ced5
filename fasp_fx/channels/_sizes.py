"""Concrete sizes for the symbolic ones: small where the program allows, those of the example inputs otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.numbers import int_oo

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def _symints(value: Any) -> Iterator[torch.SymInt]:
    if isinstance(value, torch.SymInt):
        yield value
    elif isinstance(value, torch.Tensor):
        for size in value.shape:
            if isinstance(size, torch.SymInt):
                yield size
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _symints(item)


class Sizes:
    """Turns symbolic shapes recorded at capture into integers, all by the same assignment of symbols."""

    def __init__(self, module: fx.GraphModule, small: bool) -> None:
        self.small = small
        self.assigned: dict[sympy.Symbol, int] = {}
        counted: dict[int, Any] = {}
        for node in module.graph.nodes:
            recorded = node.meta.get("val")
            if node.op == "placeholder":
                for size in _symints(recorded):
                    self._assign(size)
            elif isinstance(recorded, torch.SymInt):
                counted[id(recorded.node.shape_env)] = recorded.node.shape_env
        for environment in counted.values():
            self._share_out(environment)

    def _share_out(self, environment: Any) -> None:
        """Numbers known only at run time that the program says add up to a size, such as how many tokens each expert gets, share it."""
        for asserted in [item.expr for items in environment.deferred_runtime_asserts.values() for item in items]:
            if not isinstance(asserted, sympy.Eq):
                continue
            difference = sympy.expand(asserted.lhs - asserted.rhs)
            self._choose_total(difference, environment)
            difference = sympy.expand(difference.xreplace(self.assigned))
            parts = sorted(difference.free_symbols, key=str)
            for total in (sympy.Add(*parts) - difference, sympy.Add(*parts) + difference):
                if parts and total.is_Integer and total >= 0:
                    each, over = divmod(int(total), len(parts))
                    self.assigned |= {symbol: each + (index < over) for index, symbol in enumerate(parts)}

    def _choose_total(self, difference: sympy.Expr, environment: Any) -> None:
        """A total that is itself known only at run time is chosen before its parts: the one symbol that stands against all the others."""
        signs = {symbol: difference.coeff(symbol) for symbol in difference.free_symbols}
        for symbol, sign in signs.items():
            others = [other for name, other in signs.items() if name != symbol]
            if symbol not in self.assigned and len(others) > 1 and all(other == -sign for other in others):
                self._choose(symbol, environment)

    def _assign(self, size: torch.SymInt) -> None:
        for symbol in sorted(size.node.expr.free_symbols - self.assigned.keys(), key=str):
            self._choose(symbol, size.node.shape_env)

    def _choose(self, symbol: sympy.Symbol, environment: Any) -> None:
        hint = environment.backed_var_to_val.get(symbol)
        wanted = _PRIMES[len(self.assigned) % len(_PRIMES)] if hint is None or self.small else int(hint)
        bounds = environment.var_to_range.get(symbol)
        lower, upper = (bounds.lower, bounds.upper) if bounds is not None else (2, int_oo)
        if upper not in (int_oo, sympy.oo):
            wanted = min(wanted, int(upper))
        self.assigned[symbol] = max(wanted, int(lower)) if lower not in (-int_oo, -sympy.oo) else wanted

    def integer(self, size: int | torch.SymInt) -> int:
        """One size as an integer."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        self._assign(size)
        return int(size.node.expr.xreplace(self.assigned))

    def concrete(self, value: Any) -> Any:
        """The recorded value of a node with every symbolic size replaced; tensors become empty ones of that shape."""
        if isinstance(value, torch.Tensor):
            return torch.empty([self.integer(size) for size in value.shape], dtype=value.dtype, device=value.device)
        if isinstance(value, torch.SymInt):
            return self.integer(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self.concrete(item) for item in value)
        return value
