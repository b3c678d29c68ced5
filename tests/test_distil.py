"""Distillation: its losses against closed forms, its steps against a loop written out, its promises by
property.
"""

import copy
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from conftest import EXAMPLES
from hypothesis import given, settings, strategies as st
from models import made as model_of
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.errors import ArgumentError, CalibrationError, FaspError
from fasp_fx.pruning import Recovery
from fasp_fx.training._recovery import Divergence, SquaredError

#: a dense model, its data, and what it was pruned to
Made = tuple[nn.Module, list[Tensor], fasp_fx.Result]


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return (
        nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 5))
        .eval()
        .to(dtype)
    )


def batches(count: int = 10, seed: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 6, generator=generator).to(dtype) for _ in range(count)]


def pruned(dense: nn.Module, data: list[Tensor], **options: Any) -> fasp_fx.Result:
    return fasp_fx.prune(
        dense, (data[0],), calibration=data, held_out=(), **{"sparsity": 0.5, "quality": "fast", **options}
    )


@pytest.fixture(scope="module")
def made() -> Made:
    dense, data = net(), batches()
    return dense, data, pruned(dense, data)


def told(result: Any) -> Recovery:
    """What the report of a result says of its training."""
    assert result.report.recovery is not None
    return result.report.recovery


def relative_error(model: nn.Module, dense: nn.Module, data: list[Tensor]) -> float:
    """The mean over batches of ‖a − b‖² / ‖b‖²."""
    with torch.no_grad():
        return sum(float((model(x) - dense(x)).square().sum() / dense(x).square().sum()) for x in data) / len(
            data
        )


def curve(checkpoint: str) -> str:
    """How far a run is from the dense model on what it holds out, epoch by epoch."""
    dense, data = net(), batches()
    options: dict[str, Any] = {"epochs": 3, "learning_rate": 3e-3, "accumulate": 2, "checkpoint": checkpoint}
    after = fasp_fx.distil(pruned(dense, data), dense, data, **options)
    return " ".join(f"{point.held_out:.6f}" for point in told(after).curve)


def weights_of(result: fasp_fx.Result) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in result.module.named_parameters()}


def assert_weights(result: fasp_fx.Result, expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    torch.testing.assert_close(weights_of(result), expected, rtol=0, atol=0)


# --- losses


@given(st.integers(0, 999), st.integers(2, 40), st.integers(1, 40), st.integers(1, 7))
def test_gradients_of_a_divergence_are_those_of_its_formula_in_blocks_of_any_size(
    seed: int, vocabulary: int, top_k: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense, other = (torch.randn(2, 3, vocabulary, generator=generator) * 3 for _ in range(2))
    own, plain = other.clone().requires_grad_(), other.clone().requires_grad_()
    match = Divergence(top_k)
    with mock.patch("fasp_fx.training._distillation._ROWS", rows):
        kept = match.targets(dense)
        terms = match.terms(own, kept, {})
        terms.square().sum().backward()
    q, p = kept["log_probabilities"].float(), plain.log_softmax(-1).gather(-1, kept["places"].long())
    written = (q.exp() * (q - p)).sum(-1)
    if top_k < vocabulary:
        least = torch.finfo(torch.float32).eps
        other_q, other_p = ((1 - part.exp().sum(-1)).clamp_min(least) for part in (q, p))
        written = written + other_q * (other_q / other_p).log()
    written.square().sum().backward()
    torch.testing.assert_close(terms, written.flatten(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(own.grad, plain.grad, atol=1e-3, rtol=1e-3)


def test_probabilities_of_zero_do_not_spoil_a_divergence() -> None:
    dense = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]]).repeat(3, 1)
    other = torch.zeros(3, 4, requires_grad=True)
    match = Divergence(3)
    terms = match.terms(other, match.targets(dense), {})
    terms.sum().backward()
    assert bool(torch.isfinite(terms).all())
    assert other.grad is not None
    assert bool(torch.isfinite(other.grad).all())


def test_squared_error_is_relative_and_takes_outputs_alike() -> None:
    dense, other = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.full((2, 2), 10.0), "n": torch.arange(2)}, {}
    other = {"a": torch.tensor([[3.0, 5.0]]), "b": torch.full((2, 2), 9.0), "n": torch.arange(2)}
    match = SquaredError()
    torch.testing.assert_close(match.terms(other, match.targets(dense), {}), torch.tensor([1 / 25, 1 / 100]))


