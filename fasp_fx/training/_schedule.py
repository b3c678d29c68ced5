"""Pruning in the middle of a training: when, how much, and what has gone so far; and the callbacks by which
trainers ask.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from fasp_fx.allocation import Cap
from fasp_fx.analysis import PruningPlan
from fasp_fx.base import is_number, write_text
from fasp_fx.calibration import as_calls
from fasp_fx.capturing import rewound
from fasp_fx.errors import ArgumentError
from fasp_fx.pruning import PruningConfig, PruningOptions, apply, prune

from ._optimizer import cut_optimizer


def cubic(gone: float, *, begin: int, end: int, times: int) -> dict[int, float]:
    """Prunings spread over a training, large ones first: after step ``begin + i (end - begin) / times`` the
    fraction ``gone · (1 - (1 - i / times)³)`` is gone, for ``i`` from 1 to ``times`` (Zhu and Gupta, 2017,
    arXiv 1710.01878, eq. 1, from nothing).

    Args:
        gone: the fraction that is gone at the end, in (0, 1).
        begin, end: steps of the optimiser; the last pruning is after step ``end``.
        times: how often something goes.

    Raises:
        ArgumentError: there are fewer steps than prunings, or none.

    Examples:
        >>> from fasp_fx.training import cubic
        >>> cubic(0.5, begin=100, end=500, times=4)
        {200: 0.2890625, 300: 0.4375, 400: 0.4921875, 500: 0.5}
    """
    if not 0 < times <= end - begin:
        raise ArgumentError(f"{times} prunings do not fit between steps {begin} and {end}; give more room")
    return {
        begin + i * (end - begin) // times: gone * (1 - (1 - i / times) ** 3) for i in range(1, times + 1)
    }


class Schedule:
    """When a model in training becomes smaller, and by how much: one object for a whole training, whose state
    is plain data.

    Args:
        gone: for each step of the optimiser after which something goes, the fraction of the first model that
            is gone then, in (0, 1): :func:`cubic`, or steps of your own.
        calibration: batches as for :func:`fasp_fx.prune`; the first is the example on which the model is
            captured. The same after an interruption, and in all processes.
        of: what the fractions are of: called with a share that stays, gives a budget, such as
            :class:`fasp_fx.allocation.Macs`. ``None``: of the weights that sparsity counts.
        group: the processes of ``torch.distributed`` that train copies of the model: all get the same one.
        config, options: as for :func:`fasp_fx.prune`, but for ``sparsity`` and ``budget``.

    Attributes:
        plan: all that has gone, for the first model; ``None``: nothing yet.
        left: the fraction that stays.
        done: the step after which something went last.

    Raises:
        ArgumentError: an option is not known or out of range.

    Examples:
        >>> from fasp_fx.training import Schedule, cubic
        >>> import copy
        >>> schedule = Schedule(cubic(0.5, begin=0, end=4, times=2), batches, round_to=1)
        >>> small = copy.deepcopy(model)
        >>> optimizer = torch.optim.AdamW(small.parameters())
        >>> for step, inputs in enumerate(batches, 1):
        ...     small(inputs).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     small = schedule.step(step, small, optimizer)
        >>> print(f"{schedule.left:.2f}", small[0])
        0.49 Linear(in_features=8, out_features=18, bias=True)
    """

    def __init__(
        self,
        gone: Mapping[int, float],
        calibration: Iterable[Any],
        *,
        of: Callable[[float], Cap] | None = None,
        group: dist.ProcessGroup | None = None,
        config: PruningConfig | None = None,
        **options: Unpack[PruningOptions],
    ) -> None:
        if not all(type(step) is int and is_number(share) and 0 < share < 1 for step, share in gone.items()):
            raise ArgumentError(f"gone={gone!r:.200} does not give fractions in (0, 1) by their steps")
        self.gone, self.calibration = dict(gone), list(calibration)
        self.args, self.kwargs = next(as_calls(self.calibration))
        self.of, self.group, self.config = of, group, PruningConfig.of(config, options)
        self.plan: PruningPlan | None = None
        self.left, self.done = 1.0, 0

    def step(self, step: int, model: nn.Module, *optimizers: Optimizer) -> nn.Module:
        """What to train on after a step: the model itself, or its smaller copy if something is due.

        Args:
            step: how many steps of the optimiser are done.
            model: the model, in any mode, not what ``DistributedDataParallel`` or the like made of it: wrap
                the copy anew.
            optimizers: go on with the copy (:func:`fasp_fx.training.cut_optimizer`).

        Raises:
            EagerError: the pruned program is no model of this class; no copy is made.
            FaspError: as for :func:`fasp_fx.prune` and :func:`fasp_fx.training.cut_optimizer`.
        """
        gone = max((gone for at, gone in self.gone.items() if self.done < at <= step), default=0.0)
        share = (1 - gone) / self.left
        if share >= 1:
            return model
        if self.group is not None:  # running averages are those of each process
            for buffer in model.buffers():
                dist.broadcast(buffer, group=self.group, group_src=0)
        budget = None if self.of is None else self.of(share)
        with rewound(model):
            result = prune(
                model.eval(),
                self.args,
                self.kwargs,
                calibration=self.calibration,
                config=self.config,
                group=self.group,
                progress=False,
                sparsity=1 - share if budget is None else None,
                budget=budget,
            )
        small = result.eager(model)
        for optimizer in optimizers:
            cut_optimizer(optimizer, result.plan, model, small)
        (spent,) = result.report.budgets or (None,)
        self.left *= 1 - result.plan.sparsity if spent is None else spent.used / spent.dense
        self.plan = result.plan if self.plan is None else self.plan.then(result.plan)
        self.done = step
        return small

    def shrink(self, model: nn.Module) -> nn.Module:
        """A copy of a model with all that has gone so far gone, and nothing repaired: of a new one, whose
        weights a checkpoint then gives, or of an average of weights at the sizes before the last pruning.

        Raises:
            PlanError: the model is at none of the sizes that there were.
            EagerError: see :meth:`fasp_fx.Result.eager`.
        """
        if self.plan is None:
            return model
        with rewound(model):
            result = apply(model.eval(), self.plan, self.args, self.kwargs, progress=False)
        return result.eager(model)

    def state_dict(self) -> dict[str, Any]:
        """What has gone so far, as plain data."""
        return {"plan": self.plan and self.plan.to_json(), "left": self.left, "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            PlanError: the plan is damaged.
        """
        self.plan = PruningPlan.from_json(state["plan"]) if state["plan"] else None
        self.left, self.done = state["left"], state["done"]


