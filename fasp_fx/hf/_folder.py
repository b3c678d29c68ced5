"""Results on disk: a folder as transformers write it, with what was removed and a model card.

A plain checkpoint is what ``save_pretrained`` of its class writes, and loads wherever one of this class
loads. Of a pruned model ``config.json``, ``generation_config.json`` and the tokenizer's files are
transformers'; ``model.safetensors`` holds the weights by the names of the original model, tied ones once;
``programs.json`` the programs, ``constants.safetensors`` what they hold besides. ``plan.json`` and
``report.json`` say of either what their names say, and ``manifest.json`` the size and SHA-256 of the files.
As with :mod:`fasp_fx.store`, everything that torch would evaluate, import or turn into code is checked before
it is.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ..analysis.plan import PruningPlan
from ..base._options import path_of
from ..base._tolerable import tolerable
from ..errors import FaspError, StoreError, first_line
from ..pruning.report import Report
from ..pruning.saving._folder import TOLD, read_told, write_told
from ..storage._folder import MANIFEST, new_save, verify, write_json, write_manifest
from ..storage._tensors import write_tensors
from ._experiments import quiet
from ._model import PrunedModel

KIND, PLAIN = "hf", "plain"
FILES = ("config.json", "model.safetensors", "constants.safetensors", "programs.json", *TOLD)


def save(
    model: Any,
    tokenizer: Any,
    plan: PruningPlan,
    report: Report,
    folder: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a model of either kind and its tokenizer to a new folder, whole or not at all.

    Args:
        tokenizer: saved along, or ``None``.
        overwrite: replace an earlier save of the same kind (and nothing else) of that name.

    Raises:
        StoreError: the path is taken or cannot be written, or the model holds something that cannot be
            stored.
    """
    path = path_of(folder, "folder").absolute()
    plain = not isinstance(model, PrunedModel)
    with new_save(path, PLAIN if plain else KIND, overwrite=overwrite) as made:
        try:
            with quiet():
                if plain:
                    model.save_pretrained(made)
                    _tell(made, model, plan, report)
                else:
                    _fill(made, model, None)
                if tokenizer is not None:
                    tokenizer.save_pretrained(str(made))
        except (OSError, FaspError):
            raise
        except tolerable(Exception) as error:  # save_pretrained raises what it likes
            raise StoreError(
                f"save_pretrained of {type(model).__name__} or its tokenizer failed: {first_line(error)};"
                " nothing was written"
            ) from error
    return path


def read_plain(folder: Path) -> tuple[PruningPlan, Report]:
    """The plan and the report of a plain checkpoint, whose weights may have been trained since.

    Raises:
        StoreError: a file is missing, damaged or of another version.
    """
    verify(folder, PLAIN, TOLD)
    return read_told(folder)


def save_into(model: PrunedModel, path: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write a pruned model to a folder that may hold other files, as a trainer's checkpoints do.

    The files are written aside first; the manifest is the last to take its place, so that a half-replaced
    model is noticed.

    Raises:
        StoreError: the folder cannot be written, or a weight no longer fits the program.
    """
    path = path.absolute()
    if path.is_file():
        raise StoreError(f"'{path}' is a file; give a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", suffix=".partial", dir=path.parent, ignore_cleanup_errors=True
        ) as made:
            aside = Path(made)
            _fill(aside, model, state_dict)
            write_manifest(aside, KIND)
            path.mkdir(exist_ok=True)
            for file in sorted(aside.iterdir(), key=lambda file: file.name == MANIFEST):
                os.replace(file, path / file.name)
    except OSError as error:
        raise StoreError(f"'{path}' cannot be written: {error}; free space or choose another path") from error


def _fill(folder: Path, model: PrunedModel, state_dict: Mapping[str, Tensor] | None) -> None:
    weights = _weights(model, state_dict)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    names = (name for held in model._constant_names.values() for name in held.values())
    write_tensors(folder / "model.safetensors", weights)
    write_tensors(folder / "constants.safetensors", {name: buffers[name] for name in names})
    programs = {
        name: {**program.data, "constants": model._constant_names[name]}
        for name, program in model._stored.items()
    }
    write_json(folder / "programs.json", programs)
    _tell(folder, model, model.plan, model.report)


def _weights(model: PrunedModel, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The weights to write, held against those that the programs need."""
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if state_dict is None:
        return own
    found: dict[str, Tensor] = {}
    for name, tensor in own.items():
        given = state_dict.get(name)
        if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
            shown = "missing" if given is None else f"{given.dtype} {list(given.shape)}"
            raise StoreError(
                f"'{name}' of state_dict is {shown}, the programs need {tensor.dtype} {list(tensor.shape)};"
                " pass the model's own state_dict()"
            )
        is_parameter = isinstance(tensor, nn.Parameter)
        found[name] = nn.Parameter(given.detach(), tensor.requires_grad) if is_parameter else given
    return found


def _tell(folder: Path, model: Any, plan: PruningPlan, report: Report) -> None:
    """Write what was removed and what it cost, as data and as a README.md for the hub."""
    write_told(folder, plan, report)
    plain = not isinstance(model, PrunedModel)
    original = model.config.to_dict() if plain else model.config.original
    kind = "/".join(original.get("architectures") or [str(original.get("model_type"))])
    source = str(original.get("_name_or_path") or model.name_or_path or "")
    encodes = model.config.is_encoder_decoder
    header = {
        "library_name": "transformers",
        "tags": ["fasp_fx", "pruned"],
        "pipeline_tag": "text2text-generation" if encodes else "text-generation",
    }
    if source.count("/") == 1 and not os.path.exists(source) and not source.startswith((".", "/", "~")):
        header["base_model"] = source
    rows = [("parameters", report.parameters), ("bytes of weights", report.bytes)]
    if report.cache is not None:
        rows.append(("bytes of cache per token of one sequence", report.cache))
    changed = [line for line in report.lines if line.before != line.after]
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in header.items()),  # JSON is YAML
        "---",
        "",
        f"# {kind}, pruned by {report.sparsity:.1%}",
        "",
        (
            f"A {kind} from which fasp_fx removed {report.sparsity:.2%} of the weights of linear operators by"
            " structured pruning ([FASP](https://arxiv.org/abs/2501.09412))."
        ),
        "This is an ordinary checkpoint: nothing but transformers is needed to load it."
        if plain
        else "Widths in `config.json` under `original` are those of the dense model.",
        "",
        *("```python", *loading(model, "this/folder"), "```", ""),
        *(f"- {note}" for note in report.notes),
        "",
        *("| | dense | pruned |", "|---|---|---|"),
        *(f"| {name} | {before:,} | {after:,} |" for name, (before, after) in rows),
        *(f"| `{line.name}` | {line.before} | {line.after} |" for line in changed),
        "",
        "`plan.json` lists every index that was removed.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def loading(model: Any, folder: str) -> list[str]:
    """Lines of Python that load the model."""
    loader = "AutoModelForSeq2SeqLM" if model.config.is_encoder_decoder else "AutoModelForCausalLM"
    plain = not isinstance(model, PrunedModel)
    if plain and MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None) is not type(model):
        loader = type(model).__name__
    return [
        *([] if plain else ["import fasp_fx"]),
        f"from transformers import {loader}",
        f'model = {loader}.from_pretrained("{folder}")',
    ]
