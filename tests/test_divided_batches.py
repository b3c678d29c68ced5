"""Calibration batches for which memory is too short are divided, and give what smaller batches give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import wide
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fasp_fx
from fasp_fx.capturing._runner import Runner

pytestmark = pytest.mark.usefixtures("shared_captures")


def rows(together: bool) -> nn.Module:
    """Sees each row of a table alone, or all of them together."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(m.up(x))
        return m.down(hidden - hidden.mean(0) if together else hidden)

    torch.manual_seed(0)
    return wide(forward, size=8)


class Memory:
    """Too short for more than some rows at once.

    Attributes:
        refused: how often it was.
    """

    def __init__(self, rows: int, patch: pytest.MonkeyPatch) -> None:
        self.refused = 0
        original = Runner._execute

        def execute(runner: Runner, node: Any, number: int) -> Any:
            made = original(runner, node, number)
            if isinstance(made, Tensor) and made.is_floating_point() and made.dim() > 1 and len(made) > rows:
                self.refused += 1
                raise torch.OutOfMemoryError("tried to allocate 3.00 GiB")
            return made

        patch.setattr(Runner, "_execute", execute)


def tables(*rows: int) -> list[Tensor]:
    """Tables of so many rows."""
    return [torch.randn(count, 8, generator=torch.Generator().manual_seed(count)) for count in rows]


def pruned(model: nn.Module, batches: list[Any], **options: Any) -> fasp_fx.Result:
    """The model without a third of its channels, of an example that fits."""
    example = batches[0] if isinstance(batches[0], dict) else {}
    example = {name: value[:2] if isinstance(value, Tensor) else value for name, value in example.items()}
    args = () if example else (batches[0][:2],)
    return fasp_fx.prune(model, args, example, calibration=batches, sparsity=0.3, quality="fast", **options)


def alike(found: fasp_fx.Result, expected: fasp_fx.Result) -> bool:
    """Whether plans and weights are the same, to the bit."""
    ours, theirs = dict(found.module.named_parameters()), dict(expected.module.named_parameters())
    return found.plan == expected.plan and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rows_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = rows(together=False), tables(40, 13, 10)
    expected = pruned(model, [part for table in whole for part in table.split(10)])
    with monkeypatch.context() as patch:
        memory = Memory(10, patch)
        found = pruned(model, whole)
    assert memory.refused == 2, "40 rows, then 20"
    assert alike(found, expected)
    assert any("divided into 7" in note for note in found.report.notes)
    assert not any("divided into" in note for note in expected.report.notes)


def test_sequences_are_divided_and_masks_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 40, (6, 12))
    mask = torch.ones(6, 12, dtype=torch.long)
    mask[3, :5] = 0
    parts = [
        {"input_ids": ids[start : start + 3], "attention_mask": mask[start : start + 3], "use_cache": False}
        for start in (0, 3)
    ]
    expected = pruned(model, parts)
    with monkeypatch.context() as patch:
        memory = Memory(3, patch)
        found = pruned(model, [{"input_ids": ids, "attention_mask": mask, "use_cache": False}])
    assert memory.refused == 1
    assert alike(found, expected)


@pytest.mark.parametrize(
    ("together", "most"), [(True, 10), (False, 0)], ids=["sees all rows", "nothing fits"]
)
def test_what_cannot_be_divided_ends_in_the_shortage(
    together: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Memory(most, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        pruned(rows(together), tables(40))


def test_a_run_that_is_kept_goes_on_divided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, whole = rows(together=False), tables(40, 13)
    expected = pruned(model, [part for table in whole for part in table.split(20)])
    with monkeypatch.context() as patch:
        Memory(20, patch)
        found = pruned(model, whole, checkpoint=tmp_path / "state")
    assert alike(found, expected)
    assert alike(pruned(model, whole, checkpoint=tmp_path / "state"), expected), "nothing is decided anew"
