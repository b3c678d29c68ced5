"""Plain checkpoints on disk: what ``save_pretrained`` writes, with the plan and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ..analysis.plan import PruningPlan
from ..base._options import path_of
from ..base._tolerable import tolerable
from ..errors import StoreError, first_line
from ..pruning.report import Report
from ..pruning.saving._folder import TOLD, read_told, write_told
from ..storage._folder import new_save, verify
from ._experiments import quiet

KIND = "plain"


def save_plain(
    model: PreTrainedModel,
    tokenizer: Any,
    plan: PruningPlan,
    report: Report,
    folder: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a plain checkpoint to a new folder, whole or not at all.

    ``config.json``, ``generation_config.json``, safetensors and the tokenizer's files are those of
    ``save_pretrained``, so that the folder loads wherever a checkpoint of this class loads. ``plan.json``
    and ``report.json`` hold what was removed, ``README.md`` the model card, ``manifest.json`` a list of the
    files.

    Args:
        tokenizer: saved along, or ``None``.
        overwrite: replace an earlier plain checkpoint (and nothing else) of that name.

    Raises:
        StoreError: the path is taken or cannot be written.
    """
    path = path_of(folder, "folder").absolute()
    with new_save(path, KIND, overwrite=overwrite) as made:
        write_told(made, plan, report)
        try:
            with quiet():
                model.save_pretrained(made)
                if tokenizer is not None:
                    tokenizer.save_pretrained(str(made))
        except OSError:
            raise
        except tolerable(Exception) as error:  # save_pretrained raises what it likes
            raise StoreError(
                f"{type(model).__name__}.save_pretrained failed: {first_line(error)}; nothing was written"
            ) from error
        (made / "README.md").write_text(card(model, plan, report), encoding="utf-8")
    return path


def read_plain(folder: Path) -> tuple[PruningPlan, Report]:
    """The plan and the report of a plain checkpoint, whose weights may have been trained since.

    Raises:
        StoreError: a file is missing, damaged or of another version.
    """
    verify(folder, KIND, TOLD)
    return read_told(folder)


def card(model: PreTrainedModel, plan: PruningPlan, report: Report) -> str:
    """The model card: what was removed, what is left, how to load it."""
    changed = [line for line in report.lines if line.before != line.after]
    return "\n".join(
        [
            *("---", "library_name: transformers", "tags:", "- fasp_fx", "- pruned", "---", ""),
            f"# {type(model).__name__}, pruned by {report.sparsity:.0%}",
            "",
            (
                f"{report.sparsity:.2%} of the weights of its layers' linear operators were removed, and"
                " those that stay repaired, by [FASP](https://arxiv.org/abs/2501.09412) with fasp_fx. This"
                " is an ordinary checkpoint: nothing but transformers is needed to load it."
            ),
            "",
            *("```python", *loading(model, "this/folder"), "```", ""),
            *(f"- {note}" for note in report.notes),
            f"- parameters: {report.parameters[0]:,} before, {report.parameters[1]:,} now",
            f"- bytes: {report.bytes[0]:,} before, {report.bytes[1]:,} now",
            f"- `plan.json` lists every index removed from the weights of {len(plan.groups)} groups",
            "",
            *("| group | before | now |", "|---|---|---|"),
            *(f"| `{line.name}` | {line.before} | {line.after} |" for line in changed),
            "",
        ]
    )


def loading(model: PreTrainedModel, folder: str) -> list[str]:
    """Lines of Python that load the model."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    loader = "AutoModelForCausalLM" if causal is type(model) else type(model).__name__
    return [f"from transformers import {loader}", f'model = {loader}.from_pretrained("{folder}")']


__all__ = ["KIND", "card", "loading", "read_plain", "save_plain"]
