"""A model that does something else while it is traced: the captured program is not the model, and that is
said.
"""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import block, linear, made
from oracle import zeroed
from torch import Tensor, nn

import fasp_fx

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
NUMBERS = {"score": "magnitude", "restore": None}


def layers(forward: Callable[..., Any], **held: Any) -> nn.Module:
    return made(forward, up=nn.Linear(6, 12), down=nn.Linear(12, 4), **held)


def sly(
    scale: float, after: Callable[[Any, Tensor, Tensor], Any] = lambda self, x, found: found
) -> nn.Module:
    """Computes something else once somebody looks: the result is scaled only when the model is merely
    called.
    """

    def forward(self: Any, x: Tensor, shift: Tensor | None = None) -> Any:
        self.calls.add_(1)
        x.add_(1)
        found = block(self, x)
        return after(self, x, found if torch.compiler.is_exporting() else found * scale)

    return layers(forward, calls=torch.zeros(()))


def traced(other: Callable[[Tensor], Any], plain: Callable[[Tensor], Any]) -> nn.Module:
    return layers(lambda self, x: (other if torch.compiler.is_compiling() else plain)(block(self, x)))


def remembering(kind: str) -> nn.Module:
    """Keeps something of each call in a plain attribute: a count, a tensor, or what happens to be the same
    each time.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden, before = self.up(x).relu(), self.kept
        self.kept = {"count": before + 1, "tensor": x.detach().mean(), "same": x.shape[-1]}[kind]
        return self.down(hidden + before if kind == "tensor" else hidden * self.kept)

    return layers(forward, kept=0.0)


def asking(asks: bool, steps: bool = False) -> nn.Module:
    """Does otherwise for a single row, as where a model decodes one token at a time; with steps, it needs
    three of these at least.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = self.up(x).relu().clone()
        if steps:
            hidden[:, -3:] = hidden[:, :1]
        return self.down(hidden.flip(-1) if asks and x.shape[0] == 1 else hidden)

    return layers(forward)


def drops(self: Any, x: Tensor, found: Tensor) -> Tensor:
    return nn.FeatureAlphaDropout(0.5).eval()(nn.Dropout(0.5).eval()(found))


def added(self: Any, x: Tensor, others: dict[str, Tensor]) -> Tensor:
    """Takes two inputs alike."""
    return self.down((self.up(x) + self.up(others["a"]) * self.up(others["b"])).sigmoid()).argmax(-1)


