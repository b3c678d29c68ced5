"""What pruned decoders and pruned encoder-decoders have in common: shared weights, programs, and the checks around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from ..errors import ArgumentError
from ..plan import PruningPlan
from ..report import Report
from . import _caches
from ._config import PrunedConfig
from ._fast import grouped, one_token, without_checks
from ._flat import FlatProgram

#: arguments of transformers' models that a program does not take, and the values that ask for nothing
_IDLE = {"output_attentions": False, "output_hidden_states": False, "inputs_embeds": None, "token_type_ids": None, "decoder_inputs_embeds": None}
CONSTANTS = "_constants"


@dataclass(frozen=True)
class StoredProgram:
    """One program: as it is written to disk, and as it runs, with its weights under the model's names."""

    data: Mapping[str, Any]
    flat: FlatProgram


@dataclass(frozen=True)
class Parts:
    """What a pruned model is made of.

    Attributes:
        programs: by name.
        weights: parameters and persistent buffers by the names of the original model; tied ones are one object.
        constants: for each program, its constants and other buffers by the names in its graph.
        plan: what was removed.
        report: what it cost.
    """

    programs: Mapping[str, StoredProgram]
    weights: Mapping[str, Tensor]
    constants: Mapping[str, Mapping[str, Tensor]]
    plan: PruningPlan
    report: Report


class Branch(nn.Module):
    """A part of the tree of weights; nothing is computed by it."""

    main_input_name = "input_ids"  # generate() asks an encoder for it


class PrunedModel(PreTrainedModel, GenerationMixin):
    """A model whose forward is a captured and pruned program with a cache; made by :func:`fasp_fx.hf.prune` or ``from_pretrained``.

    The programs share the parameters of this module, which have the names of the original model. Dropout and the like are as they were at
    capture, in evaluation mode; ``train()`` and ``eval()`` change nothing.
    """

    config_class = PrunedConfig
    _supports_sdpa = True
    _supports_flash_attn = False

    def __init__(self, config: PrunedConfig, parts: Parts | None = None) -> None:
        if parts is None:
            raise ArgumentError(f"{type(self).__name__} cannot be made of a configuration alone; use fasp_fx.hf.prune or from_pretrained")
        super().__init__(config)
        self.plan, self.report = parts.plan, parts.report
        for name, tensor in parts.weights.items():
            _place(self, name, tensor, persistent=True)
        self._parts = {name: program.data for name, program in parts.programs.items()}
        self._constant_names = _adopt_constants(self, parts)
        self._programs = {name: _served(program.flat, parts.constants[name], self._constant_names[name]) for name, program in parts.programs.items()}
        self._steps = {name: _step(program) for name, program in self._programs.items()}
        self._cache_sizes = {name: program.cache_sizes() for name, program in self._programs.items()}
        self.eval()

    def _run(self, name: str, values: dict[str, Tensor], one: bool = False) -> dict[str, Tensor]:
        """Run a program; ``one``: in the form for a query of one token."""
        program = (self._steps if one else self._programs)[name]
        try:
            return program(self, values)
        except IndexError as error:
            raise ArgumentError(
                f"a token number or position lies outside of the model's tables: {error}; shorten the input, or check its token numbers"
            ) from error

    def _like(self) -> Tensor:
        """A parameter that shows dtype and device."""
        return next(parameter for parameter in self.parameters() if parameter.is_floating_point())

    def _cached(self, program: str, cache: Any, batch: int) -> dict[str, Tensor]:
        """The cache tensors that a program takes."""
        return _caches.read(cache, self._cache_sizes[program], batch, self._like())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = self._like()
        moved = fn(held.detach().new_empty(0))
        if moved.dtype != held.dtype:
            raise ArgumentError(
                f"the programs were captured in {held.dtype} and cannot be made {moved.dtype}; load the dense model in that dtype and prune it again"
            )
        super()._apply(fn, recurse)
        if moved.device != held.device:
            for program in (*self._programs.values(), *self._steps.values()):
                program.to_device(moved.device)
        return self

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """A cache that holds every token of every layer, as the programs take it."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ArgumentError(f"cache_implementation={kind!r} is not served: the programs take a cache that grows; leave it out")
        given = model_kwargs.get("cache")
        if given is not None:
            _caches.check(given, self.config.is_encoder_decoder)
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["cache"] = _caches.fresh(self.config.is_encoder_decoder)
            if generation_config.is_assistant:
                model_kwargs["cache"].activate_past_recording()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible: the programs fix the vocabulary.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("the vocabulary of a pruned model is fixed by its programs; resize the embeddings of the dense model and prune it again")

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the model as it is now to a folder, which may exist already, as transformers' models do.

        The files are complete before the first of them takes its place. See :meth:`fasp_fx.hf.Pruned.save_pretrained` for a folder that appears
        whole or not at all, with the tokenizer.

        Args:
            state_dict: weights to write instead of the model's own, by the same names.

        Raises:
            StoreError: the folder cannot be written, or a weight no longer fits the program.
        """
        from ._folder import save_into

        if is_main_process:
            save_into(self, Path(save_directory), state_dict)
        if push_to_hub:
            raise ArgumentError("push_to_hub=True is not served; call save_pretrained(folder), then huggingface_hub.upload_folder")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a folder that ``save_pretrained`` wrote, or a repository on the hub that holds one.

        Args:
            pretrained_model_name_or_path: the folder, or a hub id.
            dtype: ``None``, ``"auto"`` or the dtype that the model was captured in; another one is refused.
            device_map: ``None``, ``"auto"`` (the accelerator if there is one), a device, or ``{"": device}``.

        Raises:
            StoreError: a file is missing, damaged or of another version.
            ArgumentError: an argument cannot be honoured.
        """
        from ._folder import load

        return load(cls, pretrained_model_name_or_path, **kwargs)


def refuse(arguments: dict[str, Any], known: tuple[str, ...] = ()) -> None:
    """Refuse arguments that the programs do not take, unless they ask for nothing.

    Raises:
        ArgumentError: names the first.
    """
    for name, value in arguments.items():
        if name in known or value is None or (name in _IDLE and value == _IDLE[name]):
            continue
        remedy = "pass 'cache'" if name == "past_key_values" else "leave it out, or use the dense model"
        raise ArgumentError(f"argument '{name}' is not served by a pruned model, whose forward is a captured program; {remedy}")


def check_tokens(name: str, ids: Any) -> None:
    """Refuse anything but token numbers ``[batch, tokens]``.

    Raises:
        ArgumentError: names the argument.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape:
        shown = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ArgumentError(f"{name} is {shown}; pass token numbers [batch, tokens], at least one token")


