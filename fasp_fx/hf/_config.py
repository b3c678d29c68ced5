"""The configuration of a pruned model: that of the original, and how the programs are called."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from fasp_fx.errors import StoreError
from fasp_fx.storage import parsing

#: what would let transformers build a cache that the programs do not take: theirs holds every token of every
#: layer
_HIDDEN = (
    "layer_types",
    "sliding_window",
    "attention_chunk_size",
    "kv_sharing_modes",
    "auto_map",
    "quantization_config",
)


#: numbers that no model has: of layers, which configurations list one by one, and sizes, for which memory
#: would be asked
_TOO_MANY = re.compile(r'"\w*(?:layers?": \d{5,}|(?:size|dim|heads|model|embd|inner|ff)": \d{9,})')

#: called when there is a configuration; the door sets it, since the models are made of configurations
load_models: Callable[[], object] = lambda: None  # noqa: E731


class PrunedConfig(PreTrainedConfig):
    """Configuration of :class:`PrunedForCausalLM` and :class:`PrunedForSeq2SeqLM`.

    Attributes:
        original: the configuration of the model that was pruned; its attributes can be read on this one, such
            as ``vocab_size``. Widths are those of the dense model.
        positions: how positions follow where a caller gives none: ``"count"``, one after the other,
            ``"mask"``, counting tokens that the attention mask shows, ``"mask and hidden"``, where those
            hidden stand one before the first, or ``None`` where the model takes none.
        loss: how labels are predicted: ``"next"``, each from the logits before it, ``"same"``, from those at
            its place, or ``None`` where the original has a loss of its own.
        labels_moved: how an encoder-decoder makes tokens of labels: behind its token for the ``"start"``, or
            in another way, which is not served.

    Examples:
        >>> print(pruned.model.config.model_type, pruned.model.config.original["model_type"])
        fasp_fx llama
    """

    #: what ``original`` reads as: no field, which would be saved
    __slots__ = ("_read",)

    model_type = "fasp_fx"
    has_no_defaults_at_init = True

    original: dict[str, Any] | None = None
    positions: str | None = None
    loss: str | None = None
    labels_moved: str | None = None
    fasp_fx_version: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        load_models()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a file, which may be damaged: the Auto classes read it before anything else.

        Raises:
            StoreError: it is no configuration of a pruned model.
        """
        with parsing("config.json"):
            return super().from_dict(config_dict, **kwargs)

    def _get_generation_parameters(self) -> dict[str, Any]:
        """What transformers refuses to find in a configuration: here only what was set on this one, since a
        field of the original may have such a name.
        """
        return {
            name: value for name, value in super()._get_generation_parameters().items() if name in vars(self)
        }

    def __getattr__(self, name: str) -> Any:
        if self.__dict__.get("original") and not name.startswith(("_", "rope_")) and name not in _HIDDEN:
            value = getattr(original_of(self), name)
            if not isinstance(value, PreTrainedConfig):
                return value
        raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")


def original_of(config: PrunedConfig) -> PreTrainedConfig:
    """The configuration of the model that was pruned.

    Raises:
        StoreError: it cannot be made of what was stored.
    """
    original: PreTrainedConfig | None = getattr(config, "_read", None)
    if original is None:
        with parsing("config.json"):
            check_layers(config.original)
            data: dict[str, Any] = copy.deepcopy(config.original or {})
            kind: Any = data.get("model_type")
            known: Any = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else PreTrainedConfig  # noqa: SIM401 - get() of this mapping loads nothing
            original = known.from_dict(data)
        object.__setattr__(config, "_read", original)
    return original


def check_layers(data: Any) -> None:
    """Refuse a configuration that says a number of layers, or a size, that no model has: transformers makes
    lists as long as that, and asks for as much memory.

    Raises:
        StoreError: quotes it.
    """
    number = _TOO_MANY.search(json.dumps(data))
    if number is not None:
        raise StoreError(
            f"config.json says {number[0]:.80}, more than any model has; correct it, or save the model again"
        )


AutoConfig.register(PrunedConfig.model_type, PrunedConfig, exist_ok=True)