@pytest.mark.parametrize("match", [Divergence(4), SquaredError()], ids=["divergence", "squared"])
def test_tokens_that_the_mask_hides_do_not_count(match: Any) -> None:
    dense, other = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    changed = other.clone()
    changed[0, :2] = 1e3
    first, second = (
        match.terms(out, match.targets(dense), {"attention_mask": mask}).mean() for out in (other, changed)
    )
    torch.testing.assert_close(first, second)


# --- steps


def test_steps_are_those_of_a_loop_written_out(made: Made) -> None:
    dense, data, result = made
    result = copy.deepcopy(result)
    by_hand = copy.deepcopy(result.module)
    fasp_fx.distil(
        result,
        dense,
        data,
        epochs=3,
        accumulate=2,
        learning_rate=2e-3,
        held_out=0.2,
        seed=7,
        precision="weights",
    )
    training = [index for index in range(10) if index not in (2, 7)]  # the middles of two halves are held out
    steps, step = 12, 0
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=2e-3, weight_decay=0.0)
    for epoch in range(3):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(7 + epoch)).tolist()
        for first in range(0, 8, 2):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 1.2, (steps - step) / 10.8)
            for place in order[first : first + 2]:
                x = data[training[place]]
                with torch.no_grad():
                    wanted = dense(x)
                (((by_hand(x) - wanted).square().mean() / wanted.square().mean()) / 2).backward()
            nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    expected = dict(by_hand.named_parameters())
    torch.testing.assert_close(dict(result.module.named_parameters()), expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=min(EXAMPLES, 30))
@given(
    seed=st.integers(0, 99),
    rate=st.sampled_from([1e-6, 1e-4, 3e-3, 0.1, 10.0, 1e6]),
    frozen=st.booleans(),
    epochs=st.integers(1, 4),
    accumulate=st.integers(1, 12),
    held=st.sampled_from([0.1, 0.5, 0.99]),
    evaluations=st.integers(1, 9),
)
def test_it_never_gets_worse(
    made: Made,
    seed: int,
    rate: float,
    frozen: bool,
    epochs: int,
    accumulate: int,
    held: float,
    evaluations: int,
) -> None:
    dense, data, result = made
    result = copy.deepcopy(result)
    before, count = weights_of(result), max(1, min(round(10 * held), 9))
    held_out = [data[int((index + 0.5) * 10 / count)] for index in range(count)]
    error = relative_error(result.module, dense, held_out)
    next(result.module.parameters()).requires_grad_(not frozen)
    after = fasp_fx.distil(
        result,
        dense,
        data,
        seed=seed,
        learning_rate=rate,
        epochs=epochs,
        accumulate=accumulate,
        held_out=held,
        evaluations=evaluations,
    )
    recovery = told(after)
    kept = {point.step: point.held_out for point in recovery.curve}[recovery.kept]
    assert recovery.curve[0].held_out == pytest.approx(error, rel=1e-4)
    assert relative_error(after.module, dense, held_out) == pytest.approx(kept, rel=1e-3)
    assert kept <= error * (1 + 1e-6)
    assert rate < 1e6 or recovery.kept == 0  # it diverges
    assert all(torch.isfinite(tensor).all() for tensor in after.module.parameters())
    if recovery.kept == 0:
        assert all(torch.equal(before[name], tensor) for name, tensor in after.module.named_parameters())
    first, *others = after.module.named_parameters()
    assert not frozen or torch.equal(before[first[0]], first[1])
    assert all(tensor.grad is None and tensor.requires_grad for _, tensor in others)
    # They share their weights.
    torch.testing.assert_close(after.program.module()(data[0]), after.module(data[0]))
    after.module.requires_grad_(False)
    with pytest.raises(ArgumentError, match="requires_grad_"):
        fasp_fx.distil(after, dense, data)