STEPS = torch.randn(2, 9, 6)
#: what makes a model, its example, and what is said of it, if anything
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], str | None]] = {
    "a tenth less": (lambda: sly(0.9), (X,), "on the example inputs .an output differs by 11%"),
    "a thousandth more": (
        lambda: traced(lambda found: found, lambda found: found * 1.003).double(),
        (X.double(),),
        "differs by 3.0e-03 of its size",
    ),
    "other labels": (
        lambda: traced(lambda found: found.argmin(-1), lambda found: found.argmax(-1)),
        (X,),
        "on the example inputs",
    ),
    "numbers of tokens, one further": (
        lambda: traced(lambda found: found.argmax(-1) + 10**6, lambda found: found.argmax(-1) + 10**6 + 1),
        (X,),
        "on the example inputs",
    ),
    "other complex numbers": (
        lambda: traced(lambda found: torch.complex(found, -found), lambda found: torch.complex(found, found)),
        (X,),
        "on the example inputs",
    ),
    "could draw and does not": (lambda: sly(2.0, drops), (X,), "an output differs"),
    "counts": (lambda: remembering("count"), (X,), "in the second of two calls .*'kept'"),
    "keeps a tensor": (lambda: remembering("tensor"), (X,), "in the second of two calls .*'kept'"),
    "asks for a size of one": (lambda: asking(True), (X,), "where sizes are one"),
    "beside a size that is never one": (lambda: asking(True, True), (STEPS,), "where sizes are one"),
    "orders memory for strides": (
        lambda: layers(lambda self, x: block(self, x.contiguous().as_strided((5, 6), (6, 1)))),
        (X,),
        "where inputs lie otherwise in memory",
    ),
    "orders memory behind a convolution": (
        lambda: made(
            lambda self, x: self.conv(x).contiguous().as_strided((2, 4, 5, 5), (100, 25, 5, 1)),
            conv=nn.Conv2d(3, 4, 1),
        ),
        (torch.randn(2, 3, 5, 5),),
        "where inputs lie otherwise in memory",
    ),
    "a size of one that guards refuse": (
        lambda: layers(lambda self, x: block(self, x) * (1.0 if x.shape[0] % 4 == 1 else 2.0)),
        (torch.cat([X, X[:4]]),),
        None,
    ),
    "asks for strides, as its program does": (
        lambda: layers(lambda self, x: block(self, x.as_strided((2, 6), (6, 1)))),
        (X,),
        None,
    ),
    "keeps the same": (lambda: remembering("same"), (X,), None),
    "asks for none": (lambda: asking(False), (X,), None),
    "the same": (lambda: sly(1.0), (X,), None),
    "the same, could draw": (lambda: sly(1.0, drops), (X,), None),
    "of earlier calls": (
        lambda: sly(1.0, lambda self, x, found: (found * self.calls, self.calls)),
        (X,),
        None,
    ),
    "draws": (lambda: sly(1.0, lambda self, x, found: found + torch.rand_like(x[:, :4])), (X,), None),
    "symmetric": (lambda: layers(added), (X, {"a": X, "b": X + 1}), None),
    **{
        f"rounding of {dtype}": (lambda dtype=dtype, by=by: sly(1 + by).to(dtype), (X.to(dtype),), None)
        for dtype, by in (
            (torch.float64, 1e-12),
            (torch.float32, 1e-5),
            (torch.bfloat16, 1e-3),
            (torch.float16, 1e-3),
        )
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_what_no_graph_shows_is_said_and_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    make, args, says = MODELS[name]
    model, given = make(), copy.deepcopy(args)
    with (
        pytest.warns(fasp_fx.CaptureWarning, match=says)
        if says
        else warnings.catch_warnings(action="error", category=fasp_fx.CaptureWarning)
    ):
        notes = fasp_fx.capture(model, given).program.notes
    assert any("does not compute what the model does" in note for note in notes) == (says is not None)
    assert all(float(getattr(model, name)) == 0.0 for name in ("calls", "kept") if hasattr(model, name)), (
        "the model is not touched"
    )
    assert torch.equal(given[0], args[0])


def _seeded(self: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return block(self, x) + torch.rand_like(x[:, :4])


def _seeded_aside(self: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        return _seeded(self, x)


@pytest.mark.parametrize("forward", [_seeded, _seeded_aside])
def test_a_model_that_seeds_what_it_draws_repeats_itself_and_its_program_does_not(forward: Any) -> None:
    model = layers(forward)
    with pytest.warns(fasp_fx.CaptureWarning, match="forward seeds a generator"):
        result = fasp_fx.prune(model, (X,), **NUMBERS)
    assert any("draws other random numbers in each call" in note for note in result.report.notes)
    assert [torch.equal(called(X), called(X)) for called in (model, result.module)] == [True, False]


def test_programs_without_a_model_have_nothing_to_be_held_against() -> None:
    with warnings.catch_warnings(action="error", category=fasp_fx.CaptureWarning):
        fasp_fx.prune(torch.export.export(sly(2.0), (X,), strict=False), **NUMBERS)
        fasp_fx.analyze(sly(2.0), (X,))


def test_a_size_of_one_that_the_program_refuses_is_not_tried() -> None:
    result = fasp_fx.prune(asking(False, True), (STEPS,), **NUMBERS)
    with pytest.raises(fasp_fx.CallError, match=">= 3"):
        result.module(torch.randn(2, 1, 6))


@functools.lru_cache
def table(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32)[:, None].cos()


LAST: Tensor | None = None


def kept(length: int) -> Tensor:
    global LAST
    if LAST is None or len(LAST) != length:
        LAST = table.__wrapped__(length)
    return LAST


def tabled(remember: Callable[[int], Tensor], asks: bool) -> nn.Module:
    """Looks up what a function remembers, and may ask what a graph cannot."""

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = self.up(x + self.embed(torch.ones(1, dtype=torch.long))).relu()
        hidden = hidden * remember(int(x.shape[0]))
        return self.down(hidden if not asks or hidden.sum() < 1e9 else -hidden)

    return layers(forward, embed=nn.Embedding(4, 6, max_norm=0.1))


@pytest.mark.parametrize("asks", [False, True], ids=["captured", "refused"])
@pytest.mark.parametrize(("remember", "samples"), [(table, 5), (kept, 1)])
def test_what_functions_remember_has_values_after_a_capture(
    remember: Callable[[int], Tensor], asks: bool, samples: int
) -> None:
    def forget() -> None:
        global LAST
        table.cache_clear()
        LAST = None

    torch.manual_seed(0)
    model, x = tabled(remember, asks), torch.randn(samples, 6)
    forget()
    expected = copy.deepcopy(model)(x).detach()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forget()
    with pytest.raises(fasp_fx.CaptureError, match="data-dependent") if asks else contextlib.nullcontext():
        fasp_fx.capture(model, (x,))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    found = copy.deepcopy(model)(x).detach()
    assert type(found) is Tensor
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "form",
    [
        lambda h: h[0] - h[1] if h.shape[0] > 1 else h[0],
        lambda h: h[:1] - h[1:2] if h.shape[0] > 1 else h,
        lambda h: h * 2 if h.shape[0] == 2 else h,
        lambda h: h.sum(1) if h.shape[0] > 2 else h.mean(1),
        lambda h: h,
    ],
    ids=["rows", "slices", "two", "more than two", "any number"],
)
def test_one_sample_is_captured_as_it_is_where_two_are_something_else(
    form: Any, request: pytest.FixtureRequest
) -> None:
    """An exporter takes a size of one for a constant, so that a single sample is captured doubled: not where
    the model asks how many there are.
    """
    model = made(lambda self, x: self.down(form(self.up(x).relu())), up=nn.Linear(5, 8), down=nn.Linear(8, 3))
    x = torch.randn(1, 4, 5)
    result = fasp_fx.prune(model, (x,), calibration=[x], sparsity=0.3, score="random", restore=None)
    if "any number" in request.node.name:
        assert not result.report.notes
        assert result.module(torch.randn(7, 4, 5)).shape == (7, 4, 3)
    else:
        assert any("the size 1 of dimension 0 of 'x'" in note for note in result.report.notes)
    dense = copy.deepcopy(model)
    (group,) = result.plan.groups
    dense.down.weight.data[:, list(group.consumers[0].by_block()[0])] = 0
    torch.testing.assert_close(result.module(x), dense(x))


def generating(self: Any, x: Tensor) -> Tensor:
    noise = torch.rand(6, generator=torch.Generator().manual_seed(3))
    return self.down(self.up(x + noise).sigmoid())


def named(this: Any, x: Tensor, self: Tensor | None = None) -> Tensor:
    return block(this, x)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: layers(generating), r"torch.Generator.*keep them in a buffer"),
        (lambda: layers(named), "argument named 'self'; rename it"),
        (
            lambda: made(lambda self, x: x, **{"class": nn.Linear(6, 12), "end": nn.Linear(12, 4)}),
            r"'class' is a word of Python.*rename",
        ),
    ],
)
def test_what_no_program_can_do_is_refused(make: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(fasp_fx.CaptureError, match=says):
        fasp_fx.capture(make(), (X,))


# --- what a capture leaves out


ROWS = torch.randn(4, 8)


def laid(forward: Any, **held: Any) -> Any:
    return made(forward, **{"up": nn.Linear(8, 24), "down": nn.Linear(24, 5), **held})


def logs(self: Any, x: Tensor) -> Tensor:
    hidden = self.up(x).relu()
    hidden.cumsum(-1).mean()
    return self.down(hidden)


def draws(self: Any, x: Tensor) -> Tensor:
    torch.rand(3)
    return self.down(self.up(x).relu()) + torch.rand(5)


def test_what_nothing_reads_keeps_no_channel() -> None:
    groups = [group for group in fasp_fx.analyze(laid(logs), (ROWS,)).groups if group.size == 24]
    assert [group.status for group in groups] == ["prunable"]


def test_random_numbers_that_nothing_reads_are_drawn_all_the_same() -> None:
    model = laid(draws)
    result = fasp_fx.prune(model, (ROWS,), sparsity=0.05, score="magnitude", restore=None)
    for module in (result.module, fasp_fx.apply(model, result.plan, (ROWS,)).module):
        torch.manual_seed(3)
        found = module(ROWS) - module(ROWS)
        torch.manual_seed(3)
        assert torch.allclose(found, model(ROWS) - model(ROWS), atol=1e-5)


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_derivative_that_a_graph_does_not_have_is_said() -> None:
    for forward, says in (
        (lambda self, x: self.down(Rounded.apply(self.up(x))), True),
        (lambda self, x: self.down(torch.round(self.up(x))), False),
    ):
        notes = fasp_fx.capture(laid(forward), (ROWS,)).program.notes
        assert any("derivative that Rounded defines" in note for note in notes) == says
    assert "apply" in vars(torch.autograd.Function)
    assert Rounded.apply(torch.ones(1, requires_grad=True)).grad_fn is not None


def test_a_size_that_is_asked_for_is_said_with_the_line() -> None:
    model = laid(lambda self, x: self.down(self.up(x).relu()) * torch.ones(int(x.shape[0]), 1))
    (note,) = fasp_fx.capture(model, (ROWS,)).program.notes
    assert "the size 4 of dimension 0 of 'x' is fixed, because forward asks for it as a number" in note
    assert "test_faithful.py, line " in note


def gridded(self: Any, x: Tensor) -> Tensor:
    """As the head of a detector, keeps a grid for the size seen last, made of a stride that is no weight."""
    if self.shape != x.shape:
        rows = torch.arange(x.shape[0], dtype=x.dtype)[:, None]
        self.shape, self.grid = x.shape, rows * x.new_full((x.shape[0], 1), self.strides[1])
    return block(self, x) + self.grid


def test_numbers_read_from_tensors_that_are_no_weights_are_known_before_a_run() -> None:
    model = layers(gridded, shape=None, grid=None)
    vars(model)["strides"] = torch.tensor([0.25, 0.5])
    result = fasp_fx.prune(model, (X,), **NUMBERS)
    assert torch.ops.aten.item.default not in {node.target for node in result.program.graph.nodes}
    for number in (1, 3, 8):
        x = torch.randn(number, 6)
        torch.testing.assert_close(result.module(x), zeroed(model, result.plan)(x))


def maps(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Maps a function over samples, beside an ordinary block."""
    return self.right(self.left(x).relu()), torch.func.vmap(lambda row: self.down(self.up(row).relu()))(x)


@pytest.mark.parametrize("options", [{}, {"quality": "fast"}], ids=["by losses", "plainly"])
def test_what_is_mapped_over_samples_is_pruned(options: dict[str, Any]) -> None:
    """The exporter leaves steps of the transformation in the graph, which change what later calls mean."""
    torch.manual_seed(0)
    model = made(maps, **linear(up=(5, 8), down=(8, 6), left=(5, 7), right=(7, 2)))
    data = [torch.randn(40, 5) for _ in range(2)]
    result = fasp_fx.prune(model, (data[0],), calibration=data, sparsity=0.3, restore=None, **options)
    torch.zeros(2).requires_grad_(True)  # torch is as it was
    assert {"down.weight", "right.weight"} >= {
        part.name for group in result.plan.groups for part in group.consumers
    }
    dense = zeroed(model, result.plan)
    for found, expected in zip(result.module(torch.ones(3, 5)), dense(torch.ones(3, 5)), strict=True):
        torch.testing.assert_close(found, expected)
