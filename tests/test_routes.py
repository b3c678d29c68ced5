"""Where a pruned program goes: every route gives what the eager pruned module gives, at the example's sizes
and at others.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import made, randomise
from oracle import error, zeroed
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import LlamaConfig, LlamaForCausalLM

import fasp_fx
from fasp_fx.capturing import _assemble
from fasp_fx.passes import PrunedModule, _pruned_module as _finish

#: for the same arithmetic in another order
CLOSE = 1e-5


@dataclass
class Pruned:
    """A small pruned model, and inputs of two sizes, which may go by a name."""

    result: fasp_fx.Result
    inputs: tuple[Tensor, ...]
    name: str = ""

    @torch.no_grad()
    def hold(self, function: Callable[..., Any], tolerance: float = CLOSE) -> None:
        """Compare a route with the eager pruned module."""
        for x in self.inputs:
            found = function(**{self.name: x}) if self.name else function(x)
            assert error(found, self.result.module(x)) <= tolerance


def _residual() -> nn.Module:
    """A convolution net with a residual block."""

    def forward(self: Any, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        return self.head(torch.relu(x + self.outer(torch.relu(self.inner(x)))).mean((2, 3)))

    sizes = {"stem": (3, 8), "inner": (8, 16), "outer": (16, 8)}
    convolutions = {name: nn.Conv2d(*size, 3, padding=1) for name, size in sizes.items()}
    return randomise(made(forward, norm=nn.BatchNorm2d(8), head=nn.Linear(8, 5), **convolutions))


@cache
def _llama() -> Pruned:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=48,
        max_position_embeddings=32,
    )
    inputs = tuple(torch.randint(0, 48, size) for size in ((2, 7), (3, 11)))
    model, example = randomise(LlamaForCausalLM(config)), {"input_ids": inputs[0], "use_cache": False}
    result = fasp_fx.prune(model, (), example, score="magnitude", restore=None, sparsity=0.2)
    return Pruned(result, inputs, "input_ids")


@cache
def _images() -> Pruned:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(count, 3, 8, 8) for count in (2, 5))
    result = fasp_fx.prune(_residual(), inputs[:1], score="magnitude", restore=None, sparsity=0.3)
    return Pruned(result, inputs)


def _taken(self: Any, projected: Tensor) -> Tensor:
    """Attention over what a projection of its own, a module that has returned, lays side by side."""
    query, key, value = projected.unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    attended = (query @ key.transpose(-1, -2)).softmax(-1) @ value
    return self.out(attended.transpose(1, 2).flatten(2))


def _fused() -> nn.Module:
    """Two blocks whose fused projections are taken apart by another module."""
    first, second = (
        nn.Sequential(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 48)), made(_taken, out=nn.Linear(16, 6)))
        for _ in range(2)
    )
    return made(lambda self, x: x + self.second(x + self.first(x)), first=first, second=second)


def _recurring() -> nn.Module:
    """An LSTM with initial states, which are made before anything else."""

    def forward(self: Any, x: Tensor) -> Tensor:
        state = self.start(x)
        return self.down(self.layer(self.up(x).tanh(), (state, state))[0])

    return made(
        forward,
        start=made(lambda self, x: torch.zeros(2, x.shape[0], 8, dtype=x.dtype)),
        up=nn.Linear(6, 16),
        down=nn.Linear(16, 3),
        layer=nn.LSTM(16, 8, bidirectional=True, batch_first=True),
    )


@pytest.mark.parametrize(
    "build",
    [
        _fused,
        lambda: nn.Sequential(
            nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), nn.Linear(16, 3)
        ),
        _recurring,
    ],
    ids=["fused", "encoder", "LSTM"],
)
def test_unflatten_what_the_library_wrote(build: Callable[[], nn.Module]) -> None:
    """Every node says which module it belongs to, and no module is called where the model does not."""
    model = randomise(build())
    x, other = (torch.randn(batch, 5, 6, generator=torch.Generator().manual_seed(batch)) for batch in (2, 3))
    result = fasp_fx.prune(model, (x,), score="magnitude", restore=None, sparsity=0.2)
    flat, masked = torch.export.unflatten(result.program), zeroed(model, result.plan)
    for given in (x, other):
        assert error(flat(given), masked(given)) <= CLOSE
        assert error(masked(given), model(given)) > 1e-3


@pytest.mark.parametrize("make", [_llama, _images])
def test_export_save_and_load(make: Callable[[], Pruned], tmp_path: Path) -> None:
    pruned = make()
    torch.export.save(pruned.result.program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    pruned.hold(loaded.module(), 0)
    written = {node.meta.get("custom", {}).get(fasp_fx.capturing.WRITTEN_BY) for node in loaded.graph.nodes}
    assert make is _images or {"remove_channels", "pad_value_heads"} <= written, (
        "a file keeps which pass wrote a node"
    )


#: routes that take long
DEAR = [_images, pytest.param(_llama, marks=pytest.mark.slow)]


@pytest.mark.parametrize("make", DEAR)
def test_onnx(make: Callable[[], Pruned], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(make().result.program, dynamo=True, verbose=False).save(tmp_path / "program.onnx")
    session = runtime.InferenceSession(tmp_path / "program.onnx", providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())

    def run(*given: Tensor, **named: Tensor) -> list[Tensor]:
        (x,) = (*given, *named.values())
        return [torch.from_numpy(value) for value in session.run(None, {name: x.numpy()})]

    make().hold(run)


def test_weight_only_quantisation() -> None:
    """Torchao's own looks for ``nn.Linear``, which a copy of the caller's class has."""
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 32)).eval(), torch.randn(9, 16)
    result = fasp_fx.prune(model, (x,), score="magnitude", restore=None, sparsity=0.3)
    copied = result.eager(model)
    torchao.quantize_(copied, torchao.Int8WeightOnlyConfig())
    assert all(type(layer.weight) is not nn.Parameter for layer in (copied[0], copied[2]))
    assert 0 < error(copied(x), result.module(x)) <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("make", DEAR)
def test_ahead_of_time(make: Callable[[], Pruned], tmp_path: Path) -> None:
    path = str(tmp_path / "program.pt2")
    torch._inductor.aoti_compile_and_package(make().result.program, package_path=path)
    make().hold(torch._inductor.aoti_load_package(path))


def test_bounds_stay(tmp_path: Path) -> None:
    """In what is saved, exported or pruned again, and where a copy of the class is made."""
    torch.manual_seed(0)
    dense = made(
        lambda self, x: self.down(self.up(x).relu())[:, 0], up=nn.Linear(6, 24), down=nn.Linear(24, 5)
    )
    x, shapes = torch.randn(3, 4, 6), ({0: torch.export.Dim("batch", min=1, max=9)},)
    result = fasp_fx.prune(dense, (x,), dynamic_shapes=shapes, **CHOICE)
    loaded = fasp_fx.load(result.save(tmp_path / "out"))
    exported = torch.export.export(loaded.module, (x,), dynamic_shapes=shapes)
    for program in (result.program, loaded.program, exported, fasp_fx.prune(exported, **CHOICE).program):
        (allowed,) = program.range_constraints.values()
        assert (allowed.lower, allowed.upper) == (1, 9)
    assert len(result.eager(dense)(torch.randn(9, 4, 6))) == 9
    with pytest.raises(fasp_fx.CallError, match="9"):
        loaded.module(torch.randn(10, 4, 6))


# --- the exported program is put together when it is asked for


CHOICE: dict[str, Any] = {"score": "magnitude", "restore": None, "sparsity": 0.4}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 5)).eval()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets a line whenever a whole program is put together, or is traced."""
    seen: list[str] = []
    program, export_again = _assemble.Assembly.program, _finish.export_again

    def assembled(self: _assemble.Assembly) -> ExportedProgram:
        seen.append("assembled")
        return program(self)

    def traced(*args: Any) -> ExportedProgram:
        seen.append("traced")
        return export_again(*args)

    monkeypatch.setattr(_assemble.Assembly, "program", assembled)
    monkeypatch.setattr(_finish, "export_again", traced)
    return seen


