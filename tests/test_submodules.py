"""Models that cannot be captured as a whole: their largest submodules that can are pruned and put back. Those
that are pruned exactly, with what stays whole and why, are in corpus/forking.py.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import untouched
from corpus.forking import Forks, twice, uneven
from models import BATCH, Vectors, X, made
from oracle import error, zeroed
from torch import Tensor, nn

import fasp_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.usefixtures("no_files"),
]


def _prune(model: nn.Module, args: Any = (X,), calibration: Any = None, **options: Any) -> Any:
    options = {"restore": None, "score": "random", "sparsity": 0.3, **options}
    with untouched(model):
        return fasp_fx.prune(
            model, args, calibration=[BATCH] if calibration is None else calibration, **options
        )


def test_a_part_at_two_paths_is_put_back_at_both(folder: Path) -> None:
    model = twice()
    result = _prune(model)
    for each in (result, fasp_fx.load(result.save(folder / "out"), model=copy.deepcopy(model))):
        assert each.module.first is each.module.second["again"]
    assert set(dict(result.module.named_parameters())) == set(dict(model.named_parameters()))


def test_why_two_weights_of_a_part_are_coupled() -> None:
    analysis = fasp_fx.analyze(Forks().eval(), (X,))
    lines = analysis.explain("first.up.weight", "first.down.weight")
    assert (lines[0], len(lines), lines[-1]) == ("first.up.weight", 5, "first.down.weight")
    with pytest.raises(fasp_fx.ArgumentError, match=r"in no part together .*first, second"):
        analysis.explain("first.up.weight", "second.down.weight")


# --- what is refused, and why


def test_tied_weights_across_the_boundary_stay() -> None:
    model = Forks().eval()
    model.second.up.weight = model.first.up.weight
    with pytest.raises(
        fasp_fx.CaptureError, match=r"'first': its weight 'first\.up\.weight' is also 'second\.up\.weight'"
    ):
        _prune(model)


def test_models_that_draw_at_random_are_pruned_where_a_seed_of_torch_brings_that_back() -> None:
    class Draws(Forks):
        draw = staticmethod(torch.rand_like)

        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
            return super().forward(x + self.draw(x), scale)

    model: Any = Draws().eval()
    assert set(_prune(model, score="magnitude").parts) == {"first", "second"}
    model.draw = lambda x: random.random()
    with pytest.raises(fasp_fx.CaptureError, match="with a graph in its place, or in each run"):
        _prune(model, score="magnitude")


def test_hooks_of_the_user_stay_and_run() -> None:
    model, seen = Forks().eval(), []
    model.first.down.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    result = _prune(model)
    assert "'first.down' has hooks" in result.left["first"]
    seen.clear()
    result.module(X)
    assert seen == [Tensor]


def test_submodules_that_no_exporter_takes() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(
        Vectors().eval(), {nn.Linear}, dtype=torch.qint8
    ).eval()
    for other in (torch.jit.script(Vectors().eval()), quantised):
        result = _prune(Forks(second=other).eval())
        assert set(result.parts) == {"first"}
        assert torch.isfinite(result.module(X)["out"]).all()


class Gained(Forks):
    """Keeps a function that holds on to the module itself, which a copy of the module has as well."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.change = lambda x: x * self.gain

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return super().forward(self.change(x), scale)


def test_a_copy_that_would_go_on_to_read_the_models_own_weights_is_refused() -> None:
    """The result would compute what it should, and train the caller's model."""
    with pytest.raises(
        fasp_fx.CaptureError,
        match=r"copy of Gained goes on to read 'gain' of the given model.*make it a method",
    ):
        _prune(Gained().eval())


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return Forks().eval()


@pytest.mark.parametrize(
    ("make", "args", "options", "kind", "says"),
    [
        (Forks, (X,), {}, fasp_fx.CaptureError, "training mode"),
        (None, (X[:, :4],), {}, fasp_fx.ArgumentError, "does not run on the example inputs"),
        (None, (X, 1.0, 2.0), {}, fasp_fx.ArgumentError, "do not fit"),
        (
            None,
            (X,),
            {"dynamic_shapes": {"x": {0: torch.export.Dim("batch")}, "scale": None}},
            fasp_fx.CaptureError,
            "data-dependent",
        ),
        (_on_meta, (X,), {}, fasp_fx.FaspError, None),
    ],
)
def test_submodules_are_no_way_around_other_errors(
    make: Any, args: Any, options: dict[str, Any], kind: type[Exception], says: str | None
) -> None:
    with pytest.raises(kind, match=says):
        _prune(make() if make else Forks().eval(), args, **options)


