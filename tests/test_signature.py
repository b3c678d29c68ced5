"""A pruned module is called like the original: names, order, defaults, structure of the result; what was not
captured is refused.
"""

import copy
import functools
import inspect
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import transformers
from models import block, linear, made, randomise, two_layers, wide
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn

import fasp_fx
from fasp_fx.capturing._signature import same_constant


class Out(NamedTuple):
    scaled: Tensor
    parts: dict[str, Tensor]


def many(
    self: Any,
    x: Tensor,
    y: Tensor | None = None,
    scale: float = 2.0,
    *,
    mask: Tensor | None = None,
    mode: str = "plain",
) -> Out:
    """Positional and keyword arguments, defaults, an optional tensor, a nested result."""
    hidden = self.inner(x) * scale
    if y is not None:
        hidden = hidden + y
    if mask is not None:
        hidden = hidden * mask
    return Out(hidden, {"double": hidden * 2, "mode": hidden + (1.0 if mode == "plain" else 0.0)})


@functools.cache
def made_for(call: str) -> tuple[nn.Module, fasp_fx.Result]:
    torch.manual_seed(0)
    model = made(many, inner=two_layers())
    return model, fasp_fx.prune(model, *EXAMPLES[call], sparsity=0.3, score="random", restore=None)


X, Y, MASK = torch.randn(3, 12), torch.randn(3, 12), torch.ones(3, 12)
EXAMPLES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "two": ((X, Y), {}),
    "constants": ((X,), {"scale": 0.5, "mode": "other"}),
}


def test_positional_and_keyword_calls_agree() -> None:
    model, result = made_for("two")
    other_x, other_y = torch.randn(5, 12), torch.randn(5, 12)
    expected = result.module(other_x, other_y)
    for found in (
        result.module(x=other_x, y=other_y),
        result.module(other_x, y=other_y),
        result.module(y=other_y, x=other_x),
        result.module(other_x, other_y, 2.0, mode="plain"),
        result.module(other_x, other_y, scale=2.0, mask=None),
    ):
        assert isinstance(found, Out)
        assert list(found.parts) == list(model(other_x, other_y).parts)
        assert torch.equal(found.scaled, expected.scaled)
        assert torch.equal(found.parts["double"], expected.parts["double"])


@pytest.mark.parametrize(
    ("args", "kwargs", "word"),
    [
        ((X, Y, 3.0), {}, "scale"),
        ((X, Y), {"scale": 3.0}, "scale"),
        ((X, Y), {"mode": "other"}, "mode"),
        ((X, Y), {"mask": MASK}, "mask"),
        ((X,), {}, "y"),
        ((X, None), {}, "y"),
    ],
)
def test_what_was_not_captured_is_refused(args: tuple[Any, ...], kwargs: dict[str, Any], word: str) -> None:
    _, result = made_for("two")
    with pytest.raises(fasp_fx.CallError, match=f"'{word}'"):
        result.module(*args, **kwargs)


def _of_type(self: Any, i: Tensor, x: Tensor) -> Tensor:
    found = block(self, x * self.embed(i))
    return found * 2 if i.dtype == torch.int32 else found


def test_types_are_part_of_the_signature_and_follow_the_module(tmp_path: Path) -> None:
    model, i = wide(_of_type, embed=nn.Embedding(5, 6)), torch.arange(4) % 3
    x = torch.randn(4, 6)
    result = fasp_fx.prune(model, (i, x), score="random", restore=None, sparsity=0.3)
    wider = copy.deepcopy(result.module).double()
    for module, other in (
        (result.module, torch.float64),
        (fasp_fx.load(result.save(tmp_path / "out")).module, torch.float16),
        (wider, torch.float16),
        (pickle.loads(pickle.dumps(wider)), torch.float16),
    ):
        own = module.get_parameter("up.weight").dtype
        assert module(i, x.to(own)).dtype == own
        with pytest.raises(fasp_fx.CallError, match=f"'x' is .*{other}.*captured with .*float32"):
            module(i, x.to(other))
        with pytest.raises(fasp_fx.CallError, match=r"'i' is .*torch\.int32.*captured with .*torch\.int64"):
            module(i.int(), x.to(own))
    half = {name: tensor.half() for name, tensor in result.module.state_dict().items()}
    assert torch.func.functional_call(result.module, half, (i, x.half())).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert result.module(i, x.bfloat16()).dtype == torch.bfloat16


