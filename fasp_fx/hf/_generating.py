"""The two kinds of pruned models that generate: decoders, and encoder-decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from fasp_fx.base import CACHE
from fasp_fx.errors import ArgumentError

from ._arguments import POSITIONS, after_start, check_outputs, checked_tokens, loss_of, mask_of, refuse, shown
from ._config import PrunedConfig
from ._folder import SavedModel


class PrunedForCausalLM(SavedModel):
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
        cache = past_key_values if cache is None else cache
        refuse(kwargs, known=("num_items_in_batch",))
        check_outputs(self.config)
        input_ids = checked_tokens("input_ids", input_ids)
        batch, new = input_ids.shape
        cache = self._opened(cache)
        values = self._cached("decode", cache, batch)
        past = next(iter(values.values())).shape[2] if values else 0
        values["input_ids"] = input_ids
        values["attention_mask"] = mask_of("attention_mask", attention_mask, batch, past + new, input_ids)
        if self.config.positions is not None:
            values["position_ids"] = self._positions(
                position_ids, attention_mask, batch, new, past, input_ids
            )
        elif position_ids is not None:
            raise ArgumentError("position_ids: the original model takes none; leave them out")
        inside = "logits_to_keep" in self._programs["decode"].inputs
        if not isinstance(logits_to_keep, int):
            raise ArgumentError(
                f"logits_to_keep is {shown(logits_to_keep)}; pass how many last positions, 0 for all"
            )
        first = max(new - logits_to_keep, 0) if logits_to_keep else 0
        if inside:
            values["logits_to_keep"] = torch.arange(first, new, device=input_ids.device)
        results = self._run("decode", values)
        logits = results["logits"] if inside else results["logits"][:, first:]
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
        if mask is None:
            return torch.arange(past, past + new, device=ids.device).expand(batch, new)
        return POSITIONS[self.config.positions](mask.long())[:, past:]


class Encoder(nn.Module):
    """The encoder of a pruned model, as ``generate()`` calls it; its weights are those of the model."""

    def __init__(self, model: PrunedForSeq2SeqLM) -> None:
        super().__init__()
        vars(self)["_model"] = (model,)  # in a tuple, so that it is no submodule

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
        (model,) = vars(self)["_model"]
        mask = mask_of("attention_mask", attention_mask, input_ids.shape[0], input_ids.shape[1], input_ids)
        results = model._run("encode", {"input_ids": input_ids, "attention_mask": mask})
        return BaseModelOutput(last_hidden_state=results["last_hidden_state"])


class PrunedForSeq2SeqLM(SavedModel):
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
        cache = past_key_values if cache is None else cache
        refuse(kwargs, known=("num_items_in_batch",))
        check_outputs(self.config)
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        decoder_input_ids = checked_tokens("decoder_input_ids", decoder_input_ids)
        batch, new = decoder_input_ids.shape
        hidden = self._hidden(encoder_outputs, batch)
        cache = self._opened(cache)
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
        values = self._cached(program, cache, batch)
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
