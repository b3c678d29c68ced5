"""Pruned models that generate: shared weights, programs, and the checks around them; decoders, and
encoder-decoders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from fasp_fx.base import CACHE, attention_of, mark_as_given
from fasp_fx.capturing import copy_graph
from fasp_fx.errors import ArgumentError, StoreError
from fasp_fx.storage import parsing, read_text

from ._config import PrunedConfig
from ._folder import read_saved, save_into
from ._program import (
    POSITIONS,
    FlatProgram,
    Parts,
    after_start,
    check_outputs,
    checked_tokens,
    loss_of,
    mask_of,
    opened,
    read_cache,
    refuse,
    share_heads,
    shown,
    without_checks,
    write_cache,
)

CONSTANTS = "_constants"
#: arguments of transformers' loaders that change nothing here
_WITHOUT_EFFECT = {
    *("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "adapter_kwargs", "_from_auto"),
    *("_from_pipeline", "weights_only", "proxies", "use_kernels", "cache_dir", "force_download"),
    *("local_files_only", "revision", "token"),
}


class Branch(nn.Module):
    """A part of the tree of weights; nothing is computed by it."""

    main_input_name = "input_ids"  # generate() asks an encoder for it


def place(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a parameter or buffer where its dotted name says, making the modules on the way; constants stay
    outside of the state dict.
    """
    path, _, leaf = name.rpartition(".")
    owner = root
    for part in path.split(".") if path else ():
        if part not in dict(owner.named_children()):
            owner.add_module(part, Branch())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=path != CONSTANTS)


