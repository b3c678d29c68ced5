"""Every route that a pruned program can take, on SmolLM2 (20 %, round_to=16) and on a ResNet-18: size,
latency, deviation from the eager pruned module.

SmolLM2 is calibrated and repaired on real text, and reads real text: pruned by magnitude it amplifies
rounding so much that float32 itself is 10⁻³ from float64, and no route can be told from another.

Prints one markdown table per model. Sizes are those of the file, or of the weights in memory. Latency is the
median of rounds in which the route and the eager pruned module take turns; the ratio is the median of the
pairs. A route that fails prints its reason. ``--routes`` picks some, and rows that ``--out`` holds already
are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _protocol import EVALUATION, arguments, chunks, smollm2
from fasp_fx.quantise import quantise, weight_bytes
from torch import Tensor, nn

import fasp_fx
from fasp_fx.testing.oracle import error

Route = Callable[["Subject", pathlib.Path], tuple[Callable[[Tensor], Any], int]]


@dataclass
class Subject:
    """A pruned model, its dense original, and one input."""

    name: str
    dense: nn.Module
    dense_call: Callable[[Any, Tensor], Any]
    result: fasp_fx.Result
    values: Tensor
    keyword: str | None
    example: tuple[tuple[Any, ...], dict[str, Any]]

    def call(self, function: Callable[..., Any], values: Tensor) -> Any:
        with torch.no_grad():
            return function(**{self.keyword: values}) if self.keyword else function(values)

    def through(self, function: Callable[..., Any]) -> Callable[[Tensor], Any]:
        return lambda values: self.call(function, values)


def language_model(options: argparse.Namespace) -> Subject:
    model, tokenizer = smollm2("cpu")
    text = chunks(tokenizer, options.text, "cpu")
    values = text[EVALUATION][:1, : options.tokens]
    calibration = [{"input_ids": chunk[None], "use_cache": False} for chunk in text[: options.chunks]]
    result = fasp_fx.prune(model, (), calibration[0], calibration=calibration, sparsity=0.2, round_to=16)
    return Subject(
        "SmolLM2-135M, 20 %",
        model,
        lambda module, ids: module(input_ids=ids, use_cache=False),
        result,
        values,
        "input_ids",
        ((), calibration[0]),
    )


def image_model(options: argparse.Namespace) -> Subject:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model, values = resnet18(weights=None).eval(), torch.randn(4, 3, 224, 224)
    result = fasp_fx.prune(model, (values,), score="magnitude", restore=None, sparsity=0.25, round_to=8)
    return Subject(
        "ResNet-18 (random weights), 25 %",
        model,
        lambda module, images: module(images),
        result,
        values,
        None,
        ((values,), {}),
    )


# --- routes


def dense(subject: Subject, folder: pathlib.Path) -> tuple[Callable[[Tensor], Any], int]:
    def call(values: Tensor) -> Any:
        with torch.no_grad():
            return subject.dense_call(subject.dense, values)

    return call, weight_bytes(subject.dense)


def eager(subject: Subject, folder: pathlib.Path) -> tuple[Callable[[Tensor], Any], int]:
    return subject.through(subject.result.module), weight_bytes(subject.result.module)


def compiled(subject: Subject, folder: pathlib.Path) -> tuple[Callable[[Tensor], Any], int]:
    return subject.through(torch.compile(subject.result.module)), weight_bytes(subject.result.module)


def ahead_of_time(subject: Subject, folder: pathlib.Path) -> tuple[Callable[[Tensor], Any], int]:
    path = torch._inductor.aoti_compile_and_package(
        subject.result.program, package_path=str(folder / "aoti.pt2")
    )
    return subject.through(torch._inductor.aoti_load_package(path)), pathlib.Path(path).stat().st_size


def onnx(subject: Subject, folder: pathlib.Path) -> tuple[Callable[[Tensor], Any], int]:
    import onnxruntime

    torch.onnx.export(subject.result.program, dynamo=True, verbose=False).save(folder / "program.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        folder / "program.onnx", options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    size = sum(file.stat().st_size for file in folder.glob("program.onnx*"))
    return (
        lambda values: [torch.from_numpy(found) for found in session.run(None, {name: values.numpy()})],
        size,
    )


def saved(subject: Subject, folder: pathlib.Path) -> tuple[Callable[[Tensor], Any], int]:
    torch.export.save(subject.result.program, folder / "program.pt2")
    return (
        subject.through(torch.export.load(folder / "program.pt2").module()),
        (folder / "program.pt2").stat().st_size,
    )


def decomposed(subject: Subject, folder: pathlib.Path) -> tuple[Callable[[Tensor], Any], int]:
    module = subject.result.program.run_decompositions().module()
    return subject.through(module), weight_bytes(module)


def quantised(subject: Subject, folder: pathlib.Path) -> tuple[Callable[[Tensor], Any], int]:
    from torchao.quantization import Int8WeightOnlyConfig

    module = quantise(copy.deepcopy(subject.result.module), Int8WeightOnlyConfig())
    return subject.through(module), weight_bytes(module)


def unflattened(subject: Subject, folder: pathlib.Path) -> tuple[Callable[[Tensor], Any], int]:
    module = torch.export.unflatten(subject.result.program)
    return subject.through(module), weight_bytes(module)


def front_door(subject: Subject, folder: pathlib.Path) -> tuple[Callable[[Tensor], Any], int]:
    module = torch.compile(subject.dense, backend=fasp_fx.backend(subject.result.plan))

    def call(values: Tensor) -> Any:
        with torch.no_grad():
            return subject.dense_call(module, values)

    return call, weight_bytes(subject.dense)


ROUTES: dict[str, tuple[str, Route]] = {
    "dense": ("dense, eager", dense),
    "eager": ("eager", eager),
    "compile": ("`torch.compile` (inductor)", compiled),
    "aoti": ("`aoti_compile_and_package`, loaded", ahead_of_time),
    "onnx": ("`torch.onnx.export`, ONNX Runtime", onnx),
    "save": ("`torch.export.save`, `load`", saved),
    "decompose": ("`run_decompositions`", decomposed),
    "quantise": ("torchao, int8 weights", quantised),
    "unflatten": ("`torch.export.unflatten`", unflattened),
    "backend": ("`torch.compile(dense, backend=fasp_fx.backend(plan))`", front_door),
}


def measure(subject: Subject, route: Route, rounds: int) -> dict[str, Any]:
    """One row: bytes, median seconds of the route and of the eager pruned module, median of their ratios,
    deviation.
    """
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        function, size = route(subject, pathlib.Path(folder))
        reference = subject.through(subject.result.module)
        # the front door is the plan without the repair
        equal = (
            subject.through(fasp_fx.apply(subject.dense, subject.result.plan, *subject.example).module)
            if route is front_door
            else reference
        )
        deviation = error(function(subject.values), equal(subject.values))
        times: list[tuple[float, float]] = []
        for count in range(rounds + 2):
            pair = [_seconds(call, subject.values) for call in (function, reference)]
            if count >= 2:
                times.append((pair[0], pair[1]))
    return {
        "bytes": size,
        "seconds": statistics.median(own for own, _ in times),
        "eager": statistics.median(other for _, other in times),
        "ratio": statistics.median(own / other for own, other in times),
        "deviation": deviation,
    }


def _seconds(call: Callable[[Tensor], Any], values: Tensor) -> float:
    start = time.perf_counter()
    call(values)
    return time.perf_counter() - start


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        "| route | size, MB | latency, ms | against eager pruned | largest deviation |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        label = ROUTES[name][0]
        if "failed" in row:
            lines.append(f"| {label} | failed: {row['failed']} | | | |")
            continue
        lines.append(
            f"| {label} | {row['bytes'] / 1e6:.1f} | {1000 * row['seconds']:.1f} | {row['ratio']:.2f} |"
            f" {row['deviation']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--models", nargs="*", choices=["smollm2", "resnet18"], default=["smollm2", "resnet18"]
    )
    parser.add_argument("--routes", nargs="*", choices=list(ROUTES), default=list(ROUTES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt, batch 1")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="JSON file that keeps the rows; those it holds are not measured again",
    )
    options = parser.parse_args()
    kept: dict[str, dict[str, Any]] = (
        json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    )
    for model in options.models:
        rows = kept.setdefault(model, {})
        missing = [name for name in options.routes if name not in rows or "failed" in rows[name]]
        subject = {"smollm2": language_model, "resnet18": image_model}[model](options) if missing else None
        for name in missing:
            assert subject is not None
            try:
                rows[name] = measure(subject, ROUTES[name][1], options.rounds)
            except Exception as problem:  # the other routes are measured all the same
                rows[name] = {
                    "failed": (
                        f"{type(problem).__name__}:"
                        f" {str(problem).strip().splitlines()[0][:160] if str(problem).strip() else ''}"
                    )
                }
            print(model, name, rows[name], flush=True)
            if options.out:
                options.out.write_text(json.dumps(kept), encoding="utf-8")
        print(
            f"\n{model}, {torch.get_num_threads()}"
            f" threads\n\n{table({name: rows[name] for name in options.routes if name in rows})}\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
