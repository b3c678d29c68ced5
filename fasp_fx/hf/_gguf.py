"""Write a Llama whose layers have sizes of their own as a GGUF file of the architecture ``deci``, which
llama.cpp and what is built on it read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from fasp_fx.errors import ArgumentError

from ._gguf_tokenizer import add_tokenizer

#: neurons of a feed-forward layer that gives zeros: llama.cpp skips the attention before an absent one too
_ZEROS = 32
#: the largest number of a type; blocks have a factor of 16 bits
_LARGEST = {"F16": 65504, "Q8_0": 127 * 65504, "Q4_0": 8 * 65504}
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F32"}


def write_gguf(file: Path, model: Any, tensors: str, tokenizer: Any = None) -> None:
    """Write a model.

    Args:
        model: of transformers' Llama; its ``config.per_layer_config`` says the sizes of its layers.
        tensors: the type of matrices, as the ``gguf`` package calls it; ``""``: the model's own.
        tokenizer: written into the file; ``None``: the file has token numbers alone.

    Raises:
        ArgumentError: the format cannot hold its positions, its tokenizer, or a matrix in that type.
    """
    writer, weights = describe_gguf(file, model, tensors, tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in weights:
        writer.write_tensor_data(gguf.quantize(tensor.detach().float().cpu().numpy(), kind))
    writer.close()


def describe_gguf(
    file: Path, model: Any, tensors: str, tokenizer: Any
) -> tuple[GGUFWriter, list[tuple[Tensor, GGMLQuantizationType]]]:
    """What :func:`write_gguf` will write, and with what; nothing is written yet."""
    config, layers = model.config, list(model.config.per_layer_config)
    writer = GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DECI])
    header = {
        "name": type(model).__name__.removeprefix("PerLayer"),
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": len(layers),
        "feed_forward_length": [layer.intermediate_size or _ZEROS for layer in layers],
        # llama.cpp takes a model whose first layer has no heads for one without attention: some give zeros.
        "head_count": [
            layer.num_attention_heads or _heads_of_zeros(config) * (not i) for i, layer in enumerate(layers)
        ],
        "head_count_kv": [
            layer.num_key_value_heads or _heads_of_zeros(config) * (not i) for i, layer in enumerate(layers)
        ],
        **dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), config.head_dim),
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
    }
    for name, value in header.items():
        getattr(writer, f"add_{name}")(value)
    kind = tensors or _TYPES[model.dtype]
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    weights = []
    for name, tensor in _tensors(model, layers):
        storage = _type(name, tensor, kind)
        weights.append((tensor, storage))
        raw = storage != GGMLQuantizationType.F32
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, storage) if raw else tuple(tensor.shape)
        number: Any = np.dtype(np.uint8 if raw else np.float32)
        writer.add_tensor_info(name, shape, number, int(np.prod(shape)) * number.itemsize, storage)
    return writer, weights


def _heads_of_zeros(config: Any) -> int:
    """As many as fill whole blocks of a row."""
    return _ZEROS // math.gcd(_ZEROS, config.head_dim)


def bytes_each(weight: Tensor, tensors: str) -> float:
    """How many bytes a file takes for each number of a weight.

    Args:
        tensors: as for :func:`write_gguf`.
    """
    block, size = gguf.GGML_QUANT_SIZES[_held_as(weight, tensors or _TYPES[weight.dtype])]
    return size / block


def _held_as(tensor: Tensor, kind: str) -> GGMLQuantizationType:
    """Vectors are in float32."""
    return GGMLQuantizationType[kind if tensor.dim() > 1 else "F32"]


def _type(name: str, tensor: Tensor, kind: str) -> GGMLQuantizationType:
    """How a tensor is held.

    Raises:
        ArgumentError: its rows are no whole blocks, or a number is too large.
    """
    storage = _held_as(tensor, kind)
    block, _ = gguf.GGML_QUANT_SIZES[storage]
    if tensor.shape[-1] % block:
        raise ArgumentError(
            f"'{name}' has rows of {tensor.shape[-1]} numbers, and {kind} holds blocks of {block}; choose"
            f" another type, or have widths that are multiples of {block}"
        )
    low, high = tensor.detach().aminmax()
    largest = max(float(-low), float(high))
    if largest > _LARGEST.get(storage.name, largest):
        raise ArgumentError(
            f"'{name}' has a number of the size {largest:.6g}, and {kind} holds none beyond"
            f" {_LARGEST[storage.name]}; choose 'gguf-bf16' or 'gguf'"
        )
    return storage


def _tensors(model: Any, layers: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, by its name there.

    Raises:
        ArgumentError: positions turn in a way that the file cannot say.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(layers))
    tied = model.config.tie_word_embeddings
    without = [f"model.layers.{i}." for i, said in enumerate(layers) if i and not said.num_attention_heads]
    absent = tuple(layer + part for layer in without for part in ("self_attn.", "input_layernorm."))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(absent):
            continue
        if not tensor.numel():
            width = _ZEROS if ".mlp." in name else model.config.head_dim * _heads_of_zeros(model.config)
            tensor = tensor.new_zeros([size or width for size in tensor.shape])
        file_name = names.get_name(name, try_suffixes=(".weight",))
        if file_name is None:
            raise ArgumentError(f"a GGUF file has no place for '{name}'; choose another format")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # The file has the two numbers that turn together side by side, the model half a head apart.
            halves = tensor.reshape(-1, 2, model.config.head_dim // 2, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if not (tied and name == "lm_head.weight"):
            yield file_name, tensor
    rotary, width = model.get_decoder().rotary_emb, model.config.head_dim
    if rotary.attention_scaling != 1 or rotary.rope_type in ("dynamic", "longrope"):
        raise ArgumentError(
            f"a GGUF file has no positions of the kind {rotary.rope_type!r} here; choose another format"
        )
    powers = torch.arange(0, width, 2, device=rotary.inv_freq.device) / width
    factors = model.config.rope_parameters["rope_theta"] ** -powers / rotary.inv_freq
    if not torch.allclose(factors, torch.ones_like(factors)):
        yield "rope_freqs.weight", factors
