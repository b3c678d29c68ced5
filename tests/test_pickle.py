"""Results in pickles: what ``pickle`` and ``torch.save`` write is the same module in a process that knows
nothing of the model.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import X, block, wide
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx

_READ = """
import pickle, sys, torch
for folder in sys.argv[1:]:
    args, kwargs, expected, weights = torch.load(folder + "/call.pt")
    with open(folder + "/module.pkl", "rb") as file:
        modules = [pickle.load(file), torch.load(folder + "/module.pt", weights_only=False)]
    for module in modules:
        found = module(*args, **kwargs)
        assert list(found) == ["y", "both"]
        assert all(torch.equal(parameter, weights[name]) for name, parameter in module.named_parameters())
        for ours, theirs in ((found["y"], expected["y"]), (found["both"][1], expected["both"][1])):
            torch.testing.assert_close(ours, theirs)  # to rounding: kernels follow where memory begins
        assert module.first.weight is module.again.weight and not module.first.weight.requires_grad
        assert "fixed" not in module.state_dict()
        assert len(pickle.dumps(module)) > 1000
    if folder == sys.argv[-1]:
        import fasp_fx
        assert fasp_fx.analyze(module.eval(), args, kwargs).select("prunable")
    print(folder)
"""


class Model(nn.Module):
    """Tied layers, buffers of both kinds, a constant, a nested argument, a constant argument, and a nested
    output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 4)
        self.again = self.first
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("fixed", torch.ones(4), persistent=False)

    def forward(self, x: Tensor, *, extra: dict[str, Tensor], wide: bool = False) -> dict[str, Any]:
        self.calls += 1
        y = (
            self.second(F.gelu(self.again(x))) * self.fixed
            + torch.tensor([1.0, 2.0, 3.0, 4.0])
            + extra["bias"].sum()
        )
        return {"y": y, "both": (y, y * self.calls)}


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    call = {"extra": {"bias": torch.randn(3)}, "wide": True}
    return fasp_fx.prune(
        Model().eval(), (torch.randn(3, 8),), call, score="magnitude", restore=None, sparsity=0.3
    ).module


def _written(module: nn.Module, folder: Path) -> None:
    """Pickle a module in two ways, and what one call of it returns."""
    folder.mkdir()
    module.first.weight.requires_grad_(False)  # type: ignore[union-attr]
    with torch.no_grad():  # what is written are the weights as they are now
        module.get_parameter("second.bias").fill_(0.5)
    dtype = module.get_parameter("second.weight").dtype
    args, kwargs = (
        (torch.randn(7, 8, dtype=dtype),),
        {
            "extra": {"bias": torch.randn(3, dtype=dtype)},
            "wide": True,
        },
    )
    (folder / "module.pkl").write_bytes(pickle.dumps(module))
    torch.save(module, folder / "module.pt")
    with torch.no_grad():
        torch.save(
            (args, kwargs, module(*args, **kwargs), dict(module.named_parameters())), folder / "call.pt"
        )


@pytest.mark.slow
def test_pickles_are_read_in_another_process(module: nn.Module, tmp_path: Path) -> None:
    """One process for all, as each would take seconds to begin; the first pickle finds it without fasp_fx."""
    made = {
        "is": copy.deepcopy(module),
        "double": copy.deepcopy(module).double(),
        "copied": copy.deepcopy(copy.deepcopy(module)).train(),
    }
    for state, one in made.items():
        _written(one, tmp_path / state)
    found = {**os.environ, "PYTHONPATH": str(Path(fasp_fx.__file__).parents[1])}
    command = [sys.executable, "-W", "error::FutureWarning", "-c", _READ, *made]
    ran = subprocess.run(command, cwd=tmp_path, env=found, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == list(made)


def test_what_was_captured_is_still_checked(module: nn.Module) -> None:
    again = pickle.loads(pickle.dumps(module))
    with pytest.raises(fasp_fx.CallError, match="keys"):
        again(torch.randn(3, 8), extra={"other": torch.zeros(3)})
    with pytest.raises(fasp_fx.CallError, match=r"of shape \(.*9"):
        again(torch.randn(3, 9), extra={"bias": torch.zeros(3)})


def test_copies_save_what_the_module_saves_and_warn_of_nothing(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = copy.deepcopy(copy.deepcopy(module))
        pickle.loads(pickle.dumps(copied))
    assert copied.state_dict().keys() == module.state_dict().keys()
    assert "fixed" not in copied.state_dict()


def test_a_whole_result_is_pickled() -> None:
    """Of a model that writes into a buffer, whose program torch pickles by a tracer that it cannot make."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return block(self, x)

    result = fasp_fx.prune(wide(forward, calls=torch.zeros(())), (X,), score="magnitude", restore=None)
    again = pickle.loads(pickle.dumps(result))
    assert again.plan == result.plan
    with torch.no_grad():
        torch.testing.assert_close(again.module(X), result.module(X))
        torch.testing.assert_close(again.program.module()(X), result.program.module()(X))
