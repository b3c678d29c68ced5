"""Windows: found from the graph, and trained until each gives more nearly what the dense one gives."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import PROFILE
from fasp_fx.restoration import Window
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank import llama, tokens
from torch import Tensor, nn
from zoo import randomise

import fasp_fx
from fasp_fx.calibration.observe import _reconstruction
from fasp_fx.calibration.observe._windows import find_windows
from fasp_fx.testing import build, example, programs

pytestmark = pytest.mark.usefixtures("shared_captures")


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(Block(12, 48) for _ in range(count))), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def stack() -> nn.Module:
    return randomise(Stack(), std=0.4)


def batches(count: int = 24, rows: int = 64, width: int = 12) -> list[Tensor]:
    return [torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def windows_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[str, set[str]]]:
    """The output and the weights of each window, if all groups lose something."""
    analysis = fasp_fx.analyze(model, args, kwargs)
    return [(window.output.name, set(window.weights)) for window in find_windows(analysis, analysis.chosen)]


def test_windows_end_where_a_block_ends() -> None:
    found = windows_of(stack(), batches(1)[0])
    names = [
        {f"blocks.{index}.{name}" for name in ("up.weight", "up.bias", "down.weight", "down.bias")}
        for index in range(3)
    ]
    names = [
        own | ({f"blocks.{index}.norm.weight", f"blocks.{index}.norm.bias"} if index else set())
        for index, own in enumerate(names)
    ]
    assert [weights for _, weights in found] == names  # the first norm sees what nothing has changed
    assert [output for output, _ in found] == ["linear_1", "add_1", "add_2"]


def test_attention_and_what_follows_it_are_windows_of_their_own() -> None:
    found = windows_of(llama(), input_ids=tokens()[0], use_cache=False)
    kinds = ["self_attn" if any("self_attn" in name for name in weights) else "mlp" for _, weights in found]
    assert kinds == ["self_attn", "mlp"] * (len(kinds) // 2)
    assert all(len({name.split(".")[2] for name in weights}) == 1 for _, weights in found), (
        "no window is of two layers"
    )
    assert not any("embed" in name or "lm_head" in name for _, weights in found for name in weights)
    assert all(
        {name.rsplit(".", 2)[1] for name in weights}
        >= {"q_proj", "k_proj", "v_proj", "o_proj", "input_layernorm"}
        for _, weights in found[2::2]
    )


def test_convolutions_without_a_residual_path() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = (3, 8, 12, 8, 6)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Conv2d(own, other, 3), nn.BatchNorm2d(other), nn.ReLU())
                for own, other in pairwise(sizes)
            )
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x.mean((2, 3)))

    found = windows_of(Plain().eval(), torch.randn(2, 3, 16, 16))
    matrices = [
        sorted(name for name in weights if "0.weight" in name or "head.weight" in name)
        for _, weights in found
    ]
    assert matrices == [
        ["layers.0.0.weight", "layers.1.0.weight"],
        ["head.weight", "layers.2.0.weight", "layers.3.0.weight"],
    ]


def held_out(data: list[Tensor]) -> Tensor:
    """Every fourth sequence, which is a row here."""
    return torch.cat(data)[3::4]


def test_each_window_gives_more_nearly_what_the_dense_one_gives() -> None:
    """The blocks, run by hand on the pruned model's inputs, against the dense ones on the same."""
    model, data = stack(), batches()
    captured = fasp_fx.capture(model, (data[0],))
    options: dict[str, Any] = {"calibration": data, "sparsity": 0.4}
    plain, trained = (
        fasp_fx.prune(captured, restore=restore, **options)
        for restore in ("least-squares", Window(epochs=6, rate=0.01))
    )
    assert plain.plan.groups == trained.plan.groups

    def errors(result: fasp_fx.Result, x: Tensor) -> list[float]:
        found = []
        for index, block in enumerate(model.get_submodule("blocks").children()):
            own = {
                name: result.module.get_parameter(f"blocks.{index}.{name}")
                for name, _ in block.named_parameters()
            }
            h = nn.functional.layer_norm(x, (12,), own["norm.weight"], own["norm.bias"])
            h = nn.functional.gelu(nn.functional.linear(h, own["up.weight"], own["up.bias"]))
            given, x = block(x), x + nn.functional.linear(h, own["down.weight"], own["down.bias"])
            found.append(float((given - x).square().mean()))
        return found

    with torch.no_grad():
        before, after = (errors(result, held_out(data)) for result in (plain, trained))
        fresh = torch.randn(2000, 12, generator=torch.Generator().manual_seed(99))
        dense = model(fresh)
        wrong, less = (float((result.module(fresh) - dense).norm()) for result in (plain, trained))
    assert all(mine < 0.9 * theirs for mine, theirs in zip(after, before, strict=True))
    assert less < wrong
    assert any("3 of 3" in note for note in trained.report.notes)


