"""Say what a pruning will take before anything of it runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor, fx

from ..allocation._allocation import Search
from ..allocation._macs import macs_of
from ..allocation._search import passes
from ..analysis._analysis import Analysis
from ..base._device import multiplies_bfloat16
from ..base.compat import pytree
from ..calibration._needed import DOUBLE, SINGLE, Needed, Shape, bytes_of_weights
from ..calibration.observe._consumers import Consumer, Consumers
from ..capturing._fx import attribute
from ..capturing._sizes import Sizes
from ..errors import BudgetError
from ..pruning._allocating import expected_sparsity
from ..pruning._method import Method
from ..pruning.config import MEASURED, PruningConfig
from ._rates import copy_rate, factorisation_rate, product_rate

#: strengths of the ridge that are compared for a consumer, as a rule
_STRENGTHS = 4
#: how often as many bytes as a Gram matrix has are written until its consumer is repaired: 12 times each for
#: the tokens that are fitted and for those held out (added up in double precision, rounded, made whole, put
#: in order and scaled, and kept in between), 10 times for both (added in double precision, the system, its
#: factor), 5 for the systems of the strengths that are tried, and 6 for the products that errors are sums of
_COPIES = 45
#: of a square matrix of inner products, which is symmetric, so much is computed
_TRIANGLE = 0.6
#: forward and backward passes in forward passes
_BACK = 3.0
#: forward passes of the example inputs that capture and check take in all
_EXAMPLES = 10


@dataclass(frozen=True)
class Forecast:
    """What a pruning will take. Memory is in bytes.

    Attributes:
        base: what this process takes without the model.
        weights: of the dense model.
        repaired: of the weights that are repaired, which are kept until the model is rewritten.
        pruned: of what is left.
        waiting: of the activations of all calibration batches where a consumer is observed, at the widest
            such place.
        running: of those of one batch on the way between two such places.
        matrices: of Gram matrices that are held at once.
        solving: of what one consumer is repaired with.
        checking: of the weight that the check widens while it runs the result beside the dense model.
        on_device: of a device that batches run on while the weights lie in files, with the weights between
            two places where a consumer is observed, one batch, and what one consumer is repaired with.
        operations: floating-point operations, by step.
        seconds: predicted from what this machine did when it was measured, by step; ``None``: it was not.
    """

    base: int
    weights: int
    repaired: int
    pruned: int
    waiting: int
    running: int
    matrices: int
    solving: int
    checking: int
    on_device: int
    operations: dict[str, float]
    seconds: dict[str, float] | None

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
    analysis: Analysis,
    config: PruningConfig,
    batches: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    measure: bool = True,
) -> Forecast:
    """What it takes to prune an analysed model on calibration batches like its example.

    Args:
        analysis: of the model, which may lie on the meta device.
        config: what is asked for.
        batches: how many batches calibrate.
        dtype: of the weights; ``None``: as they are.
        device: where batches run and repairs are solved; ``None``: on the CPU.
        measure: try for some seconds how fast this machine is, to predict times.
    """
    program = analysis.program
    consumers = list(Consumers(analysis).by_key.values())
    weights = program.weights()
    largest = max(weights.values(), key=Tensor.numel, default=torch.empty(0))
    kind = largest.dtype if dtype is None else dtype
    total = bytes_of_weights(weights.values(), kind)
    read = {consumer.weight: attribute(program.module, consumer.weight) for consumer in consumers}
    linear = bytes_of_weights(
        (tensor for name, tensor in weights.items() if name in analysis.walk.facts.matrices), kind
    )
    method = Method.of(config)
    sparsity = expected_sparsity(config, analysis)
    needed = Needed(analysis, consumers, kind, sparsity)
    steps = _operations(analysis, method, needed.shapes, batches, sparsity, needed.sizes)
    found = Forecast(
        base=psutil.Process().memory_info().rss,
        weights=total,
        repaired=bytes_of_weights(read.values(), kind),
        pruned=round(total - sparsity * linear),
        waiting=batches * needed.waiting,
        running=needed.running,
        matrices=max(needed.pair, sum(needed.grams) if method.needs_measuring else 0),
        solving=needed.solving,
        checking=2 * DOUBLE * largest.numel(),  # as it is, and masked
        on_device=needed.on_device,
        operations={step: sum(done.values()) for step, done in steps.items()},
        seconds=None,
    )
    if not measure:
        return found
    where = device or torch.device("cpu")
    return replace(found, seconds=_seconds(method, needed.shapes.values(), steps, kind, where))


def _operations(
    analysis: Analysis,
    method: Method,
    shapes: Mapping[Consumer, Shape],
    batches: int,
    sparsity: float,
    sizes: Sizes,
) -> dict[str, dict[str, float]]:
    """Operations by step and kind (see :func:`_seconds`)."""
    config = method.config
    try:
        forward = 2.0 * macs_of(analysis).whole
    except BudgetError:  # an operator that is not counted: what weights do is most of it
        forward = sum(
            2.0 * _outputs(use.node, sizes) * columns
            for consumer, (_, _, columns) in shapes.items()
            for use in consumer.uses
        )
    gram = compared = tried = factored = solved = cut = 0.0
    for consumer, (rows, blocks, columns) in shapes.items():
        tokens = sum(_outputs(use.node, sizes) // max(rows * blocks, 1) for use in consumer.uses)
        kept, gone = (1 - sparsity) * columns, sparsity * columns
        gram += 2.0 * _TRIANGLE * blocks * tokens * columns**2
        compared += blocks * rows * columns**2  # errors, of symmetric matrices
        factored += blocks * kept**3 / 3
        tried += blocks * _STRENGTHS * kept**3 / 3
        unknowns = min(rows, gone) * kept**2
        errors = rows * (columns**2 + 4.0 * gone**2)
        solved += blocks * (2.0 * rows * kept * gone + 2.0 * unknowns + errors)
        cut += blocks * (columns**3 / 3 + gone * columns**2)
    found = {
        "capture and check": {"full": _EXAMPLES * forward},
        "running the batches": {"run": batches * forward},
        "Gram matrices": {"gram": batches * gram},
    }
    if config.restore is not None:
        found["choosing the ridge"] = {"single products": compared, "single factors": tried}
        found["repair"] = {"double products": solved, "double factors": factored}
    if method.needs_measuring:
        measured = max(1, -(-batches // MEASURED[config.quality]))
        found["measuring costs"] = {"run": measured * (_BACK * forward + 2 * gram) + cut}
    search = config.allocator
    if isinstance(search, Search):  # a batch may hold several sequences, of which it runs one
        found["searching"] = {
            "run": forward * passes(search.generations, search.offspring, min(search.sequences, batches))
        }
    return found


def _outputs(node: fx.Node, sizes: Sizes) -> int:
    """How many elements the first tensor has that a node makes."""
    made = next((leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)), None)
    return 0 if made is None else math.prod(sizes.integer(size) for size in made.shape)


def _seconds(
    method: Method,
    shapes: Collection[Shape],
    steps: dict[str, dict[str, float]],
    kind: torch.dtype,
    device: torch.device,
) -> dict[str, float]:
    """Times at the rates that are measured now, on matrices like those of the widest consumer."""
    rows, _, columns = max(shapes, key=lambda shape: shape[0] * shape[2], default=(1, 1, 1))
    precision = "medium" if multiplies_bfloat16(device) else "highest"
    tokens = 1024
    rates = {
        "run": product_rate(tokens, columns, rows, kind, precision, device),
        "full": product_rate(tokens, columns, rows, kind, "highest", torch.device("cpu")),
        "gram": product_rate(columns, tokens, columns, torch.float32, precision, device),
    }
    found = {}
    for step, done in steps.items():
        for one in done:
            if one not in rates:
                precise, of = one.split()
                dtype = torch.float32 if precise == "single" else torch.float64
                rates[one] = (
                    factorisation_rate(columns, dtype, device)
                    if of == "factors"
                    else product_rate(rows, columns, columns, dtype, "highest", device)
                )
        found[step] = sum(count / rates[one] for one, count in done.items())
    if "repair" in found:
        copied = sum(SINGLE * blocks * columns**2 for _, blocks, columns in shapes)
        found["repair"] += _COPIES * copied / copy_rate(device)
    return found


__all__ = ["Forecast", "forecast"]
