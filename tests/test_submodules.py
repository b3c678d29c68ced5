"""Models that cannot be captured as a whole: their largest submodules that can are pruned and put back."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import TOLERANCE, error, floats, zeroed
from refusal import BATCH, Vectors, X, untouched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

import fasp_fx
from fasp_fx.pruning.submodules._result import PartsResult

pytestmark = [
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.usefixtures("no_files", "shared_captures"),
]


def _zeroed(model: nn.Module, plan: fasp_fx.PruningPlan) -> nn.Module:
    """A copy of the dense model whose consumers' removed columns are zero."""
    copied = copy.deepcopy(model)
    weights = dict(copied.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for part in [part for group in plan.groups for part in group.consumers]:
            blocks = part.by_block()
            pieces = (
                [weights[part.name]]
                if part.block_dim is None
                else weights[part.name].chunk(len(blocks), part.block_dim)
            )
            for piece, removed in zip(pieces, blocks, strict=True):
                piece.index_fill_(part.dim, torch.tensor(removed, dtype=torch.long), 0)
    return copied


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
    zeroed, dense = _zeroed(model, result.plan), copy.deepcopy(model)
    differs = 0.0
    with torch.no_grad():
        for call in calls or (args,):
            found, expected, full = (
                result.module(*copy.deepcopy(call)),
                zeroed(*copy.deepcopy(call)),
                dense(*copy.deepcopy(call)),
            )
            assert pytree.tree_structure(found) == pytree.tree_structure(expected)
            assert error(found, expected) < 1e-5
            differs = max(
                [
                    differs,
                    *(
                        float((a - b).abs().max())
                        for a, b in zip(floats(expected), floats(full))
                        if a.shape == b.shape
                    ),
                ]
            )
    assert differs > 1e-3, "masking changes nothing that can be seen"
    sizes, shrunk = (
        {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers())}
        for m in (model, result.module)
    )
    for part in [part for group in result.plan.groups for part in (*group.producers, *group.consumers)]:
        assert shrunk[part.name].shape[part.dim] < sizes[part.name].shape[part.dim]
    mine = {
        id(tensor.untyped_storage()) for tensor in (*result.module.parameters(), *result.module.buffers())
    }
    assert not mine & {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
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
    assert set(result.left) == {"out"}
    assert "nothing to be coupled" in result.left["out"]
    assert abs(result.report.sparsity - 0.3) < 0.02
    assert result.report.requested == 0.3
    assert any("cannot be captured as a whole" in note for note in result.report.notes)
    assert any("part 'second' (1 call seen)" in note for note in result.report.notes)
    assert any("left 'out' whole" in note for note in result.report.notes)
    assert {line.name.partition(".")[0] for line in result.report.lines} == {"first", "second"}


class Convolutions(nn.Module):
    """A convolutional backbone, and one head that sees each of a pyramid's levels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1)
        )
        self.head = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        found = []
        for image in images:
            level = self.body(image[None])
            while min(level.shape[-2:]) > 4 and level.mean() < 1e6:
                found.append(self.head(level)[0])
                level = F.max_pool2d(level, 2)
        return found


def test_convolutions_called_with_many_shapes() -> None:
    images = [torch.rand(3, 20, 24), torch.rand(3, 16, 16), torch.rand(3, 36, 18)]
    result = _exact(
        Convolutions().eval(),
        {"body", "head"},
        (images,),
        (images[:1],),
        args=(images[:2],),
        calibration=[(images,)],
    )
    assert any("part 'head' (5 calls seen)" in note for note in result.report.notes)


class Nested(nn.Module):
    """Control flow at two levels, around containers that are never called themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Forks(), nn.ModuleDict({"a": Vectors(), "b": Vectors()})])  # type: ignore[dict-item]
        self.unused = Vectors()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[0](x)["kept"][0]
        for name, block in self.stages[1].items():
            x = block(x) if x.sum() < 1e6 else x * len(name)
        return x


