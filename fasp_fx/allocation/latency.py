"""Latency tables: how long operators take on a device at some widths, measured once and kept."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base._atomic import write_text
from ..base._options import is_number, path_of
from ..base._tolerable import tolerable
from ..errors import ArgumentError, BudgetError, first_line

FORMAT = "fasp_fx.latency/1"
#: the widths that are measured, as parts of the dense model's
GRID = (0.25, 0.5, 0.75, 1.0)
#: seconds that one operator is run for at least, and how often
_AT_LEAST, _TIMES = 0.02, 5


def run_time(call: Callable[[], Any], device: torch.device) -> float:
    """The least seconds that a call takes, over several."""
    call()
    best = total = float("inf")
    total, count = 0.0, 0
    while count < _TIMES or total < _AT_LEAST:
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        spent = time.perf_counter() - started
        best, total, count = min(best, spent), total + spent, count + 1
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """What timings hold for: the device's name, and of a CPU also how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {_processor()} with {torch.get_num_threads()} threads"


def _named(device: torch.device | str) -> str:
    try:
        return device_name(torch.device(device))
    except tolerable(RuntimeError, AssertionError, TypeError) as error:
        raise ArgumentError(
            f"device={device!r} is none that is here: {first_line(error)}; leave it out for that of the first"
            " model"
        ) from error


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


class LatencyTable:
    """Seconds of operators at widths on a grid. It grows as :class:`fasp_fx.budgets.Latency` asks for what it
    lacks.

    Args:
        device: what is measured on; ``None``: that of the first model that it serves.
        time: how to measure a call; given the call and the device, it returns seconds. ``None``: the least of
            several runs.

    Raises:
        ArgumentError: there is no such device.

    Attributes:
        device: the device's name (:func:`device_name`), once there is one.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        time: Callable[[Callable[[], Any], torch.device], float] | None = None,
    ) -> None:
        self.device = None if device is None else _named(device)
        self.time = time or run_time
        self._entries: dict[str, tuple[list[list[float]], np.ndarray]] = {}

    def seconds(self, call: Callable[[], Any], device: torch.device) -> float:
        """How long a call takes.

        Raises:
            BudgetError: what measures says no number of seconds.
        """
        found = self.time(call, device)
        if not is_number(found) or found < 0:
            raise BudgetError(
                f"time= of the latency table returned {found!r}, which is no number of seconds; leave it out"
                " to measure as usual"
            )
        return float(found)

    def check(self, device: torch.device) -> None:
        """Take the device for that of the table, if it has none.

        Raises:
            BudgetError: it has another.
        """
        found = device_name(device)
        if self.device is None:
            self.device = found
        if self.device != found:
            raise BudgetError(
                f"the latency table is of '{self.device}', and the model is on '{found}'; measure one here:"
                " LatencyTable()"
            )

    def entry(
        self, key: str, measure: Callable[[], tuple[list[list[float]], np.ndarray]]
    ) -> tuple[list[list[float]], np.ndarray]:
        """Parts of the dense widths along each axis, and the seconds at every combination; measured if they
        are not there.
        """
        if key not in self._entries:
            self._entries[key] = measure()
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, whole or not at all.

        Raises:
            StoreError: the file cannot be written; what it held stays.
        """
        entries = {
            key: {"parts": parts, "seconds": seconds.tolist()}
            for key, (parts, seconds) in self._entries.items()
        }
        text = json.dumps({"format": FORMAT, "device": self.device, "entries": entries})
        write_text(path_of(path, "path"), text)

    @staticmethod
    def load(path: str | Path) -> LatencyTable:
        """Read what :meth:`save` wrote.

        Raises:
            ArgumentError: the file is none, or damaged.
        """
        try:
            data = json.loads(path_of(path, "path").read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, and {FORMAT!r} is read here")
            table = LatencyTable()
            table.device = None if data["device"] is None else str(data["device"])
            for key, entry in data["entries"].items():
                parts, seconds = (
                    [[float(part) for part in axis] for axis in entry["parts"]],
                    np.asarray(entry["seconds"], dtype=np.float64),
                )
                if (
                    seconds.shape != tuple(map(len, parts))
                    or any(axis != sorted(set(axis)) for axis in parts)
                    or not np.isfinite(seconds).all()
                    or (seconds < 0).any()
                ):
                    raise ValueError(f"the seconds of '{key:.60}' do not fit its parts")
                table._entries[key] = parts, seconds
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArgumentError(
                f"'{path}' is no latency table: {error}; write one with LatencyTable.save"
            ) from error
        return table


__all__ = ["LatencyTable", "device_name"]
