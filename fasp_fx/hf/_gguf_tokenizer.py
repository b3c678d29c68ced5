"""Write a tokenizer into a GGUF file, if llama.cpp makes the same tokens of every text.

llama.cpp knows a few kinds of tokenizers by name. What a tokenizer does with text is compared with what is
done for a name, part by part, and anything that is left over is refused. Of a model that came from a GGUF
file, what that says of its tokenizer is written as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby, product
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFWriter, Keys, TokenType
from tokenizers import pre_tokenizers

from fasp_fx.base import warn
from fasp_fx.errors import ArgumentError, CalibrationWarning
from fasp_fx.storage import MANIFEST

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
    same = (file for file in files if count_shared(file, tokenizer))
    return next(same, files[0] if files else None)


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
