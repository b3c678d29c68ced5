"""A model that does something else while it is traced: the captured program is not the model, and that is
said.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasp_fx


class Sly(nn.Module):
    """Computes something else once somebody looks: the result is scaled only when the model is
    merely called.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(6, 12), nn.Linear(12, 4), scale
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        self.calls.add_(1)
        x.add_(1)
        found = self.down(self.up(x).relu())
        return found if torch.compiler.is_exporting() else found * self.scale


@pytest.fixture
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", fasp_fx.CaptureWarning)
        yield


def example() -> tuple[Tensor]:
    torch.manual_seed(1)
    return (torch.randn(5, 6),)


@pytest.mark.parametrize(("scale", "percent"), [(2.0, "50%"), (0.9, "11%")])
def test_another_result_is_said(scale: float, percent: str) -> None:
    model, args = Sly(scale).eval(), example()
    before = args[0].clone()
    with pytest.warns(fasp_fx.CaptureWarning, match=f"an output differs by {percent}") as told:
        result = fasp_fx.prune(model, args, score="magnitude", restore=None)
    assert any("does not compute what the model does" in note for note in result.report.notes)
    assert told[0].filename == __file__  # the caller's line, not one of the library
    assert float(model.calls) == 0  # neither the model nor its inputs are touched
    assert torch.equal(args[0], before)
    with pytest.warns(fasp_fx.CaptureWarning):
        fasp_fx.apply(model, result.plan, args)


class Off(Sly):
    """As it is, with something that could draw random numbers, and does not."""

    def __init__(self, kind: str, scale: float) -> None:
        super().__init__(scale)
        self.kind, self.dropout, self.alpha = kind, nn.Dropout(0.5), nn.FeatureAlphaDropout(0.5)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        found = super().forward(x.clone())
        if self.kind == "attention":
            return nn.functional.scaled_dot_product_attention(found[None], found[None], found[None])[0]
        return self.dropout(self.alpha(found)) if self.kind == "dropout" else found


@pytest.mark.parametrize("kind", ["dropout", "attention"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_what_could_draw_and_does_not_is_compared(kind: str, scale: float) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", fasp_fx.CaptureWarning)
        fasp_fx.capture(Off(kind, scale).eval(), example())
    assert bool([one for one in told if "an output differs" in str(one.message)]) == (scale != 1.0)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_that_goes_on_where_it_was_is_said(layer: type[nn.LSTM | nn.GRU]) -> None:
    class GoingOn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.state = layer(6, 8), None
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            found, self.state = self.layer(x, self.state)
            last: Tensor = self.last(found)
            return last

    with pytest.warns(fasp_fx.CaptureWarning, match=r"in the second of two calls .*'state'"):
        fasp_fx.capture(GoingOn().eval(), example())


@pytest.mark.usefixtures("strict")
def test_the_same_result_is_not() -> None:
    result = fasp_fx.prune(Sly(1.0).eval(), example(), score="magnitude", restore=None)
    assert not any("does not compute" in note for note in result.report.notes)


@pytest.mark.usefixtures("strict")
def test_a_result_that_depends_on_what_earlier_calls_wrote() -> None:
    class Counting(Sly):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
            found = super().forward(x.clone())
            return found * self.calls, self.calls

    model = Counting(1.0).eval()
    fasp_fx.prune(model, example(), score="magnitude", restore=None)
    assert float(model.calls) == 0


@pytest.mark.usefixtures("strict")
def test_programs_without_a_model_have_nothing_to_be_held_against() -> None:
    exported = torch.export.export(Sly(2.0).eval(), example(), strict=False)
    fasp_fx.prune(exported, score="magnitude", restore=None)
    fasp_fx.analyze(Sly(2.0).eval(), example())


@pytest.mark.usefixtures("strict")
def test_random_numbers_are_not_compared() -> None:
    class Noisy(Sly):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            return super().forward(x.clone()) + torch.rand_like(x[:, :4])

    fasp_fx.prune(Noisy(1.0).eval(), example(), score="magnitude", restore=None)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    ("dtype", "little"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)],
)
def test_rounding_is_no_other_result(dtype: torch.dtype, little: float) -> None:
    fasp_fx.prune(
        Sly(1.0 + little).eval().to(dtype), (example()[0].to(dtype),), score="magnitude", restore=None
    )


