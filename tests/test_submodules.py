"""Models that cannot be captured as a whole: their largest submodules that can are pruned and put back."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import made
from oracle import error, floats, zeroed
from refusal import BATCH, Vectors, X, untouched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fasp_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.usefixtures("no_files", "shared_captures"),
]


def _prune(model: nn.Module, args: Any = (X,), calibration: Any = None, **options: Any) -> Any:
    options = {"restore": None, "score": "random", "sparsity": 0.3, **options}
    with untouched(model):
        return fasp_fx.prune(
            model, args, calibration=[BATCH] if calibration is None else calibration, **options
        )


def _exact(
    model: nn.Module, parts: set[str], *calls: tuple[Any, ...], args: tuple[Any, ...] = (X,), **options: Any
) -> Any:
    """Prune; these are the parts, and the result is what the dense model with zeros computes, on every call
    in a row.
    """
    result = _prune(model, args, **options)
    assert set(result.parts) == parts, result.report
    assert result.plan.groups
    models = (result.module, zeroed(model, result.plan), copy.deepcopy(model))
    differs = [0.0]
    with torch.no_grad():
        for call in calls or (args,):
            found, expected, full = (each(*copy.deepcopy(call)) for each in models)
            assert pytree.tree_structure(found) == pytree.tree_structure(expected)
            assert error(found, expected) < 1e-5
            pairs = zip(floats(expected), floats(full))
            differs += [float((a - b).abs().max()) for a, b in pairs if a.shape == b.shape]
    assert max(differs) > 1e-3, "masking changes nothing that can be seen"
    dense, shrunk = model.state_dict(), result.module.state_dict()
    for part in [part for group in result.plan.groups for part in (*group.producers, *group.consumers)]:
        assert shrunk[part.name].shape[part.dim] < dense[part.name].shape[part.dim]
    own, mine = (
        {id(tensor.untyped_storage()) for tensor in (*each.parameters(), *each.buffers())}
        for each in (model, result.module)
    )
    assert not mine & own
    return result


class Forks(nn.Module):
    """The second block runs if the first one says so; the outputs are lists whose lengths depend
    on the data.
    """

    def __init__(self, first: nn.Module | None = None, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.out = first or Vectors(), second or Vectors(), nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = self.first(x) * scale
        if x.sum() < 1e6:
            x = x + self.second(x)
        return {"out": self.out(x), "kept": [row for row in x if row[0] > -10]}


# --- what is found


def test_blocks_around_a_branch() -> None:
    result = _exact(Forks().eval(), {"first", "second"}, (X,), (X[:2],), (X, 2.0))
    assert result.left == {}
    assert abs(result.report.sparsity - 0.3) < 0.02
    assert result.report.requested == 0.3
    assert any("cannot be captured as a whole" in note for note in result.report.notes)
    assert {line.name.partition(".")[0] for line in result.report.lines} == {"first", "second"}


def test_convolutions_called_with_many_shapes() -> None:
    """A convolutional backbone, and one head that sees each of a pyramid's levels."""

    def forward(self: Any, images: list[Tensor]) -> list[Tensor]:
        found = []
        for level in (self.body(image[None]) for image in images):
            while min(level.shape[-2:]) > 4 and level.mean() < 1e6:
                found.append(self.head(level)[0])
                level = F.max_pool2d(level, 2)
        return found

    layers = (nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))
    head = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))
    images = [torch.rand(3, 20, 24), torch.rand(3, 16, 16), torch.rand(3, 36, 18)]
    _exact(
        made(forward, body=nn.Sequential(*layers), head=head),
        {"body", "head"},
        (images,),
        (images[:1],),
        args=(images[:2],),
        calibration=[(images,)],
    )


def _forking(forward: Callable[..., Tensor], **held: Any) -> Any:
    """A model that goes on through its last submodule if what it has so far says so."""

    def whole(self: Any, x: Tensor) -> Tensor:
        x = forward(self, x)
        return self.other(x) if x.sum() < 1e6 else x

    return made(whole, other=Vectors(), **held)


def test_containers_and_inner_control_flow_are_descended_in_the_order_of_the_calls() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stages[0](x)["kept"][0]
        for block in self.stages[1].values():
            x = block(x)
        return x

    stages = nn.ModuleList([Forks(), nn.ModuleDict({"a": Vectors(), "b": Vectors()})])  # type: ignore[dict-item]
    result = _exact(
        _forking(forward, stages=stages, unused=Vectors()),
        {"stages.0.first", "stages.0.second", "stages.1.a", "stages.1.b", "other"},
    )
    assert list(result.parts)[-1] == "other", "it is held first, and called last"
    assert any("'stages.0' is no part: it cannot be captured" in note for note in result.report.notes)


