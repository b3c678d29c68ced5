"""The exported program of a result is put together when somebody asks for it, and then is what the module
computes.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import fasp_fx
from fasp_fx.capturing import _assemble
from fasp_fx.passes import PrunedModule, _pruned_module as _finish

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


def test_it_computes_what_the_module_does_now() -> None:
    result = fasp_fx.prune(model(), (torch.randn(3, 6),), **CHOICE)
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.mul_(1.5)
    for count in (1, 3, 11):
        x = torch.randn(count, 6)
        torch.testing.assert_close(result.program.module()(x), result.module(x), rtol=0, atol=0)
    assert result.program.state_dict["0.weight"] is result.module.get_parameter("0.weight")


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


def _images() -> nn.Module:
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
        result = fasp_fx.prune(_images(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=shapes, **CHOICE)
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"  # type: ignore[attr-defined]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert switches() == before
    assert asked == []
    x = torch.randn(17, 3, *((8, 12) if 2 in free else (16, 16)))
    torch.testing.assert_close(result.program.module()(x), result.module(x), rtol=0, atol=0)
