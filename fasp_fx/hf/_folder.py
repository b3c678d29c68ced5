"""Results on disk: a folder as transformers write it, with what was removed.

A plain checkpoint is what ``save_pretrained`` of its class writes, and loads wherever one of this class
loads. Of a pruned model ``config.json``, ``generation_config.json`` and the tokenizer's files are
transformers'; ``model.safetensors`` holds the weights by the names of the original model, tied ones once;
``programs.json`` the programs, ``constants.safetensors`` what they hold besides. ``plan.json`` and
``report.json`` say of either what their names say, and ``manifest.json`` the size and SHA-256 of the files.
As with :class:`fasp_fx.Result`, everything that torch would evaluate, import or turn into code is checked
before it is.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors
import torch
from huggingface_hub import HfApi
from torch import Tensor, nn

from fasp_fx.base import Scratch, check_device, keep_weights, kept_in_float32, with_values
from fasp_fx.errors import ArgumentError, StoreError
from fasp_fx.pruning import CARD, MARK, TOLD, Report, read_told, write_card, write_told
from fasp_fx.storage import (
    MANIFEST,
    parsing,
    program_from_json,
    read_json,
    read_manifest,
    read_tensors,
    verify,
    write_json,
    write_manifest,
    write_tensors,
)

from ._config import PrunedConfig, original_of
from ._program import LOSSES, POSITIONS, FlatProgram, Parts, StoredProgram

KIND, PLAIN = "hf", "plain"
#: what makes a pruned model, and with it what else is written
FILES = ("config.json", "model.safetensors", "constants.safetensors", "programs.json", *TOLD)

_OWN = (*FILES, "generation_config.json")


def check_sums(folder: Path) -> None:
    """Hold the files that a folder's manifest lists against it, but for what is there to be read by people; a
    folder without one is not ours.

    Raises:
        StoreError: a file is missing, damaged or of another version.
    """
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        listed = (name for name in manifest.files if not name.endswith(".md"))
        verify(folder, manifest.kind, dict.fromkeys([*TOLD, *listed]))


def save_into(model: Any, path: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write a pruned model to a folder that may hold other files, as a trainer's checkpoints do.

    The manifest is the last file, so that a half-replaced model is noticed.

    Raises:
        StoreError: the folder cannot be written, or a weight no longer fits the program.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        fill(path, model, state_dict)
        report = model.report.without_stale(model)
        write_told(path, model.plan, report)
        describe(path, model, report, path)
        write_manifest(path, KIND, [*_OWN, CARD])
    except (OSError, safetensors.SafetensorError) as error:
        raise StoreError(f"'{path}' cannot be written: {error}; free space or choose another path") from error


def fill(folder: Path, model: Any, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write the files of a pruned model, but for what is told of it and its manifest; ``state_dict``: with
    other weights.

    Raises:
        StoreError: a weight no longer fits the program, or the program holds something that cannot be stored.
    """
    weights = _weights(model, state_dict)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    names = (name for constants in model._constant_names.values() for name in constants.values())
    write_tensors(folder / "model.safetensors", weights)
    write_tensors(folder / "constants.safetensors", {name: buffers[name] for name in names})
    programs = {
        name: {**program.data, "constants": model._constant_names[name]}
        for name, program in model._stored.items()
    }
    write_json(folder / "programs.json", programs)


def loading_of(model: Any, folder: Path, where: str) -> str:
    """The code that loads a model that was written to a folder.

    Args:
        where: what the code calls the folder.
    """
    generating = "AutoModelForSeq2SeqLM" if model.config.is_encoder_decoder else "AutoModelForCausalLM"
    name = generating if model.can_generate() else type(model).__name__
    own = "import fasp_fx.hf\n" if isinstance(model.config, PrunedConfig) else ""
    code = ", trust_remote_code=True" if type(model)._auto_class is not None else ""
    stock = (
        f"\n# or in llama.cpp: llama-cli -m {where}/model.gguf" if (folder / "model.gguf").is_file() else ""
    )
    return f'{own}transformers.{name}.from_pretrained("{where}"{code}){stock}'


