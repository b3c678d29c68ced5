"""Every route that a pruned program can take, on SmolLM2 (20 %, round_to=16) and on a ResNet-18: size,
latency, deviation from the eager pruned module.

SmolLM2 is calibrated and repaired on real text, and reads real text: pruned by magnitude it amplifies
rounding so much that float32 itself is 10⁻³ from float64, and no route can be told from another.

Prints one markdown table per model. Sizes are those of the file, or of the weights in memory. Latency is the
median of rounds in which the route and the eager pruned module take turns; the ratio is the median of the
pairs. A route that fails prints its reason.
"""

from __future__ import annotations

import pathlib
import pickle
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _protocol import EVALUATION, arguments, chunks, interleaved, ratio, smollm2
from torch import nn

import fasp_fx
from fasp_fx.testing.oracle import error


@dataclass
class Subject:
    """A pruned model, its dense original, an example, and one input."""

    dense: nn.Module
    result: fasp_fx.Result
    example: dict[str, Any]
    inputs: dict[str, Any]


#: what is called, how large it is, and how its outputs are had of the inputs
Route = tuple[Callable[..., Any], int]


def language_model(options: Any) -> Subject:
    model, tokenizer = smollm2("cpu")
    text = chunks(tokenizer, options.text, "cpu")
    calibration = [{"input_ids": chunk[None], "use_cache": False} for chunk in text[: options.chunks]]
    result = fasp_fx.prune(model, (), calibration[0], calibration=calibration, sparsity=0.2, round_to=16)
    inputs = {"input_ids": text[EVALUATION][:1, : options.tokens], "use_cache": False}
    return Subject(model, result, calibration[0], inputs)


def image_model(options: Any) -> Subject:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model, values = resnet18(weights=None).eval(), {"x": torch.randn(4, 3, 224, 224)}
    result = fasp_fx.prune(model, (), values, score="magnitude", restore=None, sparsity=0.25, round_to=8)
    return Subject(model, result, values, values)


MODELS = {"smollm2": language_model, "resnet18": image_model}


def in_memory(module: nn.Module, of: nn.Module | None = None) -> Route:
    return module, sum(len(pickle.dumps(tensor)) for tensor in (of or module).state_dict().values())


def ahead_of_time(subject: Subject, folder: pathlib.Path) -> Route:
    path = str(folder / "aoti.pt2")
    path = torch._inductor.aoti_compile_and_package(subject.result.program, package_path=path)
    return torch._inductor.aoti_load_package(path), pathlib.Path(path).stat().st_size


def onnx(subject: Subject, folder: pathlib.Path) -> Route:
    import onnxruntime

    torch.onnx.export(subject.result.program, dynamo=True, verbose=False).save(folder / "program.onnx")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        folder / "program.onnx", settings, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def call(**inputs: Any) -> Any:
        (values, *_) = inputs.values()
        return [torch.from_numpy(found) for found in session.run(None, {name: values.numpy()})]

    return call, sum(file.stat().st_size for file in folder.glob("program.onnx*"))


def saved(subject: Subject, folder: pathlib.Path) -> Route:
    torch.export.save(subject.result.program, folder / "program.pt2")
    return torch.export.load(folder / "program.pt2").module(), (folder / "program.pt2").stat().st_size


def quantised(subject: Subject, folder: pathlib.Path) -> Route:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    made = subject.result.eager(subject.dense)
    quantize_(made, Int8WeightOnlyConfig())
    return in_memory(made)


FRONT_DOOR = "`torch.compile(dense, backend=fasp_fx.backend(plan))`"
ROUTES: dict[str, Callable[[Subject, pathlib.Path], Route]] = {
    "dense, eager": lambda s, _: in_memory(s.dense),
    "eager": lambda s, _: in_memory(s.result.module),
    "`torch.compile` (inductor)": lambda s, _: in_memory(torch.compile(s.result.module), s.result.module),
    "`aoti_compile_and_package`, loaded": ahead_of_time,
    "`torch.onnx.export`, ONNX Runtime": onnx,
    "`torch.export.save`, `load`": saved,
    "`run_decompositions`": lambda s, _: in_memory(s.result.program.run_decompositions().module()),
    "torchao, int8 weights": quantised,
    "`torch.export.unflatten`": lambda s, _: in_memory(torch.export.unflatten(s.result.program)),
    FRONT_DOOR: lambda s, _: in_memory(
        torch.compile(s.dense, backend=fasp_fx.backend(s.result.plan)), s.dense
    ),
}


@torch.no_grad()
def row(subject: Subject, name: str, rounds: int) -> str:
    """One row of the table: MB, milliseconds, ratio to the eager pruned module, deviation."""
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        called, size = ROUTES[name](subject, pathlib.Path(folder))
        expected = subject.result.module
        if name == FRONT_DOOR:  # the plan without the repair
            expected = fasp_fx.apply(subject.dense, subject.result.plan, (), subject.example).module
        deviation = error(called(**subject.inputs), expected(**subject.inputs))
        subjects = {"own": called, "eager": subject.result.module}
        times = interleaved(
            {key: lambda f=function: f(**subject.inputs) for key, function in subjects.items()}, rounds
        )
    return (
        f"| {name} | {size / 1e6:.1f} | {1000 * statistics.median(times['own']):.1f} |"
        f" {ratio(times, 'own', 'eager'):.2f} | {deviation:.1e} |"
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt, batch 1")
    options = parser.parse_args()
    for model in options.models:
        subject = MODELS[model](options)
        print(f"\n{model}, {torch.get_num_threads()} threads\n")
        print("| route | size, MB | latency, ms | against eager pruned | largest deviation |")
        print("|---|---|---|---|---|")
        for name in ROUTES:
            try:
                print(row(subject, name, options.rounds), flush=True)
            except Exception as problem:  # the other routes are measured all the same
                print(f"| {name} | failed: {type(problem).__name__}: {str(problem)[:160]!r} | | | |")


if __name__ == "__main__":
    main()
