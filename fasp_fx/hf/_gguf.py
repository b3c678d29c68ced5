"""Write a Llama whose layers have sizes of their own as a GGUF file of the architecture ``deci``, which
llama.cpp and what is built on it read; and into it a tokenizer, if llama.cpp makes the same tokens of every
text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import groupby, product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, Keys, LlamaFileType, TokenType
from tokenizers import pre_tokenizers
from torch import Tensor

from fasp_fx.base import warn
from fasp_fx.errors import ArgumentError, CalibrationWarning
from fasp_fx.storage import MANIFEST

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
    tied, width = model.config.tie_word_embeddings, model.config.head_dim
    without = [f"model.layers.{i}." for i, said in enumerate(layers) if i and not said.num_attention_heads]
    absent = tuple(layer + part for layer in without for part in ("self_attn.", "input_layernorm."))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(absent) or (tied and name == "lm_head.weight"):
            continue
        if not tensor.numel():
            zeros = _ZEROS if ".mlp." in name else width * _heads_of_zeros(model.config)
            tensor = tensor.new_zeros([size or zeros for size in tensor.shape])
        file_name = names.get_name(name, try_suffixes=(".weight",))
        if file_name is None:
            raise ArgumentError(f"a GGUF file has no place for '{name}'; choose another format")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # The file has the two numbers that turn together side by side, the model half a head apart.
            tensor = tensor.reshape(-1, 2, width // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        yield file_name, tensor
    rotary = model.get_decoder().rotary_emb
    if rotary.attention_scaling != 1 or rotary.rope_type in ("dynamic", "longrope"):
        raise ArgumentError(
            f"a GGUF file has no positions of the kind {rotary.rope_type!r} here; choose another format"
        )
    powers = torch.arange(0, width, 2, device=rotary.inv_freq.device) / width
    factors = model.config.rope_parameters["rope_theta"] ** -powers / rotary.inv_freq
    if not torch.allclose(factors, torch.ones_like(factors)):
        yield "rope_freqs.weight", factors


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_AT = {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}
_AT_DIGITS = _AT | {"pattern": {"Regex": _LLAMA3.replace("{1,3}", "")}}
_DIGITS = {"type": "Digits", "individual_digits": True}
_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = _WORDS | {"use_regex": False}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_NEVER = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
#: the kinds of llama.cpp: a model, how text is split or whether a space is put before it, and what parts of a
#: tokenizer.json say the same, and nothing more
_KINDS: tuple[tuple[str, str | bool, tuple[Any, ...]], ...] = (
    ("gpt2", "gpt-2", ("BPE", [], [_WORDS], False)),
    ("gpt2", "smollm", ("BPE", [], [_DIGITS, _WORDS], False)),
    ("gpt2", "llama-bpe", ("BPE", [], [_AT, _BYTES], True)),
    ("gpt2", "smaug-bpe", ("BPE", [], [_AT, _BYTES], False)),
    ("gpt2", "qwen2", ("BPE", [], [_AT_DIGITS, _BYTES], False)),
    ("llama", True, ("BPE, byte_fallback", [_PREPEND, _SPACES], [], False)),
    ("llama", False, ("BPE, byte_fallback", [_SPACES], [], False)),
    ("llama", False, ("BPE, byte_fallback", [], [_NEVER], False)),
)
_PARTS = ("model", "normalizer", "pre_tokenizer", "ignore_merges")
#: fields of a model that are looked at, or do not matter where there is a token for every byte
_KNOWN = {"type", "vocab", "merges", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges"}
#: how SentencePiece calls bytes
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, size: int) -> None:
    """Write a tokenizer.

    Args:
        tokenizer: ``None``: the file has token numbers alone.
        size: how many tokens the model has.

    Raises:
        ArgumentError: llama.cpp would make other tokens of some text; names the part that says so.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    backend, source = getattr(tokenizer, "backend_tokenizer", None), source_of(tokenizer)
    data = {"model": {"type": "Python"}} if backend is None else json.loads(backend.to_str())
    kind, part = _kind(data)
    if source is None:
        faults = [part] if kind is None else _left_over(tokenizer, data, size)
    else:
        faults = ["other tokens than its GGUF file, or than the model"] * (
            count_shared(source, tokenizer) != size
        )
    for fault in faults:
        raise ArgumentError(
            f"a GGUF file cannot say that the tokenizer {type(tokenizer).__name__} has {fault}: llama.cpp"
            " would do otherwise; prune without tokenizer and give llama.cpp token numbers, or change the"
            " tokenizer (docs/formats.md)"
        )
    if source is not None:
        copy_tokenizer(source, writer)
        said = (source.get_field(Keys.Tokenizer.PRE) or source.fields[Keys.Tokenizer.MODEL]).contents()
        if kind is None or said not in kind:
            warn(
                f"the GGUF file that the tokenizer was read from splits text as {said!r}, and transformers"
                " otherwise: what it made of calibration text is here and there not what llama.cpp makes of"
                " it; the file that is written splits text as the one that was read",
                CalibrationWarning,
            )
    elif kind is not None:
        _write(writer, tokenizer, data, size, *kind)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def source_of(tokenizer: Any) -> GGUFReader | None:
    """The GGUF file that transformers read a tokenizer from, which it does not remember: one in the folder
    that was read, if there is no other tokenizer, with the same tokens if one has them. That of a folder
    which was saved here counts too.
    """
    named = getattr(tokenizer, "name_or_path", "")
    path = Path(named)
    if not named or ((path / "tokenizer_config.json").is_file() and not (path / MANIFEST).is_file()):
        return None
    files = [*map(GGUFReader, [path] if path.is_file() else sorted(path.glob("*.gguf")))]
    return next((file for file in files if count_shared(file, tokenizer)), files[0] if files else None)