# --- sparsity, calibration, restoration


@pytest.mark.parametrize("sparsity", [0.2, 0.8])
def test_the_sparsity_is_that_of_all_parts_together(sparsity: float) -> None:
    result = _prune(uneven(), sparsity=sparsity)
    # At a low sparsity, four channels lose none.
    assert set(result.parts) | set(result.left) == {"wide", "narrow"}
    assert abs(result.report.sparsity - sparsity) < 0.02


def test_restoration_on_the_inputs_that_the_parts_get() -> None:
    torch.manual_seed(0)
    model = _lasting()
    batches = [torch.randn(200, 6) for _ in range(3)]
    data = torch.cat(batches)
    errors = {}
    for restore in ("least-squares", None):
        result = _prune(model, calibration=batches, restore=restore, score="fasp")
        assert set(result.parts) == {"first", "second"}
        errors[restore] = (result.module(data)["out"] - model(data)["out"]).square().mean()
    assert errors["least-squares"] < 0.7 * errors[None]


def test_bad_calibration_data() -> None:
    model = Forks().eval()
    for calibration, match in (
        ([], "empty"),
        (BATCH, "single|is a Tensor"),
        ([BATCH[:, :3]], "batch 0 fails in the model"),
        ([BATCH, "text"], "batch 1 is a str"),
        ([BATCH * float("nan")], "not finite"),
    ):
        with pytest.raises(fasp_fx.CalibrationError, match=match):
            _prune(model, calibration=calibration, restore="least-squares")
    with untouched(model), pytest.raises(fasp_fx.CalibrationError, match="no calibration data"):
        fasp_fx.prune(model, (X,))
    assert fasp_fx.prune(model, (X,), score="magnitude", restore=None).plan.groups


# --- the result


def _lasting() -> Any:
    return Forks(nn.Sequential(Vectors(), nn.Tanh(), Vectors())).eval()


@pytest.fixture(scope="module")
def forks() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = _lasting()
    return model, fasp_fx.prune(model, (X,), calibration=[BATCH], sparsity=0.3)


def test_a_plan_is_for_its_model_alone(forks: tuple[nn.Module, Any]) -> None:
    _, result = forks
    for model, said in ((Forks().eval(), "another model"), (result.module, "already applied")):
        with pytest.raises(fasp_fx.PlanError, match=said):
            fasp_fx.apply(model, result.plan, (X,))


def test_an_analysis_finds_the_same_parts(forks: tuple[nn.Module, Any]) -> None:
    model, result = forks
    with untouched(model):
        analysis = fasp_fx.analyze(model, (X,))
    assert (list(analysis.parts), analysis.left) == (list(result.parts), result.left)
    assert {(group.name, group.status) for group in analysis.groups} == {
        (line.name, line.status) for line in result.report.lines
    }
    most = analysis.max_sparsity
    how = {"score": "magnitude", "restore": None, "round_to": 1}
    reached = fasp_fx.prune(model, (X,), sparsity=most, **how)
    assert reached.report.sparsity == pytest.approx(most)
    with pytest.raises(fasp_fx.SparsityError):
        fasp_fx.prune(model, (X,), sparsity=most + 0.01, **how)


def test_there_is_no_single_program(forks: tuple[nn.Module, Any]) -> None:
    _, result = forks
    with pytest.raises(fasp_fx.CaptureError, match=r"result\.parts"):
        _ = result.program
    for path, part in result.parts.items():
        assert part.program.state_dict.keys() == dict(part.module.named_parameters()).keys()
        assert result.module.get_submodule(path) is part.module


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def test_a_result_is_saved_and_loaded_around_the_code_of_the_model(
    forks: tuple[nn.Module, Any], folder: Path
) -> None:
    _, result = forks
    other = _lasting().train()  # other weights everywhere, and not ready to run
    with untouched(other):
        loaded = fasp_fx.load(result.save(folder / "out"), model=other)
    assert not loaded.module.training
    assert torch.equal(loaded.module(X, 2.0)["out"], result.module(X, 2.0)["out"])
    assert (loaded.plan, loaded.report) == (result.plan, result.report)
    assert (loaded.left, list(loaded.parts)) == (result.left, list(result.parts))
    assert all(loaded.module.get_submodule(path) is part.module for path, part in loaded.parts.items())