class PrunedModel(PreTrainedModel, GenerationMixin):
    """A model whose forward is a captured and pruned program with a cache; made by :func:`fasp_fx.hf.prune`
    or ``from_pretrained``.

    The programs share the parameters of this module, which have the names of the original model. Dropout and
    the like are as they were at capture, in evaluation mode; ``train()`` and ``eval()`` change nothing.
    """

    config_class = PrunedConfig
    program_names: ClassVar[frozenset[str]] = frozenset()
    _supports_sdpa = True
    _supports_flash_attn = False

    def __init__(self, config: PrunedConfig, parts: Parts) -> None:
        super().__init__(config)
        self.plan, self.report = parts.plan, parts.report
        for name, tensor in parts.weights.items():
            place(self, name, tensor)
        self._stored = parts.programs
        self._constant_names: dict[str, dict[str, str]] = {}
        self._programs: dict[str, FlatProgram] = {}
        for program, stored in parts.programs.items():
            names = {name: f"{CONSTANTS}.{program}{i}" for i, name in enumerate(parts.constants[program])}
            for name, tensor in parts.constants[program].items():
                place(self, names[name], tensor.clone())
            graph = copy_graph(stored.flat.graph)
            for node in graph.find_nodes(op="get_attr"):
                node.target = names.get(str(node.target), node.target)
            without_checks(graph)
            share_heads(graph)
            self._constant_names[program] = names
            self._programs[program] = replace(stored.flat, graph=graph)
        self.eval()

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers' own, without what ``generate`` hands on to the loop around the model, and without
        positions where the original model takes none.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        left_out = {"tokenizer", "assistant_tokenizer"}
        left_out |= {"position_ids"} if self.config.positions is None else set()
        return {name: value for name, value in inputs.items() if name not in left_out}

    def _run(self, name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        program = self._programs[name]
        for bound in program.bounds:
            bound.check(values)
        return program(self, values)

    def _like(self) -> Tensor:
        """A parameter that shows dtype and device."""
        return next(parameter for parameter in self.parameters() if parameter.is_floating_point())

    def _opened(self, cache: Any, older: Any = None) -> Any:
        """The caller's cache by one of its names, or an empty one."""
        kind = EncoderDecoderCache if self.config.is_encoder_decoder else DynamicCache
        return opened(older if cache is None else cache, kind)

    def _extended(self, cache: Any, results: dict[str, Tensor], use_cache: bool | None) -> Any:
        """Write what a program returned into the cache; ``None`` if the output shall not hold it."""
        write_cache(cache, {name: value for name, value in results.items() if name.startswith("cache.")})
        wanted = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        return cache if wanted else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight = self._like()
        moved = fn(weight.detach().new_empty(0))
        if moved.dtype != weight.dtype:
            raise ArgumentError(
                f"the programs were captured in {weight.dtype} and cannot be made {moved.dtype}; load the"
                " dense model in that dtype and prune it again"
            )
        super()._apply(fn, recurse)
        if moved.device != weight.device:
            for program in self._programs.values():
                program.to_device(moved.device)
        return self

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """A cache that holds every token of every layer, as the programs take it."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ArgumentError(
                f"cache_implementation={kind!r} is not served: the programs take a cache that grows; leave"
                " it out"
            )
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            mark_as_given(self._opened(cache))
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = self._opened(None)
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible: it needs a cache in pages, which the programs do not take.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(
            "continuous batching needs a paged cache, which a pruned model's programs do not take; call"
            " generate() on padded batches"
        )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the model as it is now to a folder, which may exist already, as transformers' models do.

        The files are complete before the first of them takes its place. See
        :meth:`fasp_fx.hf.Pruned.save_pretrained` for a folder that appears whole or not at all, with the
        tokenizer.

        Args:
            state_dict: weights to write instead of the model's own, by the same names.

        Raises:
            StoreError: the folder cannot be written, or a weight no longer fits the program.
        """
        if is_main_process:
            save_into(self, Path(save_directory), state_dict)
        if push_to_hub:
            raise ArgumentError(
                "push_to_hub=True is not served; call save_pretrained(folder), then"
                " huggingface_hub.upload_folder"
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        **options: Any,
    ) -> Any:
        """Load a folder that ``save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: the folder; of a repository on the hub, what
                ``huggingface_hub.snapshot_download`` made of it.
            dtype: ``None``, ``"auto"`` or the dtype that the model was captured in; another one is refused.
            device_map: ``None``, ``"auto"`` (the accelerator if there is one), or a device.

        Raises:
            StoreError: a file is missing, damaged or of another version.
            ArgumentError: an argument cannot be honoured.
        """
        folder = Path(pretrained_model_name_or_path) / (options.pop("subfolder", "") or "")
        refuse(options, known=_WITHOUT_EFFECT)
        # The Auto classes put it there; a pruned model says "sdpa" of itself.
        if (asked := attention_of(config)) not in (None, "sdpa"):
            raise ArgumentError(
                f"attn_implementation={asked!r} cannot be had: the programs fix attention; choose it for the"
                " dense model and prune it again"
            )
        saved, parts = read_saved(folder, config, device_map)
        wanted = dtype if dtype is not None else torch_dtype
        if getattr(torch, str(wanted), wanted) not in (None, "auto", saved.dtype):
            raise ArgumentError(
                f"dtype={wanted} cannot be had: the programs were captured in {saved.dtype}; load the dense"
                " model in that dtype and prune it again"
            )
        if set(parts.programs) != cls.program_names:
            auto = "AutoModelForSeq2SeqLM" if saved.is_encoder_decoder else "AutoModelForCausalLM"
            raise StoreError(
                f"programs.json holds the programs {sorted(parts.programs)!r:.200}, not those of a"
                f" {cls.__name__}, {sorted(cls.program_names)}; load it with {auto}, or save the model again"
            )
        with parsing("programs.json or config.json"):
            model = cls(saved, parts)
        if os.path.lexists(folder / "generation_config.json"):
            with parsing("generation_config.json"):
                read_text(folder / "generation_config.json")
                model.generation_config = model.generation_config_class.from_pretrained(folder)
        model.name_or_path = str(pretrained_model_name_or_path)
        return model


class PrunedForCausalLM(PrunedModel):
    """A pruned decoder that generates as its original does.

    Examples:
        >>> isinstance(pruned.model, hf.PrunedForCausalLM)
        True
        >>> pruned.model(input_ids=texts[0]).logits.shape
        torch.Size([4, 16, 32])
    """

    program_names = frozenset({"decode"})

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the next tokens.

        Args:
            input_ids: token numbers ``[batch, new]``.
            attention_mask: ``[batch, cached + new]``, zero where a token is padding; ``None``: no padding.
            position_ids: ``[batch, new]``; ``None``: as the original model counts.
            cache: a ``DynamicCache`` of this model, extended in place; ``None``: an empty one.
            labels: ``[batch, new]``; the loss is the original's (of predicting each from the tokens before
                it, as a rule), -100 is left out.
            use_cache: whether the output holds the cache; ``None``: as the configuration says.
            logits_to_keep: logits of so many last positions, 0 for all.
            past_key_values: the cache, by its name in transformers until 5.23.

        Raises:
            ArgumentError: an argument has the wrong shape or is not served, a position lies outside of the
                model's table, or positions begin again and no mask says that the tokens are of one text.
        """
        refuse(kwargs, known=("num_items_in_batch",))
        check_outputs(self.config)
        input_ids = checked_tokens("input_ids", input_ids)
        batch, new = input_ids.shape
        cache = self._opened(cache, past_key_values)
        values = read_cache(cache, self._programs["decode"].cache_sizes, batch, self._like())
        past = next((tensor.shape[2] for tensor in values.values()), 0)
        values["input_ids"] = input_ids
        values["attention_mask"] = mask_of("attention_mask", attention_mask, batch, past + new, input_ids)
        if self.config.positions is not None:
            values["position_ids"] = self._positions(
                position_ids, attention_mask, batch, new, past, input_ids
            )
        elif position_ids is not None:
            raise ArgumentError("position_ids: the original model takes none; leave them out")
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ArgumentError(
                f"logits_to_keep is {shown(logits_to_keep)}; pass how many last positions, 0 for all"
            )
        # Some programs take it, and return no more.
        first = max(new - logits_to_keep, 0) if logits_to_keep else 0
        values["logits_to_keep"] = torch.arange(first, new, device=input_ids.device)
        results = self._run("decode", values)
        logits = results["logits"][:, first - new :]
        loss = loss_of(self.config.loss, logits, labels, kwargs.get("num_items_in_batch"))
        cache = self._extended(cache, results, use_cache)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _positions(
        self, positions: Tensor | None, mask: Tensor | None, batch: int, new: int, past: int, ids: Tensor
    ) -> Tensor:
        if positions is not None:
            if not isinstance(positions, Tensor) or positions.shape not in ((batch, new), (1, new)):
                raise ArgumentError(
                    f"position_ids is {shown(positions)}; give one for each new token: [{batch}, {new}]"
                )
            if mask is None and not past and bool((positions.diff(dim=1) != 1).any()):
                raise ArgumentError(
                    "position_ids begin again, and no attention_mask is given: many models keep such texts"
                    " apart, and the program of a pruned one does not; give each text a row of its own, or an"
                    " attention_mask where they are one text"
                )
            return positions.expand(batch, new)
        mask = mask_of("attention_mask", mask, batch, past + new, ids)
        return POSITIONS[self.config.positions](mask)[:, past:]


class Encoder(nn.Module):
    """The encoder of a pruned model, as ``generate()`` calls it; its weights are those of the model."""

    def __init__(self, model: PrunedForSeq2SeqLM) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that it is no submodule

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states ``[batch, source, width]`` of token numbers ``[batch, source]``."""
        refuse(kwargs)
        input_ids = checked_tokens("input_ids", input_ids)
        mask = mask_of("attention_mask", attention_mask, len(input_ids), input_ids.shape[1], input_ids)
        results = self._model[0]._run("encode", {"input_ids": input_ids, "attention_mask": mask})
        return BaseModelOutput(last_hidden_state=results["last_hidden_state"])