def describe(folder: Path, model: Any, report: Report, before: Path) -> None:
    """Write the card of a model; arguments as for :func:`fasp_fx.pruning.write_card`."""
    base = str(model.name_or_path)
    is_named = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    header = "library_name: transformers" + f"\nbase_model: {base}" * bool(is_named)
    loading = f"import transformers\n{loading_of(model, folder, 'this/repository')}"
    write_card(folder, report, loading, header, before)


def upload(save: Callable[[Path], Any], repo_id: str, **options: Any) -> str:
    """What ``push_to_hub`` of a transformers model does, with the card.

    Args:
        save: writes the files to a new folder.
        options: ``private``, ``token``, and what ``huggingface_hub.HfApi.upload_folder`` takes. A card that
            somebody has written on the hub stays.

    Returns:
        The address of the commit.
    """
    hub = HfApi(token=options.pop("token", None))
    repo = hub.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
    there = Path(hub.hf_hub_download(repo, CARD)).read_text("utf-8") if hub.file_exists(repo, CARD) else MARK
    with TemporaryDirectory() as folder:
        save(Path(folder) / "model")
        options |= {"repo_id": repo, "folder_path": Path(folder) / "model"}
        return str(hub.upload_folder(ignore_patterns=None if MARK in there else [CARD], **options))


