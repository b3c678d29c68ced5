"""Pruned decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..base.compat._transformers import CACHE
from ..errors import ArgumentError
from ._arguments import check_numbers, check_outputs, check_tokens, loss_of, mask_of, refuse, shown
from ._labels import POSITIONS
from ._saved import SavedModel


class PrunedForCausalLM(SavedModel):
    """A pruned decoder that generates as its original does."""

    program_names = frozenset({"decode"})

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
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
            logits_to_keep: logits of so many last positions, 0 for all, or of the positions in a tensor
                ``[count]``.
            past_key_values: the cache, by its name in transformers until 5.23.

        Raises:
            ArgumentError: an argument has the wrong shape or is not served, a position lies outside of the
                model's table, or positions begin again where the original would take that for another text.
        """
        cache = past_key_values if cache is None else cache
        refuse(kwargs, known=("num_items_in_batch",))
        check_outputs(self.config)
        check_tokens("input_ids", input_ids)
        assert input_ids is not None
        batch, new = input_ids.shape
        given, cache = cache is not None, self._opened(cache)
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
        kept = _kept(logits_to_keep, new, input_ids.device)
        if inside:
            values["logits_to_keep"] = kept
        found = self._run("decode", values, one=new == 1)
        whole = inside or (isinstance(logits_to_keep, int) and kept.numel() == new)
        logits = found["logits"] if whole else found["logits"].index_select(1, kept)
        loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch") if self.config.counts_items else None
            loss = loss_of(self.config.loss, logits, labels, items)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, **{CACHE: self._extended(cache, given, found, use_cache)}
        )
        return output if return_dict is not False else output.to_tuple()

    def _positions(
        self, given: Tensor | None, mask: Tensor | None, batch: int, new: int, past: int, ids: Tensor
    ) -> Tensor:
        limit = self.config.position_limit
        if given is not None:
            check_numbers("position_ids", given)
            if given.shape not in ((batch, new), (1, new)):
                raise ArgumentError(
                    f"position_ids have the shape {list(given.shape)}; give one for each new token: [{batch},"
                    f" {new}]"
                )
            positions = given.expand(batch, new)
            if mask is None and not past and self.config.packs and bool((positions.diff(dim=1) != 1).any()):
                raise ArgumentError(
                    "position_ids begin again, and no attention_mask is given: the original model keeps such"
                    " texts apart, and the program of a pruned one does not; give each text a row of its own,"
                    " or an attention_mask where they are one text"
                )
        elif mask is None:
            positions = torch.arange(past, past + new, device=ids.device).expand(batch, new)
        else:
            positions = POSITIONS[self.config.positions](mask.long())[:, past:]
        if limit is not None and past + new > limit and int(positions.max()) >= limit:
            raise ArgumentError(
                f"position {int(positions.max())} lies outside of the model's table of {limit} positions;"
                " shorten the prompt or generate fewer tokens"
            )
        return positions

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers' own; positions are left out where the original model takes none."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if self.config.positions is None:
            inputs.pop("position_ids", None)
        return inputs


def _kept(logits_to_keep: int | Tensor, new: int, device: torch.device) -> Tensor:
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dtype == torch.bool and logits_to_keep.shape == (new,):
            return logits_to_keep.nonzero()[:, 0]
        if logits_to_keep.dim() != 1 or logits_to_keep.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(_misread(logits_to_keep, new))
        if bool(((logits_to_keep < -new) | (logits_to_keep >= new)).any()):
            raise ArgumentError(f"{_misread(logits_to_keep, new)}; one of them lies outside")
        return torch.where(logits_to_keep < 0, logits_to_keep + new, logits_to_keep)
    if not isinstance(logits_to_keep, int):
        raise ArgumentError(_misread(logits_to_keep, new))
    if logits_to_keep < 0:
        raise ArgumentError(f"logits_to_keep is {logits_to_keep}; pass how many last positions, 0 for all")
    return torch.arange(max(new - logits_to_keep, 0) if logits_to_keep else 0, new, device=device)


def _misread(logits_to_keep: object, new: int) -> str:
    """Written only when raised: text with a size in it would fix that size for a compiler."""
    return (
        f"logits_to_keep is {shown(logits_to_keep)}; pass how many last positions, or positions [count] among"
        f" the {new} new ones, for all sequences alike"
    )


__all__ = ["PrunedForCausalLM"]
