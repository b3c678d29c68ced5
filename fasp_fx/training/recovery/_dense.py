"""What the dense model returns for the batches: computed once, kept on disk, read back batch by batch."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ...base._device import device_of, products_in_bfloat16
from ...base._tolerable import tolerable
from ...base.compat import pytree
from ...capturing._unchanged import copied, rewound
from ...errors import CalibrationError, StoreError, first_line
from ._asking import check_terms, targets_of
from ._checkpoint import written
from ._hidden import Hidden
from ._matching import Match


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model: one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> Call:
        """The same with its tensors on a device."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), (self.args, self.kwargs))
        return Call(args, kwargs)

    def numbers(self) -> int:
        """How many numbers its tensors hold."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))

    def copied(self) -> Call:
        """The same with tensors of its own, which a model may write into."""
        return Call(*copied((self.args, self.kwargs)))

    def named(self, model: nn.Module) -> Mapping[str, Any]:
        """The arguments by their names in the model's forward."""
        bound = inspect.signature(model.forward).bind(*self.args, **self.kwargs)
        named = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named.update(named.pop(name, {}))
        return named


class DenseOutputs:
    """What a loss keeps of the dense model's outputs, one file for each batch.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        match: Match,
        hidden: Hidden | None,
        coarse: Collection[int],
        progress: Callable[[float], None],
    ) -> None:
        """Run the dense model on the batches whose files are not there yet, with products in bfloat16 for
        those whose numbers are in ``coarse``. What it writes into its buffers is put back after each.

        Args:
            match: what is kept of the outputs.
            hidden: the hidden states that are kept beside them.

        Raises:
            ArgumentError: the loss does not compare what the model returns, or a hidden state is not seen.
            CalibrationError: the model does not take a batch, nothing of it counts, or what it returns is not
                finite.
            StoreError: the disk is full, or cannot be written to, or a file that is there is damaged.
        """
        device = device_of(model)
        weights = dict(model.named_parameters(remove_duplicate=False))
        for index, call in enumerate(calls):
            if self._file(index).exists():
                self._check(index)
            else:
                held = call.to(device).copied()
                try:
                    with (
                        torch.no_grad(),
                        rewound(model),
                        products_in_bfloat16(device, index in coarse),
                        contextlib.nullcontext() if hidden is None else hidden.reading(weights) as readings,
                    ):
                        outputs = model(*held.args, **held.kwargs)
                except tolerable(Exception) as error:  # a model raises what it likes
                    raise CalibrationError(
                        f"the dense model does not take batch {index}: {type(error).__name__}:"
                        f" {first_line(error)}"
                    ) from error
                with torch.no_grad():
                    targets = targets_of(match, outputs, index)
                    check_terms(match, outputs, targets, call.to(device).named(model), index)
                    if hidden is not None and readings is not None:
                        targets |= hidden.targets(readings, index)
                self._save(index, targets)
            progress((index + 1) / len(calls))

    def read(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """What was kept for a batch.

        Raises:
            StoreError: its file is damaged.
        """
        with self._reading(index) as file:
            return safetensors.torch.load_file(file, device=str(device))

    def _check(self, index: int) -> None:
        """Refuse a file that is not whole, of which its header tells."""
        with self._reading(index) as file, safetensors.safe_open(file, "pt"):
            pass

    @contextlib.contextmanager
    def _reading(self, index: int) -> Iterator[Path]:
        file = self._file(index)
        try:
            yield file
        except (OSError, safetensors.SafetensorError) as error:
            raise StoreError(
                f"'{file}', what is kept of the dense model's outputs for batch {index}, is damaged:"
                f" {first_line(error)}; remove the file, and the same call computes it anew"
            ) from error

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.safetensors"

    def _save(self, index: int, targets: Mapping[str, Tensor]) -> None:
        partial = self._file(index).with_suffix(".partial")
        try:
            with written(self._folder):
                safetensors.torch.save_file(
                    {name: tensor.detach().cpu().contiguous().clone() for name, tensor in targets.items()},
                    partial,
                )
                os.replace(partial, self._file(index))
        finally:
            partial.unlink(missing_ok=True)


__all__ = ["Call", "DenseOutputs"]
