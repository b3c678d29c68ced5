"""Hidden states: what chosen weights read, in the dense model and in the pruned one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...allocation._selection import matches
from ...errors import ArgumentError
from ._matching import SquaredError

#: what files of the dense model's outputs call a hidden state, before the weight and which of its readings
_KEPT = "hidden state "


class Readings(TorchFunctionMode):
    """Within it, what chosen weights read is noted: the activation that comes first beside the weight.

    Args:
        names: of the weights, by the identities of their tensors.

    Attributes:
        found: the activations of each, in the order in which they were read.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self.found: dict[str, list[Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        name = next((self._names[id(value)] for value in given if id(value) in self._names), None)
        if name is not None:
            read = next(
                (
                    value
                    for value in given
                    if not isinstance(value, nn.Parameter)
                    and id(value) not in self._names
                    and value.is_floating_point()
                ),
                None,
            )
            if read is not None:
                self.found.setdefault(name, []).append(read)
        return func(*args, **kwargs)

    def kept(self) -> dict[str, Tensor]:
        """The activations by the names that files have for them, of the weight and of its reading."""
        return {
            f"{_KEPT}{name} {turn}": value
            for name, values in self.found.items()
            for turn, value in enumerate(values)
        }


class Hidden:
    """The hidden states that a training matches beside the outputs.

    Args:
        names: of the weights that read them, the same in both models.
        weight: of their error, beside the loss of the outputs.
    """

    def __init__(self, names: Sequence[str], weight: float) -> None:
        self._names, self.weight = frozenset(names), weight

    @staticmethod
    def of(patterns: Sequence[str], weight: float, dense: nn.Module, student: nn.Module) -> Hidden | None:
        """Those that weights of some patterns read; ``None`` where there are no patterns.

        Raises:
            ArgumentError: a pattern matches no weight of two dimensions or more, or one that the pruned model
                does not have.
        """
        found: set[str] = set()
        own = {name for name, _ in student.named_parameters(remove_duplicate=False)}
        for pattern in patterns:
            named = {
                name
                for name, tensor in dense.named_parameters(remove_duplicate=False)
                if tensor.dim() > 1 and matches(pattern, name)
            }
            if not named:
                raise ArgumentError(
                    f"hidden: '{pattern}' matches no weight of two dimensions or more of the dense model;"
                    " name weights, as named_parameters() does, that read what is to be matched"
                )
            gone = sorted(named - own)
            if gone:
                raise ArgumentError(
                    f"hidden: the pruned model has no weight '{gone[0]}', which '{pattern}' matches in the"
                    " dense one; name others"
                )
            found |= named
        return Hidden(sorted(found), weight) if found else None

    def reading(self, weights: Mapping[str, Tensor]) -> Readings:
        """Within it, what the weights read is noted.

        Args:
            weights: of the model that is called.
        """
        return Readings({id(tensor): name for name, tensor in weights.items() if name in self._names})

    def targets(self, readings: Readings, index: int) -> dict[str, Tensor]:
        """What is kept of the dense model's hidden states for a batch: bfloat16, by weight and reading.

        Raises:
            ArgumentError: one of the weights read nothing.
        """
        for name in sorted(self._names - readings.found.keys()):
            raise ArgumentError(
                f"hidden: '{name}' reads no activation when the dense model runs on batch {index}, or in"
                " a way that cannot be seen; name other weights"
            )
        return {key: value.detach().bfloat16() for key, value in readings.kept().items()}

    @staticmethod
    def parted(targets: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What was kept of outputs, and what of hidden states."""
        return (
            {name: tensor for name, tensor in targets.items() if not name.startswith(_KEPT)},
            {name: tensor for name, tensor in targets.items() if name.startswith(_KEPT)},
        )

    def error(
        self, readings: Readings, targets: Mapping[str, Tensor], inputs: Mapping[str, Any], index: int
    ) -> Tensor:
        """The mean over the hidden states of their squared errors, each relative to the mean square of the
        dense model's; tokens that an ``attention_mask`` hides count nothing.

        Raises:
            ArgumentError: the models read differently, or one has lost channels of a hidden state.
        """
        found = readings.kept()
        for key in sorted({*found, *targets}):
            own, dense = found.get(key), targets.get(key)
            if own is None or dense is None or own.shape != dense.shape:
                name = key.removeprefix(_KEPT).rsplit(" ", 1)[0]
                shown = " and ".join("none" if one is None else str(list(one.shape)) for one in (own, dense))
                raise ArgumentError(
                    f"hidden: what '{name}' reads has other shapes in the pruned model and in the dense one"
                    f" ({shown} in batch {index}); name weights that read what kept all its channels"
                )
        match = SquaredError()
        return match.terms(
            list(found.values()), match.targets([targets[key] for key in found]), inputs
        ).mean()


__all__ = ["Hidden", "Readings"]
