"""Gram matrices, scores and restoration against naive computations in float64."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import decide
from corpus.indices import COUNT, INNER, STEPS, stacked
from corpus.layers import CONVOLUTIONS, recurrent
from hypothesis import given, strategies as st
from models import Vectors, block, linear, made, parameter, randomise, wide
from torch import Tensor, nn
from torch.nn import functional, functional as F

import fasp_fx
from fasp_fx.calibration import GroupColumns, GroupScore, Order, SplitGram, TokenRoles, decided, is_few, whole
from fasp_fx.calibration._statistics import FEW, FITTED, HELD, PADDING
from fasp_fx.pruning import PruningConfig
from fasp_fx.pruning.check import restricted


def net() -> nn.Module:
    """Two coupled groups in a row."""
    torch.manual_seed(3)
    layers = (nn.Linear(10, 48), nn.ReLU(), nn.Linear(48, 40), nn.SiLU(), nn.Linear(40, 5))
    return nn.Sequential(*layers).eval()


def data(batches: int = 3, tokens: int = 90) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(tokens, 10, generator=generator) for _ in range(batches)]


@given(
    tokens=st.integers(1, 40),
    columns=st.integers(1, 900),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_gram_leaves_padding_out_and_adds_up_to_the_rest(
    tokens: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gram = SplitGram(columns, torch.device("cpu"))
    parts = [torch.randn(tokens, columns, generator=generator).to(dtype) for _ in range(3)]
    marks = [torch.randint(0, 3, (tokens,), generator=generator) for _ in range(3)]
    for part, own in zip(parts, marks, strict=True):
        gram.update(part, own)
    flat, kinds = torch.cat(parts).double(), torch.cat(marks)
    counted, held = flat[kinds != PADDING], flat[kinds == HELD]
    torch.testing.assert_close(whole(gram.total()), (counted.T @ counted).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gram.norms(), counted.norm(dim=0), rtol=1e-5, atol=1e-5)
    assert gram.tokens == len(counted)
    torch.testing.assert_close(whole(gram.held.compact()), (held.T @ held).float(), rtol=1e-5, atol=1e-4)
    assert len(gram.parts) == 1 + bool(len(held))
    if FEW * len(flat) <= columns:  # X itself is kept, and nothing of the size of a Gram matrix
        assert all(is_few(part.compact()) for part in gram.parts)


def test_the_type_that_torch_gives_numbers_plays_no_part() -> None:
    model, batches = net(), data(tokens=FEW)
    first = fasp_fx.measure(model, (batches[0],), calibration=batches, score="obs")
    torch.set_default_dtype(torch.float64)
    try:
        again = fasp_fx.measure(model, (batches[0],), calibration=batches, score="obs")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(np.array_equal(again[name].losses, curve.losses) for name, curve in first.items())


class Kept:
    """A statistic that keeps nothing."""

    needs_gradient = True

    def __init__(self, columns: int, device: torch.device) -> None:
        pass

    def update(self, tokens: Tensor, gradient: Tensor | None, weight: Tensor) -> None:
        pass


class Writing(Kept):
    """The same, and writes into all that it is given."""

    def update(self, tokens: Tensor, gradient: Tensor | None, weight: Tensor) -> None:
        for tensor in (tokens, gradient, weight):
            if tensor is not None:
                tensor.zero_()


class InOrder(GroupScore):
    """Takes the channel sets as they come; may write into the weights that it is given."""

    def __init__(self, statistic: Any, writes: bool) -> None:
        self.statistics, self.writes = {"own": statistic}, writes  # type: ignore[misc]

    def __call__(self, group: GroupColumns) -> Order:
        for columns in group.consumers if self.writes else ():
            columns.weight.zero_()
        return Order(np.stack(list(group.members)))


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_scores_and_statistics_may_write_into_what_they_are_given(allocation: str) -> None:
    model, batches = net(), data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (
        fasp_fx.prune(
            model,
            (batches[0],),
            calibration=batches,
            sparsity=0.3,
            allocation=allocation,  # type: ignore[arg-type]
            score=score,
        )
        for score in (InOrder(Kept, False), InOrder(Writing, True))
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(map(torch.equal, batches, data()))
    assert first.plan.groups == second.plan.groups
    torch.testing.assert_close(*(list(each.module.parameters()) for each in (first, second)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (lambda columns: torch.empty(columns.weight.shape[1], device="meta"), "a dense tensor"),
        (lambda columns: columns.norms.to_sparse(), "a dense tensor"),
        (lambda columns: columns.norms * 1j, "a dense tensor of real numbers"),
    ],
    ids=["meta", "sparse", "complex"],
)
def test_scores_that_cannot_be_are_refused(score: Any, says: str) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=says):
        fasp_fx.prune(net(), (data()[0],), calibration=data(), sparsity=0.3, score=score)


# --- which tokens are held out to judge a repair, which are padding, and weights that a repair must


def _encoder(arranged: Callable[[Any, Tensor], Tensor], pooled: bool = True) -> nn.Module:
    """Two pairs of linear layers over tokens, between them the mean over a sequence; the second pair sees no
    padding.

    Args:
        arranged: how the first pair's tokens lie before the second layer, which this calls; gives them back
            as they were.
    """

    def forward(self: Any, x: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = arranged(self.down, self.up(x).relu())
        if pooled:
            tokens = (tokens * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return self.narrow(self.wide(tokens).tanh())

    return made(forward, **linear(up=(6, 16), down=(16, 6), wide=(6, 12), narrow=(12, 3)))


def encoder() -> nn.Module:
    return _encoder(lambda down, wide: down(wide))


def in_one_row(in_turn: bool) -> nn.Module:
    """The first pair sees all tokens as one long list: of one sequence after the other, or, as torch's own
    attention has them, of all sequences in turn.
    """

    def arranged(down: Any, wide: Tensor) -> Tensor:
        wide = wide.transpose(0, 1) if in_turn else wide
        tokens = down(wide.reshape(-1, 16)).view(*wide.shape[:2], -1)
        return tokens.transpose(0, 1) if in_turn else tokens

    return _encoder(arranged)


def padded(lengths: list[int], size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences of these lengths in a batch, and their mask; what is padding is large."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    x = torch.where(mask[..., None], torch.randn(len(lengths), size, 6, generator=generator), 100.0)
    return x, mask.float()


def roles_of(
    model: nn.Module, batches: list[Any], shape: tuple[int, ...] | None = None, **options: Any
) -> list[Tensor]:
    """The roles in the first consumer's input, for each batch, in full."""
    analysis = fasp_fx.analyze(model, batches[0])
    node = analysis.chosen[0].uses[0].activation
    roles = TokenRoles(analysis.program, [list(batch) for batch in batches], **options)
    found = []
    for index, batch in enumerate(batches):
        activation = torch.zeros(shape or (*batch[0].shape[:-1], 16))
        dims = list(range(activation.dim() - 1))
        found.append(roles.of(index, node, activation, dims).expand(activation.shape)[..., 0])
    return found


