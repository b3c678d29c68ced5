"""How weights come of the captured ones, as data: what a program without weights says of them makes the
weights of the smaller program.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, PROFILE
from fasp_fx.channels import Numbering
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from models import made
from torch import Tensor, nn
from zoo import ZOO, randomise

from fasp_fx.analysis import Analysis, analyze_program
from fasp_fx.capturing import capture
from fasp_fx.capturing._program import Program
from fasp_fx.capturing._recipes import Cut, Recipe
from fasp_fx.errors import VerificationError
from fasp_fx.passes import Prune, split_fused
from fasp_fx.passes.remove_channels import recipes_of
from fasp_fx.testing import build, example, programs
from fasp_fx.testing._case import draw_sets
from fasp_fx.testing.specs import Net

WIDTH = 8
_INCLUDED = ((), ("exempt",), ("approximate", "depth"))


def _convolutions() -> nn.Module:
    """A convolution in groups, each with channels of its own."""
    layers = (nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 5, 1))
    return nn.Sequential(*layers)


def _cross() -> nn.Module:
    """PyTorch's attention of one sequence to another, which takes ranges of rows of one matrix apart."""
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    return made(lambda self, x, y: x + self.attention(x, y, y, need_weights=False)[0], attention=attention)


@dataclass(frozen=True)
class Architecture:
    """A model, what it is called with and what may go; ``shows``: what its recipes are to show."""

    make: Callable[[], nn.Module]
    call: dict[str, Any]
    shows: frozenset[str]
    granularity: tuple[str, ...] = ("channel",)
    include: tuple[str, ...] = ()


def _zoo(name: str, *shows: str, **options: Any) -> Architecture:
    return Architecture(ZOO[name].make, ZOO[name].example(), frozenset(shows), **options)


#: removals of each architecture
SEEDS = 3 if PROFILE == "slow" else 1

ARCHITECTURES = {
    "grouped query": _zoo("llama_gqa", include=("exempt",)),
    "tied": _zoo("llama_mha", "tied", include=("approximate",)),
    "depth": _zoo("opt", "empty", granularity=("channel", "head"), include=("depth",)),
    "cross": Architecture(
        _cross, {"x": torch.zeros(2, 3, WIDTH), "y": torch.zeros(2, 5, WIDTH)}, frozenset(["part"])
    ),
    "convolutions": Architecture(
        _convolutions, {"input": torch.zeros(2, 3, 8, 8)}, frozenset(["blocks", "several"])
    ),
}


def hold(full: Analysis, hollow: Analysis, weights: dict[str, Tensor], seed: int) -> set[str]:
    """Prune two programs alike, of which one has no weights: the recipes of this one make the weights of the
    other.

    Args:
        weights: of the captured model.

    Returns:
        What the recipes show.
    """
    assert hollow.numbering.slots == full.numbering.slots
    gone = draw_sets(full, np.random.default_rng(seed))[full.labels]
    smaller, said = Prune(gone, None, full)(full.program), Prune(gone, None, hollow)(hollow.program)
    shapes = {name: tuple(tensor.shape) for name, tensor in said.weights().items()}
    assert shapes.keys() == smaller.weights().keys()
    shown = set()
    for name, expected in smaller.weights().items():
        recipe = said.recipe(name)
        assert recipe == smaller.recipe(name) == pickle.loads(pickle.dumps(recipe))
        source = weights[recipe.source]
        found = recipe.apply(source)
        assert recipe.shape(source.shape) == tuple(found.shape) == shapes[name], name
        assert torch.equal(found, expected), name
        assert name in said.recipes or (name in weights and found.shape == weights[name].shape)
        shown |= set(_kinds(name, said))
    return shown