class Remembering(nn.Module):
    """Keeps something of each call in a plain attribute: a count, a tensor, or what happens to be the same
    each time.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down, self.kind, self.kept = nn.Linear(6, 12), nn.Linear(12, 4), kind, 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        if self.kind == "count":
            self.kept = self.kept + 1
            return self.down(hidden * self.kept)
        if self.kind == "tensor":
            found = self.down(hidden + self.kept)
            self.kept = x.detach().mean()
            return found
        self.kept = x.shape[-1]
        return self.down(hidden * self.kept)


@pytest.mark.parametrize("kind", ["count", "tensor"])
def test_what_a_model_keeps_in_attributes_is_said(kind: str) -> None:
    model = Remembering(kind).eval()
    with pytest.warns(fasp_fx.CaptureWarning, match="in the second of two calls .*'kept'"):
        result = fasp_fx.prune(model, example(), score="magnitude", restore=None)
    assert any("second of two calls" in note for note in result.report.notes)
    assert model.kept == 0.0


def test_attributes_that_come_out_the_same_are_none_of_it(strict: None) -> None:
    fasp_fx.prune(Remembering("same").eval(), example(), score="magnitude", restore=None)


class Asking(nn.Module):
    """Does otherwise for a single row (or column of steps), as where a model decodes one token at a time."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.up, self.down, self.asks = nn.Linear(6, 12), nn.Linear(12, 4), asks

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        if self.asks and x.shape[0] == 1:
            hidden = hidden.flip(-1)
        return self.down(hidden)


def test_what_a_model_does_at_a_size_of_one_is_said() -> None:
    with pytest.warns(fasp_fx.CaptureWarning, match="where sizes are one"):
        fasp_fx.prune(Asking(True).eval(), example(), score="magnitude", restore=None)


def test_a_size_of_one_like_any_other_is_none_of_it(strict: None) -> None:
    fasp_fx.prune(Asking(False).eval(), example(), score="magnitude", restore=None)


