"""What a training takes beside the two models, and what of it fits the memory that is free."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

import psutil
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ...base._tolerable import short_of_memory
from ...errors import ArgumentError, TrainingMemoryError, first_line
from ._config import DistillationConfig
from ._trained import Part, Trained, trained_part, weights_of

#: of every number that is trained: its gradient, AdamW's two moments, and the best state
_COPIES = 4
_GIB = 2.0**30


def free_bytes(device: torch.device) -> int | None:
    """The bytes that can still be had on a device; ``None`` where nobody says."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available + psutil.swap_memory().free)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return None


def kept_bytes(call: Callable[[], object], model: nn.Module) -> int:
    """The bytes that autograd keeps for the way back from one call of a model, beside its weights and
    buffers.
    """
    held = {number for number, _, _ in map(_storage, (*model.parameters(), *model.buffers()))}
    found: dict[int, tuple[StorageWeakRef | None, int]] = {}

    def pack(tensor: Tensor) -> None:
        """Notes a tensor, and lets go of it: there is no way back."""
        number, reference, size = _storage(tensor)
        if number not in held:
            found[number] = reference, size

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _no_way_back):
        call()
    return sum(size for _, size in found.values())


def check_memory(trained: Trained, config: DistillationConfig, device: torch.device, kept: int) -> None:
    """Refuse a training that takes more memory than is free, whatever happens on the way.

    Args:
        trained: what ``config`` asks to train.
        kept: the bytes that autograd keeps of the largest batch.

    Raises:
        TrainingMemoryError: says what training takes, and what would fit.
    """
    free, own = free_bytes(device), _beside(trained.leaves.values())
    if free is None or own + kept <= free:
        return
    said = (_fits(part, _size_of(trained.student, part, config), kept, free) for part in get_args(Part))
    fitting = [part for part in said if part is not None]
    raise TrainingMemoryError(
        f"train='{config.train}' takes at least {(own + kept) / _GIB:.3g} GiB beside the two models"
        f" ({own / _GIB:.3g} for gradients, the optimiser and the best state, {kept / _GIB:.3g} for what"
        f" autograd keeps of the largest batch), and {free / _GIB:.3g} GiB are free on '{device}'; what fits:"
        f" {', or '.join(fitting) or 'nothing beside these models'}"
    )


@contextlib.contextmanager
def told_of_memory() -> Iterator[None]:
    """What a device says of memory that is short, as an error of ours."""
    try:
        yield
    except TrainingMemoryError:
        raise
    except short_of_memory() as error:
        raise TrainingMemoryError(
            f"the memory is too little for the dense model and the training of the pruned one:"
            f" {first_line(error)}; give smaller batches with accumulate=, or train='low-rank' or 'vectors'"
        ) from error


def _storage(tensor: Tensor) -> tuple[int, StorageWeakRef | None, int]:
    """What tells a tensor's storage from others as long as the reference is held, and its bytes; of a sparse
    tensor, which lies in several or in none, nothing.
    """
    if tensor.layout is not torch.strided:
        return 0, None, 0
    reference = StorageWeakRef(tensor.untyped_storage())
    return reference.cdata, reference, tensor.untyped_storage().nbytes()


def _no_way_back(packed: None) -> Tensor:
    raise AssertionError("nothing is run backwards")


def _beside(numbers: Iterable[Tensor]) -> int:
    return sum(_COPIES * tensor.numel() * tensor.itemsize for tensor in numbers)


def _size_of(student: nn.Module, part: Part, config: DistillationConfig) -> int | None:
    """The bytes that another part takes, with copies in float32 of coarse weights; ``None`` where there is no
    such part.
    """
    if part == "low-rank":
        try:
            return _beside(trained_part(student, part, config.rank, config.seed).leaves.values())
        except ArgumentError:
            return None
    weights = weights_of(student, part).values()
    return sum(
        (_COPIES + 1) * 4 * weight.numel() if weight.itemsize <= 2 else _beside([weight])
        for weight in weights
    )


def _fits(part: Part, own: int | None, kept: int, free: int) -> str | None:
    """With which batches a part can be trained, if it can."""
    if not own or own >= free:
        return None
    size = (free - own) / max(kept, 1)
    batches = (
        "these batches" if size >= 1 else f"batches of at most {math.floor(100 * size) or 1} % of that size"
    )
    return f"train='{part}' with {batches}"


__all__ = ["check_memory", "free_bytes", "kept_bytes", "told_of_memory"]