class PrunedForSeq2SeqLM(PrunedModel):
    """A pruned encoder-decoder that generates as its original does.

    Examples:
        >>> from transformers import GenerationMixin
        >>> issubclass(hf.PrunedForSeq2SeqLM, GenerationMixin)  # of T5, BART, …
        True
    """

    program_names = frozenset({"encode", "first", "decode"})

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder, called with ``input_ids`` and ``attention_mask``."""
        return Encoder(self)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the next tokens of the output.

        Args:
            input_ids: token numbers of the source ``[batch, source]``; not needed with ``encoder_outputs``.
            attention_mask: ``[batch, source]``, zero where the source is padding.
            decoder_input_ids: ``[batch, new]``; ``None`` with ``labels``: the labels moved on by one, as the
                original does it.
            decoder_attention_mask: ``[batch, cached + new]``.
            encoder_outputs: what ``get_encoder()`` returned, or a tuple that begins with the hidden states.
            cache: an ``EncoderDecoderCache`` of this model, extended in place; ``None``: an empty one.
            labels: ``[batch, new]``; -100 is left out of the loss.
            use_cache: whether the output holds the cache; ``None``: as the configuration says.
            past_key_values: the cache, by its name in transformers until 5.23.

        Raises:
            ArgumentError: an argument has the wrong shape or is not served.
        """
        refuse(kwargs, known=("num_items_in_batch",))
        check_outputs(self.config)
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        decoder_input_ids = checked_tokens("decoder_input_ids", decoder_input_ids)
        batch, new = decoder_input_ids.shape
        hidden = self._hidden(encoder_outputs, batch)
        cache = self._opened(cache, past_key_values)
        known = bool(cache.is_updated) and all(cache.is_updated.values())
        if not known and cache.get_seq_length():
            raise ArgumentError(
                "the cache holds tokens of the output, but nothing of the source; begin with an empty one"
            )
        source = cache.cross_attention_cache.get_seq_length()
        if known and source != hidden.shape[1]:
            raise ArgumentError(
                f"the cache holds {source} tokens of the source, encoder_outputs {hidden.shape[1]}; begin"
                " with an empty cache for another source"
            )
        program = "decode" if known else "first"
        values = read_cache(cache, self._programs[program].cache_sizes, batch, self._like())
        past = cache.get_seq_length()
        values["encoder_outputs.last_hidden_state"] = hidden
        values["attention_mask"] = mask_of("attention_mask", attention_mask, batch, hidden.shape[1], hidden)
        values["decoder_input_ids"] = decoder_input_ids
        if (
            decoder_attention_mask is not None
            and "decoder_attention_mask" not in self._programs[program].inputs
        ):
            raise ArgumentError("decoder_attention_mask: the original model takes none; leave it out")
        values["decoder_attention_mask"] = mask_of(
            "decoder_attention_mask", decoder_attention_mask, batch, past + new, decoder_input_ids
        )
        results = self._run(program, values)
        loss = loss_of(self.config.loss, results["logits"], labels, kwargs.get("num_items_in_batch"))
        cache = self._extended(cache, results, use_cache)
        return Seq2SeqLMOutput(
            loss=loss, logits=results["logits"], encoder_last_hidden_state=hidden, **{CACHE: cache}
        )

    def _hidden(self, outputs: Any, batch: int) -> Tensor:
        """The hidden states among an encoder's outputs.

        Raises:
            ArgumentError: there are none, or not those of this model for so many sequences.
        """
        like, width = self._like(), self._programs["first"].shapes()["encoder_outputs.last_hidden_state"][-1]
        hidden = outputs if isinstance(outputs, Tensor) or not outputs else outputs[0]
        if hidden is outputs or (*hidden.shape[::2], hidden.dtype, hidden.device) != (
            batch,
            width,
            like.dtype,
            like.device,
        ):
            raise ArgumentError(
                f"encoder_outputs holds {shown(hidden)}; pass what get_encoder() returns for {batch}"
                f" sequences: {like.dtype} [{batch}, source, {width}] on {like.device}"
            )
        return hidden

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels behind the token that begins an output, as inputs of the decoder, where a data collator puts
        them too; what the loss leaves out becomes padding.
        """
        checked_tokens("labels", labels)
        if self.config.labels_moved != "start":
            raise ArgumentError(
                "the original model makes the decoder's tokens of labels in a way of its own, or not at all;"
                " pass decoder_input_ids"
            )
        return after_start(labels, self.config.decoder_start_token_id, self.config.pad_token_id)


AutoModelForCausalLM.register(PrunedConfig, PrunedForCausalLM, exist_ok=True)
AutoModelForSeq2SeqLM.register(PrunedConfig, PrunedForSeq2SeqLM, exist_ok=True)