def test_what_needs_no_program_makes_none(asked: list[str]) -> None:
    result = fasp_fx.prune(model(), (torch.randn(3, 6),), **CHOICE)
    copied = copy.deepcopy(result.module)
    optimizer = torch.optim.SGD(result.module.parameters(), 0.1)
    result.module(torch.randn(7, 6)).square().sum().backward()
    optimizer.step()
    result = fasp_fx.prune(model(), (torch.randn(3, 6),), **CHOICE)
    result.eager(model())
    assert len(copied(torch.randn(2, 6))) == 2
    assert asked == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda result, folder: result.program,
        lambda result, folder: result.save(folder),
        lambda result, folder: pickle.dumps(result.module),
    ],
    ids=["program", "save", "pickle"],
)
def test_it_is_put_together_once(asked: list[str], ask: Callable[..., Any], tmp_path: Path) -> None:
    result = fasp_fx.prune(model(), (torch.randn(3, 6),), **CHOICE)
    ask(result, tmp_path / "first")
    ask(result, tmp_path / "second")
    assert asked == ["assembled"]


def test_it_keeps_no_weights_alive() -> None:
    result = fasp_fx.prune(model(), (torch.randn(3, 6),), **CHOICE)
    assert isinstance(result.module, PrunedModule)
    origin, weight = result.module.fasp_fx_origin, weakref.ref(result.module.get_parameter("0.weight"))
    del result
    gc.collect()
    assert weight() is None
    assert origin.program.state_dict["0.weight"].is_meta


def test_what_is_assumed_of_the_sizes_later_is_none_of_its_guards() -> None:
    captured = fasp_fx.capture(model(), (torch.randn(3, 6),))
    result = fasp_fx.prune(captured, **CHOICE)
    (placeholder,) = captured.program.placeholders()
    bool(placeholder.meta["val"].shape[0] < 9)  # a guard, from now on
    assert not any("size()[0]" in guard for guard in result.program._guards_code)
    assert len(result.program.module()(torch.randn(20, 6))) == 20
    assert len(result.module(torch.randn(20, 6))) == 20


def convolved() -> nn.Module:
    """Convolutions over images of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()


def switches() -> tuple[bool, ...]:
    return torch._C._get_mkldnn_enabled(), torch._C._get_nnpack_enabled(), torch._C._get_cudnn_enabled()


@pytest.mark.parametrize("free", [(0,), (0, 2, 3)])
def test_convolutions_are_not_traced_again(asked: list[str], free: tuple[int, ...]) -> None:
    """What libraries of kernels would ask of the sizes is no guard, and their switches stay as they were."""
    torch.manual_seed(0)
    before, shapes = switches(), (dict.fromkeys(free, torch.export.Dim.AUTO),)
    torch.set_float32_matmul_precision("high")
    try:
        result = fasp_fx.prune(convolved(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=shapes, **CHOICE)
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"  # type: ignore[attr-defined]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (switches(), asked) == (before, [])
    x = torch.randn(17, 3, *((8, 12) if 2 in free else (16, 16)))
    torch.testing.assert_close(result.program.module()(x), result.module(x), rtol=0, atol=0)