def mask_of(name: str, mask: Tensor | None, batch: int, length: int, like: Tensor) -> Tensor:
    """A mask over ``length`` tokens, all shown by default.

    Raises:
        ArgumentError: it has another shape.
    """
    if mask is None:
        return torch.ones((batch, length), dtype=torch.long, device=like.device)
    if mask.shape != (batch, length):
        raise ArgumentError(f"{name} has the shape {list(mask.shape)}; it must cover every token, cached ones included: [{batch}, {length}]")
    return mask.to(torch.long)


def _place(root: nn.Module, name: str, tensor: Tensor, *, persistent: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = root
    for part in path.split(".") if path else ():
        if part not in owner._modules:
            owner.add_module(part, Branch())
        owner = owner._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)


def _adopt_constants(model: nn.Module, parts: Parts) -> dict[str, dict[str, str]]:
    """Hold constants as buffers outside of the state dict, equal ones once; returns their names in the model, for each program."""
    held: list[Tensor] = []
    names: dict[str, dict[str, str]] = {}
    for program, constants in parts.constants.items():
        names[program] = {}
        for name, tensor in constants.items():
            index = next(
                (i for i, known in enumerate(held) if known.shape == tensor.shape and known.dtype == tensor.dtype and torch.equal(known, tensor)), None
            )
            if index is None:
                index = len(held)
                held.append(tensor)
                _place(model, f"{CONSTANTS}.c{index}", tensor, persistent=False)
            names[program][name] = f"{CONSTANTS}.c{index}"
    return names


def _served(flat: FlatProgram, constants: Mapping[str, Tensor], names: dict[str, str]) -> FlatProgram:
    graph = flat.copy_graph()
    for node in graph.find_nodes(op="get_attr"):
        node.target = names.get(str(node.target), node.target)
    without_checks(graph)
    grouped(graph)
    return flat.rewritten(graph)


def _step(program: FlatProgram) -> FlatProgram:
    graph = program.copy_graph()
    one_token(graph)
    return program.rewritten(graph)


__all__ = ["Parts", "PrunedModel", "StoredProgram", "check_tokens", "mask_of", "refuse"]