class Late(nn.Module):
    """What stands deeper is called first."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.inner = Vectors(), Forks()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)["kept"][0]) if x.sum() < 1e6 else x


def test_parts_are_pruned_in_the_order_of_their_calls() -> None:
    assert list(_prune(Late().eval()).parts) == ["inner.first", "inner.second", "last"]


def test_containers_and_inner_control_flow_are_descended() -> None:
    result = _exact(Nested().eval(), {"stages.0.first", "stages.0.second", "stages.1.a", "stages.1.b"})
    assert any(
        "'stages.0' is pruned only by its submodules: it cannot be captured" in note
        for note in result.report.notes
    )
    assert "unused" not in {path for group in result.plan.groups for path in group.name}


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = Vectors()
        self.first, self.second = block, nn.ModuleDict({"again": block})

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second["again"](x) if x.sum() < 1e6 else x


def test_a_module_at_two_paths_is_pruned_once_and_put_back_at_both() -> None:
    model = Shared().eval()
    result = _exact(model, {"first"})
    assert result.module.first is result.module.second["again"]
    assert any("also at 'second.again'" in note for note in result.report.notes)
    assert set(dict(result.module.named_parameters())) == set(dict(model.named_parameters()))


# --- what is refused, and why


def test_tied_weights_across_the_boundary_stay() -> None:
    model = Forks().eval()
    model.second.up.weight = model.first.up.weight
    with pytest.raises(
        fasp_fx.CaptureError, match=r"'first': its weight 'first\.up\.weight' is tied to 'second\.up\.weight'"
    ):
        _prune(model)
    model.third = Vectors()
    model.register_forward_hook(
        lambda module, args, output: {**output, "third": module.third(output["out"].new_ones(2, 6))}
    )
    result = _exact(model.eval(), {"third"})
    assert "is tied to" in result.left["second"]


class Counts(Vectors):
    """Counts its calls in a buffer that it is given."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.register_buffer("count", buffer)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.count.add_(1)
        return y


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_a_buffer_that_is_written_and_read_across_the_boundary_keeps_the_part_whole(kind: str) -> None:
    class Sees(Forks):
        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
            return super().forward(x * (1 + self.seen), scale)

    buffer = torch.zeros(1)
    model = Sees(Counts(buffer)).eval()
    if kind == "buffer":
        model.register_buffer("seen", buffer)
    else:
        model.seen = buffer
    result = _exact(model, {"second"}, (X,), (X,))
    assert "its buffer 'first.count' is also 'seen' outside of it" in result.left["first"]


def test_a_buffer_that_nobody_writes_may_be_shared() -> None:
    class Adds(Vectors):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.table)

    model = Forks(Adds(), Adds()).eval()
    for place in (model, model.first, model.second):
        place.register_buffer("table", model._buffers.get("table", torch.arange(6.0)))
    _exact(model, {"first", "second"})


def test_a_model_that_no_seed_of_torch_brings_back_stays_whole() -> None:
    class DrawsElsewhere(Forks):
        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
            count = sum(parameter.numel() for parameter in self.first.parameters())
            return super().forward(x + random.random(), scale * count)

    with pytest.raises(fasp_fx.CaptureError, match="'first': the model computes something else in each run"):
        _prune(DrawsElsewhere().eval(), score="magnitude")


def test_a_module_shared_across_the_boundary_stays() -> None:
    model = Forks(nn.Sequential(Vectors(), Vectors()), nn.Sequential(Vectors(), Vectors())).eval()
    model.second[1] = model.first[0]
    result = _exact(model, {"first.0", "first.1", "second.0"})
    assert "its submodule 'first.0' is also used as 'second.1'" in result.left["first"]
    assert result.module.second[1] is result.module.first[0]


