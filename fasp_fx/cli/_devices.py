"""Where a command works: on which device, and among which processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fasp_fx.base import check_device, process, tolerable
from fasp_fx.errors import ArgumentError, first_line


def find_device(name: str | None) -> torch.device:
    """The device of that name; ``None``: the accelerator if there is one, and of several the one of this
    process's number on this machine.

    Raises:
        ArgumentError: there is no such device here.
    """
    if name is not None:
        return check_device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, process("LOCAL_RANK", 0) % torch.accelerator.device_count())


@contextmanager
def together(device: torch.device) -> Iterator[dist.ProcessGroup | None]:
    """The group of all processes that ``torchrun`` started, while they work; ``None`` for one alone.

    Raises:
        ArgumentError: they do not find one another.
    """
    count, backends = process("WORLD_SIZE", 1), "cpu:gloo"
    if count == 1:
        yield None
        return
    try:
        if device.type != "cpu":
            backends += f",{device.type}:{dist.get_default_backend_for_device(device)}"
            torch.accelerator.set_device_index(device.index or 0)
        dist.init_process_group(backends)
    except tolerable(RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"the {count} processes do not find one another: {first_line(error)}; start them with torchrun"
        ) from error
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
