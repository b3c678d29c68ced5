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
            difference = sympy.expand((asserted.lhs - asserted.rhs).xreplace(self.assigned))
            parts = sorted(difference.free_symbols, key=str)
            for total in (sympy.Add(*parts) - difference, sympy.Add(*parts) + difference):
                if parts and total.is_Integer and total >= 0:
                    each, over = divmod(int(total), len(parts))
                    self.assigned |= {symbol: each + (index < over) for index, symbol in enumerate(parts)}

    def _assign(self, size: torch.SymInt) -> None:
        environment = size.node.shape_env
        for symbol in sorted(size.node.expr.free_symbols - self.assigned.keys(), key=str):
            hint = environment.backed_var_to_val.get(symbol)
            lower = environment.var_to_range[symbol].lower if symbol in environment.var_to_range else 2
            wanted = _PRIMES[len(self.assigned) % len(_PRIMES)]
            if hint is not None and not self.small:
                wanted = int(hint)
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
