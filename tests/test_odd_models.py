"""Odd models: pruned right, held against the dense model with the removed columns of its inputs masked, or
left whole with a reason.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import itertools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from oracle import masked, zeroed
from refusal import BATCH, Vectors, X
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import _pytree as pytree

import fasp_fx

pytestmark = [
    pytest.mark.usefixtures("shared_captures"),
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.usefixtures("no_files"),
]

TOLERANCE = 1e-5


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Same tensors, same values, same attributes, whatever kind of tensor they are."""

    def tensors() -> dict[str, Tensor]:
        return dict(
            [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        )

    copies = {
        name: (tensor, None if nn.parameter.is_lazy(tensor) else tensor.detach().clone())
        for name, tensor in tensors().items()
    }
    attributes = [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]
    try:
        yield
    finally:
        found = tensors()
        assert found.keys() == copies.keys()
        for name, (tensor, value) in copies.items():
            assert found[name] is tensor, name
            assert nn.parameter.is_lazy(tensor) == (value is None)
            if value is not None:
                same = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach().to_dense()
                assert torch.equal(same, value.dequantize() if value.is_quantized else value.to_dense()), name
        assert [
            {name: id(value) for name, value in vars(module).items()} for module in model.modules()
        ] == attributes


def _prune(
    model: nn.Module, args: tuple[Any, ...] = (X,), calibration: Any = None, **options: Any
) -> fasp_fx.Result:
    # The score would take channels that are always zero, and show nothing.
    options = {"restore": None, "score": "random", "sparsity": 0.3, **options}
    with _untouched(model):
        return fasp_fx.prune(
            model, args, calibration=[BATCH] if calibration is None else calibration, **options
        )


def _columns(plan: Any) -> dict[str, set[int]]:
    """The columns that each module's weight loses; a parametrised weight is that of its module."""
    found: dict[str, set[int]] = {}
    for group in plan.groups:
        for part in group.consumers:
            module = (
                part.name.partition(".parametrizations.")[0]
                if ".parametrizations." in part.name
                else part.name.rpartition(".")[0]
            )
            found.setdefault(f"{module}.weight", set()).update(part.removed)
    return found


def _leaves(output: Any) -> list[Any]:
    leaves = pytree.tree_leaves(output)
    return [
        torch.view_as_real(leaf) if isinstance(leaf, Tensor) and leaf.is_complex() else leaf
        for leaf in leaves
    ]


def _assert_same(found: Any, expected: Any) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for a, b in zip(_leaves(found), _leaves(expected), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        else:
            assert a == b


def _exact(
    model: nn.Module, *calls: tuple[Any, ...], args: tuple[Any, ...] = (X,), calibration: Any = None
) -> fasp_fx.Result:
    """Prune and compare several calls in a row: outputs, effects on the arguments, and buffers."""
    result = _prune(model, args, calibration)
    columns = _columns(result.plan)
    assert any(columns.values())
    dense, reference = copy.deepcopy(model), copy.deepcopy(model)
    differs = False
    with torch.no_grad(), masked(reference, columns):
        for call in calls or (args,):
            mine, theirs, whole = copy.deepcopy(call), copy.deepcopy(call), copy.deepcopy(call)
            found, expected, full = result.module(*mine), reference(*theirs), dense(*whole)
            _assert_same(found, expected)
            _assert_same(mine, theirs)
            differs |= any(
                isinstance(a, Tensor) and not torch.allclose(a, b, atol=100 * TOLERANCE)
                for a, b in zip(_leaves(expected), _leaves(full))
            )
    assert differs, "masking changes nothing that can be seen"
    own = dict(result.module.named_buffers())
    for name, buffer in reference.named_buffers():
        if name in own and own[name].shape == buffer.shape:
            torch.testing.assert_close(own[name], buffer)
    return result


def _exact_or_left(model: nn.Module, reason: str, *calls: tuple[Any, ...]) -> None:
    """Either is sound; what is left whole says why."""
    said = reason
    try:
        _exact(model, *calls)
    except fasp_fx.NothingPrunableError as error:
        said = str(error)
    assert reason in said


def _stack(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


# --- lazy modules


def test_lazy_modules_that_were_run_once() -> None:
    model = _stack(nn.LazyLinear(24), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(6))
    model(X)
    _exact_or_left(model, "no rule")
    model = _stack(nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(6))
    model(X)
    _exact(model)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(_stack(nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(6)), id="all"),
        pytest.param(_stack(Vectors(), nn.LazyLinear(6)), id="last"),
        pytest.param(_stack(nn.Linear(6, 24), nn.LazyBatchNorm1d(), nn.Linear(24, 6)), id="batch_norm"),
    ],
)
def test_uninitialised_modules_are_refused(model: nn.Module) -> None:
    with pytest.raises(fasp_fx.FaspError, match="uninitialized"):
        _prune(model)


# --- hooks


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def _double_with_kwargs(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return 2 * output


def _halve_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] / 2,)


