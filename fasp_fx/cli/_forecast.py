"""``fasp-fx prune --dry-run``: what it would take of memory and disk, with no weight loaded."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from ..analysis._analysis import Analysis
from ..base._offload import RESIDENT
from ..calibration._consumers import Consumers
from ..calibration._needed import DOUBLE, Needed, bytes_of_weights
from ..hf._plain import plain_config
from ..pruning._allocating import budget_for, check_request, counted, expected_sparsity
from ..pruning._method import Method
from ..pruning._prune import analyze
from ..pruning.config import PruningConfig
from . import _models
from ._console import CAPTURING, Stages, say

_GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """What a pruning will take, in bytes.

    Attributes:
        base: what this process takes without the model.
        weights: of the dense model.
        repaired: of the weights that are repaired, which are kept until the model is rewritten.
        pruned: of what is left.
        matrices: of Gram matrices that are held at once.
        checking: of the weight that the check widens while it runs the result beside the dense model.
        waiting: of the activations of all calibration batches where a consumer is observed, at the widest
            such place.
        running: of those of one batch on the way between two such places.
        solving: of what one consumer is repaired with.
        on_device: of a device that batches run on while the weights lie in files, with the weights between
            two places where a consumer is observed, one batch, and what one consumer is repaired with.
    """

    base: int
    weights: int
    repaired: int
    pruned: int
    matrices: int
    checking: int
    waiting: int
    running: int
    solving: int
    on_device: int

    @property
    def peak(self) -> int:
        """The most memory at once, with the weights in memory."""
        calibrating = self.repaired + self.waiting + self.running + self.matrices + self.solving
        return self.base + self.weights + max(calibrating, self.repaired + self.pruned + self.checking)

    def streamed(self, resident: int) -> int:
        """The most memory at once, with all that waits in files of which ``resident`` bytes are in memory
        (:func:`fasp_fx.offload`).
        """
        return self.base + min(resident, self.disk) + max(self.running + self.solving, self.checking)

    @property
    def disk(self) -> int:
        """Bytes of files, with all in them that :func:`fasp_fx.offload` puts there."""
        return self.weights + self.repaired + self.pruned + self.waiting + self.matrices


def forecast(
    analysis: Analysis, config: PruningConfig, batches: int, *, dtype: torch.dtype | None = None
) -> Forecast:
    """What it takes to prune an analysed model on calibration batches like its example.

    Args:
        analysis: of the model, which may lie on the meta device.
        config: what is asked for.
        batches: how many batches calibrate.
        dtype: of the weights; ``None``: as they are.
    """
    program, method = analysis.program, Method.of(config)
    consumers = list(Consumers(analysis).by_key.values())
    weights, read = program.weights(), {consumer.weight for consumer in consumers}
    largest = max(weights.values(), key=Tensor.numel, default=torch.empty(0))
    kind = largest.dtype if dtype is None else dtype
    pruned_of, repaired, total = (
        bytes_of_weights((tensor for name, tensor in weights.items() if name in names), kind)
        for names in (analysis.walk.facts.matrices, read, weights)
    )
    sparsity = expected_sparsity(config, analysis)
    needed = Needed(analysis, consumers, kind, sparsity)
    return Forecast(
        base=psutil.Process().memory_info().rss,
        weights=total,
        repaired=repaired,
        pruned=round(total - sparsity * pruned_of),
        waiting=batches * needed.waiting,
        running=needed.running,
        matrices=max(needed.pair, sum(needed.grams) if method.needs_measuring else 0),
        solving=needed.solving,
        checking=2 * DOUBLE * largest.numel(),  # as it is, and masked
        on_device=needed.on_device,
    )


def run(
    source: _models.Source,
    config: PruningConfig,
    heads_asked: bool | None,
    batches: int,
    length: int,
    dtype: str,
    device: torch.device,
    stages: Stages,
) -> None:
    """Say what it would take to prune a model on so many batches of one text of so many tokens.

    Args:
        heads_asked: of a plain checkpoint, as for :func:`fasp_fx.hf._plain.plain_config`; ``None``: no plain
            one.
        device: where batches are to run.

    Raises:
        FaspError: the model cannot be analysed, or not be pruned as asked for.
    """
    stages.begin("reading the configuration")
    empty = _models.load_empty(source)
    _models.check_length(empty, length)
    if heads_asked is not None:
        config = plain_config(empty, config, heads_asked)[2]
    stages.begin(CAPTURING)
    example = {"input_ids": torch.zeros(1, length, dtype=torch.long), "use_cache": False}
    analysis = analyze(empty, (), example, granularity=config.granularity, include=config.include)
    budget = budget_for(config, analysis.chosen, lambda cap: counted(analysis, cap))
    check_request(Method.of(config), budget, analysis.groups)
    found = forecast(analysis, config, batches, dtype=_models.dtype_of(empty, dtype))
    stages.end()
    there, streamed = psutil.virtual_memory().available + found.base, found.streamed(RESIDENT)
    say(
        f"memory: {found.peak / _GIB:.1f} GiB at most, or {streamed / _GIB:.1f} GiB with --stream and"
        f" {found.disk / _GIB:.1f} GiB of disk; {there / _GIB:.1f} GiB can be had"
    )
    say(
        f"of that {found.weights / _GIB:.1f} GiB dense weights, {found.pruned / _GIB:.1f} pruned,"
        f" {(found.waiting + found.running) / _GIB:.1f} activations, {found.matrices / _GIB:.1f} Gram"
        f" matrices, {found.solving / _GIB:.1f} for the repair of one weight"
    )
    if device.type != "cpu":
        say(f"with --stream, {found.on_device / _GIB:.1f} GiB of that on '{device}'")
    if found.peak > there:
        less = "not with --stream either: use fewer or shorter --batches"
        say(f"it does not fit: {'pass --stream' if streamed <= there else less}")