def test_gradients_that_the_caller_has_gathered_do_not_enter_and_are_there_afterwards(
    made: Made,
) -> None:
    dense, data, result = made
    expected, found = copy.deepcopy(result), copy.deepcopy(result)
    (found.module(data[0]).square().sum() * 1e4).backward()
    gathered = {name: tensor.grad for name, tensor in found.module.named_parameters()}
    copies = {name: tensor.clone() for name, tensor in gathered.items() if tensor is not None}
    for one in (expected, found):
        fasp_fx.distil(one, dense, data, learning_rate=3e-3)
    assert_weights(found, weights_of(expected))
    for name, tensor in found.module.named_parameters():
        assert tensor.grad is gathered[name]
        assert torch.equal(tensor.grad, copies[name])


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_weights_of_16_bits_learn_by_steps_that_they_could_not_hold(precision: Any) -> None:
    """In bfloat16 no step of 1e-4 moves a weight above 0.03."""
    dense, data = net(dtype=torch.bfloat16), batches(dtype=torch.bfloat16)
    result = pruned(dense, data, restore=None)
    before = relative_error(copy.deepcopy(result.module).float(), net().bfloat16().float(), batches())
    after = fasp_fx.distil(result, dense, data, learning_rate=1e-4, epochs=30, precision=precision)
    assert {tensor.dtype for tensor in after.module.parameters()} == {torch.bfloat16}
    assert relative_error(copy.deepcopy(after.module).float(), dense.float(), batches()) < before * 0.98


# --- models


def tied() -> nn.Module:
    """An embedding that also predicts."""
    torch.manual_seed(0)
    embed, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = embed.weight

    def forward(self: Any, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(F.gelu(self.up(x))))

    return model_of(forward, embed=embed, up=nn.Linear(8, 32), down=nn.Linear(32, 8), head=head)


def masked() -> nn.Module:
    """Reads tokens of which some are padding."""
    return model_of(
        lambda self, input_ids, attention_mask: self.body(input_ids) * (1 + attention_mask[..., None]),
        body=tied(),
    )


def branching(**held: Any) -> nn.Module:
    """Cannot be captured as a whole."""
    return model_of(lambda self, x: self.body(x) if float(x.sum()) < 1e9 else x, body=net(), **held)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    dense = tied()
    data = [torch.randint(0, 20, (4, 6)) for _ in range(10)]
    result = fasp_fx.prune(dense, (data[0],), calibration=data, sparsity=0.5, quality="fast")
    after = fasp_fx.distil(result, dense, data, loss="divergence", learning_rate=3e-3, epochs=4)
    assert told(after).kept > 0
    module: Any = after.module
    assert module.embed.weight is module.head.weight
    after.save(tmp_path / "saved")
    loaded = fasp_fx.load(tmp_path / "saved")
    torch.testing.assert_close(loaded.module(data[0]), after.module(data[0]))
    assert told(loaded) == told(after)
    first = told(fasp_fx.distil(loaded, dense, data, loss="divergence", epochs=1)).curve[0]
    assert first.held_out == pytest.approx(min(point.held_out for point in told(after).curve), rel=1e-3)


# --- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"held_out": 1.0}, "held_out"),
        ({"loss": "kl"}, "'divergence'"),
        ({"loss": 3}, "Match"),
        ({"precision": "fp16"}, "'bfloat16'"),
        ({"seed": -1}, "seed"),
        ({"epoch": 3}, "the option 'epoch' is not known"),
        ({"config": {"epochs": 1}}, "DistillationConfig"),
        ({"progress": 5}, "progress is a int; pass a function"),
    ],
)
def test_options_that_make_no_sense(made: Made, options: dict[str, Any], said: str) -> None:
    dense, data, result = made
    with pytest.raises(ArgumentError, match=said):
        fasp_fx.distil(result, dense, data, **options)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "no batch"),
        (None, "NoneType"),
        (torch.randn(4, 6), "is a Tensor"),
        ([torch.randn(4, 6)], "at least two"),
        ([torch.randn(4, 6), "text"], "batch 1"),
        ([torch.randn(4, 5)] * 3, "the dense model does not take batch 0"),
        ([torch.full((4, 6), math.nan)] * 3, "not finite"),
    ],
)
def test_data_that_does_not_fit(made: Made, data: Any, said: str) -> None:
    dense, _, result = made
    before = weights_of(result)
    with pytest.raises(FaspError, match=said):
        fasp_fx.distil(result, dense, data)
    assert_weights(result, before)