def test_constants_other_than_the_defaults() -> None:
    model, result = made_for("constants")
    assert torch.equal(result.module(X, None, 0.5, mode="other").scaled, result.module(X).scaled)
    assert inspect.signature(result.module.forward).parameters["scale"].default == 0.5
    with pytest.raises(fasp_fx.CallError, match="'scale'"):
        result.module(X, scale=0.25)
    found, expected = (
        [(p.name, p.kind) for p in inspect.signature(one.forward).parameters.values()]
        for one in (result.module, model)
    )
    assert found == expected
    for wrong in ({"nonsense": 1}, {"mode": "other"}):
        with pytest.raises(TypeError):
            result.module(*((X,) if "nonsense" in wrong else ()), **wrong)


def gathered(self: Any, x: Tensor, factor: float, /, *parts: Tensor, **named: Tensor) -> Tensor:
    """Arguments that only go by position, a constant among them, and variable positional and keyword ones."""
    return self.inner(x * factor + sum(parts) + named["extra"])


def test_variable_arguments() -> None:
    model, extra = made(gathered, inner=two_layers()), {"extra": torch.randn(3, 12)}
    result = fasp_fx.prune(model, (X, 2.0, Y, MASK), extra, sparsity=0.3, score="random", restore=None)
    assert not result.report.notes
    assert torch.equal(result.module(X, 2.0, Y, MASK, **extra), result.module(X, 2.0, MASK, Y, **extra))
    assert not torch.equal(result.module(X, 2.0, Y, MASK, **extra), result.module(Y, 2.0, X, MASK, **extra))
    for args, kwargs, says in (
        ((X, 3.0, Y, MASK), extra, "captured with"),
        ((X, 2.0, Y), extra, "'parts_1' is missing"),
        ((X, 2.0, Y, Y, Y), extra, "'parts_2' is a tensor"),
        ((X, 2.0, Y, MASK), {}, "extra"),
        ((X, 2.0, Y, MASK), {**extra, "other": MASK}, "other"),
    ):
        with pytest.raises(fasp_fx.CallError, match=says):
            result.module(*args, **kwargs)
    reference = zeroed(model, result.plan)
    for x, y, more in ((X, Y, MASK), (X[:1], Y[:1], MASK[:1]), [torch.cat([X, X])] * 3):  # sizes vary
        found, expected = (called(x, 2.0, y, y, extra=more) for called in (result.module, reference))
        assert error(found, expected) < TOLERANCE
    assert "forward" not in vars(model)
    assert result.program.range_constraints


def test_parts_with_a_configuration_of_their_own_return_what_the_model_is_asked_for() -> None:
    """T5 gives its encoder and its decoder a copy of its configuration each."""
    config = transformers.T5Config(
        vocab_size=96, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = randomise(transformers.T5ForConditionalGeneration(config))
    ids = torch.arange(12).reshape(2, 6)
    asked = {"use_cache": False, "output_hidden_states": True}
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :4], **asked}
    configs = [part.config.to_dict() for part in (model, model.encoder, model.decoder)]  # type: ignore[union-attr]
    result = fasp_fx.prune(model, (), given, sparsity=0.2, score="random", restore=None)
    found, expected = result.module(**given), zeroed(model, result.plan)(**given)
    assert list(found) == list(expected)
    # The caller's model has no hook of the capture.
    assert len(model(**given).encoder_hidden_states) == len(expected.encoder_hidden_states) == 2
    assert error(dict(found), dict(expected)) < TOLERANCE
    assert [part.config.to_dict() for part in (model, model.encoder, model.decoder)] == configs  # type: ignore[union-attr]