class Reads(nn.Module):
    """A parent that reads attributes of its children besides calling them."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.block, self.other = Vectors(), Vectors()
        self.block.width, self.block.config = 6, {"scale": 2.0, "names": ["a"]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if self.what == "numbers":
            x = x * self.block.width + self.block.config["scale"]
        elif self.what == "weight":
            x = x + self.block.up.weight.abs().mean()
        elif self.what == "method":
            x = x + self.block.forward(x)
        elif self.what == "device":
            x = x.to(next(self.block.parameters()).dtype)
        elif self.what == "penalty":
            x = x + sum(parameter.square().sum() for parameter in self.block.parameters())
        elif self.what == "count":
            x = x * sum(parameter.numel() for _, parameter in self.block.named_parameters())
        elif self.what == "layer":
            x = self.block.down(torch.relu(self.block.up(x)))
        return self.other(x) if x.sum() < 1e6 else x


def test_simple_attributes_of_a_part_can_be_read() -> None:
    result = _exact(Reads("numbers").eval(), {"block", "other"})
    assert copy.deepcopy(result.module).block.config == {"scale": 2.0, "names": ["a"]}
    _exact(Reads("device").eval(), {"block", "other"})
    _exact(Reads("method").eval(), {"block", "other"})


@pytest.mark.parametrize("what", ["weight", "layer"])
def test_a_parent_that_reads_inside_a_part_keeps_it_whole(what: str) -> None:
    result = _exact(Reads(what).eval(), {"other"})
    assert "AttributeError" in result.left["block"]


@pytest.mark.parametrize("what", ["penalty", "count"])
def test_a_parent_that_reads_values_or_sizes_of_parameters_keeps_the_part_whole(what: str) -> None:
    result = _exact(Reads(what).eval(), {"other"})
    assert "computes something else" in result.left["block"]


class Hidden(Forks):
    """A reference that the module tree does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.references = [self.first]

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return super().forward(self.references[0](x), scale)


class Sets(Vectors):
    """A forward that leaves something behind."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape[0]
        return super().forward(x)


class Times(Vectors):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return super().forward(x) * factor


class CallsDifferently(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Times(), Vectors()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(x, 1.0), 2.0)
        return self.other(x) if x.sum() < 1e6 else x


class Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Unboxes(Vectors):
    def forward(self, box: Box, x: Tensor) -> Tensor:
        return super().forward(box.tensor) + x


class HandsOverABox(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Unboxes(), Vectors()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(Box(x), x)
        return self.other(x) if x.sum() < 1e6 else x


class Squares(Vectors):
    """Rows and columns must be equal in number: no dimension may vary freely."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(3, 6))


class CallsWithTwoShapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Squares(), Vectors()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(x).reshape(6, 3)).reshape(3, 6)
        return self.other(x) if x.sum() < 1e6 else x


def test_other_reasons_to_stay_whole() -> None:
    assert "reference outside of the module tree" in _exact(Hidden().eval(), {"second"}).left["first"]
    assert "sets the attribute 'first.seen'" in _exact(Forks(Sets()).eval(), {"second"}).left["first"]
    assert "does not take all its calls" in _exact(CallsDifferently().eval(), {"other"}).left["block"]
    assert "takes a Box" in _exact(HandsOverABox().eval(), {"other"}).left["block"]


def test_calls_with_shapes_that_one_graph_does_not_take() -> None:
    result = _exact(CallsWithTwoShapes().eval(), {"other"})
    assert "does not take all its calls" in result.left["block"]


def test_hooks_of_the_user_stay_and_run() -> None:
    model, seen = Forks().eval(), []
    model.first.down.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    result = _exact(model, {"second"})
    assert "its submodule 'down' has hooks" in result.left["first"]
    seen.clear()
    result.module(X)
    assert seen == [Tensor]


def test_weights_computed_by_torchs_own_hooks_are_no_hooks_of_the_user() -> None:
    model = Forks().eval()
    nn.utils.parametrizations.spectral_norm(model.first.up)
    model.eval()
    result = _prune(model)
    assert "second" in result.parts
    assert "hooks" not in result.left.get("first", "")


