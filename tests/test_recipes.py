"""How weights come of the captured ones, as data: what a program without weights says of them makes the
weights of the smaller program.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, PROFILE
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor

from fasp_fx.analysis import Analysis, Numbering, analyze_program
from fasp_fx.capturing import Cut, Recipe, capture
from fasp_fx.errors import VerificationError
from fasp_fx.passes import remove, split_fused
from fasp_fx.passes._remove_channels import recipes_of
from fasp_fx.testing import build, example, programs
from fasp_fx.testing._case import draw_sets
from fasp_fx.testing.specs import Net

_INCLUDED = ((), ("exempt",), ("approximate", "depth"))


def hold(full: Analysis, hollow: Analysis, weights: dict[str, Tensor], seed: int) -> None:
    """Prune two programs alike, of which one has no weights: the recipes of this one make the weights of the
    other.

    Args:
        weights: of the captured model.
    """
    assert hollow.numbering.slots == full.numbering.slots
    gone = draw_sets(full, np.random.default_rng(seed))[full.labels]
    smaller, said = remove(full, gone), remove(hollow, gone)
    shapes = {name: tuple(tensor.shape) for name, tensor in said.weights().items()}
    assert shapes.keys() == smaller.weights().keys()
    for name, expected in smaller.weights().items():
        recipe = said.recipe(name)
        assert recipe == smaller.recipe(name) == pickle.loads(pickle.dumps(recipe))
        source = weights[recipe.source]
        found = recipe.apply(source)
        assert recipe.shape(source.shape) == tuple(found.shape) == shapes[name], name
        assert torch.equal(found, expected), name
        assert name in said.recipes or (name in weights and found.shape == weights[name].shape)


@settings(max_examples=EXAMPLES if PROFILE == "slow" else 5)
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
    hold(full, said, captured.weights(), seed)


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