def remembering(self: Any, x: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Attention of two heads over what was seen before as well, which it is given and returns."""
    q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    seen = nn.functional.scaled_dot_product_attention(q, keys, values)
    return {"y": self.out(seen.transpose(1, 2).flatten(2)), "keys": keys, "values": values}


@pytest.mark.parametrize("in_order", [True, False])
def test_state_goes_by_the_names_of_arguments(in_order: bool) -> None:
    model = randomise(made(remembering, **linear(q=(6, 16), k=(6, 16), v=(6, 16), out=(16, 6))))
    given = {"x": torch.randn(2, 3, 6), "keys": torch.randn(2, 2, 5, 8), "values": torch.zeros(2, 2, 5, 8)}
    args, kwargs = (tuple(given.values()), {}) if in_order else ((), given)
    result = fasp_fx.prune(
        model, args, kwargs, state=("values",), sparsity=0.3, score="magnitude", restore=None
    )
    assert any("'keys', 'values' but the first are fixed" in note for note in result.report.notes)
    (group,) = [group for group in result.plan.groups if group.name == "out.weight"]
    width = 8 - group.removed_sets
    assert width < 8
    with torch.no_grad():
        expected = zeroed(model, result.plan)(**given)
        found = result.module(given["x"], given["keys"], given["values"][..., :width])
    assert error(found["y"], expected["y"]) <= TOLERANCE
    assert found["values"].shape == (2, 2, 8, width)


def test_an_exported_program_with_constants() -> None:
    exported = torch.export.export(
        made(many, inner=two_layers()), (X, None, 2.0), {"mask": MASK}, strict=False
    )
    for given in (exported, exported.module()):
        result = fasp_fx.prune(
            given, (X, None, 2.0), {"mask": MASK}, sparsity=0.3, score="random", restore=None
        )
        assert result.module(X, None, 2.0, mask=MASK).scaled.shape == X.shape
        with pytest.raises(fasp_fx.CallError):
            result.module(X, None, 3.0, mask=MASK)


def tabled(self: Any, x: Tensor, rest: dict[str, Tensor]) -> Tensor:
    """A length with an upper bound, fixed widths, and sizes that must agree."""
    return self.inner(x + self.table[: x.shape[0]]) + rest["same"]


@pytest.fixture(scope="module")
def tables() -> fasp_fx.Result:
    torch.manual_seed(0)
    example = (torch.randn(3, 12), {"same": torch.randn(3, 12)})
    model = made(tabled, inner=two_layers(), table=torch.randn(10, 12))
    return fasp_fx.prune(model, example, sparsity=0.3, score="random", restore=None)


@pytest.fixture(scope="module")
def loaded_tables(tables: fasp_fx.Result, tmp_path_factory: pytest.TempPathFactory) -> fasp_fx.Result:
    return fasp_fx.load(tables.save(tmp_path_factory.mktemp("tables") / "out"))


@pytest.mark.parametrize(
    ("x", "same", "message"),
    [
        pytest.param(
            X[:, :7], X, r"captured for x.shape\[1\] == 12, the call has 'x' of shape \(3, 7\)", id="width"
        ),
        pytest.param(
            X,
            torch.randn(3, 5),
            r"captured for rest\['same'\].shape\[1\] == 12, .*'rest\['same'\]' of shape \(3, 5\)",
            id="inside_a_dict",
        ),
        pytest.param(
            torch.randn(11, 12),
            torch.randn(11, 12),
            r"captured for x.shape\[0\] <= 10, the call has 'x' of shape \(11, 12\)",
            id="at_most",
        ),
        pytest.param(
            X,
            torch.randn(4, 12),
            r"do not fit.*'x' of shape \(3, 12\), 'rest\['same'\]' of shape \(4, 12\)",
            id="agree",
        ),
        pytest.param(
            X[0],
            X,
            r"argument 'x' is a tensor of shape \(12,\).* captured with one of 2 dimensions",
            id="rank",
        ),
        pytest.param([1.0], X, r"argument 'x' is \[1.0\], but the program was captured with", id="no_tensor"),
    ],
)
def test_other_sizes_are_refused_by_argument_and_dimension(
    tables: fasp_fx.Result, loaded_tables: fasp_fx.Result, x: Any, same: Tensor, message: str
) -> None:
    for module in (tables.module, copy.deepcopy(tables.module), loaded_tables.module):
        with pytest.raises(fasp_fx.CallError, match=message):
            module(x, {"same": same})


def test_compilers_and_exporters_take_the_checks_over(tables: fasp_fx.Result) -> None:
    call = (torch.randn(5, 12), {"same": torch.randn(5, 12)})
    expected = tables.module(*call)
    compiled = torch.compile(tables.module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*call), expected)
    for strict in (False, True):
        shapes = ({0: torch.export.Dim.AUTO}, {"same": {0: torch.export.Dim.AUTO}})
        again = torch.export.export(tables.module, call, dynamic_shapes=shapes, strict=strict)
        torch.testing.assert_close(again.module()(*call), expected)
        # Known only to the guards: the slice is in the graph.
        assert max(int(bounds.upper) for bounds in again.range_constraints.values()) == 10
        with pytest.raises(AssertionError):
            again.module()(torch.randn(11, 12), {"same": torch.randn(11, 12)})


def test_constants_that_are_not_simply_compared() -> None:
    assert same_constant(float("nan"), float("nan"))
    for value, expected in (
        (1.0, float("nan")),
        (numpy.zeros(2), numpy.ones(2)),
        (True, 1),
        (None, False),
        (0.0, -0.0),
    ):
        assert not same_constant(value, expected)


def test_an_exported_program_takes_a_tensor_alone_as_a_model_does() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(3, 4)
    captured = fasp_fx.capture(torch.export.export(model, (x,)), x)
    assert captured.program.signature.parameters == fasp_fx.capture(model, x).program.signature.parameters