def _weights(model: Any, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The weights to write, held against those that the programs need."""
    weights: dict[str, Tensor] = model.state_dict(keep_vars=True)
    values = weights if state_dict is None else state_dict
    checked: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        value = values.get(name)
        if value is None or (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
            raise StoreError(
                f"'{name}' of state_dict is missing, or not {tensor.dtype} {list(tensor.shape)} as the"
                " programs need it; pass the model's own state_dict()"
            )
        checked[name] = with_values(tensor, value)
    return checked


#: fields of a configuration that say what the programs are
_OF_THE_PROGRAMS = ("original", "positions", "loss", "labels_moved", "fasp_fx_version", "is_encoder_decoder")


def read_saved(folder: Path, changed: Any, device_map: Any) -> tuple[PrunedConfig, Parts]:
    """What :func:`save_into` wrote, with the configuration as the caller has changed it; what that says of
    the programs stays as it was saved.

    Raises:
        StoreError: a file is missing, damaged or of another version.
        ArgumentError: there is no such device here.
    """
    verify(folder, KIND, [*FILES, *({"generation_config.json"} & read_manifest(folder).files.keys())])
    if device_map == "auto":
        device_map = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.get_default_device() if device_map is None else check_device(device_map, values=False)
    with parsing("config.json"):
        saved = PrunedConfig.from_pretrained(folder)
    if not isinstance(saved.original, dict):
        raise StoreError(
            "config.json does not hold the configuration of the model that was pruned; save the model again"
        )
    original_of(saved)
    for name, ways in (("positions", POSITIONS), ("loss", LOSSES)):
        if getattr(saved, name) not in (None, *ways):
            raise StoreError(
                f"config.json does not say how the model is called ({name}); save the model again"
            )
    config = copy.deepcopy(changed) if isinstance(changed, PrunedConfig) else saved
    for name in (*_OF_THE_PROGRAMS, "dtype"):
        setattr(config, name, getattr(saved, name))
    return config, _parts(folder, device)


def _parts(folder: Path, device: torch.device) -> Parts:
    weights = read_tensors(folder / "model.safetensors", device)
    tensors = read_tensors(folder / "constants.safetensors", device)
    constants: dict[str, dict[str, Tensor]] = {}
    programs: dict[str, StoredProgram] = {}
    stored_programs = read_json(folder / "programs.json")
    with parsing("programs.json"):
        for name, stored in stored_programs.items():
            constants[name] = {inside: tensors[outside] for inside, outside in stored["constants"].items()}
            kept = {"program": stored["program"]}
            module = program_from_json(kept, weights, constants[name], device).module(check_guards=False)
            programs[name] = StoredProgram(kept, FlatProgram.of(module))
    return Parts(programs, weights, constants, *read_told(folder))


_NUMBER = re.compile(r"\.\d+\.")


def load_offloaded(
    folder: str | Path, scratch: Scratch, *, dtype: torch.dtype | None = None, auto: Any = None
) -> Any:
    """Load a model whose weights lie in files, and never all in memory; otherwise as ``from_pretrained``
    does.

    Args:
        folder: a checkpoint as transformers writes it, with weights in safetensors files.
        scratch: what :func:`fasp_fx.offload` gave.
        dtype: of the weights; ``None``: the one of the configuration, or else as they are stored.
        auto: the class to load with; ``None``: ``AutoModelForCausalLM``.

    Returns:
        The model in evaluation mode.

    Raises:
        StoreError: it is a folder that was saved here, and damaged.
        ArgumentError: the checkpoint is quantised, or weights are missing or of another shape. What else is
            wrong with it, transformers and safetensors say.
        OffloadError: the disk is full.

    Examples:
        >>> llama.save_pretrained("dense")
        >>> with fasp_fx.offload() as scratch:
        ...     model = hf.load_offloaded("dense", scratch)
        >>> torch.equal(model(texts[0]).logits, llama(texts[0]).logits)
        True
    """
    import transformers

    folder = Path(folder)
    weights: dict[str, Tensor] = {}
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ArgumentError(
            f"the weights of '{folder}' are quantised, and would have to be expanded in memory; give the"
            " checkpoint that was quantised"
        )
    with torch.device("meta"):
        empty = (auto or transformers.AutoModelForCausalLM).from_config(config)
    wanted, exact = dtype or getattr(config, "dtype", None), kept_in_float32(empty)
    for name, tensor in _tensors(folder):
        real = tensor.is_floating_point()
        wanted = wanted or (tensor.dtype if real else None)
        kind = wanted if real and wanted and not any(part in name for part in exact) else tensor.dtype
        weights[name] = scratch.empty(tensor.shape, kind).copy_(tensor)
    model, info = type(empty).from_pretrained(
        None, config=config, state_dict=weights, dtype=wanted or torch.float32, output_loading_info=True
    )
    refuse_incomplete(model, info, str(folder))
    keep_weights(model, scratch)  # what transformers had to convert
    model.name_or_path = model.config.name_or_path = str(folder)
    with contextlib.suppress(OSError, ValueError):
        # Transformers makes one of the configuration where there is none that can be read.
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all shards by name, each of which is to be let go before the next."""
    shards = [folder / "model.safetensors"]
    if not shards[0].is_file():
        index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
        shards = [folder / Path(name).name for name in sorted(set(index["weight_map"].values()))]
    for shard in shards:
        with safetensors.safe_open(shard, "pt") as opened:
            names = list(opened.keys())
        for name in names:
            with safetensors.safe_open(shard, "pt") as opened:  # anew, which frees the memory of the last
                yield name, opened.get_tensor(name)


def refuse_incomplete(model: nn.Module, info: Mapping[str, Any], where: str) -> None:
    """Refuse a model with weights made up, or with fewer layers than its files, or of a folder that was saved
    here and changed since. Other weights may be left out: a model of one kind can be loaded of a checkpoint
    that holds more.

    Args:
        info: what transformers says of the loading.

    Raises:
        StoreError: names a file that was changed.
        ArgumentError: names a weight that would be made up or left out.
    """
    check_sums(Path(where))
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if lacking := _named(info, kind):
            rest = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise ArgumentError(
                f"'{where}' lacks the weights {', '.join(lacking[:3])}{rest}, or holds them in another size:"
                " they would be made up; give the complete model"
            )
    numberless = {_NUMBER.sub(".", name) for name, _ in model.named_parameters(remove_duplicate=False)}
    numbered = filter(_NUMBER.search, _named(info, "unexpected_keys"))
    if layers := [name for name in numbered if _NUMBER.sub(".", name) in numberless]:
        raise ArgumentError(
            f"'{where}' holds weights of more layers than its configuration says"
            f" ({layers[0]}), which would be left out; correct the configuration"
        )


def first_fault(info: Mapping[str, Any]) -> str:
    """A weight that transformers made up or left out, as it says of a loading; ``""``: none."""
    return next((f"{kind.replace('_', ' ')}: {_named(info, kind)[0]}" for kind in info if info[kind]), "")


def _named(info: Mapping[str, Any], kind: str) -> list[str]:
    """The weights of one kind of fault."""
    return sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get(kind) or ())