def test_whole_sequences_are_held_out_however_they_are_batched() -> None:
    one = padded([5] * 8, 5)
    (found,) = roles_of(encoder(), [one])
    assert (found == torch.tensor([FITTED, FITTED, FITTED, HELD] * 2)[:, None]).all()
    halves = [tuple(part[i : i + 2] for part in one) for i in range(0, 8, 2)]
    assert torch.equal(torch.cat(roles_of(encoder(), halves)), found)


@pytest.mark.parametrize("sequences", [2, 3])
def test_of_few_sequences_the_last_quarter_is_held_out(sequences: int) -> None:
    (found,) = roles_of(encoder(), [padded([8] * sequences, 8)])
    assert (found == torch.tensor([FITTED] * 6 + [HELD] * 2)).all()


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("lengths", [[5] * 8, [4, 2, 3, 3, 3]], ids=len)
def test_of_tokens_in_one_row_the_same_are_held_out(in_turn: bool, lengths: list[int]) -> None:
    batch = padded(lengths, 5 if len(lengths) == 8 else 4)
    (expected,) = roles_of(encoder(), [batch])
    (found,) = roles_of(in_one_row(in_turn), [batch], (batch[1].numel(), 16))
    assert torch.equal(found, (expected.T if in_turn else expected).reshape(-1))
    assert set(expected.unique().tolist()) == (
        {FITTED, HELD} if len(lengths) == 8 else {FITTED, HELD, PADDING}
    )


