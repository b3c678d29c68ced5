"""Hidden states that are matched beside the outputs: against a loop written out, and by what they promise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.errors import ArgumentError, FaspError

pytestmark = pytest.mark.usefixtures("shared_captures")


class Residual(nn.Module):
    """Two feed-forward blocks on a stream that keeps its channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 8)
        self.ups = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(24, 8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            h = h + down(F.gelu(up(h)))
        return self.head(h)


def batches(count: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, generator=generator) for _ in range(count)]


def cut(dense: nn.Module, args: tuple[Tensor, ...]) -> fasp_fx.Result:
    """Without repair, which leaves something to learn; the stream between the blocks stays whole."""
    return fasp_fx.prune(
        dense, args, sparsity=0.5, score="magnitude", restore=None, allocation="uniform", exclude=("embed",)
    )


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, list[Tensor], fasp_fx.Result]:
    dense, data = Residual().eval(), batches()
    return dense, data, cut(dense, (data[0],))


def run_by_hand(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the network gives, and what its second block and its head read."""
    h, read = F.linear(x, weights["embed.weight"], weights["embed.bias"]), []
    for block in range(2):
        up, down = (
            (weights[f"{side}s.{block}.weight"], weights[f"{side}s.{block}.bias"]) for side in ("up", "down")
        )
        h = h + F.linear(F.gelu(F.linear(h, *up)), *down)
        read.append(h)
    return F.linear(h, weights["head.weight"], weights["head.bias"]), read


def test_steps_are_those_of_a_loop_written_out(made: tuple[nn.Module, list[Tensor], fasp_fx.Result]) -> None:
    dense, data, result = made
    result = copy.deepcopy(result)
    own = {
        name: tensor.detach().clone().requires_grad_() for name, tensor in result.module.named_parameters()
    }
    fasp_fx.distil(
        result,
        dense,
        data,
        epochs=2,
        learning_rate=1e-3,
        warmup=0.0,
        held_out=0.1,
        hidden=("ups.1", "head.*"),
        hidden_weight=3.0,
        precision="weights",
    )
    training, step = [index for index in range(10) if index != 5], 0
    wanted = {name: tensor.detach() for name, tensor in dense.named_parameters()}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-3, weight_decay=0.0)
    for epoch in range(2):
        for place in torch.randperm(9, generator=torch.Generator().manual_seed(epoch)).tolist():
            optimizer.param_groups[0]["lr"] = 1e-3 * (18 - step) / 18
            x = data[training[place]]
            (output, read), (target, seen) = run_by_hand(own, x), run_by_hand(wanted, x)
            loss = (output - target).square().mean() / target.square().mean()
            for one, other in zip(read, seen, strict=True):
                other = other.bfloat16().float()
                loss = loss + 3.0 / 2 * (one - other).square().mean() / other.square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(own.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    for name, tensor in result.module.named_parameters():
        torch.testing.assert_close(tensor, own[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("train", ["all", "vectors", "low-rank"])
def test_hidden_states_come_nearer_whatever_is_trained(
    made: tuple[nn.Module, list[Tensor], fasp_fx.Result], train: Any
) -> None:
    dense, data, result = made
    wanted = {name: tensor.detach() for name, tensor in dense.named_parameters()}

    def distance(**options: Any) -> float:
        found = fasp_fx.distil(
            copy.deepcopy(result), dense, data, epochs=8, learning_rate=5e-3, train=train, rank=2, **options
        )
        weights = {name: tensor.detach() for name, tensor in found.module.named_parameters()}
        return sum(
            float((run_by_hand(weights, x)[1][0] - run_by_hand(wanted, x)[1][0]).square().sum()) for x in data
        )

    assert distance(hidden=("ups.1",), hidden_weight=100.0) < 0.97 * distance()


def test_what_an_attention_mask_hides_teaches_nothing() -> None:
    dense, data = Residual().eval(), batches(6)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]])
    result = cut(dense, (data[0], mask))

    def trained(filling: float) -> dict[str, Tensor]:
        shown = [(x.masked_fill(mask[..., None] == 0, filling), mask) for x in data]
        found = fasp_fx.distil(
            copy.deepcopy(result), dense, shown, learning_rate=3e-3, hidden=("ups.*", "head"), epochs=3
        )
        assert found.report.recovery is not None
        assert found.report.recovery.kept > 0
        return dict(found.module.named_parameters())

    one, other = trained(0.0), trained(50.0)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-6, rtol=1e-5)


def test_interrupted_it_goes_on_to_the_same_end(
    made: tuple[nn.Module, list[Tensor], fasp_fx.Result], tmp_path: Path
) -> None:
    dense, data, result = made
    options: dict[str, Any] = {"hidden": ["head"], "epochs": 4, "learning_rate": 3e-3}
    whole = fasp_fx.distil(copy.deepcopy(result), dense, data, **options)

    def stop(fraction: float) -> None:
        if fraction > 0.7:
            raise KeyboardInterrupt

    broken = copy.deepcopy(result)
    with pytest.raises(KeyboardInterrupt):
        fasp_fx.distil(broken, dense, data, checkpoint=tmp_path / "run", progress=stop, **options)
    with pytest.raises(FaspError, match="options differ"):
        fasp_fx.distil(broken, dense, data, checkpoint=tmp_path / "run", **{**options, "hidden": ["ups.1"]})
    resumed = fasp_fx.distil(broken, dense, data, checkpoint=tmp_path / "run", **options)
    assert resumed.report.recovery is not None
    assert whole.report.recovery is not None
    assert resumed.report.recovery.curve == whole.report.recovery.curve


class Looked(nn.Module):
    """Has a table, which is looked up by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.body = Residual()

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.table(ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": "ups"}, r"hidden='ups' is not known; pass a tuple of name patterns"),
        ({"hidden": ("ups.9",)}, r"hidden: 'ups.9' matches no weight of two dimensions"),
        ({"hidden": ("*.bias",)}, r"hidden: '\*.bias' matches no weight"),
        ({"hidden": ("downs.0",)}, r"what 'downs.0.weight' reads has other shapes.*name weights"),
        ({"hidden": ("head",), "hidden_weight": 0.0}, r"hidden_weight=0.0 is not a positive number"),
        ({"hidden": ("head",), "hidden_weight": float("nan")}, r"hidden_weight=nan"),
    ],
)
def test_what_cannot_be_matched_is_refused(
    made: tuple[nn.Module, list[Tensor], fasp_fx.Result], options: dict[str, Any], message: str
) -> None:
    dense, data, result = made
    own = copy.deepcopy(result)
    before = copy.deepcopy(own.module.state_dict())
    with pytest.raises(ArgumentError, match=message):
        fasp_fx.distil(own, dense, data, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in own.module.state_dict().items())


def test_a_weight_that_reads_no_activation_is_refused() -> None:
    torch.manual_seed(0)
    dense, data = Looked().eval(), [torch.randint(0, 7, (4, 3)) for _ in range(4)]
    result = fasp_fx.prune(dense, (data[0],), calibration=data, sparsity=0.5, quality="fast")
    with pytest.raises(ArgumentError, match=r"hidden: 'table.weight' reads no activation"):
        fasp_fx.distil(result, dense, data, hidden=("table",))