def test_submodules_that_no_exporter_takes() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(
        Vectors().eval(), {nn.Linear}, dtype=torch.qint8
    ).eval()
    for other in (torch.jit.script(Vectors().eval()), quantised):
        result = _prune(Forks(second=other).eval())
        assert set(result.parts) == {"first"}
        assert torch.isfinite(result.module(X)["out"]).all()


class Packed(nn.Module):
    """Hands a packed sequence from one submodule to another, whose class looks at what it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Vectors(), nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(self.first(x), lengths, batch_first=True, enforce_sorted=False)
        return rnn.pad_packed_sequence(self.second(packed)[0], batch_first=True)[0]


def test_packed_sequences_between_submodules() -> None:
    model, given = Packed().eval(), (torch.randn(2, 4, 6), torch.tensor([2, 4]))
    result = fasp_fx.prune(model, given, sparsity=0.3, score="magnitude", restore=None)
    assert set(result.parts) == {"first"}
    assert result.left["second"].startswith("it takes a PackedSequence")
    with torch.no_grad():
        expected = zeroed(model, result.plan)(*given)
        assert error(result.module(*given), expected) <= TOLERANCE


class Alone(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e6 else x


def test_nothing_to_capture() -> None:
    with pytest.raises(
        fasp_fx.CaptureError,
        match=r"Alone cannot be captured.*No submodule.*'up': one weight alone.*'down': one weight alone",
    ):
        _prune(Alone().eval())


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


def test_submodules_are_no_way_around_other_errors() -> None:
    with pytest.raises(fasp_fx.CaptureError, match="training mode"):
        _prune(Forks())
    with pytest.raises(fasp_fx.ArgumentError, match="does not run on the example inputs"):
        _prune(Forks().eval(), (X[:, :4],))
    with pytest.raises(fasp_fx.ArgumentError, match="do not fit"):
        _prune(Forks().eval(), (X, 1.0, 2.0))
    with pytest.raises(fasp_fx.CaptureError, match="data-dependent"):
        _prune(Forks().eval(), dynamic_shapes={"x": {0: torch.export.Dim("batch")}, "scale": None})
    lazy = nn.Sequential(nn.LazyLinear(4), Forks()).eval()
    with pytest.raises(fasp_fx.CaptureError, match="uninitialized"):
        fasp_fx.prune(lazy, (X,), calibration=[BATCH])
    assert nn.parameter.is_lazy(lazy[0].weight)
    with torch.device("meta"):
        meta = Forks().eval()
    with pytest.raises(fasp_fx.FaspError):
        _prune(meta)


# --- sparsity, calibration, restoration


class Uneven(nn.Module):
    """The second block cannot lose as much as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6))
        self.narrow = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        return self.narrow(x) if x.sum() < 1e6 else x


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_the_sparsity_is_that_of_all_parts_together(sparsity: float) -> None:
    result = _prune(Uneven().eval(), sparsity=sparsity)
    # At a low sparsity, four channels lose none.
    assert set(result.parts) | set(result.left) == {"wide", "narrow"}
    assert abs(result.report.sparsity - sparsity) < 0.02
    dense = sum(p.numel() for n, p in Uneven().named_parameters() if p.dim() > 1)
    left = sum(p.numel() for n, p in result.module.named_parameters() if p.dim() > 1)
    assert math.isclose(1 - left / dense, result.report.sparsity, abs_tol=1e-9)


def test_sparsity_out_of_reach() -> None:
    with pytest.raises(fasp_fx.SparsityError, match="at most 0"):
        _prune(Uneven().eval(), sparsity=0.999)


def test_restoration_on_the_inputs_that_the_parts_get() -> None:
    torch.manual_seed(0)
    model = Forks(nn.Sequential(Vectors(), nn.Tanh(), Vectors())).eval()
    batches = [torch.randn(200, 6) for _ in range(3)]
    data = torch.cat(batches)
    errors = {}
    for restore in ("least-squares", None):
        result = _prune(model, calibration=batches, restore=restore, score="fasp")
        assert set(result.parts) == {"first", "second"}
        with torch.no_grad():
            errors[restore] = float((result.module(data)["out"] - model(data)["out"]).square().mean())
        restored = [line.error_restored for line in result.report.lines if line.error_restored is not None]
        assert bool(restored) == (restore is not None)
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