def test_where_the_order_of_tokens_is_unknown_padding_counts_and_that_is_said() -> None:
    model = _encoder(
        lambda down, wide: down(wide.view(len(wide), -1, 2, 16).transpose(0, 1).reshape(-1, 16)), pooled=False
    )
    batch = padded([6, 3, 4, 2, 5], 6)
    analysis = fasp_fx.analyze(model, batch)
    (use,) = (use for use in analysis.walk.facts.uses if use.weight == "down.weight")
    roles = TokenRoles(analysis.program, [list(batch)] * 4)
    for index, held in enumerate([False, False, False, True]):
        found = roles.of(index, use.activation, torch.zeros(30, 16), [0])
        assert (found == (HELD if held else FITTED)).all(), "whole batches"
    assert use.activation in roles.unmatched


def test_a_loss_that_counts_padding_is_said() -> None:
    model = made(lambda self, x, attention_mask: self.net(x).transpose(0, 1), net=Vectors())
    batch = padded([6, 3, 4, 2, 5], 7)
    with pytest.warns(fasp_fx.CalibrationWarning, match="'attention_mask' could not be matched"):
        fasp_fx.measure(model, batch, calibration=[batch] * 2)


LENGTHS = [7, 3, 5, 6, 2, 7, 4, 6, 5, 7, 3, 4]