#: what is given in the place of a result and of the dense model, and what is said
WRONG: dict[str, tuple[Callable[[fasp_fx.Result, nn.Module], tuple[Any, Any]], str]] = {
    "other weights": (lambda result, dense: (result, net(seed=1)), "not the model that was pruned"),
    "the pruned one": (lambda result, dense: (result, result.module), "not the model that was pruned"),
    "a text": (lambda result, dense: (result, "dense"), "pass the module"),
    "no result": (lambda result, dense: (result.module, dense), r"fasp_fx\.prune"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_the_dense_model_or_a_result_is_refused(made: Made, name: str) -> None:
    dense, data, result = made
    given, said = WRONG[name]
    with pytest.raises(ArgumentError, match=said):
        fasp_fx.distil(*given(result, dense), data)


def test_a_model_pruned_in_parts_is_refused_in_training_mode_and_learns_otherwise() -> None:
    dense, data = branching(drop=nn.Dropout(0.3)), batches()
    result = pruned(dense, data)
    before, part = relative_error(result.module, dense, data), cast(Any, result.module)
    for module, said in (
        (part, r"the module of the result is in training mode.*eval\(\)"),
        (part.drop, r"'drop' of the module of the result is in training mode"),
        (dense.drop, "'drop' of dense is in training mode"),
    ):
        module.train()
        with pytest.raises(ArgumentError, match=said):
            fasp_fx.distil(result, dense, data)
        module.eval()
    part.body.train()  # a program that was captured in evaluation mode
    after = fasp_fx.distil(result, dense, data, learning_rate=3e-3, epochs=10)
    assert type(after) is type(result)
    assert relative_error(after.module, dense, data) < 0.8 * before


class Squared:
    def targets(self, outputs: Tensor) -> Any:
        return {"out": outputs}

    def terms(self, outputs: Tensor, targets: Any, inputs: Any) -> Any:
        return (outputs - targets["out"]).square().mean(-1)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda outputs, targets, inputs: outputs * math.nan, "loss of the held-out batches is not finite"),
        (lambda outputs, targets, inputs: outputs[:0], "nothing of batch 0 counts"),
    ],
)
def test_losses_that_do_not_do_as_they_should(made: Made, returned: Any, said: str) -> None:
    dense, data, result = made
    match: Any = Squared()
    match.terms = returned
    with pytest.raises(FaspError, match=said):
        fasp_fx.distil(result, dense, data, loss=match)


@pytest.mark.parametrize(("loss", "place"), [("divergence", 0), ("outputs", 3)], ids=["training", "held out"])
def test_a_batch_that_is_all_padding_is_named_before_anything_is_trained(loss: Any, place: int) -> None:
    dense = masked()
    data = [
        {"input_ids": torch.randint(0, 20, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
        for _ in range(6)
    ]
    result = fasp_fx.prune(dense, (), data[0], calibration=data, sparsity=0.4, quality="fast")
    before = weights_of(result)
    data[place]["attention_mask"] = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(CalibrationError, match=f"nothing of batch {place} counts.*leave it out"):
        fasp_fx.distil(result, dense, data, loss=loss, epochs=1)
    assert_weights(result, before)


#: nothing else is imported, which would take each process seconds
ALONE = f"""
import os, sys, warnings
from typing import Any, cast
import torch
from torch import Tensor, nn
import fasp_fx
from fasp_fx.pruning import Recovery
from patched import patch_torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
patch_torch()

{inspect.getsource(net)}
{inspect.getsource(batches)}
{inspect.getsource(pruned)}
{inspect.getsource(told)}
{inspect.getsource(curve)}
found = curve(sys.argv[1])
if os.environ["RANK"] == "0":
    print(found)
"""


@pytest.mark.slow
def test_two_processes_come_to_what_one_comes_to(tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *launch, str(script), str(tmp_path / "two")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == curve(str(tmp_path / "one")).split()
    assert found.stdout.startswith("0.0")