class Repeating(Asking):
    """Needs three steps at least, and asks for a single sequence where it is to."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu().clone()
        hidden[:, -3:] = hidden[:, :1]
        return self.down(hidden.flip(-1) if self.asks and x.shape[0] == 1 else hidden)


def test_a_size_of_one_that_the_program_refuses_is_not_tried(strict: None) -> None:
    result = fasp_fx.prune(Repeating(False).eval(), (torch.randn(2, 9, 6),), score="magnitude", restore=None)
    with pytest.raises(fasp_fx.CallError, match="at least 3"):
        result.module(torch.randn(2, 1, 6))


def test_beside_such_a_size_others_are_tried_at_one() -> None:
    with pytest.warns(fasp_fx.CaptureWarning, match="where sizes are one"):
        fasp_fx.prune(Repeating(True).eval(), (torch.randn(2, 9, 6),), score="magnitude", restore=None)


def test_names_that_are_words_of_python_are_refused() -> None:
    model = nn.Sequential()
    model.add_module("class", nn.Linear(6, 12))
    model.add_module("end", nn.Linear(12, 4))
    with pytest.raises(fasp_fx.CaptureError, match=r"'class' is a word of Python.*rename"):
        fasp_fx.capture(model.eval(), example())


@functools.lru_cache
def table(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32)[:, None].cos()


TABLES: dict[int, tuple[Tensor, list[Tensor]]] = {}
LAST: Tensor | None = None


def looked_up(length: int) -> Tensor:
    if length not in TABLES:
        TABLES[length] = (torch.ones(1), [table.__wrapped__(length)])
    return TABLES[length][1][0]


def kept(length: int) -> Tensor:
    global LAST
    if LAST is None or len(LAST) != length:
        LAST = table.__wrapped__(length)
    return LAST


class Tabled(nn.Module):
    """Looks up what a function remembers, and may ask what a graph cannot."""

    def __init__(self, remember: Callable[[int], Tensor], asks: bool) -> None:
        super().__init__()
        self.remember, self.asks = remember, asks
        self.embed = nn.Embedding(4, 6, max_norm=0.1)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x + self.embed(torch.ones(1, dtype=torch.long))).relu()
        hidden = hidden * self.remember(int(x.shape[0]))
        return self.down(hidden if not self.asks or hidden.sum() < 1e9 else -hidden)


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("asks", [False, True], ids=["captured", "refused"])
@pytest.mark.parametrize("remember", [table, looked_up, kept])
def test_what_functions_remember_has_values_after_a_capture(
    remember: Callable[[int], Tensor], asks: bool, samples: int
) -> None:
    def forget() -> None:
        global LAST
        table.cache_clear()
        TABLES.clear()
        LAST = None

    torch.manual_seed(0)
    model, x = Tabled(remember, asks).eval(), torch.randn(samples, 6)
    forget()
    expected = copy.deepcopy(model)(x).detach()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for capture in (fasp_fx.analyze, fasp_fx.capture):
        forget()
        with (
            pytest.raises(fasp_fx.CaptureError, match="data-dependent") if asks else contextlib.nullcontext()
        ):
            capture(model, (x,))  # type: ignore[operator]
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        found = copy.deepcopy(model)(x).detach()
        assert type(found) is Tensor
        assert torch.equal(found, expected)
    if not asks:
        forget()
        result = fasp_fx.prune(model, (x,), score="magnitude", restore=None, sparsity=0.2)
        assert torch.equal(fasp_fx.apply(model, result.plan, (x,)).module(x), result.module(x))


class ByNumber(nn.Module):
    """Does something else by how many samples there are."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.up, self.down, self.form = nn.Linear(5, 8), nn.Linear(8, 3), form

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.form(self.up(x).relu()))


@pytest.mark.parametrize(
    "form",
    [
        lambda h: h[0] - h[1] if h.shape[0] > 1 else h[0],
        lambda h: h[:1] - h[1:2] if h.shape[0] > 1 else h,
        lambda h: h * 2 if h.shape[0] == 2 else h,
        lambda h: h.sum(1) if h.shape[0] > 2 else h.mean(1),
    ],
    ids=["rows", "slices", "two", "more than two"],
)
def test_one_sample_is_captured_as_it_is_where_two_are_something_else(form: Any) -> None:
    """An exporter takes a size of one for a constant, so that a single sample is captured doubled: not where
    the model asks how many there are.
    """
    model, x = ByNumber(form).eval(), torch.randn(1, 4, 5)
    result = fasp_fx.prune(model, (x,), calibration=[x], sparsity=0.3, score="random", restore=None)
    assert any("the size 1 of dimension 0 of 'x'" in note for note in result.report.notes)
    dense = copy.deepcopy(model)
    (group,) = result.plan.groups
    dense.down.weight.data[:, list(group.consumers[0].by_block()[0])] = 0
    torch.testing.assert_close(result.module(x), dense(x))


def test_a_sample_is_doubled_where_that_is_the_same() -> None:
    model, x = ByNumber(lambda h: h).eval(), torch.randn(1, 4, 5)
    result = fasp_fx.prune(model, (x,), sparsity=0.3, score="random", restore=None)
    assert not result.report.notes
    assert result.module(torch.randn(7, 4, 5)).shape == (7, 4, 3)


class Layers(nn.Module):
    """Two linear layers, between which a subclass does something that no graph shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 4)


class Labels(Layers):
    """Returns integers, and others while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.down(self.up(x).sigmoid())
        return found.argmin(-1) if torch.compiler.is_compiling() else found.argmax(-1)


class Complex(Layers):
    def forward(self, x: Tensor) -> Tensor:
        found = self.down(self.up(x).sigmoid())
        return torch.complex(found, -found if torch.compiler.is_compiling() else found)


