"""What a training keeps on disk: what the dense model returns for the batches, computed once; and how far it
is, so that it can be interrupted at any moment and goes on as if it had not been.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base._atomic import new_file
from ...base._device import device_of, products_in_bfloat16
from ...base._tolerable import short_of_memory, tolerable
from ...base.compat import pytree
from ...capturing._unchanged import copied, rewound
from ...errors import CalibrationError, StoreError, first_line
from ...pruning.report import CurvePoint
from ...storage._run_folder import claim
from ._matching import Match, targets_of, terms_of


@dataclass
class State:
    """Everything that the rest of a training depends on.

    Attributes:
        curve: what the evaluations so far came to.
        best: what is trained, by name, as it was at the best evaluation.
        current: the same as it is now; empty before the first step.
        optimizer: the optimiser's ``state_dict``.
        step: steps taken.
        seconds: spent on training and evaluating so far.
    """

    curve: list[CurvePoint]
    best: dict[str, Tensor]
    current: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0


class Checkpoint:
    """A folder of one run: what it is of, the dense model's outputs, and the newest state.

    Args:
        folder: the folder, made if missing.
        run: what the run is of; equal for runs that give the same result.

    Raises:
        StoreError: the folder holds another run or something else, or cannot be written.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        claim(folder, "distil", run)
        self.targets = folder / "dense"
        self._file = folder / "state.pt"

    def save(self, state: State) -> None:
        """Write a state in the place of the one before.

        Raises:
            StoreError: it cannot be written; the one before is as it was.
        """
        _save(self._file, vars(state) | {"curve": [astuple(point) for point in state.curve]})

    def newest(self) -> State | None:
        """The newest state, or ``None`` if none was saved.

        Raises:
            StoreError: it is damaged.
        """
        if not self._file.exists():
            return None
        held = _load(self._file, "cpu")
        return State(**held | {"curve": [CurvePoint(*point) for point in held["curve"]]})


@dataclass(frozen=True)
class Lessons:
    """The batches, and what the loss keeps of what the dense model returns for them, one file for each.

    Attributes:
        folder: where the files are.
        calls: positional and keyword arguments of each batch.
        match: the loss.
    """

    folder: Path
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    match: Match

    @torch.no_grad()
    def write(self, model: nn.Module, coarse: Collection[int], progress: Callable[[float], None]) -> None:
        """Run the dense model on the batches whose files are not there yet, with products in bfloat16 for
        those whose numbers are in ``coarse``. What it writes into its buffers is put back after each.

        Raises:
            ArgumentError: the loss does not compare what the model returns.
            CalibrationError: the model does not take a batch, nothing of it counts, or the loss of the
                model's outputs, against themselves, is not finite.
            StoreError: the disk is full or cannot be written to, or a file that is there is damaged.
        """
        device = device_of(model)
        for index in range(len(self.calls)):
            if self._file(index).exists():
                _load(self._file(index), "cpu")
            else:
                with rewound(model), products_in_bfloat16(device, index in coarse):
                    outputs = self.outputs(model, index, device)
                targets = targets_of(self.match, outputs)
                found = terms_of(self.match, outputs, targets, self.named(model, index, device), index)
                if not bool(found.isfinite().all()):
                    raise CalibrationError(
                        f"loss={type(self.match).__name__} of what the dense model returns for batch {index},"
                        " against itself, is not finite; check the batch, the model's dtype and the loss"
                    )
                _save(self._file(index), {name: tensor.clone() for name, tensor in targets.items()})
            progress((index + 1) / len(self.calls))

    def outputs(self, model: Callable[..., Any], index: int, device: torch.device) -> Any:
        """What a model returns for a batch.

        Raises:
            CalibrationError: the model does not take it.
        """
        args, kwargs = self._on(index, device)
        try:
            return model(*args, **kwargs)
        except tolerable(Exception) as error:  # a model raises what it likes
            raise CalibrationError(
                f"the {'dense' if isinstance(model, nn.Module) else 'pruned'} model does not take batch"
                f" {index}: {type(error).__name__}: {first_line(error)}"
            ) from error

    def terms(self, model: nn.Module, outputs: Any, index: int, device: torch.device) -> Tensor:
        """The terms of the loss of what the pruned model returned for a batch.

        Raises:
            StoreError: what was kept for the batch is damaged.
        """
        inputs = self.named(model, index, device)
        return terms_of(self.match, outputs, _load(self._file(index), device), inputs, index)

    def named(self, model: nn.Module, index: int, device: torch.device) -> Mapping[str, Any]:
        """The arguments of a batch by their names in the model's forward."""
        args, kwargs = self._on(index, device)
        return dict(zip(inspect.signature(model.forward).parameters, args)) | kwargs

    def _on(self, index: int, device: torch.device) -> Any:
        """The arguments of a batch on a device, in tensors that a model may write into."""
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), copied(self.calls[index]))

    def _file(self, index: int) -> Path:
        return self.folder / f"{index}.pt"


def _save(file: Path, value: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values to a file, whole or not at all.

    Raises:
        StoreError: the file cannot be written.
    """
    with new_file(file, replaceable=lambda _: True) as made:
        try:
            torch.save(value, made)
        except short_of_memory():
            raise
        except RuntimeError as error:  # what torch raises for a full disk
            raise OSError(first_line(error)) from error


def _load(file: Path, device: torch.device | str) -> dict[str, Any]:
    """What :func:`_save` wrote.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        found: dict[str, Any] = torch.load(file, weights_only=True, map_location=device)
    except tolerable(Exception) as error:  # readers raise whatever a file makes them trip over
        raise StoreError(
            f"'{file}' is damaged: {first_line(error)}; remove it, and the same call makes it anew"
        ) from error
    return found


__all__ = ["Checkpoint", "Lessons", "State"]
