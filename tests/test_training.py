"""Pruning in the middle of a training: structure without weights, optimisers, schedules, trainers."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import made
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainingArguments

import fasp_fx
from fasp_fx.allocation import Macs
from fasp_fx.training import Schedule, cubic, cut_optimizer, lightning_callback, trainer_callback

ROWS = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(0))


def net(seed: int = 0) -> Any:
    """With norms, two uses of one weight, and one that is not trained."""
    torch.manual_seed(seed)
    layers = [nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)]
    layers[1].bias.requires_grad_(False)
    return nn.Sequential(*layers)


def trained(model: nn.Module, *optimizers: Any, rows: Tensor = ROWS[0], change: Any = lambda: None) -> float:
    """The loss of a step before it is made."""
    loss = model(rows).square().mean()
    loss.backward()
    change()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


# --- structure without weights


@pytest.fixture(scope="module")
def chain() -> tuple[fasp_fx.Result, nn.Module]:
    """What a second pruning after a training gives, and its eager copy, trained."""
    first = fasp_fx.prune(net().eval(), (ROWS[0],), calibration=[*ROWS], sparsity=0.3)
    small = first.eager(net())
    trained(small, torch.optim.SGD(small.parameters(), 0.1))
    second = fasp_fx.prune(small.eval(), (ROWS[0],), calibration=[*ROWS], sparsity=0.3).following(first.plan)
    smaller = second.eager(small)
    trained(smaller, torch.optim.SGD(smaller.parameters(), 0.1))
    return second, smaller.eval()


PROGRAM = """
import sys, torch, fasp_fx
sys.path.insert(0, sys.argv[1])
from test_training import ROWS, net
plan = fasp_fx.PruningPlan.from_json(open("plan.json").read())
model = net(7).eval()
small = fasp_fx.apply(model, plan, (ROWS[0],)).eager(model)
small.load_state_dict(torch.load("weights.pt"))
torch.save(small(ROWS[1]), "found.pt")
"""


def test_a_new_network_gets_the_sizes_of_a_chain_in_another_process(
    chain: tuple[fasp_fx.Result, nn.Module], tmp_path: Path
) -> None:
    result, smaller = chain
    (tmp_path / "plan.json").write_text(result.plan.to_json())
    torch.save(smaller.state_dict(), tmp_path / "weights.pt")
    result.module.load_state_dict(smaller.state_dict())
    result.save(tmp_path / "saved")
    subprocess.run([sys.executable, "-c", PROGRAM, str(Path(__file__).parent)], cwd=tmp_path, check=True)
    loaded = fasp_fx.load(tmp_path / "saved").eager(net(7))
    for found in (torch.load(tmp_path / "found.pt"), loaded.eval()(ROWS[1])):
        assert torch.equal(found, smaller(ROWS[1]))
    assert type(loaded) is nn.Sequential
    assert loaded[0].out_features == smaller[0].out_features < 24


def other(width: int = 24, bias: bool = True) -> nn.Module:
    layers = {"a": nn.Linear(8, width), "b": nn.Linear(width, 4, bias=bias)}
    return made(lambda m, x: m.b(m.a(x).relu()), **layers).eval()


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (other(), other(20), r"'a.bias' is \[20\] here, \[24\] there"),
        (other(), other(bias=False), "'b.bias' is missing here"),
        (other(bias=False), other(), "'b.bias' is not there"),
    ],
)
def test_the_plan_of_another_structure_is_refused_by_name(
    first: nn.Module, second: nn.Module, said: str
) -> None:
    result = fasp_fx.prune(first, (ROWS[0],), score="random", restore=None, sparsity=0.3)
    with pytest.raises(fasp_fx.PlanError, match=said):
        fasp_fx.apply(second, result.plan, (ROWS[0],))
    with pytest.raises(fasp_fx.FaspError, match=r"[ab]\.(weight|bias)"):
        result.eager(second)


def test_that_a_plan_was_made_for_other_weights_is_said() -> None:
    model, note = other(), "the plan was made when the weights had other values"
    plan = fasp_fx.prune(model, (ROWS[0],), score="random", restore=None, sparsity=0.3).plan
    assert note in fasp_fx.apply(other(), plan, (ROWS[0],)).report.notes
    assert note not in fasp_fx.apply(model, plan, (ROWS[0],)).report.notes


# --- the optimiser


def tied() -> Any:
    """A fused weight whose parts the program takes apart, and one weight under two names."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(m.up(x)).chunk(3, -1)
        return m.down((q * k).tanh() + v) + m.again(q)

    torch.manual_seed(0)
    model = made(
        forward, up=nn.Linear(8, 16), qkv=nn.Linear(16, 48), down=nn.Linear(16, 4), again=nn.Linear(16, 4)
    )
    model.again.weight = model.down.weight
    return model.eval()


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda weights: torch.optim.Adam(weights, 0.01, amsgrad=True),
    "AdamW": lambda weights: torch.optim.AdamW(weights, 0.01, fused=True),
    "RMSprop": lambda weights: torch.optim.RMSprop(weights, 0.01, momentum=0.9, centered=True, foreach=True),
    "Adafactor": lambda weights: torch.optim.Adafactor(weights, 0.01),
}