def _changed(change: Callable[[Any], Any]) -> nn.Module:
    model = _lasting()
    change(model)
    return model


#: models around which the parts are not loaded, and why
OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another class": (lambda: nn.Sequential(Vectors()), "no attribute `first`"),
    "a part less": (lambda: _changed(lambda model: delattr(model, "second")), "no attribute `second`"),
    "a wider layer": (
        lambda: _changed(lambda model: setattr(model, "out", nn.Linear(6, 4))),
        "weights around the parts",
    ),
    "another layer": (
        lambda: _changed(lambda model: setattr(model, "more", nn.Linear(2, 2))),
        r"'more\.weight'",
    ),
}


def test_what_cannot_be_loaded_or_saved(forks: tuple[nn.Module, Any], folder: Path) -> None:
    _, result = forks
    path = result.save(folder / "out")
    with pytest.raises(fasp_fx.ArgumentError, match=r"give the dense model: fasp_fx\.load"):
        fasp_fx.load(path)
    for make, message in OTHERS.values():
        with pytest.raises(fasp_fx.StoreError, match=message):
            fasp_fx.load(path, model=make())
    moved = copy.copy(result.module)
    moved._modules = {**result.module._modules, "second": Vectors()}
    with pytest.raises(fasp_fx.StoreError, match="no longer stands"):
        replace(result, module=moved).save(folder / "moved")


@pytest.mark.parametrize("tied", [False, True])
def test_weights_around_the_parts_are_those_that_were_saved(folder: Path, tied: bool) -> None:
    """Whatever types, ties and values those of the model have that is given."""

    def make(tied: bool) -> nn.Module:
        model = Forks()
        model.before, model.after = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        model.register_buffer("seen", torch.rand(3))
        if tied:
            model.after.weight = model.before.weight
        return model.eval()

    model = make(tied)
    path = _prune(model).save(folder / "out")
    with torch.device("meta"):
        empty = make(not tied)
    for other in (make(not tied), make(tied).double(), empty):
        loaded = fasp_fx.load(path, model=other).module
        assert (loaded.before.weight is loaded.after.weight) == tied
        for name in ("before.weight", "after.weight", "out.weight", "seen"):
            assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])
    empty.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(fasp_fx.StoreError, match="such as 'table'"):
        fasp_fx.load(path, model=empty)


def test_a_part_that_is_called_in_another_way_than_on_the_example_refuses() -> None:
    """By values."""

    class Told(Vectors):
        def forward(self, x: Tensor, flip: bool = False) -> Tensor:
            hidden = self.up(x).relu()
            return self.down(hidden.flip(-1) if flip else hidden)

    x = torch.rand(2, 6, 6)
    model = made(lambda self, x: self.part(x, flip=True) if x.sum().item() > 0 else self.part(x), part=Told())
    result = fasp_fx.prune(model, (x,), sparsity=0.3, score="random", restore=None)
    assert list(result.parts) == ["part"]
    assert error(result.module(x), zeroed(model, result.plan)(x)) < 1e-5
    with pytest.raises(fasp_fx.CallError, match="'flip' is False"):
        # Left out by the model, which means its own default.
        result.module(-x)


def test_what_a_part_that_no_data_reach_would_lose_goes_from_the_others() -> None:
    """Of four blocks the second, which the example reaches and the calibration data do not."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.p(x)
        if x.sum().item() > 0:
            x = x + self.q(x)
        x = x + self.r(x)
        return x + self.s(x)

    torch.manual_seed(0)
    widths = {"p": 32, "q": 32, "r": 64, "s": 8}
    blocks = {name: nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 8)) for name, n in widths.items()}
    model = made(forward, **blocks)
    example, data = torch.rand(16, 8) + 3, [-torch.rand(16, 8) - 3 for _ in range(8)]
    asked: dict[str, Any] = {"calibration": data, "sparsity": 0.4}
    result = fasp_fx.prune(model, (example,), **asked)
    without = fasp_fx.prune(model, (example,), **asked, exclude=("q",))
    assert result.report.sparsity == pytest.approx(0.4, abs=0.02)
    assert "never reaches" in result.left["q"]
    assert "q" not in {group.name.partition(".")[0] for group in result.plan.groups}
    assert result.plan.groups == without.plan.groups