class Seldom(Forks):
    """The second block runs only for batches of more than ten."""

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = self.first(x)
        if y.shape[0] > 10 and y.sum() < 1e6:
            y = self.second(y)
        return {"out": self.out(y), "sum": y.sum().item()}


def test_a_part_that_the_calibration_never_reaches_stays() -> None:
    model = Seldom().eval()
    result = _exact(model, {"first"}, (BATCH,), args=(BATCH,), calibration=[X, X], restore=None, score="fasp")
    assert "never reaches" in result.left["second"]
    assert result.report.sparsity == pytest.approx(0.3, abs=0.02)  # the first loses for both


def test_progress_and_analyses_are_reported() -> None:
    fractions: list[float] = []
    names: list[str] = []
    _prune(
        Forks().eval(),
        progress=fractions.append,
        on_analysis=lambda analysis: names.extend(group.name for group in analysis.groups),
    )
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert names.count("down.weight") == 2


# --- state


class Remembers(nn.Module):
    """Buffers written outside of the parts and inside of one, and a list that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.counted = Vectors(), Counted()
        self.register_buffer("mean", torch.zeros(6))
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.log.append(len(x))
        x = self.block(x - self.mean)
        return self.counted(x) if x.sum() < 1e6 else x


class Counted(Vectors):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return super().forward(x) * self.count


def test_state_is_that_of_the_callers_model_and_evolves_like_it() -> None:
    model = Remembers().eval()
    model.mean.fill_(0.5)
    result = _prune(model, calibration=[BATCH, 2 * BATCH], restore="least-squares")
    assert torch.equal(result.module.mean, model.mean)
    assert result.module.log == model.log == []
    result = _exact(model, {"block", "counted"}, (X,), (2 * X,), (X - 1,))
    assert float(result.module.counted.count) == 3
    assert result.module.log == [3, 3, 3]


class Draws(Forks):
    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return super().forward(x + torch.rand_like(x), scale)


def test_random_models_leave_the_random_numbers_alone() -> None:
    state = torch.random.get_rng_state()
    result = _prune(Draws().eval(), score="magnitude")
    assert set(result.parts) == {"first", "second"}
    torch.random.set_rng_state(state)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- the result


@pytest.fixture(scope="module")
def forks() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Forks(nn.Sequential(Vectors(), nn.Tanh(), Vectors())).eval()
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
    assert isinstance(analysis, fasp_fx.Analysis)
    assert (list(analysis.parts), analysis.left) == (list(result.parts), result.left)
    assert {(group.name, group.status) for group in analysis.groups} == {
        (line.name, line.status) for line in result.report.lines
    }
    assert {name for group in result.plan.groups for name in (group.name,)} <= {
        group.name for group in analysis.select("prunable")
    }
    names = {name for name, _ in model.named_parameters()}
    assert {
        member.name for group in analysis.groups for member in (*group.producers, *group.consumers)
    } <= names
    most = analysis.max_sparsity
    assert fasp_fx.prune(
        model, (X,), sparsity=most, score="magnitude", restore=None
    ).report.sparsity == pytest.approx(most)
    with pytest.raises(fasp_fx.SparsityError):
        fasp_fx.prune(model, (X,), sparsity=most + 0.01, score="magnitude", restore=None)
    assert analysis.explain("second.up.weight", "second.down.weight")
    assert analysis.explain("first.0.up.weight", "second.down.weight") == []
    assert ("group", "second.down.weight") in analysis.graph()
    for ask in (lambda: analysis.program, lambda: fasp_fx.to_html(analysis)):
        with pytest.raises(fasp_fx.CaptureError, match=r"analysis\.parts holds the analysis of each part"):
            ask()
    with pytest.raises(fasp_fx.ArgumentError, match="not a weight of a part"):
        analysis.explain("out.weight", "second.up.weight")


def test_no_single_program(forks: tuple[nn.Module, Any]) -> None:
    _, result = forks
    with pytest.raises(fasp_fx.CaptureError, match=r"result\.parts"):
        _ = result.program
    assert isinstance(result, fasp_fx.Result)
    assert "first" in repr(result)
    for path, part in result.parts.items():
        assert part.program.state_dict.keys() == dict(part.module.named_parameters()).keys()
        assert result.module.get_submodule(path) is part.module


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def _same_block() -> nn.Module:
    return nn.Sequential(Vectors(), nn.Tanh(), Vectors())


def test_a_result_is_saved_and_loaded_around_the_code_of_the_model(
    forks: tuple[nn.Module, Any], folder: Path
) -> None:
    _, result = forks
    other = Forks(_same_block()).train()  # other weights everywhere, and not ready to run
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
    loaded.module(X)["out"].sum().backward()
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            parameter -= 0.1 * parameter.grad
    again = fasp_fx.load(loaded.save(folder / "out", overwrite=True), model=other)
    assert torch.equal(again.module(X)["out"], loaded.module(X)["out"])
    assert not torch.equal(again.module(X)["out"], result.module(X)["out"])
    assert [child.name for child in folder.iterdir()] == ["out"]


def test_buffers_and_shared_parts_are_saved(folder: Path) -> None:
    shared = Vectors()
    model = Forks(shared, shared).eval()
    model.register_buffer("seen", torch.arange(3.0))
    result = _prune(model)
    assert len({id(result.module.first), id(result.module.second)}) == 1
    other = Forks().eval()
    other.register_buffer("seen", torch.zeros(3))
    loaded = fasp_fx.load(result.save(folder / "out"), model=other)
    assert loaded.module.first is loaded.module.second
    assert torch.equal(loaded.module.seen, torch.arange(3.0))
    assert torch.equal(loaded.module(X)["out"], result.module(X)["out"])


class Renamed(Forks):
    def forward(self, y: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return super().forward(y, scale)


def test_what_cannot_be_loaded(forks: tuple[nn.Module, Any], folder: Path) -> None:
    model, result = forks
    path = result.save(folder / "out")
    with pytest.raises(fasp_fx.ArgumentError, match=r"give the dense model: fasp_fx\.load"):
        fasp_fx.load(path)
    wider = Forks(_same_block())
    wider.out = nn.Linear(6, 4)
    deeper, shallower = Forks(_same_block()), Forks(_same_block())
    deeper.more = nn.Linear(2, 2)
    del shallower.second
    with torch.device("meta"):
        empty = Forks(_same_block())
    for other, message in (
        (Renamed(_same_block()), r"takes \['y', 'scale'\]"),
        (
            Forks(_same_block()).double(),
            r"'out\.weight' is torch\.float64 .* give model\.to\(torch\.float32\)",
        ),
        (empty, "'out\\.weight' of the model that was given is on the meta device"),
        (nn.Sequential(Vectors()), "takes"),
        (shallower, "has no submodule 'second'"),
        (wider, "weights around the parts"),
        (deeper, r"'more\.weight'"),
    ):
        with pytest.raises(fasp_fx.StoreError, match=message):
            fasp_fx.load(path, model=other)
    plain = fasp_fx.prune(Vectors().eval(), (X,), sparsity=0.3, score="random", restore=None).save(
        folder / "plain"
    )
    with pytest.raises(fasp_fx.ArgumentError, match="leave model= out"):
        fasp_fx.load(plain, model=model)
    for taken in (plain, path):
        with pytest.raises(fasp_fx.StoreError):
            result.save(taken, overwrite=taken == plain)
    moved = copy.copy(result.module)
    moved._modules = {**result.module._modules, "second": Vectors()}
    with pytest.raises(fasp_fx.StoreError, match="no longer stands"):
        PartsResult(moved, result.plan, result.report, result.signature, result.parts, result.left).save(
            folder / "moved"
        )
    weights = next(path.glob("parts/*/weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(fasp_fx.StoreError, match="truncated"):
        fasp_fx.load(path, model=model)
    (path / "parts" / "0" / "graph.json").unlink()
    with pytest.raises(fasp_fx.StoreError, match="missing"):
        fasp_fx.load(path, model=model)
    assert sorted(child.name for child in folder.iterdir()) == ["out", "plain"]


def test_weights_that_were_two_are_not_loaded_into_one(folder: Path) -> None:
    def make(tied: bool) -> nn.Module:
        model = Forks()
        model.before, model.after = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        if tied:
            model.after.weight = model.before.weight
        return model.eval()

    path = _prune(make(tied=False)).save(folder / "out")
    with pytest.raises(fasp_fx.StoreError, match=r"are one weight in the model that was given and two in"):
        fasp_fx.load(path, model=make(tied=True))
    path = _prune(made := make(tied=True)).save(folder / "tied")
    loaded = fasp_fx.load(path, model=make(tied=True)).module
    assert loaded.before.weight is loaded.after.weight
    assert torch.equal(loaded.after.weight, made.after.weight)


def test_the_result_trains_copies_and_moves(forks: tuple[nn.Module, Any]) -> None:
    _, result = forks
    copied = copy.deepcopy(result.module)
    assert torch.equal(copied(X)["out"], result.module(X)["out"])
    copied.train()
    copied.eval()
    copied(X)["out"].sum().backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())
    assert all(parameter.grad is None for parameter in result.module.parameters())
    moved = copied.double()
    assert moved(X.double())["out"].dtype is torch.float64


def test_one_plan_after_another() -> None:
    model = Forks().eval()
    first, second = (_prune(model, score=score).plan for score in ("random", "magnitude"))
    once = fasp_fx.apply(model, first, (X,))
    twice = fasp_fx.apply(once.module, second.after(once.plan), (X,))
    with torch.no_grad():
        assert error(twice.module(X), _zeroed(_zeroed(model, first), second)(X)) < 1e-5
    assert twice.report.parameters[1] < once.report.parameters[1]


def test_a_result_is_pruned_again(forks: tuple[nn.Module, Any]) -> None:
    _, result = forks
    again = fasp_fx.prune(result.module, (X,), calibration=[BATCH], sparsity=0.3, allocation="uniform")
    assert set(again.parts) == set(result.parts)
    assert again.report.parameters[1] < result.report.parameters[1]


# --- detection models


def _detector() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=4, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, stride=2, padding=1),
    )
    backbone.out_channels = 8
    anchors = detection.rpn.AnchorGenerator(sizes=((8, 16),), aspect_ratios=((0.5, 1.0),))
    pool = pytest.importorskip("torchvision.ops").MultiScaleRoIAlign(
        featmap_names=["0"], output_size=2, sampling_ratio=1
    )
    sizes = {
        "min_size": 32,
        "max_size": 64,
        "rpn_post_nms_top_n_test": 40,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 10,
    }
    model = detection.FasterRCNN(
        backbone, num_classes=3, rpn_anchor_generator=anchors, box_roi_pool=pool, **sizes
    )
    return model.eval().double()  # in float32, rounding reorders boxes with nearly the same score


def _images(*sizes: tuple[int, int]) -> tuple[list[Tensor]]:
    return ([torch.rand(3, *size, dtype=torch.float64) for size in sizes],)


def test_a_faster_rcnn(folder: Path) -> None:
    images = _images((32, 32), (32, 40))
    parts = {"backbone", "rpn.head", "roi_heads.box_head"}
    result = _exact(
        _detector(), parts, images, _images((32, 48)), args=images, calibration=[images], sparsity=0.2
    )
    assert abs(result.report.sparsity - 0.2) < 0.01
    assert result.left.keys() >= {"rpn", "roi_heads", "roi_heads.box_predictor"}
    loaded = fasp_fx.load(result.save(folder / "out"), model=_detector())
    with torch.no_grad():
        assert all(
            map(
                torch.equal,
                pytree.tree_leaves(loaded.module(*images)),
                pytree.tree_leaves(result.module(*images)),
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "ssdlite320_mobilenet_v3_large",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "retinanet_resnet50_fpn",
        "fcos_resnet50_fpn",
    ],
)
def test_torchvision_detection_models(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=5).eval().double()
    if not name.startswith("ssd"):
        model.transform.min_size = (128,)
    images = _images((128, 128), (128, 160))
    result = fasp_fx.prune(model, images, sparsity=0.2, score="magnitude", restore=None)
    assert "backbone" in result.parts
    assert abs(result.report.sparsity - 0.2) < 0.01
    for place in (model, result.module):
        getattr(place, "roi_heads", place).score_thresh = 0.0  # untrained models are sure of nothing
    with torch.no_grad():
        assert error(result.module(*images), _zeroed(model, result.plan)(*images)) < 1e-9


class _Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor, flip: bool = False) -> Tensor:
        hidden = self.up(x).relu()
        return self.down(hidden.flip(-1) if flip else hidden)


class _TellsByValue(nn.Module):
    """Calls a part in two ways, by values."""

    def __init__(self) -> None:
        super().__init__()
        self.part = _Told()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, flip=True) if x.sum().item() > 0 else self.part(x)


def test_a_part_that_is_called_in_another_way_than_on_the_example_refuses() -> None:
    torch.manual_seed(0)
    model, x = _TellsByValue().eval(), torch.rand(2, 6, 8)
    result = fasp_fx.prune(model, (x,), sparsity=0.3, score="random", restore=None)
    assert list(result.parts) == ["part"]
    assert error(result.module(x), _zeroed(model, result.plan)(x)) < 1e-5
    with pytest.raises(fasp_fx.CallError, match="'flip' is False"):
        # Left out by the model, which means its own default.
        result.module(-x)


class Gone(nn.Module):
    """Four blocks, the second of which the example reaches and the calibration data do not."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.p, self.q, self.r, self.s = (Block(width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = self.p(x)
        if x.sum().item() > 0:
            x = self.q(x)
        return self.s(self.r(x))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("quality", ["fast", "balanced"])