HOOKS: dict[str, Callable[[Any], Any]] = {
    "forward_of_the_model": lambda m: m.register_forward_hook(_double),
    "forward_of_the_model_with_kwargs": lambda m: m.register_forward_hook(
        _double_with_kwargs, with_kwargs=True
    ),
    "always_called": lambda m: m.register_forward_hook(_double, always_call=True),
    "forward_of_the_producer": lambda m: m.up.register_forward_hook(_double),
    "before_the_producer": lambda m: m.up.register_forward_pre_hook(_halve_input),
    "before_the_consumer": lambda m: m.down.register_forward_pre_hook(_halve_input),
    "backward": lambda m: m.register_full_backward_hook(lambda module, before, after: None),
    "backward_of_the_producer": lambda m: m.up.register_full_backward_hook(
        lambda module, before, after: None
    ),
    "state_dict": lambda m: m.register_state_dict_post_hook(lambda module, state, prefix, metadata: None),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_part_of_what_the_model_computes(hook: str) -> None:
    model = Vectors().eval()
    HOOKS[hook](model)
    _exact(model)


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_hook_before_the_model(with_kwargs: bool) -> None:
    model = Vectors().eval()
    if with_kwargs:
        model.register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0] / 2,), kwargs), with_kwargs=True
        )
    else:
        model.register_forward_pre_hook(_halve_input)
    _exact(model)


def test_global_hook() -> None:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return 2 * output if isinstance(module, nn.Linear) else None

    model = Vectors().eval()
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        _exact(model)
    finally:
        handle.remove()


# --- parametrisations


class Square(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


PARAMETRISATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "square": lambda layer: parametrize.register_parametrization(layer, "weight", Square()),
    "weight_norm": parametrizations.weight_norm,
    "weight_norm_of_all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "weight_norm_of_columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
#: the older kind, which computes the weight in a hook before forward and sets it as an attribute
BY_HOOK: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruned_by_a_mask": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
}


@pytest.mark.parametrize("layer", ["up", "down"])
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_parametrised_weights(name: str, layer: str) -> None:
    model = Vectors().eval()
    PARAMETRISATIONS[name](model.get_submodule(layer))
    _exact_or_left(model.eval(), "aten.")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("layer", ["up", "down"])
@pytest.mark.parametrize("name", BY_HOOK)
def test_weights_computed_in_a_hook(name: str, layer: str) -> None:
    model = Vectors().eval()
    BY_HOOK[name](model.get_submodule(layer))
    with torch.no_grad():
        model(X)  # the attribute becomes a leaf, which can be copied
    _exact_or_left(model, "aten.")


def test_a_symmetric_weight_in_the_middle() -> None:
    model = _stack(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 6))
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    _exact_or_left(model.eval(), "aten.triu")


# --- weights that are not plain


class SparseFilter(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.body = Vectors()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.weight, self.body(x).T).T


