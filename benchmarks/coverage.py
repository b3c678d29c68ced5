"""Coverage of model zoos: what is captured, prunable, frozen and why, how exact the pruned models are, and
how long it takes.

    python benchmarks/coverage.py transformers|torchvision|timm [--only NAME ...] [--out FILE.jsonl]
        [--redo-failed]
    python benchmarks/coverage.py transformers --table

Each model's record is appended to the file as soon as it is known; models that are in it already are skipped,
so an interrupted run goes on where it stopped. A worker process measures one model after the other; one that
crashes, hangs or runs out of memory is recorded as such, and the next model gets a fresh worker.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import time
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import Any

ZOOS = ("transformers", "torchvision", "timm")
#: models after which a worker is replaced, so that what the exporters keep does not pile up
MODELS_PER_WORKER = 25

Record = dict[str, Any]


def main() -> None:
    options = _arguments()
    if options.table:
        from zoos._table import table

        print(table(_read(options.out)))
    else:
        _run(options, options.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", choices=ZOOS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names or kinds of models")
    parser.add_argument(
        "--out", type=pathlib.Path, help="records, one JSON object a line (default: coverage-ZOO.jsonl)"
    )
    parser.add_argument("--redo-failed", action="store_true", help="measure again what failed")
    parser.add_argument(
        "--table", action="store_true", help="print the table of the records in the file, and a summary"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one model")
    parser.add_argument("--memory", type=float, default=12, help="GiB for the worker")
    options = parser.parse_args()
    options.out = options.out or pathlib.Path(f"coverage-{options.zoo}.jsonl")
    return options


def _read(path: pathlib.Path) -> dict[str, Record]:
    """The last record of each model; a line cut short by an interruption is passed over."""
    records: dict[str, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["name"]] = record
    return records


# --- the parent


def _run(options: argparse.Namespace, out: pathlib.Path) -> None:
    signal.signal(signal.SIGTERM, lambda *received: sys.exit(143))  # so that the worker ends too
    again = (None, True) if options.redo_failed else (None, True, False)
    done = {n for n, record in _read(out).items() if record["ok"] in again}
    worker = _worker(options)
    try:
        wanted = [
            model
            for model in worker.submit(_models, options.zoo).result()
            if (not options.only or {*model.values()} & {*options.only}) and model["name"] not in done
        ]
        for index, model in enumerate(wanted, 1):
            start = time.monotonic()
            try:
                record = worker.submit(_record, options, model["name"]).result(options.timeout)
            except (TimeoutError, BrokenExecutor) as problem:
                spent = time.monotonic() - start
                record = {**model, "captured": False, "ok": False, "stage": "worker"}
                record["error"] = f"no answer in {spent:.0f} s: {type(problem).__name__}"
                record["seconds"] = {"worker": round(spent, 1)}
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{index}/{len(wanted)} {_line(record)}", flush=True)
            if record.get("stage") == "worker" or index % MODELS_PER_WORKER == 0:
                _end(worker)
                worker = _worker(options)
    finally:
        _end(worker)


def _worker(options: argparse.Namespace) -> ProcessPoolExecutor:
    """A process that measures models, started when it is first asked."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_settle, initargs=(options.memory,))


def _end(worker: ProcessPoolExecutor) -> None:
    """End a process, whatever it is at."""
    for process in list((worker._processes or {}).values()):
        process.kill()
    worker.shutdown()


def _line(record: Record) -> str:
    seconds = " ".join(f"{stage} {value:.1f}" for stage, value in record["seconds"].items())
    mask = f"mask error {record['mask_error']:.1e}" if "mask_error" in record else ""
    reached = f"{record.get('sparsity', 0):.2f}/{record.get('max_sparsity', 0):.2f}"
    trouble = f"{record['stage']}: {record['error'][:150]!r}" if record.get("error") else ""
    return f"{record['name']}: ok={record['ok']} {reached} {mask} [{seconds}] {trouble}"


# --- the worker


def _settle(memory: float) -> None:
    """What models print goes nowhere, and their memory has an end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    warnings.simplefilter("ignore")
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@functools.cache
def _entries(zoo: str) -> dict[str, Any]:
    return {entry.name: entry for entry in importlib.import_module(f"zoos._{zoo}").entries()}


def _models(zoo: str) -> list[dict[str, str]]:
    return [{"name": entry.name, "kind": entry.kind} for entry in _entries(zoo).values()]


def _record(options: argparse.Namespace, name: str) -> Record:
    import torch
    from zoos._measure import measure

    found = measure(_entries(options.zoo)[name])
    torch._dynamo.reset()
    gc.collect()
    return found


if __name__ == "__main__":
    main()