def _kinds(name: str, program: Program) -> list[str]:
    """What the recipe of a weight shows."""
    recipe = program.recipe(name)
    found = {
        "part": name in program.parts,
        "tied": recipe.source != name and name not in program.parts,
        "blocks": any(cut.block_dim is not None for cut in recipe.cuts),
        "empty": any(not cut.kept.size for cut in recipe.cuts),
        "several": len(recipe.cuts) > 1,
    }
    return [kind for kind, is_shown in found.items() if is_shown]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_on_the_meta_device(name: str) -> None:
    own = ARCHITECTURES[name]
    with torch.device("meta"):
        hollow = own.make().eval()
    captured, empty = (capture(model, (), own.call) for model in (randomise(own.make()), hollow))
    assert all(tensor.is_meta for tensor in empty.parameters().values())
    full, said = (
        analyze_program(program, split_fused, own.granularity, own.include) for program in (captured, empty)
    )
    shown: set[str] = set()
    for seed in range(SEEDS):
        shown |= hold(full, said, captured.weights(), seed)
    assert own.shows <= shown


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(net=programs(), seed=st.integers(0, 999), include=st.sampled_from(_INCLUDED))
def test_models_drawn_at_random(net: Net, seed: int, include: tuple[str, ...]) -> None:
    model = build(net, seed)
    with torch.device("meta"):
        hollow = type(model)(net).eval()
    captured, empty = (capture(made, example(net, 2, seed)) for made in (model, hollow))
    full, said = (
        analyze_program(program, split_fused, ("channel", "head", "expert"), include)
        for program in (captured, empty)
    )
    assume(np.array_equal(full.labels, said.labels))  # what buffers hold can say what is coupled
    for kind in sorted(hold(full, said, captured.weights(), seed)):
        event(kind)


def test_a_recipe() -> None:
    """Blocks of rows each lose columns of their own, then rows go; made by hand."""
    weight = torch.arange(24.0).reshape(4, 6).requires_grad_()
    stays = np.array([[True, False, True, True, False, True], [False, True, True, True, True, False]])
    recipe = Recipe("w", (Cut.of("w", 1, stays, 0),)).then(Cut(0, np.array([[3, 0, 1]])))
    found = recipe.apply(weight)
    expected = [[19.0, 20, 21, 22], [0, 2, 3, 5], [6, 8, 9, 11]]
    assert found.tolist() == expected
    assert recipe.shape(weight.shape) == (3, 4)
    assert recipe.shape(weight.shape) == tuple(recipe.apply(weight.detach().to("meta")).shape)
    found.sum().backward()
    assert weight.grad is not None
    assert sorted(weight[weight.grad.bool()].tolist()) == sorted(value for row in expected for value in row)
    assert Recipe("w").apply(weight) is weight


def test_unequal_blocks() -> None:
    stays = np.array([[True, True, False], [True, False, False]])
    with pytest.raises(VerificationError) as caught:
        Cut.of("stack", 2, stays, 0)
    assert str(caught.value) == (
        "the blocks of 'stack' would keep unequal numbers of channels along dimension 2: [1, 2]"
    )


def test_recipes_need_no_weights() -> None:
    """From the numbers of channels and the names of weights alone; unequal blocks are refused there."""
    numbering = Numbering({("w", 1): (0, 2)})
    rows, columns = numbering.add("w", 0, 4, "weight"), numbering.add("w", 1, 3, "weight")
    gone = np.zeros(numbering.total, dtype=bool)
    gone[[rows.base + 1, columns.base, columns.base + 5]] = True
    expected = Recipe("w", (Cut(1, np.array([[1, 2], [0, 1]]), 0), Cut(0, np.array([[0, 2, 3]]))))
    assert recipes_of(numbering, gone, {"w"}) == {"w": expected}
    assert recipes_of(numbering, gone, {"v"}) == {}
    gone[columns.base + 1] = True
    with pytest.raises(VerificationError, match=r"blocks of 'w' .* unequal .* dimension 1: \[1, 2\]"):
        recipes_of(numbering, gone, {"w"})