class Quantised(Vectors):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.quantize_per_tensor(torch.eye(6), 0.1, 0, torch.qint8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.table.dequantize()


class EightBits(Vectors):
    """Weights stored in eight bits and scaled where they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randint(-128, 127, (6, 24), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(6, 1) / 128)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.up(x)), self.table.float() * self.scale)


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_weights_are_left_whole(layout: str) -> None:
    dense = torch.eye(6)
    model = SparseFilter(dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()).eval()
    _left_or_in_parts(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_modules_are_left_whole() -> None:
    model = _stack(Vectors(), nn.ReLU(), Vectors())
    with pytest.raises(fasp_fx.FaspError):
        _prune(torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8))
    model[2] = torch.ao.quantization.quantize_dynamic(model[2], {nn.Linear}, dtype=torch.qint8)
    _left_or_in_parts(model)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_buffers_are_left_whole() -> None:
    _left_or_in_parts(Quantised().eval())
    _exact_or_left(EightBits().eval(), "computed from weights")


def _left_or_in_parts(model: nn.Module) -> None:
    """The exporter does not take such weights: refused, or pruned in the submodules that have none."""
    try:
        result = _prune(model)
    except fasp_fx.CaptureError:
        return
    with torch.no_grad(), masked(model, _columns(result.plan)):
        _assert_same(result.module(X), model(X))


# --- complex numbers


class Complex(nn.Module):
    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24, dtype=torch.complex64), nn.Linear(24, 6, dtype=torch.complex64)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x.to(torch.complex64))
        out = self.down(hidden * hidden)
        return out.real if self.inside else out


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.fft.ifft(torch.fft.fft(self.first(x))).real)))


def _complex(count: int) -> Tensor:
    return torch.randn(count, 6, dtype=torch.complex64)


def test_complex_tensors() -> None:
    _exact(Complex().eval(), args=(_complex(4),), calibration=[_complex(40)])
    _exact(Complex(inside=True).eval())
    result = _exact(Fourier().eval())
    # What the transform mixes stays.
    assert {part.name for group in result.plan.groups for part in group.producers} == {
        "second.weight",
        "second.bias",
    }


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
def test_restoration_of_complex_weights_helps_or_is_left_out() -> None:
    torch.manual_seed(0)
    model, data = Complex().eval(), _complex(2000)
    restored, cut = (
        _prune(model, (data[:4],), [data], restore=restore, score="magnitude")
        for restore in ("least-squares", None)
    )
    with torch.no_grad():
        target = model(data)
        errors = [float((result.module(data) - target).abs().square().sum()) for result in (restored, cut)]
    assert errors[0] <= errors[1] * (1 + 1e-5)


# --- edits in place


class ScalesItsInput(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return super().forward(x)


class ClearsAColumn(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = 0
        return self.down(torch.relu_(self.up(x)))


class WritesIntoItsInput(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(super().forward(x))
        return x


class OverwritesItsInput(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        x.copy_(out)
        return out.sum()


class ReturnsItsInput(Vectors):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, super().forward(x)


@pytest.mark.parametrize(
    "kind", [ScalesItsInput, ClearsAColumn, WritesIntoItsInput, OverwritesItsInput, ReturnsItsInput]
)
def test_inputs_edited_in_place(kind: type[nn.Module]) -> None:
    example, batch = X.clone(), BATCH.clone()
    model = kind().eval()
    _exact(model, args=(example,), calibration=[batch])
    _prune(model, (example,), [batch], restore="least-squares")
    assert torch.equal(example, X)
    assert torch.equal(batch, BATCH)


# --- buffers and attributes written in forward


class Averages(Vectors):
    """A count and a running mean of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
        return super().forward(x + self.mean) * self.count


class Feedback(Vectors):
    """The mean output is assigned, and added to the next output."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) + self.last
        self.last = out.mean(0)
        return out


class HiddenMean(Vectors):
    """A buffer as wide as the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        self.mean.mul_(0.9).add_(hidden.mean(0) * 0.1)
        return self.down(hidden - self.mean)


class Remembers(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        self.hidden = torch.relu(self.up(x))
        return self.down(self.hidden)


class CountsCalls(Vectors):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize("kind", [Averages, Feedback])
def test_buffers_written_in_forward(kind: type[nn.Module]) -> None:
    model = kind().eval()
    _exact(model, (X,), (2 * X,), (X - 1,))
    with _untouched(model):
        # Observing does not count as calling.
        result = fasp_fx.prune(model, (X,), calibration=[BATCH, 2 * BATCH], sparsity=0.3)
    for name, buffer in model.named_buffers():
        assert torch.equal(result.module.get_buffer(name), buffer)


def test_a_buffer_of_hidden_channels_is_left_whole_or_right() -> None:
    _exact_or_left(HiddenMean().eval(), "", (X,), (2 * X,))


def test_writing_a_buffer_is_not_an_unknown_operator() -> None:
    result = _prune(Averages().eval())
    assert not [note for note in result.report.notes if "patterns.register(torch.ops.aten.copy_" in note]


@pytest.mark.parametrize(("kind", "name"), [(Remembers, "hidden"), (CountsCalls, "calls")])
def test_attributes_set_in_forward_are_not_left_behind(kind: type[nn.Module], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fasp_fx.CaptureWarning)  # that one of them counts is said besides
        result = _prune(kind().eval())
    assert f"forward sets the attribute '{name}', which a graph does not" in result.report.notes


# --- arguments that are no tensors


class Mode(enum.Enum):
    RELU = 1
    TANH = 2


class Options(Vectors):
    def forward(
        self,
        x: Tensor,
        mode: Mode = Mode.RELU,
        scale: float = 2.0,
        function: Any = torch.relu,
        *,
        count: int | None = None,
    ) -> Tensor:
        hidden = self.up(x) * scale
        hidden = function(hidden) if mode is Mode.RELU else torch.tanh(hidden)
        return self.down(hidden)[:count]


class Nested(Vectors):
    def forward(self, data: dict[str, Any]) -> Tensor:
        return super().forward(data["x"]) * data.get("k", 1)


class Images(Vectors):
    """A list of tensors of different sizes, as detection models take it."""

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [super(Images, self).forward(image) for image in images]


def test_options_become_part_of_the_program() -> None:
    model = Options().eval()
    for options in ((), (Mode.TANH, 3), (Mode.TANH, 3.0), (Mode.RELU, 2.0, torch.sigmoid)):
        _exact(model, args=(X, *options), calibration=[(BATCH, *options)])
    result = _prune(model, (X, Mode.TANH, 3.0), [(BATCH, Mode.TANH, 3.0)])
    for call in ((X, Mode.RELU, 2.5), (X, Mode.TANH, 2.5), (X, Mode.TANH, 3.0, torch.tanh)):
        with pytest.raises(fasp_fx.CallError, match="captured with"):
            result.module(*call)
    with pytest.raises(fasp_fx.CallError, match="'count'"):
        result.module(X, Mode.TANH, 3.0, count=2)


class Lenient(Vectors):
    """Reads a mask of any kind, each in its own way."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        return self.down(
            hidden.masked_fill(mask[:, None], 0.5) if mask.dtype == torch.bool else hidden + mask[:, None]
        )


@pytest.mark.parametrize("example", [torch.bool, torch.int64, torch.float32])
def test_tensors_of_another_kind_are_refused(example: torch.dtype) -> None:
    mask = torch.arange(len(X)) % 2
    result = _prune(
        Lenient().eval(), (X, mask.to(example)), [(BATCH, (torch.arange(len(BATCH)) % 2).to(example))]
    )
    compiled = torch.compile(result.module, backend="eager")
    for call in (result.module, compiled):
        call(X, mask.to(example))
        for other in {torch.bool, torch.int64, torch.float32} - {example}:
            with pytest.raises(fasp_fx.CallError, match=f"'mask' is a tensor of {other}"):
                call(X, mask.to(other))


class Casting(Vectors):
    """Casts what it is given, or what it makes of that."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.make(x).to(self.up.weight.dtype)).relu())


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x.flip(0) * 2).relu()], ids=["given", "made"])
def test_a_dtype_that_the_program_asserts_is_asked_for(make: Callable[[Tensor], Tensor]) -> None:
    result = _prune(Casting(make).eval(), (X,), [(BATCH,)])
    for other in {torch.float32, torch.float64, torch.bfloat16} - {X.dtype}:
        with pytest.raises(fasp_fx.CallError, match=f"'x' is a tensor of {other}.*captured for {X.dtype}"):
            result.module(X.to(other))