def trainer_callback(schedule: Schedule) -> Any:
    """A callback that prunes in transformers' ``Trainer``, for ``Trainer(…, callbacks=[…])``.

    The model that the Trainer holds changes in place. Beside each checkpoint ``pruning.json`` is written: the
    state of the schedule. To go on from one, load that, give the Trainer ``schedule.shrink(model)``, and call
    ``train(resume_from_checkpoint=…)``.

    Raises:
        ArgumentError: (when the training begins) the Trainer wraps its model, which cannot be exchanged then.

    Examples:
        >>> from fasp_fx.training import Schedule, cubic, trainer_callback
        >>> schedule = Schedule(cubic(0.5, begin=100, end=500, times=4), batches)
        >>> callback = trainer_callback(schedule)  # Trainer(model, …, callbacks=[callback])
    """
    from transformers import TrainerCallback

    class Pruning(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            how = [name for name in ("deepspeed", "fsdp", "torch_compile") if getattr(args, name)]
            if how or args.world_size > 1 or args.n_gpu > 1:
                raise ArgumentError(
                    f"the Trainer wraps its model ({', '.join(how) or 'for several devices'}), and what is"
                    " wrapped cannot be exchanged; train without, or in a loop of your own (docs/training.md)"
                )

        def on_step_end(self, args: Any, state: Any, control: Any, **held: Any) -> None:
            model = held["model"]
            # What accelerate wraps for mixed precision is bound to this object, and stays.
            names = ("forward", "_original_forward") if "_original_forward" in vars(model) else ()
            wrapped = {name: vars(model).pop(name) for name in names}
            vars(model).update(vars(schedule.step(state.global_step, model, held["optimizer"])) | wrapped)

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            write_text(folder / "pruning.json", json.dumps(schedule.state_dict()))

    return Pruning()


def lightning_callback(schedule: Schedule, path: str = "model") -> Any:
    """A callback that prunes in Lightning's ``Trainer``, for ``Trainer(callbacks=[…])``.

    The state of the schedule lies in each checkpoint, as ``checkpoint["callbacks"]["fasp_fx"]``. To go on
    from one, load that, put ``schedule.shrink(model)`` into the module, and call ``fit(…, ckpt_path=…)``.

    Args:
        schedule: says when and how much.
        path: where in the LightningModule the model stands that is pruned.

    Raises:
        ImportError: there is no package ``lightning``; ``pip install "fasp_fx[lightning]"`` has it.
        ArgumentError: (when the training begins) several processes train, whose wrapper holds the model.

    Examples:
        >>> from fasp_fx.training import Schedule, cubic, lightning_callback
        >>> schedule = Schedule(cubic(0.5, begin=100, end=500, times=4), batches)
        >>> callback = lightning_callback(schedule, "net")  # doctest: +SKIP
    """
    from lightning.pytorch import Callback

    class Pruning(Callback):
        state_key = "fasp_fx"

        def on_train_start(self, trainer: Any, module: Any) -> None:
            if trainer.strategy.model is not trainer.lightning_module:
                raise ArgumentError(
                    "Lightning's strategy wraps the model, and what is wrapped cannot be exchanged; train in"
                    " one process, or in a loop of your own (docs/training.md)"
                )

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            model = module.get_submodule(path)
            vars(model).update(vars(schedule.step(trainer.global_step, model, *trainer.optimizers)))

        state_dict, load_state_dict = (
            staticmethod(schedule.state_dict),
            staticmethod(schedule.load_state_dict),
        )

    return Pruning()