def test_a_window_that_nothing_helps_is_left_as_it_was() -> None:
    model, data = stack(), batches(4)
    captured = fasp_fx.capture(model, (data[0],))
    options: dict[str, Any] = {"calibration": data, "sparsity": 0.4}
    plain, trained = (
        fasp_fx.prune(captured, restore=restore, **options)
        for restore in ("least-squares", Window(epochs=1, rate=0.9))
    )
    for (name, value), other in zip(
        plain.module.named_parameters(), trained.module.parameters(), strict=True
    ):
        assert torch.equal(value, other), name
    assert any("0 of 3" in note for note in trained.report.notes)


def test_it_does_not_depend_on_the_callers_random_numbers_and_leaves_them() -> None:
    model, data = stack(), batches(6)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(
            fasp_fx.prune(model, (data[0],), calibration=data, sparsity=0.4, restore=Window(epochs=1))
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(one, other)
        for one, other in zip(*(list(result.module.parameters()) for result in found), strict=True)
    )
    assert not any(parameter.grad is not None for parameter in model.parameters())


class Conditioned(nn.Module):
    """What all blocks are given is an output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.gain = nn.Linear(12, 12), nn.Parameter(torch.ones(12))
        self.ups, self.downs = (
            nn.ModuleList(nn.Linear(12, 48) for _ in range(3)),
            nn.ModuleList(nn.Linear(48, 12) for _ in range(3)),
        )

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        h = x + self.downs[0](torch.tanh(self.ups[0](x)))
        given = self.given(t)
        scale = self.gain.tanh()
        h = h + self.downs[1](torch.tanh(self.ups[1](h + given) * scale.mean()))
        h = h + self.downs[2](torch.tanh(self.ups[2](h - given)))
        return h, 10 * given * scale


def test_what_leaves_a_window_by_another_way_stays() -> None:
    model = randomise(Conditioned(), std=0.4)
    data = list(zip(batches(), reversed(batches()), strict=True))
    result = fasp_fx.prune(
        model, data[0], calibration=data, sparsity=0.5, quality="fast", restore=Window(epochs=4, rate=0.02)
    )
    assert torch.equal(result.module(*data[0])[1], model(*data[0])[1])
    assert any("3 of 3" in note for note in result.report.notes)


def test_the_dense_models_own_values_are_a_part_of_the_target() -> None:
    model = randomise(
        nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 5)), std=0.4
    )
    for options in ({"drift": 0.5}, {"quality": "best"}):
        result = fasp_fx.prune(
            model, (batches(1)[0],), calibration=batches(), sparsity=0.4, restore="window", **options
        )  # type: ignore[arg-type]
        assert any(note.startswith("windows: ") for note in result.report.notes)


def test_padding_among_channels_first() -> None:
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.up2, self.down2 = (
                nn.Conv1d(8, 40, 1),
                nn.Conv1d(40, 8, 1),
                nn.Conv1d(8, 40, 1),
                nn.Conv1d(40, 8, 1),
            )

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = self.down(self.up(x.transpose(1, 2) + 0 * mask[:, None]).tanh())
            return self.down2(self.up2(h).tanh())

    model, found = randomise(Channels(), std=0.4), []
    for filler in (0.0, 30.0):
        data = []
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            x, lengths = (
                torch.randn(6, 9, 8, generator=generator),
                torch.randint(3, 9, (6, 1), generator=generator),
            )
            mask = (torch.arange(9)[None] < lengths).float()
            data.append((torch.where(mask[..., None] > 0, x, filler), mask))
        options: dict[str, Any] = {
            "calibration": data,
            "sparsity": 0.4,
            "quality": "fast",
            "padding_mask": "mask",
            "restore": Window(epochs=3, rate=0.01),
        }
        found.append(fasp_fx.prune(model, data[0], **options))
    for value, other in zip(*(list(result.module.parameters()) for result in found), strict=True):
        torch.testing.assert_close(value, other)


def test_what_is_left_whole_after_all_takes_its_window_back() -> None:
    from fasp_fx.config import PruningConfig

    from fasp_fx.calibration.observe._visit import decided
    from fasp_fx.pruning._pipeline import decide
    from fasp_fx.pruning.check import restricted

    program = fasp_fx.capture(stack(), (batches(1)[0],)).program
    config = PruningConfig(sparsity=0.4, restore=Window(epochs=4, rate=0.01))
    analysis, decision = decide(program, config, batches())
    groups = decided(analysis, decision)
    assert len(decision.windows) == 3
    assert {"blocks.1.up.weight", "blocks.1.norm.bias"} <= decision.weights.keys()
    left = restricted(
        analysis, decision, [group for group in groups if not group.name.startswith("blocks.1")]
    )
    assert not any(name.startswith("blocks.1") for name in left.weights)
    assert all(torch.equal(left.weights[name], decision.weights[name]) for name in left.weights)
    assert len(left.windows) == 2
    assert left.notes == decision.notes


def test_padding_teaches_nothing() -> None:
    model = llama()
    found = []
    for filler in (3, 7):
        data = []
        for seed in range(8):
            ids = torch.randint(0, 20, (2, 12), generator=torch.Generator().manual_seed(seed))
            mask = torch.ones_like(ids)
            ids[0, 8:], mask[0, 8:] = filler, 0
            data.append({"input_ids": ids, "attention_mask": mask})
        result = fasp_fx.prune(
            model,
            (),
            data[0] | {"use_cache": False},
            calibration=data,
            sparsity=0.3,
            restore=Window(epochs=2),
            padding_mask="attention_mask",
        )
        found.append(result)
    for (name, value), other in zip(
        found[0].module.named_parameters(), found[1].module.parameters(), strict=True
    ):
        torch.testing.assert_close(value, other, msg=name)


def test_sixteen_bits() -> None:
    model, data = stack().bfloat16(), [batch.bfloat16() for batch in batches()]
    result = fasp_fx.prune(
        model, (data[0],), calibration=data, sparsity=0.4, restore=Window(epochs=4, rate=0.01)
    )
    assert {parameter.dtype for parameter in result.module.parameters()} == {torch.bfloat16}
    assert any("3 of 3" in note for note in result.report.notes)


def test_a_weight_that_two_windows_read_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(12, 48), Block(12, 48)])
            self.blocks[1].up = self.blocks[0].up  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model, data = randomise(Tied(), std=0.4), batches()
    result = fasp_fx.prune(
        model, (data[0],), calibration=data, sparsity=0.4, restore=Window(epochs=2, rate=0.01)
    )
    kept = [row for row in range(48) if row not in result.plan.groups[0].producers[0].removed]
    assert torch.equal(
        result.module.get_parameter("blocks.0.up.weight"), model.get_parameter("blocks.0.up.weight")[kept]
    )
    assert [sorted(weights)[0] for _, weights in windows_of(model, data[0])] == [
        "blocks.0.down.bias",
        "blocks.1.down.bias",
    ]
    assert not any("up" in name for _, weights in windows_of(model, data[0]) for name in weights)


@pytest.mark.parametrize("include", [("exempt",), ()])
def test_query_and_key_channels_beside(include: tuple[str, ...]) -> None:
    result = fasp_fx.prune(
        llama(),
        (),
        {"input_ids": tokens()[0], "use_cache": False},
        calibration=[{"input_ids": ids} for ids in tokens()],
        sparsity=0.4,
        include=include,
        restore="window",
    )
    (note,) = (note for note in result.report.notes if note.startswith("windows:"))
    assert ("no weight reads" in note) == bool(include)


@pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")
@settings(
    max_examples=200 if PROFILE == "slow" else 4, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(net=programs(max_blocks=4), seed=st.integers(0, 99))
def test_drawn_nets(net: Any, seed: int) -> None:
    """Every result passes the check by running; what cannot be pruned is refused as without windows."""
    model, inputs = build(net, seed), [example(net, batch=3, seed=index) for index in range(4)]
    outcomes = []
    for restore in ("least-squares", Window(epochs=1, rate=0.01)):
        try:
            outcomes.append(
                type(
                    fasp_fx.prune(
                        model, inputs[0], calibration=inputs, sparsity=0.3, restore=restore, quality="fast"
                    )
                )
            )  # type: ignore[arg-type]
        except fasp_fx.FaspError as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_a_diverging_step_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reconstruction, "_BETAS", (0.0, 0.0))
    model, data = stack(), batches(4)
    result = fasp_fx.prune(
        model, (data[0],), calibration=data, sparsity=0.4, restore=Window(epochs=2, rate=0.5)
    )
    assert all(bool(torch.isfinite(parameter).all()) for parameter in result.module.parameters())


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"epochs": True}, {"rate": 0}, {"rate": 2.0}, {"seed": -1}]
)
def test_a_window_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=next(iter(options))):
        Window(**options)


def test_windows_need_what_they_need() -> None:
    with pytest.raises(fasp_fx.ArgumentError, match="propagate="):
        fasp_fx.PruningConfig(restore="window", propagate=False)
    config = fasp_fx.PruningConfig(restore=Window(epochs=3, rate=0.01))
    assert fasp_fx.PruningConfig.from_json(config.to_json()) == config
    with pytest.raises(fasp_fx.ArgumentError, match="no window"):
        fasp_fx.PruningConfig.from_json(config.to_json().replace('"epochs"', '"turns"'))