class Settings:
    """Says nothing of when two are equal."""

    def __init__(self, scale: float, steps: list[Any]) -> None:
        self.scale, self.steps = scale, steps


class Set(Vectors):
    def forward(self, x: Tensor, settings: Any = None) -> Tensor:
        hidden = self.up(x).relu() * settings.scale
        for step in settings.steps:
            hidden = hidden.tanh() if step is True else hidden * step
        return self.down(hidden)


@pytest.mark.parametrize(
    "make", [Settings, lambda scale, steps: types.SimpleNamespace(scale=scale, steps=steps)]
)
def test_what_the_caller_changes_inside_of_a_constant_is_seen(make: Any) -> None:
    model, given = Set().eval(), make(2.0, [1])
    result = _prune(model, (X, given), [(BATCH, given)])
    expected = result.module(X, given)
    assert torch.equal(result.module(X, make(2.0, [1])), expected)
    for other in (make(3.0, [1]), make(2.0, [True]), make(2.0, [1, 1])):
        with pytest.raises(fasp_fx.CallError, match="captured with"):
            result.module(X, other)
    given.scale = 3.0
    with pytest.raises(fasp_fx.CallError, match="captured with"):
        result.module(X, given)


def test_lists_and_dicts_of_tensors() -> None:
    _exact(Images().eval(), args=([X, X[:2]],), calibration=[([BATCH, BATCH],)])
    _exact(Nested().eval(), args=({"x": X, "k": 2},), calibration=[({"x": BATCH, "k": 2},)])


