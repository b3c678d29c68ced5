"""``fasp-fx prune`` and ``fasp-fx recover``: text, pruning, recovering, measuring, saving; and with
``--dry-run`` what it would take of memory and disk.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, fx

from ..allocation.budgets import Bytes
from ..analysis._analysis import Analysis
from ..base._offload import RESIDENT, offload
from ..base._progress import process
from ..base._tolerable import tolerable
from ..base.compat import pytree
from ..calibration._consumers import Consumers
from ..capturing._fx import viewed
from ..capturing._sizes import Sizes
from ..errors import ArgumentError, StoreError, first_line
from ..hf import Pruned, convert, prune
from ..hf._folder import KIND, OWN, PLAIN
from ..hf._formats import FORMATS, config_for
from ..hf._stages import pruned_already
from ..pruning._allocating import budget_for, check_request, expected_sparsity
from ..pruning._calibrating import Method
from ..pruning._prune import analyze
from ..pruning.config import PruningConfig
from ..pruning.report import Figure
from ..pruning.report import counted as counted_weights
from ..storage._folder import is_save, new_save, refuse_other
from ..training.recovery import DistillationConfig, distil
from . import _models
from ._console import CAPTURING, Stages, console, figures_table, groups_table, say
from ._models import Texts
from .evaluation import agreement, latency

_GIB = 2**30
#: weights of float64 and of float32 take so many bytes
DOUBLE, SINGLE = 8, 4


@dataclass(frozen=True)
class Forecast:
    """What a pruning will take, in bytes.

    Attributes:
        peak: the most memory at once, with the weights in memory.
        streamed: the most with all that waits in files (:func:`fasp_fx.offload`).
        disk: of files, with all in them that is put there.
    """

    peak: int
    streamed: int
    disk: int


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
    module, weights = analysis.program.module, analysis.program.weights()
    consumers = list(Consumers(analysis).by_key.values())
    read = {consumer.weight: consumer.matrices for consumer in consumers}
    largest = max(weights.values(), key=Tensor.numel, default=torch.empty(0))
    kind = largest.dtype if dtype is None else dtype
    pruned_of, repaired, total = (
        bytes_of_weights((tensor for name, tensor in weights.items() if name in names), kind)
        for names in (analysis.walk.facts.matrices, read, weights)
    )
    sparsity = expected_sparsity(config, analysis)
    sizes = Sizes(module, small=False)
    live = live_bytes(module.graph, lambda shape: map(sizes.integer, shape))
    place = {node: index for index, node in enumerate(module.graph.nodes)}
    stops = [place[use.node] for consumer in consumers for use in consumer.uses]
    narrower = kind.itemsize / largest.dtype.itemsize
    # of each consumer, the Gram matrices of fitted tokens and of those held out; of the widest, as they are
    # accumulated, made whole, and in the order of the system
    grams = [2 * SINGLE * len(own.columns) * own.columns.shape[1] ** 2 for own in read.values()]
    # The Gram matrix of one block, what is kept of it twice, the rows, and what is solved for.
    solving = [
        SINGLE * columns * (3 * columns + 2 * own.rows(weights[name]) // len(own.columns))
        for name, own in read.items()
        for columns in own.columns.shape[1:2]
    ]
    pruned = round(total - sparsity * pruned_of)
    # Activations of all batches wait where a consumer is observed, repaired weights for the rewriting.
    waiting = batches * round(max((live[stop] for stop in stops), default=0) * narrower)
    matrices = max(3 * max(grams, default=0), sum(grams) if Method.of(config).needs_measuring else 0)
    running = round(max(live[: max(stops, default=0) + 1], default=0) * narrower)
    computing = running + max(solving, default=0)
    checking = 2 * DOUBLE * largest.numel()  # the check widens a weight, as it is and masked
    disk = total + repaired + pruned + waiting + matrices
    base = psutil.Process().memory_info().rss
    return Forecast(
        peak=base + total + repaired + max(waiting + matrices + computing, pruned + checking),
        streamed=base + min(RESIDENT, disk) + max(computing, checking),
        disk=disk,
    )


def bytes_of_weights(tensors: Iterable[Tensor], kind: torch.dtype) -> int:
    """Of different tensors, if those of real numbers had a type."""
    different = {id(tensor): tensor for tensor in tensors}.values()
    return sum(
        tensor.numel() * (kind if tensor.is_floating_point() else tensor.dtype).itemsize
        for tensor in different
    )


def live_bytes(graph: fx.Graph, sizes: Callable[[torch.Size], Iterable[int]]) -> list[int]:
    """Bytes of all values that have been made and will be used again, after each node, in graph order; views
    and weights take none.

    What the program returns is not kept for that (see :class:`fasp_fx.capturing._runner.Runner`).

    Args:
        sizes: a recorded shape as numbers.
    """
    dies: dict[fx.Node, int] = {}
    for index, node in enumerate(graph.nodes):
        if node.op != "output":
            dies |= {viewed(value): index for value in (node, *node.all_input_nodes)}
    change = [0] * (len(graph.nodes) + 1)
    for index, node in enumerate(graph.nodes):
        if node in dies and node.op != "get_attr":
            made = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
            taken = sum(math.prod(sizes(leaf.shape)) * leaf.dtype.itemsize for leaf in made)
            change[index] += taken
            change[dies[node] + 1] -= taken  # what a node reads is there while it is executed
    return list(accumulate(change[:-1]))


def say_needs(
    model: str,
    config: PruningConfig,
    format: str,
    texts: Texts,
    dtype: str,
    stages: Stages,
) -> None:
    """Say what it would take to prune a model on batches of one text each.

    Args:
        format: of the files.

    Raises:
        FaspError: the model cannot be analysed, or not be pruned as asked for.
    """
    stages.begin("reading the configuration")
    empty: Any = _models.load_empty(model)
    _models.check_length(empty, texts.length)
    if format != OWN:
        config, _ = config_for(format, empty, config)
    stages.begin(CAPTURING)
    example = {
        "input_ids": torch.zeros(1, texts.length, dtype=torch.long),
        "use_cache": config.counts_cache,
    }
    analysis = analyze(empty, (), example, granularity=config.granularity, include=config.include)
    budget = budget_for(config, analysis)
    check_request(Method.of(config), budget, analysis.groups)
    kind = empty.dtype if dtype == "auto" else getattr(torch, dtype)
    found = forecast(analysis, config, texts.batches if texts.used is None else len(texts.used), dtype=kind)
    stages.end()
    say(
        f"memory: {found.peak / _GIB:.1f} GiB at most, or {found.streamed / _GIB:.1f} GiB with --stream and"
        f" {found.disk / _GIB:.1f} GiB of disk; {psutil.virtual_memory().available / _GIB:.1f} GiB are free"
    )


#: tokens of a step of training, and of each text of it, as far as whole chunks allow: for as many tokens,
#: short texts teach as much as long ones, and attention sees less (docs/benchmarks.md)
STEP, TEXT = 1024, 256


def recover(result: Pruned, dense: Any, chunks: Tensor, stages: Stages, **options: Any) -> Pruned:
    """Train a pruned model on chunks ``[chunks, length]`` towards the dense one.

    Args:
        options: for :func:`fasp_fx.distil`.
    """
    stages.begin(f"recovering on {chunks.shape[0]} x {chunks.shape[1]} tokens")
    return distil(result, dense, training_steps(chunks), progress=stages.update, **options)


def training_steps(chunks: Tensor) -> tuple[Tensor, ...]:
    """Cut chunks ``[chunks, length]`` into equal texts and put these together to steps ``[texts, tokens]``,
    of which there are two at least: one is held out.
    """
    count, length = chunks.shape
    parts = -(-length // TEXT)
    texts = chunks.reshape(count * parts, -1) if length % parts == 0 else chunks
    return texts.split(max(1, min(STEP // texts.shape[1], len(texts) // 2)))


def measure(dense: Any, result: Pruned, texts: Texts, stages: Stages) -> tuple[Figure, ...]:
    """Latency of the dense and of the pruned model, and how they predict the same text."""
    chunks = texts.evaluation
    assert chunks is not None
    stages.begin("measuring latency")
    times = latency([dense, result.model], chunks[:1], progress=stages.update)
    stages.begin("measuring how far both models agree")
    found = agreement(dense, result.model, chunks, stages.update)
    (divergence, spread), (same, doubt) = found.divergence, found.same
    return (
        Figure(f"milliseconds for one chunk of {chunks.shape[1]} tokens", times[0] * 1e3, times[1] * 1e3, 1),
        Figure(texts.label, *found.perplexities, 3),
        Figure(f"divergence from the dense model, nats a token (± {spread:.3f})", 0.0, divergence, 3),
        Figure(f"next tokens as the dense model's, percent (± {100 * doubt:.1f})", 100.0, 100 * same, 1),
    )


def show(result: Pruned, out: Path) -> None:
    """Print what was saved in a folder: figures, notes, and how to load it."""
    report = result.report
    name = "bytes of cache per token of one sequence"
    cache = () if report.cache is None else (Figure(name, *report.cache),)
    sizes = (Figure("parameters", *report.parameters), Figure("bytes", *report.bytes))
    console().print(figures_table([*sizes, *cache, *report.figures]))
    asked = "" if report.requested is None else f" (asked for {report.requested:.2%})"
    recovery = report.recovery
    loader = " after `import fasp_fx`" if result.format == OWN else ""
    code = ", trust_remote_code=True" if type(result.model)._auto_class is not None else ""
    file = out / "model.gguf"
    for line in (
        f"removed {report.sparsity:.2%} of the linear weights of {counted_weights(report.include)}{asked}",
        *(f"budget: {spent}" for spent in report.budgets),
        *(() if recovery is None else (f"recovered: {recovery}",)),
        *(f"note: {note}" for note in (*(recovery.notes if recovery is not None else ()), *report.notes)),
        f"saved in {out}; load it{loader} with",
        f'  transformers.AutoModelForCausalLM.from_pretrained("{out}"{code})',
        *([f"or run it in llama.cpp: llama-cli -m {file}"] if file.is_file() else []),
    ):
        say(line)


def check_target(out: Path, *, overwrite: bool, own: bool) -> None:
    """Refuse a folder that could not be written later.

    Raises:
        StoreError: something is there that must not be replaced, or the folder cannot be made.
    """
    with new_save(out.absolute(), KIND if own else PLAIN, overwrite=overwrite, keep=False):
        pass


def check_room(out: Path, model: Any, format: str, kept: float = 1.0) -> None:
    """Refuse a folder on a disk that has no room for a model.

    Args:
        kept: the part of the model's bytes that will be left at least.

    Raises:
        StoreError: says how many bytes it takes, and how many are free.
    """
    files = {None, FORMATS[format].stored if format != OWN else None}  # a GGUF file comes besides
    needed = kept * sum(Bytes(1.0, stored).held(model.parameters()) for stored in files)
    there = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise StoreError(
            f"'{out}' will take {needed / _GIB:.3g} GiB at least, and {free / _GIB:.3g} GiB are free there;"
            " free some, or give another --out"
        )


@contextmanager
def saving(out: Path, overwrite: bool, stages: Stages, made: list[Pruned]) -> Iterator[None]:
    """Save the last that was made, whole or not at all, even if it could not be improved or measured."""
    try:
        yield
    finally:
        stages.begin("saving")
        made[-1].save_pretrained(out, overwrite=overwrite)
        stages.end()


def recover_and_save(
    folder: str,
    dense: str,
    out: Path,
    texts: Texts,
    config: DistillationConfig,
    checkpoint: Path | None,
    device: str | None,
    overwrite: bool,
    stages: Stages,
) -> None:
    """Do what the command says, as its help describes it.

    Raises:
        FaspError: it cannot be met; nothing is written then but the checkpoint.
    """
    check_target(out, overwrite=overwrite, own=is_save(Path(folder), KIND))
    _models.quieten()
    where = _models.find_device(device)
    stages.begin("loading the models and the text")
    made = [_models.load_pruned(Path(folder), where)]
    check_room(out, made[0].model, made[0].format)
    tokenizer, pruned = made[0].tokenizer, made[0].model
    texts.read(tokenizer)
    teacher = _models.load_model(dense, dtype=str(pruned.dtype).removeprefix("torch."), device=where)
    texts.check_against(teacher)
    torch.manual_seed(texts.seed)
    texts.write(teacher, tokenizer, stages)
    assert texts.used is not None
    made.append(recover(made[0], teacher, texts.used, stages, config=config, checkpoint=checkpoint))
    with saving(out, overwrite, stages, made):
        made.append(made[-1].with_report(figures=measure(teacher, made[-1], texts, stages)))
    show(made[-1], out)


def convert_and_save(folder: str, out: Path, format: str, overwrite: bool, stages: Stages) -> None:
    """Do what the command says, as its help describes it.

    Raises:
        FaspError: it cannot be met; nothing is written then.
    """
    check_target(out, overwrite=overwrite, own=False)
    if format == OWN:
        raise ArgumentError(f"nothing is converted to --format {OWN}, which prune writes; give another")
    _models.quieten()
    stages.begin("loading the model")
    pruned = _models.load_pruned(Path(folder), torch.device("cpu"))
    check_room(out, pruned.model, format)
    stages.begin("converting")
    made = convert(pruned, format)
    with saving(out, overwrite, stages, [made]):
        pass
    show(made, out)


def run(
    model: str,
    out: Path,
    config: PruningConfig,
    texts: Texts,
    stages: Stages,
    *,
    epochs: int,
    device: str | None,
    dtype: str,
    format: str,
    overwrite: bool,
    checkpoint: Path | None,
    dry_run: bool,
    scratch: Path | None,
) -> None:
    """Do what the command says, as its help describes it.

    Args:
        config: how to prune.
        texts: what to calibrate and to measure on.
        epochs: of the training that follows.
        scratch: where the weights are kept; ``None``: in memory.

    Raises:
        FaspError: it cannot be met; nothing is written then.
    """
    if epochs and scratch is not None:
        raise ArgumentError(
            "--recover trains all weights at once, which --stream avoids to hold; run fasp-fx recover"
            " afterwards, or leave one out"
        )
    check_target(out, overwrite=overwrite, own=format == OWN)
    if checkpoint is not None:
        refuse_other(checkpoint, "--checkpoint")
        if out.absolute() in (checkpoint.absolute(), *checkpoint.absolute().parents):
            raise ArgumentError(f"--checkpoint '{checkpoint}' lies in --out '{out}'; give another folder")
    if _models.is_saved(model):
        raise pruned_already(f"'{model}'")
    _models.quieten()
    where = _models.find_device(device)
    torch.manual_seed(texts.seed)
    if not dry_run or texts.file is not None:
        stages.begin("loading the tokenizer and the text")
        tokenizer = _models.load_tokenizer(model)
        texts.read(tokenizer)
    if dry_run:
        say_needs(model, config, format, texts, dtype, stages)
        return
    with offload(scratch, device=where) if scratch is not None else nullcontext() as kept:
        stages.begin("loading the model")
        home = where if kept is None else "cpu"
        dense = _models.load_model(model, dtype=dtype, device=home, scratch=kept)
        texts.check_against(dense)
        if config.needs_data:
            texts.write(dense, tokenizer, stages)
        chunks = texts.used if config.needs_data else None
        with _together(where) as group:
            asked: dict[str, Any] = {"group": group, "checkpoint": checkpoint, "format": format}
            made = [_pruned(dense, tokenizer, chunks, stages, out, config=config, **asked)]
        if process("RANK", 0):  # all processes have the same
            return
        with saving(out, overwrite, stages, made):
            texts.write(dense, tokenizer, stages)
            if epochs:
                assert texts.used is not None
                made.append(recover(made[0], dense, texts.used, stages, epochs=epochs, seed=texts.seed))
            made.append(made[-1].with_report(figures=measure(dense, made[-1], texts, stages)))
    show(made[-1], out)


def _pruned(
    model: Any, tokenizer: Any, chunks: Tensor | None, stages: Stages, out: Path, **options: Any
) -> Pruned:
    """What :func:`fasp_fx.hf.prune` gives, with stages for what it does, if there is room for it."""
    device = next(model.parameters()).device
    batches = None if chunks is None else [{"input_ids": chunk[None].to(device)} for chunk in chunks]

    def show_groups(analysis: Analysis) -> None:
        stages.end()
        check_room(out, model, options["format"], 1 - expected_sparsity(options["config"], analysis))
        console().print(groups_table(analysis))
        if chunks is not None:
            stages.begin(f"calibrating on {len(chunks)} x {chunks.shape[1]} tokens")

    def calibrated(fraction: float) -> None:
        stages.update(fraction)
        if fraction >= 1:
            stages.begin("rewriting the model")

    stages.begin(CAPTURING)
    told: dict[str, Any] = {"progress": calibrated, "on_analysis": show_groups}
    return prune(model, tokenizer, calibration=batches, **told, **options)


@contextmanager
def _together(device: torch.device) -> Iterator[dist.ProcessGroup | None]:
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
