"""A training under way on disk, so that it can be interrupted at any moment and goes on as if it had not
been.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ...base._atomic import new_folder
from ...base._json import Count
from ...base._tolerable import short_of_memory, tolerable
from ...errors import StoreError, first_line
from ...pruning.report import CurvePoint
from ...storage._run_folder import claim, read_state

PROGRESS = "progress.json"


@dataclass(frozen=True)
class _Progress:
    """What a file of JSON holds of a state."""

    step: Count
    curve: list[CurvePoint]
    seconds: float


@dataclass
class State:
    """Everything that the rest of a training depends on.

    Attributes:
        step: steps taken.
        curve: what the evaluations so far came to.
        current, best: what is trained, by name: as it is now, and at the best evaluation.
        optimizer: the optimiser's ``state_dict``.
        seconds: spent on training and evaluating so far.
    """

    step: int
    curve: list[CurvePoint]
    current: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@contextlib.contextmanager
def written(folder: Path) -> Iterator[None]:
    """Say of whatever is raised where something cannot be written into a folder what to do about it.

    Raises:
        StoreError: something cannot be written.
    """
    try:
        yield
    except short_of_memory():
        raise
    # The writers of safetensors and of torch.save raise errors of their own for a full disk.
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise StoreError(
            f"'{folder}' cannot be written: {first_line(error)}; free space, or pass another checkpoint="
        ) from error


class Checkpoint:
    """A folder of one run: what it is of, the dense model's outputs, and the newest state.

    Args:
        folder: the folder, made if missing.
        run: what the run is of; equal for runs that give the same result.

    Raises:
        StoreError: the folder holds another run or something else, or cannot be written.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._folder = folder
        self.targets = folder / "dense"
        claim(folder, "distil", run)
        with written(folder):
            self.targets.mkdir(exist_ok=True)

    def save(self, state: State) -> None:
        """Write a state in the place of the one before.

        Raises:
            StoreError: it cannot be written; the one before is as it was.
        """
        old = self._states()
        with (
            written(self._folder),
            new_folder(
                self._folder / f"step-{state.step}", overwrite=False, replaceable=lambda folder: False
            ) as made,
        ):
            for name in ("current", "best"):
                safetensors.torch.save_file(
                    {key: tensor.cpu().contiguous() for key, tensor in getattr(state, name).items()},
                    made / f"{name}.safetensors",
                )
            torch.save(state.optimizer, made / "optimizer.pt")
            progress = _Progress(state.step, state.curve, state.seconds)
            (made / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)

    def newest(self) -> State | None:
        """The newest state, or ``None`` if none was saved.

        Raises:
            StoreError: it is damaged.
        """
        folders = self._states()
        if not folders:
            return None
        folder = folders[-1]
        try:
            held = read_state(_Progress, folder / PROGRESS)
            current, best = (
                safetensors.torch.load_file(folder / f"{name}.safetensors") for name in ("current", "best")
            )
            optimizer = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
            return State(held.step, held.curve, current, best, optimizer, held.seconds)
        except StoreError:
            raise
        except tolerable(Exception) as error:  # readers raise whatever the files make them trip over
            raise self.damaged(error) from error

    def damaged(self, error: Exception) -> StoreError:
        """What to raise where the newest state cannot be gone on from."""
        return StoreError(
            f"the checkpoint '{self._states()[-1]}' is damaged: {first_line(error)}; remove it, and the run"
            " begins anew"
        )

    def _states(self) -> list[Path]:
        found = [
            folder for folder in self._folder.glob("step-*") if folder.name.removeprefix("step-").isdigit()
        ]
        return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


__all__ = ["Checkpoint", "State"]