@pytest.fixture(scope="module", params=[net, tied])
def cut(request: pytest.FixtureRequest) -> tuple[Any, fasp_fx.Result, dict[str, Tensor]]:
    """A model, its pruning, and for each of its weights where something stays."""
    model = request.param().double().eval()  # in which rounding is no matter
    result = fasp_fx.prune(model, (ROWS[0].double(),), score="random", restore=None, sparsity=0.3)
    masks = {name: torch.ones_like(weight) for name, weight in model.named_parameters()}
    for (name, dim), gone in result.plan.slices().items():
        if name in masks:
            masks[name].index_fill_(dim, torch.tensor([index for _, index in gone]), 0)
    return model, result, masks


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_that_of_a_training_of_the_smaller_model(
    cut: tuple[Any, fasp_fx.Result, dict[str, Tensor]], name: str
) -> None:
    """The masked network goes the same way as the small one, where updates are element by element."""
    model, result, masks = cut
    masked, expected = copy.deepcopy(model), result.eager(model)
    before = copy.deepcopy(expected)
    weights = dict(masked.named_parameters())

    def mask() -> None:
        for key, weight in weights.items():
            weight.data *= masks[key]
            if weight.grad is not None:
                weight.grad *= masks[key]

    mask()

    def groups(own: nn.Module) -> list[list[nn.Parameter]]:
        weights = [weight for weight in own.parameters() if weight.requires_grad]
        return [[weight for weight in weights if (weight.dim() == 1) is one] for one in (True, False)]

    mine, its = (
        OPTIMIZERS[name]([{"params": group, "lr": rate} for group, rate in zip(groups(own), (0.01, 0.02))])
        for own in (masked, expected)
    )
    rate = torch.optim.lr_scheduler.StepLR(mine, 1, 0.5)
    for rows in ROWS[:1].double() if name == "Adafactor" else ROWS.double():
        trained(masked, mine, rows=rows, change=mask)
        trained(expected, its, rows=rows)
    small = before
    cut_optimizer(mine, result.plan, masked, small)
    means = name == "Adafactor"
    for (key, its_weight), weight in zip(expected.named_parameters(), small.parameters(), strict=True):
        for kind, value in its.state[its_weight].items():
            if means and kind in ("row_var", "col_var"):
                assert mine.state[weight][kind].shape == value.shape  # a mean over what went too
            else:
                torch.testing.assert_close(mine.state[weight][kind], value, msg=f"{key} {kind}")
    held = [[id(weight) for weight in group["params"]] for group in mine.param_groups]
    assert held == [[id(weight) for weight in group] for group in groups(small)]
    rate.step()
    trained(small, mine, rows=ROWS[0].double())
    assert [group["lr"] for group in mine.param_groups] == [0.005, 0.01]


def test_the_state_goes_into_the_parts_of_a_program(
    cut: tuple[Any, fasp_fx.Result, dict[str, Tensor]],
) -> None:
    model, result, _ = cut
    copied, module = copy.deepcopy(model), copy.deepcopy(result.module)
    optimizer = torch.optim.SGD(copied.named_parameters(), 0.1, momentum=0.9)
    trained(copied, optimizer, rows=ROWS[0].double())
    for weight, state in optimizer.state.items():
        state["momentum_buffer"].copy_(weight.data)  # of which it is known what is left
    module.load_state_dict(fasp_fx.apply(copied, result.plan, (ROWS[0].double(),)).module.state_dict())
    cut_optimizer(optimizer, result.plan, copied, module)
    (group,) = optimizer.param_groups
    assert len(group["param_names"]) == len(group["params"])
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], weight.detach(), msg=name)


def test_states_of_unknown_shape_and_strangers_are_refused(
    cut: tuple[Any, fasp_fx.Result, dict[str, Tensor]],
) -> None:
    model, result, _ = cut
    copied, small = copy.deepcopy(model), result.eager(model)
    newton = torch.optim.LBFGS(copied.parameters())
    newton.step(lambda: trained(copied, rows=ROWS[0].double()))
    held, plan = list(newton.param_groups[0]["params"]), result.plan
    strange = fasp_fx.PruningPlan("", (), 0.0, shapes=plan.shapes)
    for arguments, kind, said in (
        ((newton, plan, copied, small), fasp_fx.ArgumentError, r"LBFGS remembers of '\S+' as 'al' a list"),
        ((newton, plan, model, small), fasp_fx.ArgumentError, "holds no parameter of the model"),
        ((newton, plan, small, small), fasp_fx.PlanError, "not that of this pruning: '"),
        ((newton, strange, copied, small), fasp_fx.PlanError, "has the shape .* in the smaller model"),
    ):
        with pytest.raises(kind, match=said):
            cut_optimizer(*arguments)
    assert all(a is b for a, b in zip(newton.param_groups[0]["params"], held, strict=True))