def test_a_module_at_two_paths_is_pruned_once_and_put_back_at_both(folder: Path) -> None:
    block = Vectors()
    model = made(
        lambda self, x: self.second["again"](self.first(x)) if x.sum() < 1e6 else x,
        first=block,
        second=nn.ModuleDict({"again": block}),
    )
    result = _exact(model, {"first"})
    loaded = fasp_fx.load(result.save(folder / "out"), model=copy.deepcopy(model))
    for each in (result, loaded):
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


class Counts(Vectors):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return super().forward(x) * self.count


class Sets(Vectors):
    """A forward that leaves something behind."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape[0]
        return super().forward(x)


class Times(Vectors):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return super().forward(x) * factor


@dataclass
class Box:
    tensor: Tensor


class Unboxes(Vectors):
    def forward(self, box: Box, x: Tensor) -> Tensor:
        return super().forward(box.tensor) + x


def _lends() -> nn.Module:
    shared = Vectors()
    return Forks(nn.Sequential(shared, Vectors()), nn.Sequential(Vectors(), shared)).eval()


def _refers() -> nn.Module:
    """A reference that the module tree does not know."""
    block = Vectors()
    return _forking(lambda self, x: self.references[0](x), block=block, references=[block])


def _reading(read: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A parent that reads attributes of its child besides calling it."""
    block: Any = Vectors()
    block.width, block.config = 6, {"scale": 2.0, "names": ["a"]}
    return _forking(lambda self, x: read(self.block, self.block(x)), block=block)


def _sum_of(block: nn.Module, what: Callable[[Tensor], Any]) -> Any:
    return sum(what(parameter) for _, parameter in block.named_parameters())


OTHER = {"other"}
#: what makes the model, its parts, which submodule is left whole, and why
LEFT: dict[str, tuple[Callable[[], nn.Module], set[str], str, str]] = {
    "a buffer that is written": (
        lambda: _forking(lambda self, x: self.block(x), block=Counts()),
        OTHER,
        "block",
        "its buffer 'block.count' is written into",
    ),
    "a module shared across the boundary": (
        _lends,
        {"first.0", "first.1", "second.0"},
        "first",
        "its weight 'first.0.up.weight' is also 'second.1.up.weight'",
    ),
    "a weight that is read": (
        lambda: _reading(lambda block, x: x + block.up.weight.abs().mean()),
        OTHER,
        "block",
        "AttributeError",
    ),
    "layers that are called": (
        lambda: _reading(lambda block, x: block.down(torch.relu(block.up(x)))),
        OTHER,
        "block",
        "AttributeError",
    ),
    "values of parameters that are read": (
        lambda: _reading(lambda block, x: x + _sum_of(block, lambda own: own.square().sum())),
        OTHER,
        "block",
        "computes something else",
    ),
    "sizes of parameters that are read": (
        lambda: _reading(lambda block, x: x * _sum_of(block, Tensor.numel)),
        OTHER,
        "block",
        "computes something else",
    ),
    "a reference": (_refers, OTHER, "block", "reference outside of the module tree"),
    "an attribute that is set": (
        lambda: Forks(Sets()).eval(),
        {"second"},
        "first",
        "sets the attribute 'first.seen'",
    ),
    "calls with other constants": (
        lambda: _forking(lambda self, x: self.block(self.block(x, 1.0), 2.0), block=Times()),
        OTHER,
        "block",
        "CallError",
    ),
    "an argument of an unknown class": (
        lambda: _forking(lambda self, x: self.block(Box(x), x), block=Unboxes()),
        OTHER,
        "block",
        "Box",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_whole_and_why(name: str) -> None:
    make, parts, path, reason = LEFT[name]
    assert reason in _exact(make(), parts, (X,), (X,)).left[path]


@pytest.mark.parametrize(
    "read",
    [
        lambda block, x: x * block.width + block.config["scale"],
        lambda block, x: x.to(next(block.parameters()).dtype),
        lambda block, x: x + block.forward(x),
    ],
    ids=["numbers", "dtype", "method"],
)
def test_simple_attributes_of_a_part_can_be_read(read: Callable[[Any, Tensor], Tensor]) -> None:
    result = _exact(_reading(read), {"block", "other"})
    assert copy.deepcopy(result.module).block.config == {"scale": 2.0, "names": ["a"]}


def test_models_that_draw_at_random_are_pruned_where_a_seed_of_torch_brings_that_back() -> None:
    class Draws(Forks):
        def __init__(self, draw: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.draw = draw

        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
            return super().forward(x + self.draw(x), scale)

    assert set(_prune(Draws(torch.rand_like).eval(), score="magnitude").parts) == {"first", "second"}
    with pytest.raises(fasp_fx.CaptureError, match="with a graph in its place, or in each run"):
        _prune(Draws(lambda x: random.random()).eval(), score="magnitude")


def test_hooks_of_the_user_stay_and_run() -> None:
    model, seen = Forks().eval(), []
    model.first.down.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    result = _exact(model, {"second"})
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


def _uneven() -> nn.Module:
    """The second block cannot lose as much as the first."""
    return made(
        lambda self, x: self.narrow(x) if (x := self.wide(x)).sum() < 1e6 else x,
        wide=nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6)),
        narrow=nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6)),
    )