class Little(Layers):
    """Is off by a thousandth."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.down(self.up(x).sigmoid())
        return found if torch.compiler.is_compiling() else found * 1.003


class Seeding(Layers):
    """Draws the same numbers in every call."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            noise = torch.rand(x.shape[0], 1)
        return self.down(self.up(x).sigmoid() * noise)


@pytest.mark.parametrize(
    ("model", "args", "says"),
    [
        (Labels(), example(), "on the example inputs"),
        (Complex(), example(), "on the example inputs"),
        (Little().double(), (example()[0].double(),), "differs by 3.0e-03 of its size"),
        (Seeding(), example(), "the model seeds torch's generator itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_graph_shows_is_said(model: nn.Module, args: tuple[Any, ...], says: str) -> None:
    with pytest.warns(fasp_fx.CaptureWarning, match=says):
        fasp_fx.prune(model.eval(), args, score="magnitude", restore=None)


class Drawing(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).sigmoid() * torch.rand(x.shape[0], 1))


class Added(Layers):
    """Takes two inputs alike, and its dict in any order."""

    def forward(self, x: Tensor, others: dict[str, Tensor]) -> Tensor:
        return self.down((self.up(x) + self.up(others["a"]) * self.up(others["b"])).sigmoid()).argmax(-1)


@pytest.mark.parametrize(
    ("model", "args"),
    [(Drawing(), example()), (Added(), (example()[0], {"a": example()[0], "b": example()[0] + 1}))],
    ids=["draws", "symmetric"],
)
@pytest.mark.usefixtures("strict")
def test_what_a_graph_shows_is_not_said(model: nn.Module, args: tuple[Any, ...]) -> None:
    result = fasp_fx.prune(model.eval(), args, score="magnitude", restore=None)
    assert not any("does not compute" in note for note in result.report.notes)


class Generating(Layers):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(6, generator=torch.Generator().manual_seed(3))
        return self.down(self.up(x + noise).sigmoid())


class Named(Layers):
    def forward(this, x: Tensor, self: Tensor | None = None) -> Tensor:
        return this.down(this.up(x).sigmoid())


@pytest.mark.parametrize(
    ("model", "says"),
    [(Generating(), "torch.Generator.*keep them in a buffer"), (Named(), "argument named 'self'; rename it")],
)
def test_what_no_program_can_do_is_refused(model: nn.Module, says: str) -> None:
    with pytest.raises(fasp_fx.CaptureError, match=says):
        fasp_fx.prune(model.eval(), example(), score="magnitude", restore=None)


class Writing(Layers):
    """Writes into one input and reads another."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return self.down(self.up(x).sigmoid() * self.up(y).sigmoid())


@pytest.mark.usefixtures("strict")
def test_what_is_written_into_shares_no_memory_with_another_input() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    model = Writing().eval()
    result = fasp_fx.prune(model, (x, y), score="magnitude", restore=None)
    result.module(x.clone(), y)
    for one, other in ((x, x), (x, x[:]), (x, x.view(6, 5).t())):
        with pytest.raises(fasp_fx.CallError, match=r"'x' and 'y' share memory.*pass a copy"):
            result.module(one, other)


class Constants(Layers):
    def forward(self, x: Tensor, given: dict[str, Any], sign: float = 1.0) -> Tensor:
        return self.down(self.up(x + given["x"]).sigmoid() * math.copysign(1.0, sign))


@pytest.mark.usefixtures("strict")
def test_constants_are_the_same_by_sign_order_and_what_is_no_number() -> None:
    x = example()[0]
    model = Constants().eval()
    given = {"x": x, "fill": math.nan}
    result = fasp_fx.prune(model, (x, given), {"sign": 0.0}, score="magnitude", restore=None)
    result.module(x, given, sign=0.0)
    with pytest.raises(fasp_fx.CallError, match=r"'sign' is -0\.0"):
        result.module(x, given, sign=-0.0)