@pytest.mark.parametrize("widths", [(32, 32, 32, 32), (8, 32, 8, 64), (32, 32, 64, 8)])
def test_what_a_part_that_no_data_reach_would_lose_goes_from_the_others(
    quality: Any, widths: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = Gone(widths).eval()
    example, data = torch.rand(16, 8) + 3, [-torch.rand(16, 8) - 3 for _ in range(8)]
    asked: dict[str, Any] = {"calibration": data, "sparsity": 0.4, "quality": quality}
    result = fasp_fx.prune(model, (example,), **asked)
    without = fasp_fx.prune(model, (example,), **asked, exclude=("q",))
    assert isinstance(result, PartsResult)
    assert result.report.sparsity == pytest.approx(0.4, abs=0.02)
    assert result.left["q"] == "the calibration data never reaches it"
    assert "q" not in {group.name.partition(".")[0] for group in result.plan.groups}
    if quality == "balanced":  # one threshold leaves nothing to chance
        assert result.plan.groups == without.plan.groups


def test_it_says_what_leaves_a_part_whole() -> None:
    model = Forks().eval()
    for options, reason in (
        ({"exclude": ("first",)}, "exclude= leaves it whole"),
        ({"sparsity": {"second.*": 0.5}}, "no pattern of sparsity= asks for channels that its weights read"),
    ):
        result: Any = fasp_fx.prune(model, (X,), calibration=[BATCH], **options)
        assert result.left["first"] == reason
