"""What autograd is doing."""

from __future__ import annotations

import torch


def is_backward() -> bool:
    """Whether autograd runs backward in this thread, as where it computes a checkpointed part anew."""
    return int(torch._C._current_graph_task_id()) != -1


__all__ = ["is_backward"]