@pytest.mark.parametrize(
    ("kind", "example", "batch", "other"),
    [
        pytest.param(Images, [X, X[:2]], [BATCH, BATCH], [X, X, X], id="longer_list"),
        pytest.param(Images, [X, X[:2]], [BATCH, BATCH], [X], id="shorter_list"),
        pytest.param(Images, [X, X[:2]], [BATCH, BATCH], X, id="tensor_for_a_list"),
        pytest.param(Nested, {"x": X}, {"x": BATCH}, {"x": X, "k": 3}, id="another_key"),
        pytest.param(Nested, {"x": X}, {"x": BATCH}, {"y": X}, id="missing_key"),
        pytest.param(Nested, {"x": X, "k": 2}, {"x": BATCH, "k": 2}, {"x": X, "k": 3}, id="another_constant"),
    ],
)
def test_other_structures_inside_arguments_are_refused(
    kind: type[nn.Module], example: Any, batch: Any, other: Any
) -> None:
    result = _prune(kind().eval(), (example,), [(batch,)])
    with pytest.raises(fasp_fx.CallError):
        result.module(other)


def test_calibration_with_another_constant_is_refused() -> None:
    with pytest.raises(fasp_fx.CalibrationError):
        _prune(Nested().eval(), ({"x": X, "k": 2},), [({"x": BATCH, "k": 3},)], restore="least-squares")


# --- outputs


class Pair(NamedTuple):
    value: Tensor
    extra: Tensor | None


@dataclasses.dataclass
class Unknown:
    value: Tensor


class Returns(Vectors):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


def test_optional_and_constant_outputs() -> None:
    _exact(Returns(lambda out: (out, None)).eval())
    _exact(
        Returns(
            lambda out: {"out": out, "none": None, "count": 3, "name": "text", "nested": [1, (out.sum(),)]}
        ).eval()
    )
    model = Returns(lambda out: Pair(out, None)).eval()
    assert type(_exact(model).module(X)) is Pair


def test_an_output_of_an_unknown_class_is_refused_by_name() -> None:
    with pytest.raises(fasp_fx.CaptureError, match="Unknown"):
        _prune(Returns(Unknown).eval())


