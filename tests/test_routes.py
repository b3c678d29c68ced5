"""Where a pruned program goes: every route gives what the eager pruned module gives, at the example's sizes
and at others.
"""

from __future__ import annotations

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
from transformers import LlamaConfig, LlamaForCausalLM

import fasp_fx

#: for the same arithmetic in another order
CLOSE = 1e-5


@dataclass
class Pruned:
    """A small pruned model, and calls of it at two sizes, as the caller's arguments."""

    result: fasp_fx.Result
    calls: tuple[dict[str, Tensor], ...]
    keyword: bool

    def call(self, function: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
        with torch.no_grad():
            return function(**inputs) if self.keyword else function(*inputs.values())

    def hold(self, function: Callable[..., Any], tolerance: float = CLOSE) -> None:
        """Compare a route with the eager pruned module."""
        for inputs in self.calls:
            assert error(self.call(function, inputs), self.call(self.result.module, inputs)) <= tolerance


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
    calls = tuple({"input_ids": torch.randint(0, 48, size)} for size in ((2, 7), (3, 11)))
    example, model = {**calls[0], "use_cache": False}, randomise(LlamaForCausalLM(config))
    result = fasp_fx.prune(model, (), example, score="magnitude", restore=None, sparsity=0.2)
    return Pruned(result, calls, keyword=True)


@cache
def _images() -> Pruned:
    torch.manual_seed(0)
    calls = tuple({"images": torch.randn(count, 3, 8, 8)} for count in (2, 5))
    result = fasp_fx.prune(_residual(), (calls[0]["images"],), score="magnitude", restore=None, sparsity=0.3)
    return Pruned(result, calls, keyword=False)


@pytest.fixture(params=[_llama, _images], ids=["llama", "images"])
def pruned(request: pytest.FixtureRequest) -> Pruned:
    return request.param()


@pytest.fixture(params=[pytest.param(_llama, marks=pytest.mark.slow), _images], ids=["llama", "images"])
def dear(request: pytest.FixtureRequest) -> Pruned:
    """For routes that take long."""
    return request.param()


class Taken(nn.Module):
    """Attention over what a projection of its own, a module that has returned, lays side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 6)

    def forward(self, projected: Tensor) -> Tensor:
        query, key, value = projected.unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        attended = (query @ key.transpose(-1, -2)).softmax(-1) @ value
        return self.out(attended.transpose(1, 2).flatten(2))


def _fused() -> nn.Module:
    """Two blocks whose fused projections are taken apart by another module."""
    first, second = (
        nn.Sequential(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 48)), Taken()) for _ in range(2)
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
    with torch.no_grad():
        for given in (x, other):
            assert error(flat(given), masked(given)) <= CLOSE
            assert error(masked(given), model(given)) > 1e-3


def test_export_save_and_load(pruned: Pruned, tmp_path: Path) -> None:
    torch.export.save(pruned.result.program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    pruned.hold(loaded.module(), 0)
    written = {node.meta.get("custom", {}).get(fasp_fx.capturing.WRITTEN_BY) for node in loaded.graph.nodes}
    assert not pruned.keyword or {"remove_channels", "pad_value_heads"} <= written, (
        "a file keeps which pass wrote a node"
    )


def test_onnx(dear: Pruned, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(dear.result.program, dynamo=True, verbose=False).save(tmp_path / "program.onnx")
    session = runtime.InferenceSession(tmp_path / "program.onnx", providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    for inputs in dear.calls:
        (values,) = inputs.values()
        found = [torch.from_numpy(value) for value in session.run(None, {name: values.numpy()})]
        assert error(found, dear.call(dear.result.module, inputs)) <= CLOSE


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
def test_ahead_of_time(dear: Pruned, tmp_path: Path) -> None:
    path = torch._inductor.aoti_compile_and_package(
        dear.result.program, package_path=str(tmp_path / "program.pt2")
    )
    dear.hold(torch._inductor.aoti_load_package(path))
