"""Which tokens are held out to judge a repair, which are padding, and weights that a repair must
not touch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made, wide
from refusal import Vectors
from torch import Tensor, nn
from torch.nn import functional
from zoo import randomise

import fasp_fx
from fasp_fx.calibration import TokenRoles
from fasp_fx.calibration._statistics import FITTED, HELD, PADDING

pytestmark = pytest.mark.usefixtures("shared_captures")


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

    sizes = {"up": (6, 16), "down": (16, 6), "wide": (6, 12), "narrow": (12, 3)}
    return made(forward, **{name: nn.Linear(*size) for name, size in sizes.items()})


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


@pytest.mark.parametrize("restore", ["least-squares", None])
@pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")
@pytest.mark.parametrize("make", [encoder, lambda: in_one_row(True)], ids=["rows", "in turn"])
def test_padding_weighs_nothing(make: Any, restore: Any) -> None:
    model = randomise(make())
    batch = padded(LENGTHS, 7)
    options = {"sparsity": 0.3, "restore": restore}
    found = fasp_fx.prune(model, batch, calibration=[batch], **options)
    expected = fasp_fx.prune(model, batch, calibration=alone(*batch), **options)
    # no mask has other numbers than 0 and 1
    counted = fasp_fx.prune(model, batch, calibration=[(batch[0], 2 * batch[1])], **options)
    assert found.plan.groups == expected.plan.groups
    for name, weight in expected.module.named_parameters():
        torch.testing.assert_close(found.module.get_parameter(name), weight, rtol=1e-2, atol=1e-3)
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
    with torch.no_grad():
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
