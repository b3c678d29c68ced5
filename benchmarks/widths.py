"""The ten networks of peers.py at half of their multiply-accumulates, with kept widths in multiples of 1, 4,
8, 16 and 32: accuracy right away and after fine-tuning, and how much faster than the dense network two
runtimes run it. Resumes where it was stopped.

    pip install "fasp_fx[runtimes]" torchvision scikit-learn

Pruned by quality fast. Accuracy is that on handwritten digits at 32 x 32 (peers.py). Times are of one image
of 224 x 224 (ViT: 32), of processor seconds on one thread, dense and pruned in turn: the median of the
ratios.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
from _protocol import Results, arguments
from peers import ARGUMENTS, NETWORKS, TRAINING, TUNING, accuracy, digits, train
from torch import nn

import fasp_fx

MULTIPLES, ROUNDS = (1, 4, 8, 16, 32), 15


def main() -> None:
    parser = arguments(__doc__, text=False, out=True)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    options = parser.parse_args()
    results = Results(options.out)
    torch.set_num_threads(1)
    (fitted, measured), (taught, asked) = digits()
    for name in options.networks:
        wanted = [each for each in MULTIPLES if not results.has({"network": name, "round_to": each})]
        if not wanted:
            continue
        torch.manual_seed(0)
        dense = torchvision.models.get_model(name, num_classes=10, **ARGUMENTS.get(name, {}))
        train(dense, fitted, taught, TRAINING, 1e-3)
        image = torch.randn(1, 3, *[224 if name != "vit_b_16" else 32] * 2)
        ways = {runtime: make(dense, image) for runtime, make in RUNTIMES.items()}
        for multiple in wanted:
            result = fasp_fx.prune(
                dense,
                (fitted[:2],),
                calibration=fitted[:256].split(64),
                budget=fasp_fx.allocation.Macs(0.5),
                round_to=multiple,
                quality="fast",
                progress=False,
            )
            # torchvision's transformer has no eager copy; a program has heights and widths of its example
            is_as_large = image.shape[1:] == fitted.shape[1:]
            pruned: nn.Module = result.module if is_as_large else result.eager(dense)
            found: dict[str, Any] = {"network": name, "round_to": multiple}
            found["accuracy"] = accuracy(pruned, measured, asked)
            for runtime, make in RUNTIMES.items():
                found[runtime] = faster(ways[runtime], make(pruned, image))
            train(pruned, fitted, taught, TUNING, 1e-4)
            results.add({**found, "tuned": accuracy(pruned, measured, asked)})


def onnxruntime(model: nn.Module, image: torch.Tensor) -> Callable[[], object]:
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(model, (image,), dynamo=True, verbose=False).save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    inputs = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, inputs)


def openvino(model: nn.Module, image: torch.Tensor) -> Callable[[], object]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(
        openvino.convert_model(torch.export.export(model, (image,))), "CPU", settings
    )
    return lambda: compiled([np.asarray(image)])


RUNTIMES = {"ONNX Runtime": onnxruntime, "OpenVINO": openvino}


def faster(dense: Callable[[], object], pruned: Callable[[], object]) -> float:
    """The median of the ratios of processor seconds, in turn."""
    seconds: list[list[float]] = []
    for _ in range(ROUNDS + 2):
        seconds.append([])
        for call in (dense, pruned):
            start = time.process_time()
            call()
            seconds[-1].append(time.process_time() - start)
    return statistics.median(one / other for one, other in seconds[2:])


if __name__ == "__main__":
    main()
