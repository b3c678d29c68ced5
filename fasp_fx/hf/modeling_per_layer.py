"""Models of transformers whose layers have sizes of their own.

``PerLayerLlamaForCausalLM`` is ``LlamaForCausalLM`` each of whose layers is built from its own configuration,
``config.per_layer_config[i]``, and so for every class of transformers that builds its layers from a
configuration and a number. This file needs nothing but transformers and is saved along with a model, so that
``from_pretrained(folder, trust_remote_code=True)`` loads it.
"""

from typing import Any, cast

import transformers
from torch import nn

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
                    stack[index] = type(layer)(config.per_layer_config[index], index)
        cast(Any, self).post_init()


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
        return Block({name: _blocks(own) for name, own in value.items()})
    return [_blocks(own) for own in value] if isinstance(value, list) else value


class DeciLMConfig(transformers.LlamaConfig):
    """The configuration of a Llama whose ``block_configs`` say how wide each feed-forward layer is."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        sizes = {
            i: {"intermediate_size": own["ffn"]["intermediate_size"]} for i, own in enumerate(block_configs)
        }
        kwargs |= {"per_layer_config": sizes or None, "allow_global_per_layer_attribute_access": True}
        super().__init__(**kwargs)
        self.block_configs = _blocks(list(block_configs))


class DeciLMForCausalLM(PerLayer, transformers.LlamaForCausalLM):
    """A Llama with feed-forward layers of their own widths, as vLLM and others read it."""

    config_class = DeciLMConfig
