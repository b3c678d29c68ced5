"""``fasp-fx prune`` and ``inspect`` for exported programs: what ``torch.export.save`` wrote, in and out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from fasp_fx.analysis import Analysis
from fasp_fx.base import new_file, process, pytree, quiet, tensors_in, tolerable
from fasp_fx.capturing import Program, is_dynamic, upper_bound
from fasp_fx.errors import ArgumentError, CalibrationError, StoreError, first_line
from fasp_fx.pruning import PruningConfig, Report, Sweep, capture, prune, sweep

from ._console import CAPTURING, PROGRAM, Stages, console, groups_table, say, show_figures
from ._devices import find_device, together

#: what is written into the file beside the program
PLAN, REPORT = "fasp_fx_plan.json", "fasp_fx_report.json"
#: rows that are run at a time, where the program takes any number; and the part of them that is measured on
ROWS, HELD_OUT = 32, 5


@dataclass(frozen=True)
class Job:
    """What a command reads and writes.

    Attributes:
        model: the file of the dense program.
        out: the file to write; ``None``: none.
        overwrite: whether a program that was pruned before is replaced there.
        calibration: the file with a row for each sample, if any.
        device: where to calibrate; ``None``: on the accelerator if there is one.
        checkpoint: the folder that keeps the state of the work, if any.
    """

    model: Path
    out: Path | None
    overwrite: bool
    calibration: Path | None
    device: str | None
    checkpoint: Path | None


def load_program(file: Path) -> ExportedProgram:
    """The program of a file.

    Raises:
        StoreError: it is damaged, or of a version of torch that this one does not read.
    """
    try:
        with quiet():
            return torch.export.load(file)
    except tolerable(Exception) as error:  # what is in it may make the reader trip over anything
        raise StoreError(
            f"'{file}' cannot be read by torch {torch.__version__}: {first_line(error)}; give a file that"
            " torch.export.save wrote with this version, whole"
        ) from error


def load_structure(file: str) -> tuple[ExportedProgram, None]:
    """The program of a file, which brings its example along; errors as for :func:`load_program`."""
    return load_program(Path(file)), None


def report_in(file: str | Path) -> Report | None:
    """The report of a program that was pruned by this command; ``None`` of another.

    Raises:
        StoreError: the file is none that holds a program, or its report is damaged.
    """
    try:
        with ZipFile(file) as archive:
            name = next((name for name in archive.namelist() if name.endswith(f"/extra/{REPORT}")), None)
            return None if name is None else Report.from_json(archive.read(name).decode("utf-8"))
    except (BadZipFile, UnicodeDecodeError) as error:
        raise StoreError(f"'{file}' is no exported program: {first_line(error)}; export it again") from error


def run(job: Job, config: PruningConfig, stages: Stages) -> None:
    """Prune a program, measure how far it agrees with the dense one, and save it.

    Raises:
        FaspError: it cannot be done; nothing is written then but the checkpoint.
    """
    device, rank = find_device(job.device), process("RANK", 0)
    with _writing(None if rank else job.out, job.overwrite) as file:
        stages.begin("loading the program")
        dense = load_program(job.model)
        stages.begin(CAPTURING)
        captured = capture(dense, device=device)
        names = dense.graph_signature.user_inputs
        batches, held_out = read_batches(job.calibration, captured.program, names, device)
        example = captured.program.example
        # A program that was read from a folder of result.save has zeros in the place of its example.
        varies = any(bool(value.flatten().diff().any()) for value in tensors_in(example))
        stages.end()
        with together(device) as group:
            result = prune(
                captured,
                calibration=batches or None,
                config=config,
                checkpoint=job.checkpoint,
                group=group,
                on_analysis=lambda analysis: _show_groups(analysis, stages),
                progress=stages.update,
                held_out=held_out or [_batch(captured.program, pytree.tree_leaves(example))] * varies,
            )
        if rank:  # all processes have the same
            return
        what = "held out" if held_out else "the example inputs in the file, as none was held out"
        agreed = result.report.agreement
        report = replace(result.report, agreement=agreed and replace(agreed, source=what))
        if file is not None:
            stages.begin("saving")
            home = next((tensor.device for tensor in dense.state_dict.values()), device)
            smaller = result.program if home == device else move_to_device_pass(result.program, home)
            extra = {PLAN: result.plan.to_json(), REPORT: report.to_json()}
            with quiet(), file.open("wb") as stream:
                sink = _Sink(stream)
                torch.export.save(smaller, sink, extra_files=extra)  # type: ignore[arg-type]
                sink.check()
    stages.end()
    show_figures(report)
    if not batches:
        say("channels went by magnitudes, and nothing was repaired: with rows of --calibration less is lost")
    say("nothing was written" if file is None else f"saved in {job.out}; load it with torch.export.load")


def swept(model: str, file: Path, device: torch.device, stages: Stages, how: dict[str, Any]) -> Sweep:
    """What :func:`fasp_fx.sweep` finds of a program, on the rows of a file."""
    stages.begin(CAPTURING)
    dense = load_program(Path(model))
    captured, names = capture(dense, device=device), dense.graph_signature.user_inputs
    batches, held_out = read_batches(file, captured.program, names, device)
    stages.begin("sweeping")
    return sweep(captured, calibration=batches, progress=stages.update, held_out=held_out, **how)


class _Sink:
    """Takes what is written until the disk is full: an error inside of torch's writer ends the process."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.stream.write(data)
                self.stream.flush()
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None: ...

    def check(self) -> None:
        """Raise what was met."""
        if self.error is not None:
            raise self.error


