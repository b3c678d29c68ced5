"""Models are told apart by every value that they compute with."""

import copy
import hashlib
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, PROFILE
from hypothesis import assume, given, settings, strategies as st
from models import X, block, wide
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.analysis import Analysis, analyze_program
from fasp_fx.base import _tensors as _fingerprint, fingerprint
from fasp_fx.capturing import Cut, Recipe, capture
from fasp_fx.errors import ArgumentError, StoreError
from fasp_fx.passes import remove, split_fused
from fasp_fx.testing import build, example, programs
from fasp_fx.testing._case import draw_sets
from fasp_fx.testing.specs import Net

DATA = [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
WIDTH = 2048


def by_hand(name: str, tensor: Tensor) -> str:
    """The digest, in whole numbers of Python."""
    keys = hashlib.shake_256(b"fasp_fx").digest(8 * WIDTH)
    keys = [int.from_bytes(keys[8 * at : 8 * at + 8], "little") | 1 for at in range(WIDTH)]
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    for start in range(0, len(content), 4 * WIDTH):
        run = content[start : start + 4 * WIDTH].ljust(4 * WIDTH, b"\0")
        total = 0
        for at, key in enumerate(keys):
            total += key * int.from_bytes(run[4 * at : 4 * at + 4], "little", signed=True)
        digest.update((total % 2**64).to_bytes(8, "little"))
    return digest.hexdigest()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5000),
        torch.randn(70, 33).T,
        torch.randn(3001).bfloat16(),
        torch.randn(2049).double()[1:],
        torch.arange(40000, dtype=torch.uint8)[3:],
        torch.rand(77) > 0.5,
        torch.tensor(3, dtype=torch.int64),
        torch.randn(5, 7, dtype=torch.complex64),
        torch.randn(99)[::2],
        torch.randn(5, 7, dtype=torch.complex64).real[:, 0],
        torch.ones(1).expand(9),
    ],
    ids=[
        "one",
        "transposed",
        "half",
        "shifted",
        "bytes",
        "truth",
        "single",
        "complex",
        "each other",
        "part",
        "spread",
    ],
)
@pytest.mark.parametrize("size", [4 * WIDTH, 2**19])
def test_it_is_the_sum_that_it_is_said_to_be(
    tensor: Tensor, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fingerprint, "_BYTES", size)
    assert fingerprint({"a": tensor}) == by_hand("a", tensor)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_other_layouts_and_quantized_tensors() -> None:
    dense = torch.zeros(6, 6)
    dense[2, 3] = 1.0
    moved = dense.T
    assert fingerprint({"a": dense.to_sparse()}) != fingerprint({"a": moved.to_sparse()})
    made = [torch.quantize_per_tensor(one, 0.1, 0, torch.qint8) for one in (dense, moved)]
    assert fingerprint({"a": made[0]}) != fingerprint({"a": made[1]})


def normed() -> nn.Module:
    """With statistics, and a table that is as long as the longest call so far, and not saved."""
    model = wide(
        lambda m, x: m.down(torch.relu(m.norm(m.up(x)))) + m.table[: x.shape[0], None],
        size=8,
        norm=nn.BatchNorm1d(24),
    )
    model.register_buffer("table", torch.arange(16.0), persistent=False)
    return model


