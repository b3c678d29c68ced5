"""Several processes of one command, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..base._tolerable import tolerable
from ..errors import ArgumentError, first_line


def rank() -> int:
    """The number of this process; 0 where it is the only one."""
    return _number("RANK", 0) if count() > 1 else 0


def count() -> int:
    """How many processes were started."""
    return _number("WORLD_SIZE", 1)


def own_device(name: str | None) -> str | None:
    """The device of this process, if none is named: of several accelerators the one of its number on this
    machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is not None or count() == 1 or accelerator is None:
        return name
    return f"{accelerator.type}:{_number('LOCAL_RANK', 0) % torch.accelerator.device_count()}"


@contextmanager
def together(device: torch.device) -> Iterator[dist.ProcessGroup | None]:
    """The group of all processes while they work; ``None`` for one alone.

    Raises:
        ArgumentError: they do not find one another.
    """
    if count() == 1:
        yield None
        return
    try:
        own = "" if device.type == "cpu" else f",{device.type}:{dist.get_default_backend_for_device(device)}"
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index or 0)
        dist.init_process_group(f"cpu:gloo{own}")
    except tolerable(RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"the {count()} processes do not find one another: {first_line(error)}; start them with torchrun"
        ) from error
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default


__all__ = ["count", "own_device", "rank", "together"]
