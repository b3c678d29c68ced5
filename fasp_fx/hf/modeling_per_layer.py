"""Models of transformers whose layers have sizes of their own.

``PerLayerLlamaForCausalLM`` is ``LlamaForCausalLM`` each of whose layers is built from its own configuration,
``config.per_layer_config[i]``, and so for every class of transformers that builds its layers from a
configuration and a number. A layer may have no neuron and no head. This file needs nothing but transformers
and is saved along with a model, so that ``from_pretrained(folder, trust_remote_code=True)`` loads it.
"""

from typing import Any, cast

import transformers
from torch import Tensor, nn

_PREFIX = "PerLayer"


class PerLayer:
    """Comes before a model's class among the bases of a class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model = cast(nn.Module, self)
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for stack in stacks:
            if len(stack) == config.num_hidden_layers:
                for index, layer in enumerate(stack):
                    stack[index] = _layer(type(layer), config.per_layer_config[index], index)
        cast(Any, self).post_init()


class NoAttention(nn.Module):
    """Attention without heads: it gives its bias. Its weights have their names, and no numbers.

    Args:
        attention: the like of transformers' ``LlamaAttention``, with any heads.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx
        for name, child in attention.named_children():
            setattr(self, name, child)
            if name == "o_proj":
                child.weight = nn.Parameter(child.weight[:, :0])
            elif isinstance(child, nn.Linear):
                for weight_name, tensor in list(child.named_parameters()):
                    setattr(child, weight_name, nn.Parameter(tensor[:0]))

    def forward(self, hidden_states: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
        cache = options.get("cache", options.get("past_key_values"))
        if cache is not None:  # where it counts tokens
            placeholder = hidden_states[:, None, :, :1]
            cache.update(placeholder, placeholder, self.layer_idx)
        return cast(Any, self).o_proj(hidden_states[..., :0]), None


def _layer(kind: Any, config: Any, index: int) -> nn.Module:
    if getattr(config, "num_attention_heads", 1):
        return cast(nn.Module, kind(config, index))
    config.num_attention_heads = config.num_key_value_heads = 1  # classes divide by them
    layer: nn.Module = kind(config, index)
    for name, child in list(layer.named_children()):
        if hasattr(child, "num_key_value_groups"):
            setattr(layer, name, NoAttention(child))
    return layer


def __getattr__(name: str) -> Any:
    kind = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if not isinstance(kind, type):
        raise AttributeError(name)
    globals()[name] = type(name, (PerLayer, kind), {"__module__": __name__})
    return globals()[name]


class Block(dict[str, Any]):
    """What a configuration says of one block, as JSON and by attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


def _blocks(value: Any) -> Any:
    if isinstance(value, dict):
        return Block({name: _blocks(item) for name, item in value.items()})
    return [_blocks(item) for item in value] if isinstance(value, list) else value


#: widths that a factor says are multiples of it
STEP = 256


class DeciLMConfig(transformers.LlamaConfig):
    """The configuration of a Llama whose ``block_configs`` say how wide each feed-forward layer is, and which
    blocks are absent.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        sizes: dict[int, dict[str, int]] = {}
        for i, block in enumerate(block_configs):
            said = int(2 * (block["ffn"].get("ffn_mult") or 0) * kwargs.get("hidden_size", 0) / 3)
            sizes[i] = {"intermediate_size": block["ffn"].get("intermediate_size", -(-said // STEP) * STEP)}
            if block["attention"]["no_op"]:
                sizes[i] |= {"num_attention_heads": 0, "num_key_value_heads": 0}
        kwargs |= {"per_layer_config": sizes or None, "allow_global_per_layer_attribute_access": True}
        super().__init__(**kwargs)
        self.block_configs = _blocks(list(block_configs))


#: which modules of a layer belong to a block
_PARTS = {"attention": ("self_attn", "input_layernorm"), "ffn": ("mlp", "post_attention_layernorm")}


class DeciLMForCausalLM(PerLayer, transformers.LlamaForCausalLM):
    """A Llama with feed-forward layers of their own widths, as vLLM and others read it: files have no weights
    of absent blocks.
    """

    config_class = DeciLMConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        parts = tuple(
            f"model.layers.{index}.{part}."
            for index, blocks in enumerate(config.block_configs)
            for block, names in _PARTS.items()
            if blocks[block]["no_op"]
            for part in names
        )
        absent = {name for name, _ in self.named_parameters() if name.startswith(parts)}
        model = cast(Any, self)  # sets by now
        model._keys_to_ignore_on_save |= absent
        model._keys_to_ignore_on_load_missing |= absent