def with_other_statistics(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.norm.running_mean.add_(torch.linspace(-1, 1, 24))
    return other


def test_a_checkpoint_and_costs_are_of_the_buffers_too(tmp_path: Path) -> None:
    model = normed()
    other = with_other_statistics(model)
    options = {"calibration": DATA, "sparsity": 0.3, "quality": "fast", "allocation": "global"}
    fasp_fx.prune(model, (DATA[0],), checkpoint=tmp_path / "run", **options)
    with pytest.raises(StoreError, match="model differ"):
        fasp_fx.prune(other, (DATA[0],), checkpoint=tmp_path / "run", **options)
    costs = fasp_fx.measure(model, (DATA[0],), calibration=DATA, quality="fast")
    with pytest.raises(ArgumentError, match="cost curves are of another model"):
        fasp_fx.prune(other, (DATA[0],), costs=costs, **options)
    fasp_fx.prune(model, (DATA[0],), costs=costs, **options)


def test_a_teacher_has_the_buffers_of_the_model_that_was_pruned(tmp_path: Path) -> None:
    model = normed()
    other = with_other_statistics(model)
    result = fasp_fx.prune(model, (DATA[0],), calibration=DATA, sparsity=0.3, quality="fast")
    loaded = fasp_fx.load(result.save(tmp_path / "saved"))
    with pytest.raises(ArgumentError, match=r"buffer 'norm\.running_mean' holds other values"):
        fasp_fx.distil(loaded, other, DATA, epochs=1)
    # Counters that no forward reads are nobody's business.
    model.norm.num_batches_tracked += 1
    model.table = torch.arange(64.0)
    fasp_fx.distil(result, model, DATA, epochs=1)


# --- how weights come of the captured ones, as data


_INCLUDED = ((), ("exempt",), ("approximate", "depth"))


def hold(full: Analysis, hollow: Analysis, weights: dict[str, Tensor], seed: int) -> None:
    """Prune two programs alike, of which one has no weights: the recipes of this one make the weights of the
    other.

    Args:
        weights: of the captured model.
    """
    assert hollow.numbering.slots == full.numbering.slots
    gone = draw_sets(full, np.random.default_rng(seed))[full.labels]
    smaller, said = remove(full, gone), remove(hollow, gone)
    shapes = {name: tuple(tensor.shape) for name, tensor in said.weights().items()}
    assert shapes.keys() == smaller.weights().keys()
    for name, expected in smaller.weights().items():
        recipe = said.recipe(name)
        assert recipe == smaller.recipe(name) == pickle.loads(pickle.dumps(recipe))
        source = weights[recipe.source]
        found = recipe.apply(source)
        assert recipe.shape(source.shape) == tuple(found.shape) == shapes[name], name
        assert torch.equal(found, expected), name
        assert name in said.recipes or (name in weights and found.shape == weights[name].shape)


@settings(max_examples=EXAMPLES if PROFILE == "slow" else 5)
@given(net=programs(), seed=st.integers(0, 999), include=st.sampled_from(_INCLUDED))
def test_models_drawn_at_random(net: Net, seed: int, include: tuple[str, ...]) -> None:
    model = build(net, seed)
    with torch.device("meta"):
        hollow = type(model)(net).eval()
    captured, empty = (capture(made, example(net, 2, seed)) for made in (model, hollow))
    full, said = (
        analyze_program(program, split_fused, ("channel", "head", "expert"), include)
        for program in (captured, empty)
    )
    assume(np.array_equal(full.labels, said.labels))  # what buffers hold can say what is coupled
    hold(full, said, captured.weights(), seed)


def test_a_recipe() -> None:
    """Blocks of rows each lose columns of their own, then rows go; made by hand."""
    weight = torch.arange(24.0).reshape(4, 6).requires_grad_()
    stays = np.array([[True, False, True, True, False, True], [False, True, True, True, True, False]])
    recipe = Recipe("w", (Cut.of("w", 1, stays, 0),)).then(Cut(0, np.array([[3, 0, 1]])))
    found = recipe.apply(weight)
    expected = [[19.0, 20, 21, 22], [0, 2, 3, 5], [6, 8, 9, 11]]
    assert (found.tolist(), recipe.shape(weight.shape)) == (expected, (3, 4))
    assert recipe.shape(weight.shape) == tuple(recipe.apply(weight.detach().to("meta")).shape)
    found.sum().backward()
    assert weight.grad is not None
    assert sorted(weight[weight.grad.bool()].tolist()) == sorted(value for row in expected for value in row)
    assert Recipe("w").apply(weight) is weight


# --- results in pickles


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
    module.get_parameter("second.bias").detach().fill_(0.5)
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
    with warnings.catch_warnings(action="error"):
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
    torch.testing.assert_close(again.module(X), result.module(X))
    torch.testing.assert_close(again.program.module()(X), result.program.module()(X))
