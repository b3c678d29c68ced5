"""Types of inputs and outputs that a save has to find again."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fasp_fx

pytestmark = pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")


def test_caches_as_inputs_and_outputs(tmp_path: Path) -> None:
    from fasp_fx.capturing import capture
    from fasp_fx.passes._finish import finish

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )
    model = LlamaForCausalLM(config).eval()

    def call(past: int, new: int) -> dict[str, Any]:
        cache = DynamicCache(config=config)
        torch.manual_seed(past)
        cache.update(torch.randn(2, 1, past, 8), torch.randn(2, 1, past, 8), 0)
        return {
            "input_ids": torch.randint(0, 50, (2, new)),
            "cache": cache,
            "attention_mask": torch.ones(2, past + new, dtype=torch.long),
        }

    program = capture(model, (), call(4, 3))
    module = finish(program)
    result = fasp_fx.Result(
        module,
        fasp_fx.PruningPlan("", (), 0.0),
        fasp_fx.Report(0.0, None, (1, 1), (1, 1), ()),
        program.signature,
    )
    loaded = fasp_fx.load(result.save(tmp_path / "out"))
    torch.manual_seed(1)
    inputs = call(6, 2)
    torch.manual_seed(1)
    first, second = module(**inputs), loaded.module(**inputs)
    assert torch.equal(first.logits, second.logits)
    assert isinstance(second[1], DynamicCache)
    assert second[1].layers[0].keys.shape[2] == 8


Pair = namedtuple("Pair", ["left", "right"])


class PairOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Pair:
        y = self.b(torch.relu(self.a(x)))
        return Pair(y, y + 1)


def test_an_output_type_must_be_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import _pytree as pytree

    x = torch.randn(3, 4)
    result = fasp_fx.prune(PairOut().eval(), (x,), calibration=[x], sparsity=0.3)
    with pytest.raises(fasp_fx.StoreError, match="regist"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    pytree._register_namedtuple(Pair, serialized_type_name="test_store.Pair")
    loaded = fasp_fx.load(result.save(tmp_path / "out"))
    assert isinstance(loaded.module(x), Pair)
    assert torch.equal(loaded.module(x).right, result.module(x).right)
    monkeypatch.delitem(pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE, "test_store.Pair")
    with pytest.raises(
        fasp_fx.StoreError, match=r"test_store.Pair, a type that is not registered here; import"
    ):
        fasp_fx.load(tmp_path / "out")