class ReturnsHidden(Vectors):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.up(x))
        return hidden, self.down(hidden)


class ReturnsWeight(Vectors):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.up.weight, super().forward(x)


@pytest.mark.parametrize("kind", [ReturnsHidden, ReturnsWeight])
def test_what_is_returned_stays(kind: type[nn.Module]) -> None:
    with pytest.raises(fasp_fx.NothingPrunableError, match="reaches output 0"):
        _prune(kind().eval())


# --- randomness and modes


class AlwaysDrops(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(torch.relu(self.up(x)), 0.5, training=True))


def test_dropout_in_training_mode_is_refused_by_name() -> None:
    model = _stack(nn.Linear(6, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 6))
    model[2].train()
    with pytest.raises(fasp_fx.CaptureError, match=r"'2'.*training mode"):
        _prune(model)


def test_dropout_that_is_always_on_stays_on() -> None:
    result = _prune(AlwaysDrops().eval())
    assert result.plan.groups
    first, second = (result.module(X) for _ in range(2))
    assert not torch.equal(first, second)


class Regions(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.up(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            hidden = torch.relu(hidden)
        return torch.utils.checkpoint.checkpoint(self.down, hidden, use_reentrant=False)


def test_regions_of_gradient_autocast_and_checkpointing() -> None:
    _exact(Regions().eval())


# --- modules that are not modules


def test_scripted_and_traced_modules() -> None:
    model = Vectors().eval()
    with pytest.raises(fasp_fx.CaptureError, match="ScriptModule"):
        _prune(torch.jit.script(model))


def test_traced_module_is_refused() -> None:
    with pytest.raises(fasp_fx.CaptureError):
        _prune(torch.jit.trace(Vectors().eval(), X))


def test_forward_of_the_instance() -> None:
    model = Vectors().eval()
    model.forward = lambda x: 3 * Vectors.forward(model, x)
    result = _prune(model)
    with torch.no_grad(), masked(model, _columns(result.plan)):
        _assert_same(result.module(X), model(X))


# --- weights that no module multiplies


def _zeroed(model: nn.Module, *calls: tuple[Any, ...], **options: Any) -> fasp_fx.Result:
    """Prune and compare with the dense model whose consumers' removed columns are zero (with ``include``:
    whose producers' rows are, too).
    """
    result = _prune(model, calls[0], **options)
    assert result.plan.groups
    reference = zeroed(model, result.plan, producers=bool(options.get("include")))
    differs = False
    with torch.no_grad():
        for call in calls:
            _assert_same(result.module(*call), reference(*call))
            differs |= any(
                not torch.allclose(a, b, atol=100 * TOLERANCE)
                for a, b in zip(_leaves(reference(*call)), _leaves(model(*call)), strict=True)
            )
    assert differs, "masking changes nothing that can be seen"
    return result


class Splines(nn.Module):
    """Layers of splines: one dimension of a product is an input's channels times the points of a grid."""

    def __init__(self, *widths: int, points: int = 5) -> None:
        super().__init__()
        self.layers = nn.ParameterList(
            [nn.Parameter(torch.randn(o, i, points)) for i, o in itertools.pairwise(widths)]
        )
        self.register_buffer("grid", torch.linspace(-2, 2, points))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.layers:
            x = torch.einsum("big,oig->bo", torch.exp(-((x[..., None] - self.grid) ** 2)), weight)
        return x


def test_a_dimension_merged_of_channels_and_what_has_none() -> None:
    model = Splines(6, 10, 3).eval()
    result = _zeroed(model, (X,), (torch.randn(7, 6),))
    assert {(part.name, part.dim) for group in result.plan.groups for part in group.consumers} >= {
        ("layers.1", 1)
    }
    inputs = [
        group
        for group in fasp_fx.analyze(model, (X,)).groups
        if any((part.name, part.dim) == ("layers.0", 1) for part in group.consumers)
    ]
    assert [group.status for group in inputs] == ["frozen"]  # the input's own channels stay


class OnePerSample(nn.Module):
    """A convolution with a weight of its own for every sample: mixed of several (CondConv), or scaled by a
    style (StyleGAN 2).
    """

    def __init__(self, styled: bool) -> None:
        super().__init__()
        self.first, self.last, self.styled = nn.Conv2d(3, 6, 1), nn.Conv2d(8, 2, 1), styled
        self.gate = nn.Linear(6, 6 if styled else 3)
        self.weight = nn.Parameter(torch.randn(8, 6, 3, 3) if styled else torch.randn(3, 8, 6, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        batch, channels, height, width = x.shape
        gate = torch.sigmoid(self.gate(x.mean((2, 3))))
        weight = (
            self.weight * gate[:, None, :, None, None]
            if self.styled
            else torch.einsum("be,eoihw->boihw", gate, self.weight)
        )
        x = F.conv2d(
            x.reshape(1, batch * channels, height, width),
            weight.reshape(batch * 8, channels, 3, 3),
            padding=1,
            groups=batch,
        )
        return self.last(torch.relu(x.view(batch, 8, height, width)))


@pytest.mark.parametrize("styled", [False, True], ids=["mixed", "styled"])
def test_a_convolution_with_a_weight_for_every_sample(styled: bool) -> None:
    model = OnePerSample(styled).eval()
    result = _zeroed(model, (torch.randn(2, 3, 5, 5),), (torch.randn(3, 3, 5, 5),), sparsity=0.1)
    assert any(part.name == "last.weight" for group in result.plan.groups for part in group.consumers)


class OnePerPosition(nn.Module):
    """Channels mixed by a matrix of its own at every position of a plane, as Fourier operators mix modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(8, 2, 1)
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(torch.einsum("bixy,ioxy->boxy", torch.relu(self.first(x)), self.weight)))


def test_a_matrix_for_every_position_of_a_plane() -> None:
    _zeroed(OnePerPosition().eval(), (torch.randn(2, 3, 3, 3),), (torch.randn(4, 3, 3, 3),))


# --- parts of a dimension


class Apart(nn.Module):
    """The first of the hidden channels go another way than the rest."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.up, self.down, self.by = nn.Linear(6, 24), nn.Linear(24, 6), by

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        first, rest = (hidden[:, :3], hidden[:, 3:]) if self.by == "slice" else hidden.split([3, 21], 1)
        return self.down(torch.cat([first.tanh(), rest.relu()], 1))


@pytest.mark.parametrize("left", [1, 0])
@pytest.mark.parametrize("by", ["slice", "split"])
def test_a_part_of_which_one_channel_or_none_is_left(by: str, left: int) -> None:
    model = Apart(by).eval()
    with torch.no_grad():
        model.down.weight[:, left:3] *= 0.2
    result = _zeroed(model, (X,), (torch.randn(7, 6),), score="magnitude", sparsity=(3 - left) / 24)
    assert [part.removed for group in result.plan.groups for part in group.consumers] == [
        tuple(range(left, 3))
    ]


class Assigns(nn.Module):
    """Values are assigned to positions of a sequence, wherever a mask is true, and to channels of an empty
    tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).clone()
        hidden[:, 1:] += self.mix(hidden[:, :-1])
        hidden[:, 0] = hidden[:, 0] * 2
        hidden[:, -1] = 0
        hidden[hidden > 1] = 0.5
        hidden[x.sum(-1) > 3] = 1
        shifted = torch.zeros_like(hidden)
        shifted[:, 1:, :4] = hidden[:, :-1, :4]
        shifted[:, :, 4:] = hidden[:, :, 4:]
        return self.down(torch.relu(shifted))


def test_assignments_to_slices() -> None:
    result = _zeroed(Assigns().eval(), (torch.randn(3, 5, 6),), (torch.randn(2, 7, 6),))
    assert {part.name for group in result.plan.groups for part in group.consumers} == {
        "mix.weight",
        "down.weight",
    }


class Pairs(nn.Module):
    """A bilinear layer of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Bilinear(6, 6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.both(x, x.tanh())))


def test_the_outputs_of_a_bilinear_layer_go() -> None:
    result = _zeroed(Pairs().eval(), (X,), (torch.randn(7, 6),))
    assert {part.name for group in result.plan.groups for part in group.producers} == {
        "both.weight",
        "both.bias",
    }


class Modes(nn.Module):
    """A Fourier layer: the lowest frequencies are mixed by complex weights and assigned to an
    empty spectrum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, dtype=torch.complex64) / 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.first(x).transpose(1, 2))
        out = torch.zeros_like(spectrum)
        out[..., :3] = torch.einsum("bim,iom->bom", spectrum[..., :3], self.weight)
        return self.last(F.gelu(torch.fft.irfft(out, n=x.shape[1]).transpose(1, 2)))


def test_a_fourier_layer_is_pruned_and_trains() -> None:
    result = _zeroed(Modes().eval(), (torch.randn(3, 8, 6),), (torch.randn(2, 8, 6),))
    assert {part.name for group in result.plan.groups for part in group.consumers} >= {"last.weight"}
    result.module(torch.randn(3, 8, 6)).square().mean().backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        for parameter in result.module.parameters()
    )


class MixedByHead(nn.Module):
    """Tokens mixed by a matrix for every head, each scaled by a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.mix, self.scale = nn.Parameter(torch.randn(3, 5, 5)), nn.Parameter(torch.randn(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).unflatten(-1, (3, 4))
        return self.down((torch.einsum("hts,bshd->bthd", self.mix, heads) * self.scale).flatten(-2))


@pytest.mark.parametrize("sparsity", [0.75, 0.5])
def test_heads_of_which_one_channel_is_left(sparsity: float) -> None:
    result = _zeroed(
        MixedByHead().eval(), (torch.randn(3, 5, 6),), (torch.randn(2, 5, 6),), sparsity=sparsity
    )
    assert result.plan.sparsity == pytest.approx(sparsity)


@pytest.mark.parametrize("again", [False, True], ids=["to_all", "to_its_own"])
def test_a_depthwise_convolution_with_several_outputs_for_each_channel(again: bool) -> None:
    after = [nn.Conv1d(18, 6, 1, groups=6), nn.Conv1d(6, 2, 1)] if again else [nn.Conv1d(18, 2, 1)]
    model = _stack(nn.Conv1d(4, 6, 1), nn.Conv1d(6, 18, 3, padding=1, groups=6), nn.ReLU(), *after)
    result = _zeroed(model, (torch.randn(2, 4, 8),), (torch.randn(3, 4, 8),))
    removed = {part.name: part.removed for group in result.plan.groups for part in group.producers}
    assert removed["1.weight"] == tuple(
        3 * channel + output for channel in removed["0.weight"] for output in range(3)
    )


class OneVector(nn.Module):
    """One vector at a time, by operators that take no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(6, 3)
        self.matrix, self.vector, self.bias = (
            nn.Parameter(torch.randn(*size)) for size in ((6, 8), (8,), (6,))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        found = torch.mv(self.matrix, h) + torch.addmv(self.bias, self.matrix, h)
        return self.down(found.tanh()) + torch.dot(h, self.vector)


def test_products_with_a_vector() -> None:
    torch.manual_seed(0)
    fasp_fx.testing.check_program(OneVector().eval(), (torch.randn(5),))
    groups = {
        group.name: group.status for group in fasp_fx.analyze(OneVector().eval(), (torch.randn(5),)).groups
    }
    assert list(groups.values()).count("prunable") == 2


# --- graphs inside of graphs


class Looping(nn.Module):
    """A loop of which export makes one operator, beside a layer that can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        def step(count: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return count + 1, self.inside(state).tanh()

        looped = torch._higher_order_ops.while_loop(lambda count, _: count < 3, step, (torch.tensor(0), x))
        return looped[1] + self.down(self.up(x).relu())


def test_a_loop_stays_as_it_is() -> None:
    torch.manual_seed(0)
    _exact(Looping().eval(), (X,), (torch.randn(5, 6),))