# --- schedules


def schedule_of(**options: Any) -> Schedule:
    return Schedule(cubic(0.5, begin=1, end=5, times=2), [*ROWS], quality="fast", **options)


def test_a_training_that_is_resumed_ends_the_same() -> None:
    """With an average of the weights, and a budget in the place of a sparsity."""

    def run(state: dict[str, Any] | None = None, last: int = 8) -> tuple[list[float], dict[str, Any]]:
        schedule, model, losses = schedule_of(of=Macs), net(), []
        average = AveragedModel(model)
        if state is not None:
            schedule.load_state_dict(json.loads(state["schedule"]))
            model = schedule.shrink(net(5))
            average = AveragedModel(model)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        parts = {"optimizer": optimizer, "average": average}
        if state is not None:
            model.load_state_dict(state["model"])
            for name, part in parts.items():
                part.load_state_dict(state[name])
        for step in range(1 if state is None else state["step"] + 1, last + 1):
            losses.append(trained(model, optimizer, rows=ROWS[step % 4]))
            average.update_parameters(model)
            model, before = schedule.step(step, model, optimizer), model
            if model is not before:
                average.module = schedule.shrink(average.module)
        states = {name: copy.deepcopy(part.state_dict()) for name, part in {**parts, "model": model}.items()}
        return losses, {**states, "step": last, "schedule": json.dumps(schedule.state_dict())}

    losses, whole = run()
    (begun, state), before = run(last=4), run(last=2)[0]
    rest, again = run(state)
    assert begun + rest == losses
    assert begun[:2] == before
    for name in ("model", "average"):
        assert all(torch.equal(again[name][key], value) for key, value in whole[name].items())
    assert whole["schedule"] == again["schedule"]
    assert 0.45 < json.loads(whole["schedule"])["left"] <= 0.5
    assert len(fasp_fx.PruningPlan.from_json(json.loads(whole["schedule"])["plan"]).earlier) == 1


def test_steps_are_those_of_the_cubic() -> None:
    assert cubic(0.8, begin=10, end=30, times=2) == {20: 0.8 * (1 - 0.5**3), 30: 0.8}
    assert Schedule({}, [*ROWS]).step(3, model := net()) is model
    with pytest.raises(fasp_fx.ArgumentError, match="3 prunings do not fit"):
        cubic(0.5, begin=10, end=12, times=3)
    with pytest.raises(fasp_fx.ArgumentError, match="fractions in"):
        Schedule({1: 1.5}, [*ROWS])


class Scored(nn.Module):
    """As the Trainer calls it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        found = self.inner(x)
        return (
            found if labels is None else {"loss": (found - labels[:, None]).square().mean(), "logits": found}
        )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_trainer_goes_on_with_the_smaller_model(tmp_path: Path, precision: str) -> None:
    rows = [{"x": row, "labels": row.sum()} for row in ROWS.flatten(0, 1)]
    how = {"max_steps": 6, "save_steps": 3, "use_cpu": True, "report_to": [], "bf16": precision == "bfloat16"}

    def run(checkpoint: str | None = None, **others: Any) -> nn.Module:
        schedule, model = schedule_of(), Scored(net())
        if checkpoint:
            schedule.load_state_dict(json.loads(Path(checkpoint, "pruning.json").read_text()))
            model = schedule.shrink(Scored(net(5)))
        args = TrainingArguments(str(tmp_path), learning_rate=0.01, disable_tqdm=True, **{**how, **others})
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[trainer_callback(schedule)])
        trainer.train(resume_from_checkpoint=checkpoint)
        return model

    whole = run().state_dict()
    assert whole["inner.0.weight"].shape[0] < 24
    again = run(str(tmp_path / "checkpoint-3")).state_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    if precision == "float32":
        with pytest.raises(fasp_fx.ArgumentError, match=r"\(torch_compile\).*cannot be exchanged"):
            run(torch_compile=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_goes_on_with_the_smaller_model(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ROWS.flatten(0, 1)), 32)

    def run(checkpoint: Path | None = None) -> nn.Module:
        schedule, module = schedule_of(), Module(net())
        if checkpoint:
            kept = torch.load(checkpoint, weights_only=False)
            schedule.load_state_dict(kept["callbacks"]["fasp_fx"])
            module = Module(schedule.shrink(net(5)))
        callbacks = [lightning_callback(schedule), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)]
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, **quiet)
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module.model

    whole = run().state_dict()
    assert whole["0.weight"].shape[0] < 24
    again = run(tmp_path / "step=4.ckpt").state_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.items())