def _show_groups(analysis: Analysis, stages: Stages) -> None:
    console().print(groups_table(analysis))
    stages.begin("pruning")


@contextmanager
def _writing(out: Path | None, overwrite: bool) -> Iterator[Path | None]:
    """A file to write, which appears as ``out`` when the block ends; ``None`` where there is none.

    Raises:
        StoreError: something is there that must not be replaced, or it cannot be written.
        ArgumentError: it is not called as an exported program is.
    """
    if out is None:
        yield None
        return
    if out.suffix != PROGRAM:
        raise ArgumentError(
            f"--out '{out}' is to hold an exported program; give it a name that ends in {PROGRAM}"
        )
    if out.exists() and not overwrite:
        raise StoreError(
            f"'{out}' exists; choose another path, or pass overwrite=True to replace an earlier save"
        )
    with new_file(out, replaceable=lambda file: is_zipfile(file) and bool(report_in(file))) as file:
        yield file


# --- Rows of a file as batches.


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": load_file,
    ".npz": lambda file: {
        name: torch.from_numpy(rows) for name, rows in np.load(file, allow_pickle=False).items()
    },
    ".pt": lambda file: torch.load(file, map_location="cpu", weights_only=True),
}


def read_rows(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        CalibrationError: it holds something else, or cannot be read.
    """
    advice = f"give a file ({', '.join(_READERS)}) with a tensor for each input of the program, by its name"
    if file.suffix not in _READERS:
        raise CalibrationError(f"'{file}' is none of a kind that is read; {advice}")
    try:
        rows = _READERS[file.suffix](file)
    except tolerable(Exception) as error:  # what is in it may make a reader trip over anything
        raise CalibrationError(f"'{file}' cannot be read: {first_line(error)}; {advice}") from error
    if not isinstance(rows, dict) or not all(isinstance(value, Tensor) for value in rows.values()):
        raise CalibrationError(f"'{file}' does not hold tensors by name; {advice}")
    return rows


def read_batches(
    file: Path | None, program: Program, names: Collection[Any], device: torch.device
) -> tuple[list[Any], list[Any]]:
    """The rows of a file as batches to calibrate on, and as batches to measure on: the last fifth, or none.

    Args:
        names: of the program's inputs in the file, in their order.

    Raises:
        CalibrationError: the file does not hold what the program takes; names the input.
    """
    if file is None:
        return [], []
    rows = read_rows(file)
    inputs = {
        name: value.shape[0]
        for name, node in zip(names, program.placeholders(), strict=True)
        if isinstance(value := node.meta["val"], Tensor) and value.dim()
    }
    if rows.keys() != inputs.keys():
        raise CalibrationError(
            f"'{file}' holds {_listed(rows)}, and the program takes {_listed(inputs)}; give it a tensor for"
            " each of these, with a row for each sample"
        )
    counts = {name: len(tensor) if tensor.dim() else 0 for name, tensor in rows.items()}
    count = min(counts.values())
    if len({*counts.values()}) > 1 or not count:
        raise CalibrationError(f"'{file}' does not hold a row for each sample of every input: {counts}")
    fixed = {size for size in inputs.values() if not is_dynamic(size)}
    if len(fixed) > 1 or count < min(fixed, default=1):
        raise CalibrationError(
            f"the program takes {_listed(fixed)} samples at a time, and '{file}' holds {count}; export it"
            " with a batch that is free (dynamic_shapes=), or give more rows"
        )
    most = min((upper_bound(size) or ROWS for size in inputs.values() if is_dynamic(size)), default=ROWS)
    size = min(fixed, default=min(most, ROWS))
    whole = size if fixed else 1
    held_out = count // HELD_OUT // whole * whole
    ends = (0, (count - held_out) // whole * whole, count // whole * whole)
    example = pytree.tree_leaves(program.example)

    def between(start: int, stop: int) -> list[Any]:
        pieces = np.array_split(np.arange(start, stop), -(-(stop - start) // size)) if stop > start else []
        return [
            _batch(
                program,
                [
                    rows[name][piece[0] : piece[-1] + 1].to(device) if name in inputs else leaf
                    for name, leaf in zip(names, example, strict=True)
                ],
            )
            for piece in pieces
        ]

    return between(*ends[:2]), between(*ends[1:])


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "nothing"


def _batch(program: Program, leaves: list[Any]) -> Any:
    """A batch as the library takes it, of what the graph's inputs are given."""
    _, structure = pytree.tree_flatten(program.example)
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    return {**dict(zip(program.signature.given(), args)), **kwargs} if kwargs else args