def alone(x: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The sequences of a padded batch, each in a batch of its own without padding."""
    return [(row[None, own.bool()], own[None, own.bool()]) for row, own in zip(x, mask, strict=True)]


@pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")
@pytest.mark.parametrize(
    ("make", "restore"),
    [(encoder, None), (lambda: in_one_row(True), "least-squares")],
    ids=["rows", "in turn, repaired"],
)
def test_padding_weighs_nothing(make: Any, restore: Any) -> None:
    model = randomise(make())
    batch = padded(LENGTHS, 7)
    options = {"sparsity": 0.3, "restore": restore, "held_out": ()}
    found = fasp_fx.prune(model, batch, calibration=[batch], **options)
    expected = fasp_fx.prune(model, batch, calibration=alone(*batch), **options)
    # no mask has other numbers than 0 and 1
    counted = fasp_fx.prune(model, batch, calibration=[(batch[0], 2 * batch[1])], **options)
    assert found.plan.groups == expected.plan.groups
    repaired = (dict(each.module.named_parameters()) for each in (found, expected))
    torch.testing.assert_close(*repaired, rtol=1e-2, atol=1e-3)
    assert counted.plan.groups != expected.plan.groups, "padding changes nothing that can be seen"
    assert not any("padding" in note for note in found.report.notes)


def test_a_batch_of_padding_alone_is_refused() -> None:
    x, own = padded([5, 2, 4, 3], 5)
    with pytest.raises(fasp_fx.CalibrationError, match=r"batch 1: 'attention_mask' marks every token"):
        fasp_fx.prune(encoder(), (x, own), calibration=[(x, own), (x, 0 * own)])


def _autoencoder(encode: Callable[[Tensor], Tensor]) -> nn.Module:
    """One weight that encodes, by way of something, and, transposed, decodes."""
    return made(
        lambda self, x: functional.linear(functional.linear(x, encode(self.weight)).relu(), self.weight.t()),
        weight=nn.Parameter(torch.randn(12, 8, generator=torch.Generator().manual_seed(2))),
    )


@pytest.mark.parametrize(
    "encode",
    [lambda weight: weight, lambda weight: functional.normalize(weight, dim=1)],
    ids=["", "normalised"],
)
def test_a_weight_that_encodes_and_decodes_is_not_repaired(encode: Callable[[Tensor], Tensor]) -> None:
    model: Any = _autoencoder(encode)
    mix, rows = (torch.Generator().manual_seed(seed) for seed in (1, 0))
    x = torch.randn(400, 8, generator=rows) @ torch.randn(8, 8, generator=mix)
    result = fasp_fx.prune(model, (x[:3],), calibration=[x], sparsity=0.3)
    (group,) = result.plan.groups
    gone = sorted({index for part in group.consumers for index in part.removed})
    kept = [index for index in range(12) if index not in gone]
    cut = copy.deepcopy(model)
    cut.weight = nn.Parameter(model.weight[kept].detach())
    torch.testing.assert_close(result.module(x), cut(x))
    (note,) = [note for note in result.report.notes if "not repaired" in note]
    assert "'weight' is not repaired, because" in note
    (line,) = [line for line in result.report.lines if line.status == "prunable"]
    assert line.error_restored == line.error_cut


def test_a_weight_that_is_only_looked_at_is_repaired() -> None:
    model = wide(
        lambda self, x: functional.linear(self.up(x).relu(), self.down.weight.to(x.dtype)), hidden=16
    )
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    result = fasp_fx.prune(randomise(model), (x[:3],), calibration=[x], sparsity=0.3)
    (line,) = [line for line in result.report.lines if line.status == "prunable"]
    assert line.error_restored < line.error_cut  # type: ignore[operator]


# --- repairs of every kind of consumer


def inputs(width: int, count: int = 8, rows: int = 64) -> list[Tensor]:
    return [torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def _constants(bias: bool = True) -> Any:
    """A hidden layer of which every second neuron is the same, and not zero, whatever comes in."""
    torch.manual_seed(0)
    model: Any = wide(block, hidden=12, down=nn.Linear(12, 4, bias=bias))
    model.up.weight.detach()[::2] = 0
    model.up.bias.detach()[::2] = torch.rand(6) + 1
    return model


def outputs_off(result: Any, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        dense = model(x)
        return float((result.module(x) - dense).norm() / dense.norm())


def test_what_is_constant_goes_at_no_cost_where_there_is_a_bias() -> None:
    batches = inputs(6)
    for quality in ("balanced", "best"):
        model = _constants()
        result = fasp_fx.prune(model, (batches[0],), calibration=batches, sparsity=0.33, quality=quality)  # type: ignore[arg-type]
        assert len(result.plan.groups[0].consumers[0].removed) == 4
        assert set(result.plan.groups[0].consumers[0].removed) <= set(range(0, 12, 2))
        assert outputs_off(result, model, torch.randn(50, 6)) < 2e-3  # what the least of the ridges leaves


def _convolved(groups: int) -> nn.Module:
    down = nn.Conv1d(8, 4, 3, padding=1, groups=groups)
    return made(lambda self, x: self.down(torch.sigmoid(self.up(x))), up=nn.Conv1d(3, 8, 1), down=down)


def _multiplied() -> nn.Module:
    return made(
        lambda self, x: torch.addmm(self.bias, torch.sigmoid(self.up(x)), self.weight),
        up=nn.Linear(3, 8),
        weight=parameter(8, 4),
        bias=parameter(4),
    )


@pytest.mark.parametrize(
    ("make", "groups"),
    [(lambda: _convolved(1), 1), (lambda: _convolved(2), 2), (_multiplied, 1)],
    ids=["conv", "grouped", "addmm"],
)
def test_every_operator_that_adds_a_bias(make: Callable[[], nn.Module], groups: int) -> None:
    """The output of the repaired consumer is as near to the dense one's as a least-squares solve
    brings it.
    """
    torch.manual_seed(0)
    model = make()
    convolves = hasattr(model, "down")
    x = torch.randn(400, 3, 10) if convolves else torch.randn(2000, 3)
    found = fasp_fx.prune(model, (x[:4],), calibration=list(x.chunk(8)), sparsity=0.3).module
    up = [found.get_parameter(f"up.{name}") for name in ("weight", "bias")]
    with torch.no_grad():
        hidden = torch.sigmoid(F.conv1d(x, *up) if convolves else F.linear(x, *up))
        seen = F.unfold(hidden[:, :, None], (1, 3), padding=(0, 1)) if convolves else hidden
        parts = (  # [positions, columns] of each group
            part.movedim(1, -1).flatten(0, -2).double().chunk(groups, -1)
            for part in (seen, model(x), found(x))
        )
    assert seen.shape[1] < (24 if convolves else 8)
    for own, target, got in zip(*parts, strict=True):
        beside = torch.cat([own, own.new_ones(len(own), 1)], 1)
        least = (beside @ torch.linalg.lstsq(beside, target).solution - target).norm()
        assert (got - target).norm() < 1.05 * least + 1e-3 * target.norm()


def _shared() -> nn.Module:
    """Two consumers that add one bias, and one that scales its own."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = x + F.linear(torch.sigmoid(self.up(x)), self.first, self.both)
        h = h + F.linear(torch.sigmoid(self.middle(h)), self.second, self.both)
        return torch.addmm(self.scaled, torch.sigmoid(self.last(h)), self.third, beta=0.5)

    torch.manual_seed(0)
    shapes = {"first": (6, 12), "second": (6, 12), "third": (12, 6), "both": (6,), "scaled": (6,)}
    return made(
        forward,
        **{name: nn.Linear(6, 12) for name in ("up", "middle", "last")},
        **{name: parameter(*shape) for name, shape in shapes.items()},
    )


def test_a_bias_that_is_read_elsewhere_or_scaled_stays_as_it_is() -> None:
    model, batches = _shared(), inputs(6)
    result = fasp_fx.prune(model, (batches[0],), calibration=batches, sparsity=0.4)
    assert {group.consumers[0].name for group in result.plan.groups} == {"first", "second", "third"}
    for name in ("both", "scaled"):
        assert torch.equal(result.module.get_parameter(name), model.get_parameter(name)), name


def test_a_group_that_stays_whole_after_all_keeps_its_bias() -> None:
    batches = inputs(6)
    program = fasp_fx.capture(_constants(), (batches[0],)).program
    analysis, decision = decide(program, PruningConfig(sparsity=0.5), batches)
    assert decision.weights.keys() == {"down.weight", "down.bias"}
    (group,) = decided(analysis, decision)
    assert restricted(analysis, decision, [group]).weights.keys() == {"down.weight", "down.bias"}
    assert not restricted(analysis, decision, []).weights


# --- convolutions


#: models of operators that are repaired in ways of their own, and their inputs
REPAIRED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a transposed convolution in groups": (CONVOLUTIONS["transposed grouped"], (270, 3, 12, 12)),
    "recurrent layers": (lambda: recurrent("LSTM", num_layers=2, bidirectional=True), (200, 4, 3)),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_every_kind_of_operator_is_repaired(name: str) -> None:
    make, shape = REPAIRED[name]
    model = randomise(make(), std=0.5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = fasp_fx.prune(model, (x[:2],), calibration=list(x.chunk(3)), sparsity=0.3, quality="fast")
    cut = fasp_fx.apply(model, result.plan, (x[:2],))
    with torch.no_grad():
        repaired, left = ((one.module(x) - model(x)).norm() for one in (result, cut))
    assert repaired < left


def test_a_grouped_convolution_scores_each_group_by_itself() -> None:
    """Of each group the input channel with the least influence goes, whatever the other groups hold."""
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4)
    with torch.no_grad():
        for weight in (first.weight, second.weight):
            weight.fill_(1.0)
        second.weight[0:2, 1] = 0.01  # group 0: its second input
        second.weight[2:4, 0] = 0.01  # group 1: its first
        second.weight[4:6, 1] = 0.01
        second.weight[6:8, 0] = 0.01
    model = nn.Sequential(first, second, nn.Conv2d(8, 5, 1)).eval()
    result = fasp_fx.prune(model, (torch.randn(2, 3, 4, 4),), sparsity=0.5, score="magnitude", restore=None)
    (part,) = [part for group in result.plan.groups for part in group.consumers if part.name == "1.weight"]
    assert (part.block_dim, part.removed) == (0, ((1,), (0,), (1,), (0,)))
    assert result.module.get_parameter("1.weight").shape[1] == 1


# --- stacks of weights


STACKED = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


def test_restoration_repairs_every_matrix_of_a_stack() -> None:
    torch.manual_seed(0)
    model = stacked(STEPS["linear"])
    restored = fasp_fx.prune(
        model,
        (STACKED,),
        calibration=[(STACKED,)],
        sparsity={"down": 0.3},
        quality="fast",
        restore="least-squares",
    )
    cut = fasp_fx.apply(model, restored.plan, (STACKED,))
    (part,) = [part for group in restored.plan.groups for part in group.consumers if part.name == "down"]
    kept = [channel for channel in range(INNER) if channel not in part.removed]
    with torch.no_grad():
        x = model.first(STACKED)
        for expert in range(COUNT):
            inner = (x @ model.up[expert].t()).tanh()
            errors = [
                (inner[:, kept] @ result.module.down[expert].t() - inner @ model.down[expert].t()).norm()
                for result in (restored, cut)
            ]
            assert errors[0] < errors[1]
