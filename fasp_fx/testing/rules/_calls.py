"""One call of an operator: its arguments by name, its results, and how it prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...base.compat import OpOverload


@dataclass(frozen=True)
class Call:
    """An operator and its arguments by schema name."""

    operator: OpOverload
    arguments: Mapping[str, Any]

    def with_(self, /, **changed: Any) -> Call:
        """The same call with other arguments, or other tensors of a list (``name.index``)."""
        arguments = dict(self.arguments)
        for name, value in changed.items():
            whole, _, index = name.partition(".")
            arguments[whole] = (
                value
                if not index
                else [value if at == int(index) else item for at, item in enumerate(arguments[whole])]
            )
        return Call(self.operator, arguments)

    def run(self) -> list[Tensor]:
        """The tensors the operator returns, in order.

        Raises:
            Exception: whatever the operator raises.
        """
        with torch.no_grad():
            found = self.operator(**{name: _fresh(value) for name, value in self.arguments.items()})
        return tensors(found)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments; those of a list are named ``name.index``, as rules name them."""
        found: dict[str, Tensor] = {}
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, (list, tuple)):
                found |= {
                    f"{name}.{index}": item for index, item in enumerate(value) if isinstance(item, Tensor)
                }
        return found

    @property
    def size(self) -> tuple[int, int, int]:
        """How large a call is, for finding the smallest: elements, dimensions, arguments that are not at
        their default.
        """
        given = self.tensors().values()
        return sum(t.numel() for t in given), sum(t.dim() for t in given), len(self.shown())

    def shown(self) -> dict[str, Any]:
        """The arguments that are not at their default."""
        defaults = {
            argument.name: argument.default_value
            for argument in self.operator._schema.arguments
            if argument.has_default_value()
        }
        return {
            name: value
            for name, value in self.arguments.items()
            if isinstance(value, Tensor) or name not in defaults or defaults[name] != value
        }

    def __str__(self) -> str:
        return (
            f"{self.operator}({', '.join(f'{name}={_spell(value)}' for name, value in self.shown().items())})"
        )


def _fresh(value: Any) -> Any:
    """Arguments of their own for every run, so that an operator that writes into one does not change the
    next.
    """
    if isinstance(value, Tensor):
        return value.clone()
    return [_fresh(item) for item in value] if isinstance(value, list) else value


def _spell(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "" if value.is_floating_point() else f" {str(value.dtype).removeprefix('torch.')}"
        return f"<{'x'.join(map(str, value.shape)) or 'scalar'}{kind}>"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_spell, value))}]"
    return repr(value)


def tensors(found: Any) -> list[Tensor]:
    """The tensors of an operator's result."""
    if isinstance(found, Tensor):
        return [found]
    return [item for item in found if isinstance(item, Tensor)] if isinstance(found, (list, tuple)) else []


def same(first: Tensor, second: Tensor) -> bool:
    """Equal up to rounding, where both are numbers; shapes must agree."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(close(first, second).all())


def close(first: Tensor, second: Tensor) -> Tensor:
    """Which positions are equal up to rounding: boolean, of their common shape."""
    if not (first.is_floating_point() or first.is_complex()):
        return first == second
    rounding = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}.get(
        first.dtype, 2e-2
    )
    finite = second[torch.isfinite(second)].abs()
    scale = max(1.0, float(finite.max()) if finite.numel() else 1.0)
    return torch.isclose(first, second, rtol=0.0, atol=rounding * scale, equal_nan=True)


def repeatable(call: Call) -> bool:
    """Whether the operator gives the same result twice; what draws random numbers says nothing."""
    first, second = call.run(), call.run()
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