def count_shared(source: GGUFReader, tokenizer: Any) -> int:
    """How many tokens a GGUF file has, if a tokenizer has the same; transformers may add some behind them."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    said = field.contents() if (field := source.get_field(Keys.Tokenizer.LIST)) else []
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    # Transformers spells some tokens in bytes that the file does not.
    same = (a == b or a == "".join(part for part, _ in spell(b)) for a, b in zip(tokens, said))
    return len(said) if len(said) <= len(tokens) and all(same) else 0


def keep_source(tokenizer: Any, folder: Path) -> None:
    """Write beside a tokenizer what the GGUF file says of it that it was read from, if there is one."""
    source = source_of(tokenizer)
    if source is not None and not (folder / "model.gguf").is_file():
        writer = GGUFWriter(folder / "tokenizer.gguf", "deci")
        copy_tokenizer(source, writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()


def copy_tokenizer(source: GGUFReader, writer: GGUFWriter) -> None:
    """Write what a GGUF file says of its name and of its tokenizer, but for the chat template."""
    for name, field in source.fields.items():
        if name.startswith("tokenizer.ggml.") or name == "general.name":
            writer.kv_data[0].pop(name, None)
            writer.add_key_value(name, field.contents(), *field.types)


def _kind(data: Any) -> tuple[tuple[str, str | bool] | None, str]:
    """The kind that does with text what a tokenizer does, or which part of that no kind does."""
    model, fitting = data["model"], list(_KINDS)
    kind = model["type"] + ", byte_fallback" * model.get("byte_fallback", False)
    steps = (_steps(data.get(name)) for name in ("normalizer", "pre_tokenizer"))
    for at, value in enumerate((kind, *steps, model.get("ignore_merges"))):
        fitting = [each for each in fitting if each[2][at] == value]
        if not fitting:
            return None, f"{_PARTS[at]} {json.dumps(value, ensure_ascii=False):.200}"
    return fitting[0][:2], ""


def _steps(part: Any) -> list[Any]:
    """What is done with text, one after the other."""
    steps = [] if part is None else part.get("normalizers", part.get("pretokenizers", [part]))
    return [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]


def _left_over(tokenizer: Any, data: Any, size: int) -> list[str]:
    """What else a tokenizer does that llama.cpp does not."""
    model, added, names = data["model"], data["added_tokens"], data["model"]["vocab"]
    letters = _BYTE_TOKENS if model["byte_fallback"] else {*pre_tokenizers.ByteLevel.alphabet()}
    flags = ("lstrip", "rstrip", "single_word", *["normalized"] * (data["normalizer"] is not None))
    faults = {
        **{f"{name} {model[name]!r:.80}": model[name] for name in sorted(model.keys() - _KNOWN)},
        **{f"the token {each['content']!r:.80} with {name}": each[name] for each in added for name in flags},
        **{text: True for one in added for other in added for text in _overlap(one, other)},
        "no token for some bytes": not names.keys() >= letters,
        f"{len(tokenizer)} tokens, and the model {size}": len(tokenizer) > size,
        "no eos_token": tokenizer.eos_token_id is None,  # llama.cpp takes one of its own choice
        "a post_processor that adds more than bos_token and eos_token": not _ends(tokenizer),
        "merges that are not all that make a token, in the order of tokens": model["byte_fallback"]
        and not _merges_all(names, added, model["merges"]),
    }
    return [what for what, is_so in faults.items() if is_so]


def _ends(tokenizer: Any) -> list[tuple[bool, bool]]:
    """Whether the tokens of the beginning and of the end are put around a text; nothing, if it is others."""
    whole, text = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    return [
        put for put in product((False, True), (False, True)) if whole == bos * put[0] + text + eos * put[1]
    ]


def _overlap(one: Any, other: Any) -> list[str]:
    """What there is to say of two added tokens that can overlap, where transformers takes the first and
    llama.cpp the longest, or one of which, that transformers looks for later, is in the other.
    """
    first, second = one["content"], other["content"]
    meet = any(second.startswith(first[at:]) and first[at:] != second for at in range(1, len(first)))
    inside = one["normalized"] != other["normalized"] and first in second
    is_odd = inside or (meet and len({*first, *second}) > 1)
    return [f"the tokens {first!r:.80} and {second!r:.80}, which overlap"] * is_odd


def _merges_all(names: Mapping[str, int], added: list[Any], merges: list[list[str]]) -> bool:
    """Whether merges are those of SentencePiece, as llama.cpp does them: all that make a token, in the order
    of tokens.
    """
    merged, pairs = [*map("".join, merges)], {(left, right) for left, right in merges}
    tokens = names.keys() - {token["content"] for token in added}
    parts = ((token[:at], token[at:]) for token in tokens for at in range(1, len(token)))
    return len([*groupby(merged)]) == len({*merged}) and all(
        pair in pairs or any(len(part) > 1 and part not in names for part in pair) for pair in parts
    )


def _write(writer: GGUFWriter, tokenizer: Any, data: Any, size: int, model: str, split: Any) -> None:
    """Write a tokenizer of a kind that llama.cpp has."""
    added, merges = {token["id"]: token for token in data["added_tokens"]}, data["model"]["merges"]
    names = {number: text for text, number in data["model"]["vocab"].items()}
    tokens = [added[i]["content"] if i in added else names.get(i, f"[PAD{i}]") for i in range(size)]
    writer.add_tokenizer_model(model)
    if model == "llama":  # what is merged first has the highest score
        ranks = {left + right: -float(rank) for rank, (left, right) in reversed([*enumerate(merges)])}
        writer.add_token_scores([ranks.get(token, -1e9) for token in tokens])
        writer.add_add_space_prefix(split)
    else:
        writer.add_tokenizer_pre(split)
        writer.add_token_merges([*map(" ".join, merges)])
    writer.add_token_list(tokens)
    kinds = {i: TokenType.BYTE if text in _BYTE_TOKENS else TokenType.NORMAL for i, text in names.items()}
    kinds |= {
        i: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED for i, token in added.items()
    }
    writer.add_token_types([kinds.get(i, TokenType.UNUSED) for i in range(size)])
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    for name, put in zip(("bos", "eos"), _ends(tokenizer)[0], strict=True):
        getattr(writer, f"add_add_{name}_token")(put)
