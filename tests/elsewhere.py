"""Prunes models with their weights in files, with batches on the CPU and on another device, and prints as
JSON what differs. A process of its own: a device of torch lives as long as the process.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as hf
from models import VOCABULARY, wide
from patched import patch_torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import fasp_fx
from fasp_fx.capturing import Runner


def counting() -> nn.Module:
    """Writes into a buffer, makes tensors where the capture ran, and reads a view of one that it wrote to."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        h = m.up(x + torch.arange(8, device=x.device)).relu()
        rest = torch.zeros(8, 8, device=x.device)
        rest[2:4] += m.calls[0]
        return m.down(h) * rest.sum(0) + torch.ones(8)

    return wide(forward, 8, 32, calls=torch.zeros(3))


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            vocab_size=VOCABULARY,
        )
    )


def drawn(*shape: int) -> Callable[[], list[Any]]:
    return lambda: [torch.randn(shape) for _ in range(4)]


def texts() -> list[Any]:
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (2, 9)), "use_cache": False, "logits_to_keep": 0}
        for _ in range(4)
    ]


#: model, batches, options
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], dict[str, Any]]] = {
    "counting": (counting, drawn(50, 8), {}),
    "experts and products": (
        mixtral,
        texts,
        {"granularity": ("channel", "expert"), "include": ("exempt",), "drift": 0.5},
    ),
}


def run(name: str, folder: Path, elsewhere: torch.device) -> dict[str, Any]:
    """What differs between a pruning with batches on the CPU and one with batches elsewhere."""
    torch.manual_seed(0)
    make, data, options = CASES[name]
    model, batches = make().eval(), data()
    example = batches[0] if isinstance(batches[0], dict) else {}
    captured = fasp_fx.capture(model, () if example else (batches[0],), example)
    results = []
    for device in (None, elsewhere):
        with fasp_fx.offload(folder, device=device), ran_on(device) as nodes:
            results.append(
                fasp_fx.prune(captured, calibration=batches, sparsity=0.3, quality="fast", **options)
            )
    first, second = (dict(result.module.named_parameters()) for result in results)
    return {
        "plan": results[0].plan == results[1].plan and len(results[0].plan.groups) > 0,
        "repaired": sum(line.error_cut is not None for line in results[1].report.lines),
        "nodes": len(nodes),
        "differing": [name for name, value in first.items() if not torch.equal(value, second[name])],
        "devices": sorted({value.device.type for value in second.values()}),
    }


@contextmanager
def ran_on(device: torch.device | None) -> Iterator[set[Any]]:
    """The nodes whose results were on the device."""
    found, original = set[Any](), Runner._execute

    def noting(self: Runner, node: Any, number: int) -> Any:
        made = original(self, node, number)
        if isinstance(made, Tensor) and made.device == device:
            found.add(node)
        return made

    with mock.patch.object(Runner, "_execute", noting):
        yield found


def refusals(folder: Path, elsewhere: torch.device) -> dict[str, str]:
    """What is said of that which needs all weights on the device."""
    x = torch.randn(16, 8)
    with fasp_fx.offload(folder, device=elsewhere):
        try:
            fasp_fx.prune(counting(), (x,), calibration=[x], sparsity=0.3, quality="balanced")
        except fasp_fx.errors.FaspError as error:
            return {"costs": f"{type(error).__name__}: {error}"}
    return {}


# --- a device for tests that stands for an accelerator


NAME = "elsewhere"
#: operators that may meet tensors of both devices
_BETWEEN = {
    "aten::copy_",
    "aten::_copy_from",
    "aten::index",
    "aten::index_put_",
    "aten::_index_put_impl_",
}
#: what is registered goes with its library
_KEPT: list[torch.library.Library] = []


class Elsewhere(Tensor):
    """A tensor of the device; ``raw`` holds its values on the CPU, and views share it."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
            layout=raw.layout,
        )
        made.raw = raw
        return made

    def tolist(self) -> Any:
        return self.raw.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    kwargs = dict(kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = [one for one in tensors if isinstance(one, Elsewhere)]
    name = func.name().split(".")[0]
    # Tensors of no dimension are numbers, which go anywhere.
    apart = any(one.dim() for one in tensors if not isinstance(one, Elsewhere))
    if own and apart and name not in _BETWEEN:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    device = kwargs.pop("device", None)
    there = bool(own) if device is None else torch.device(device).type == NAME
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.raw if isinstance(leaf, Elsewhere) else leaf, (args, kwargs)
    )
    found = func(*args, **kwargs, **({} if device is None else {"device": torch.device("cpu")}))
    known = {id(one.raw if isinstance(one, Elsewhere) else one): one for one in tensors}

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) in known:
            return known.get(id(leaf), leaf)
        return Elsewhere(leaf) if there else leaf

    return pytree.tree_map(wrapped, found)


def register() -> torch.device:
    """Make the device known to torch, for the rest of the process."""
    _setup_privateuseone_for_python_backend(NAME)
    made = torch.library.Library("aten", "IMPL")
    aten = torch.ops.aten
    for operator, key in (
        (aten.empty.memory_format, "PrivateUse1"),
        (aten.empty_strided.default, "PrivateUse1"),
        # Else these give another shape to a tensor that is there.
        (aten.matmul.default, "AutogradPrivateUse1"),
        (aten.eye.default, "PrivateUse1"),
        (aten.arange.default, "PrivateUse1"),
        (aten.arange.start, "PrivateUse1"),
        (aten.arange.start_step, "PrivateUse1"),
        # Else these are taken apart, by which they round otherwise.
        (aten.scaled_dot_product_attention.default, "AutogradPrivateUse1"),
        (aten.lstm.input, "AutogradPrivateUse1"),
        (aten.gru.input, "AutogradPrivateUse1"),
    ):
        made.impl(operator.name(), lambda *args, _own=operator, **kwargs: _computed(_own, args, kwargs), key)
    every = torch.library.Library("_", "IMPL")
    every.fallback(lambda func, *args, **kwargs: _computed(func, args, kwargs), "PrivateUse1")
    _KEPT.extend([made, every])
    return torch.device(NAME, 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    patch_torch()
    given = Path(sys.argv[1]), register()
    found = {"runs": {name: run(name, *given) for name in CASES}}
    print(json.dumps({**found, "refusals": refusals(*given)}))
