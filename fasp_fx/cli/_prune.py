"""``fasp-fx prune`` and ``fasp-fx recover``: text, pruning, recovering, measuring, saving; and with
``--dry-run`` what it would take of memory and disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ..allocation.budgets import CacheBytes
from ..analysis._analysis import Analysis
from ..base._offload import RESIDENT, offload
from ..base._tolerable import tolerable
from ..calibration._consumers import Consumers
from ..calibration._needed import DOUBLE, Needed, bytes_of_weights
from ..errors import ArgumentError, first_line
from ..hf import Pruned, prune
from ..hf._plain import plain_config
from ..hf._stages import pruned_already
from ..interop.page import check_page, write_page
from ..pruning._allocating import budget_for, check_request, counted, expected_sparsity
from ..pruning._method import Method
from ..pruning._prune import analyze
from ..pruning.config import PruningConfig
from ..pruning.report import Figure
from ..pruning.report import counted as counted_weights
from ..storage._run_folder import refuse_other
from ..training.recovery import DistillationConfig, distil
from . import _models
from ._console import CAPTURING, Stages, console, figures_table, process, say, summary
from ._options import check_target
from ._text import Texts
from .evaluation import latency, perplexity

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


def say_needs(
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


#: tokens of a step of training, and of each text of it, as far as whole chunks allow: for as many tokens,
#: short texts teach as much as long ones, and attention sees less (docs/benchmarks.md)
STEP, TEXT = 1024, 256


def recover(result: Pruned, dense: Any, chunks: Tensor, stages: Stages, **options: Any) -> Pruned:
    """Train a pruned model on chunks ``[chunks, length]`` towards the dense one.

    Args:
        options: for :func:`fasp_fx.distil`.
    """
    stages.begin(f"recovering on {chunks.shape[0]} x {chunks.shape[1]} tokens", measured=True)
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
    """Latency and perplexity of the dense and of the pruned model."""
    chunks = texts.evaluation
    assert chunks is not None
    stages.begin("measuring latency", measured=True)
    times = latency([dense, result.model], chunks[:1], progress=stages.update)
    values = []
    for name, module in (("dense", dense), ("pruned", result.model)):
        stages.begin(f"measuring perplexity of the {name} model", measured=True)
        values.append(perplexity(module, chunks, progress=stages.update))
    return (
        Figure(f"milliseconds for one chunk of {chunks.shape[1]} tokens", times[0] * 1e3, times[1] * 1e3, 1),
        Figure(texts.label, values[0], values[1], 3),
    )


def save(result: Pruned, out: Path, overwrite: bool, stages: Stages) -> None:
    """Write a folder, whole or not at all."""
    stages.begin("saving")
    result.save_pretrained(out, overwrite=overwrite)
    stages.end()


def show(result: Pruned, out: Path) -> None:
    """Print what was saved in a folder: figures, notes, and how to load it."""
    report = result.report
    name = "bytes of cache per token of one sequence"
    cache = () if report.cache is None else (Figure(name, *report.cache),)
    sizes = (Figure("parameters", *report.parameters), Figure("bytes", *report.bytes))
    console().print(figures_table([*sizes, *cache, *report.figures]))
    asked = "" if report.requested is None else f" (asked for {report.requested:.2%})"
    recovery = report.recovery
    for line in (
        f"removed {report.sparsity:.2%} of the linear weights of {counted_weights(report.include)}{asked}",
        *(f"budget: {spent}" for spent in report.budgets),
        *(() if recovery is None else (f"recovered: {recovery}",)),
        *(f"note: {note}" for note in (*(recovery.notes if recovery is not None else ()), *report.notes)),
        f"saved in {out}; load it with",
        *(f"  {line}" for line in result.loading(out)),
    ):
        say(line)


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
    texts.check("--data")
    if _models.is_saved(dense):
        raise ArgumentError(
            f"--dense '{dense}' is a model that was pruned; give the dense one that it was made of"
        )
    plain = not _models.is_saved(folder)
    check_target(out, overwrite=overwrite, plain=plain, checkpoint=checkpoint)
    _models.quieten()
    where = _models.find_device(device)
    source = _models.Source.of(dense)
    stages.begin("loading the models and the text")
    result = _models.load_pruned(Path(folder), where)
    texts.read(result.tokenizer, least=2)
    dtype = next(parameter.dtype for parameter in result.model.parameters() if parameter.is_floating_point())
    teacher = _models.load_model(source, dtype=str(dtype).removeprefix("torch."), device=where)
    _models.check_length(teacher, texts.length)
    texts.check_against(teacher, result.tokenizer)
    torch.manual_seed(texts.seed)
    texts.write(teacher, result.tokenizer, stages)
    assert texts.used is not None
    result = recover(result, teacher, texts.used, stages, config=config, checkpoint=checkpoint)
    try:
        result = result.with_report(figures=measure(teacher, result, texts, stages))
    finally:  # what was learned is kept even if it could not be measured
        save(result, out, overwrite, stages)
    show(result, out)


#: the weights, what is repaired of them, and what is left of them
_COPIES = 2.2


def run(
    model: str,
    out: Path,
    config: PruningConfig | None,
    options: dict[str, Any],
    texts: Texts,
    stages: Stages,
    *,
    epochs: int,
    device: str | None,
    dtype: str,
    plain: bool,
    overwrite: bool,
    html: Path | None,
    checkpoint: Path | None,
    dry_run: bool,
    stream: bool,
    scratch: Path | None,
) -> None:
    """Do what the command says, as its help describes it.

    Args:
        config, options: how to prune, as :func:`fasp_fx.prune` takes them.
        texts: what to calibrate and to measure on.
        epochs: of the training that follows.

    Raises:
        FaspError: it cannot be met; nothing is written then.
    """
    whole = PruningConfig.of(config, options)
    for met, conflict in (
        (plain and whole.budgets, "a budget cannot go with --plain, whose steps are coarse; give --sparsity"),
        (
            plain and (whole.include or whole.exclude),
            "--include and --exclude cannot go with --plain: no config says what is left of such groups;"
            " leave one of them out",
        ),
        (
            epochs and texts.batches < 2,
            "--recover needs at least two --batches, of which one is held out",
        ),
        (
            epochs and stream,
            "--recover trains all weights at once, which --stream avoids to hold; run fasp-fx recover"
            " afterwards, or leave one out",
        ),
        (
            scratch is not None and not stream,
            f"--scratch {scratch} says where --stream keeps the weights; pass --stream, or leave it out",
        ),
        (
            dry_run and any(isinstance(cap, CacheBytes) for cap in whole.budgets),
            "--cache-bytes is counted of the program that generates, which --dry-run does not make; give it"
            " --sparsity or another budget",
        ),
    ):
        if met:
            raise ArgumentError(conflict)
    texts.check("--calibration")
    others = {"html": html, "checkpoint": checkpoint, "scratch": scratch}
    check_target(out, overwrite=overwrite, plain=plain, **others)
    if checkpoint is not None:
        refuse_other(checkpoint, "--checkpoint")
    if _models.is_saved(model):
        raise pruned_already(f"'{model}'")
    if html is not None:
        check_page(html)
    _models.quieten()
    where, source = _models.find_device(_own_device(device)), _models.Source.of(model)
    torch.manual_seed(texts.seed)
    if not dry_run or texts.file is not None:
        stages.begin("loading the tokenizer and the text")
        tokenizer = _models.load_tokenizer(source)
        texts.read(tokenizer, least=2 if epochs else 1)
    if dry_run:
        heads = "granularity" in options if plain else None
        batches = texts.batches if texts.used is None else len(texts.used)
        say_needs(source, whole, heads, batches, texts.length, dtype, where, stages)
        return
    stream = stream or (where.type == "cpu" and not epochs and _is_too_large(source, dtype, stages))
    folder = scratch or out.absolute().parent
    with offload(folder, device=where) if stream else nullcontext() as kept:
        stages.begin("loading the model")
        dense = _models.load_model(source, dtype=dtype, device="cpu" if stream else where, scratch=kept)
        _models.check_length(dense, texts.length)
        texts.check_against(dense, tokenizer)
        with _together(where) as group:
            shared: dict[str, Any] = {"group": group, "checkpoint": checkpoint, "config": config}
            result = _pruned(dense, tokenizer, texts, stages, plain, whole.needs_data, **shared, **options)
        if process("RANK", 0):  # all processes have the same
            return
        try:
            texts.write(dense, tokenizer, stages)
            if epochs:
                assert texts.used is not None
                result = recover(result, dense, texts.used, stages, epochs=epochs, seed=texts.seed)
            result = result.with_report(figures=measure(dense, result, texts, stages))
        finally:  # what was pruned is kept even if it could not be recovered or measured
            save(result, out, overwrite, stages)
    if html is not None:
        write_page(result.report, f"{source}, {result.report.sparsity:.0%} removed", html)
    show(result, out)


def _pruned(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    stages: Stages,
    plain: bool,
    needs_data: bool,
    **options: Any,
) -> Pruned:
    """What :func:`fasp_fx.hf.prune` gives, with stages for what it does."""
    analysed: list[Analysis] = []

    def batches() -> Iterator[dict[str, Any]]:
        is_written = texts.used is None  # only when the first batch is asked for
        texts.write(model, tokenizer, stages)
        if not analysed:  # the first is the example that the model is captured with
            stages.begin(CAPTURING)
        elif is_written:
            begin_calibrating()
        assert texts.used is not None
        for chunk in texts.used:
            yield {"input_ids": chunk[None].to(next(model.parameters()).device)}

    def begin_calibrating() -> None:
        assert texts.used is not None
        stages.begin(f"calibrating on {len(texts.used)} x {texts.length} tokens", measured=True)

    def show_groups(analysis: Analysis) -> None:
        stages.end()
        for line in summary(analysis):
            say(line)
        analysed.append(analysis)
        if texts.used is not None and needs_data:
            begin_calibrating()

    def calibrated(fraction: float) -> None:
        stages.update(fraction)
        if fraction >= 1:
            stages.begin("rewriting the model")

    stages.begin("trying out what the config can say" if plain else CAPTURING)
    return prune(
        model,
        tokenizer,
        calibration=batches(),
        plain=plain,
        progress=calibrated,
        on_analysis=show_groups,
        **options,
    )


def _is_too_large(source: _models.Source, dtype: str, stages: Stages) -> bool:
    """Whether the weights have to be kept in files; says so."""
    needed, there = _COPIES * _models.weight_bytes(source, dtype), psutil.virtual_memory().available
    if needed > there:
        stages.console.print(
            f"the model takes some {needed / 2**30:.1f} GiB, of {there / 2**30:.1f} that can be had: its"
            " weights are kept in files, as with --stream"
        )
    return needed > there


def _own_device(name: str | None) -> str | None:
    """The device of this process, if none is named: of several accelerators the one of its number on this
    machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is not None or process("WORLD_SIZE", 1) == 1 or accelerator is None:
        return name
    return f"{accelerator.type}:{process('LOCAL_RANK', 0) % torch.accelerator.device_count()}"


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