@pytest.mark.parametrize("sparsity", [0.2, 0.8])
def test_the_sparsity_is_that_of_all_parts_together(sparsity: float) -> None:
    result = _prune(_uneven(), sparsity=sparsity)
    # At a low sparsity, four channels lose none.
    assert set(result.parts) | set(result.left) == {"wide", "narrow"}
    assert abs(result.report.sparsity - sparsity) < 0.02
    dense = sum(p.numel() for n, p in _uneven().named_parameters() if p.dim() > 1)
    left = sum(p.numel() for n, p in result.module.named_parameters() if p.dim() > 1)
    assert math.isclose(1 - left / dense, result.report.sparsity, abs_tol=1e-9)


def test_restoration_on_the_inputs_that_the_parts_get() -> None:
    torch.manual_seed(0)
    model = _lasting()
    batches = [torch.randn(200, 6) for _ in range(3)]
    data = torch.cat(batches)
    errors = {}
    for restore in ("least-squares", None):
        result = _prune(model, calibration=batches, restore=restore, score="fasp")
        assert set(result.parts) == {"first", "second"}
        with torch.no_grad():
            errors[restore] = float((result.module(data)["out"] - model(data)["out"]).square().mean())
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


# --- state


def test_state_is_that_of_the_callers_model_and_evolves_like_it() -> None:
    """A buffer written outside of the parts, and a list that grows."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.log.append(len(x))
        return self.counted(x - self.mean)

    model = _forking(forward, counted=Vectors(), mean=torch.full((6,), 0.5), log=[])
    result = _prune(model, calibration=[BATCH, 2 * BATCH], restore="least-squares")
    assert torch.equal(result.module.mean, model.mean)
    assert result.module.log == model.log == []
    result = _exact(model, {"other", "counted"}, (X,), (2 * X,), (X - 1,))
    assert result.module.log == [3, 3, 3]


# --- the result


def _lasting() -> Any:
    return Forks(nn.Sequential(Vectors(), nn.Tanh(), Vectors())).eval()


@pytest.fixture(scope="module")
def forks() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = _lasting()
    return model, fasp_fx.prune(model, (X,), calibration=[BATCH], sparsity=0.3)


def test_the_plan_is_replayed(forks: tuple[nn.Module, Any]) -> None:
    model, result = forks
    plan = fasp_fx.PruningPlan.from_json(result.plan.to_json())
    assert plan == result.plan
    with untouched(model):
        again = fasp_fx.apply(model, plan, (X,))
    assert again.plan.groups == result.plan.groups
    again.module.load_state_dict(result.module.state_dict())
    assert torch.equal(again.module(X)["out"], result.module(X)["out"])
    with pytest.raises(fasp_fx.PlanError, match="another model"):
        fasp_fx.apply(Forks().eval(), plan, (X,))
    with pytest.raises(fasp_fx.PlanError, match="already applied"):
        fasp_fx.apply(result.module, plan, (X,))


def test_an_analysis_finds_the_same_parts(forks: tuple[nn.Module, Any]) -> None:
    model, result = forks
    with untouched(model):
        analysis = fasp_fx.analyze(model, (X,))
    assert (list(analysis.parts), analysis.left) == (list(result.parts), result.left)
    assert {(group.name, group.status) for group in analysis.groups} == {
        (line.name, line.status) for line in result.report.lines
    }
    assert {group.name for group in result.plan.groups} <= {
        group.name for group in analysis.select("prunable")
    }
    names = {name for name, _ in model.named_parameters()}
    assert {
        member.name for group in analysis.groups for member in (*group.producers, *group.consumers)
    } <= names
    most = analysis.max_sparsity
    reached = fasp_fx.prune(model, (X,), sparsity=most, score="magnitude", restore=None)
    assert reached.report.sparsity == pytest.approx(most)
    with pytest.raises(fasp_fx.SparsityError):
        fasp_fx.prune(model, (X,), sparsity=most + 0.01, score="magnitude", restore=None)


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
    assert loaded.plan == result.plan
    assert loaded.report == result.report
    assert loaded.left == result.left
    assert list(loaded.parts) == list(result.parts)
    for path, part in loaded.parts.items():
        assert loaded.module.get_submodule(path) is part.module
        assert torch.equal(part.program.module()(X), result.parts[path].program.module()(X))


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
