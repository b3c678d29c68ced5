"""What a GGUF file says of a tokenizer, held against stock llama.cpp."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers as hf
from llama_cpp import missing, predictions
from saved import GOLDEN
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors as post,
    trainers,
)

import fasp_fx
from fasp_fx.hf import Pruned, convert
from fasp_fx.hf._gguf import add_tokenizer, write_gguf
from fasp_fx.pruning import read_told

SIZE = 420
TRAINED_ON = (
    "The 42nd horse, it's said, WOULDN'T swim; 3,141 others did.\n\n  Über den Fluß — 河を渡る! then we'll"
    * 3
)
NASTY = [
    "",
    " ",
    "   ",
    " \n\n ",
    "\t\tx",
    " hello",
    "hello ",
    "don't WON'T we'll d'accord",
    "'S 's ' s ſ 'ſ",
    "ab" * 9,
    "1",
    "12",
    "123456",
    "3,141.5",
    "x1y22",
    "１２３ ⅷ ½²³ ٣٤٥",
    "café cafe\u0301",
    "e\u0301\u0323",
    "ﬁ ＡＢＣ ㎏",
    "日本語。中文，",
    "привет שלום مرحبا हिन्दी ไทย",
    "🙂👩‍👩‍👧🇩🇪👍🏽",
    "\u200b\ufeffz",
    "a\u00a0b\u2003c\u3000d",
    "a\r\nb\rc",
    "a<s>b <s> c</s>",
    "<|en d|> <s",
    "[PAD9] <0x41>",
    "▁a ▁ Ġb Ċ",
    "    def f(x):\n        return x\n",
    "UPPER MiXeD",
    '"q" (a)[b]{c} ... --- ***',
    "\\n \\u00e9 \x7f",
    "<think>hm</think> <think >",
]


def split(pattern: str, behaviour: str = "isolated", **options: bool) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behaviour, **options)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


@cache
def _trained(letters: bool) -> str:
    """A tokenizer.json of merges that were learned from words in bytes, or from letters as SentencePiece has
    them: with all merges that make a token, in the order of tokens.
    """
    made = Tokenizer(models.BPE(byte_fallback=letters, unk_token="<s>" if letters else None))
    made.normalizer = normalizers.Replace(" ", "▁") if letters else None
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never") if letters else WORDS
    special = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if letters)]
    alphabet = [] if letters else pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {
        "special_tokens": special,
        "initial_alphabet": alphabet,
        "show_progress": False,
    }
    made.train_from_iterator([TRAINED_ON], trainers.BpeTrainer(vocab_size=400, **options))
    own = json.loads(made.to_str())
    own["added_tokens"] = own["added_tokens"][:2]
    names = own["model"]["vocab"]
    if letters:
        pairs = ((name[:at], name[at:]) for name in [*names][258:] for at in range(1, len(name)))
        own["model"]["merges"] = [pair for pair in pairs if all(part in names for part in pair)]
    return json.dumps(own)


def tokenizer(pre: Any = WORDS, norm: Any = None, *, letters: bool = False, **options: Any) -> Any:
    """A small tokenizer.

    Args:
        letters: as SentencePiece.
        options: ``added`` tokens, a ``post`` processor, ``eos``, how many merges to ``drop``; and fields of
            the model.
    """
    own = json.loads(_trained(letters))
    own["model"]["merges"] = own["model"]["merges"][options.pop("drop", 0) :]
    added, ends = options.pop("added", []), options.pop("post", None)
    named = {"bos_token": "<s>", "eos_token": options.pop("eos", "</s>")}
    own["model"] |= options
    made = Tokenizer.from_str(json.dumps(own))
    made.normalizer, made.pre_tokenizer = norm, pre
    made.decoder = decoders.ByteLevel()
    made.add_tokens(added)
    if ends is not None:
        made.post_processor = post.TemplateProcessing(single=ends, special_tokens=[("<s>", 0), ("</s>", 1)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **named)


def metaspace(scheme: str) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


def sequence(*steps: Any) -> Any:
    return pre_tokenizers.Sequence(list(steps))


def spelled(pre: Any = None, norm: Any = LEGACY, **options: Any) -> Any:
    return tokenizer(pre, norm, letters=True, **options)


def token(text: str, **options: bool) -> list[AddedToken]:
    return [AddedToken(text, **{"normalized": False, **options})]


#: by the name of the split, or whether a space is put before the text
WRITTEN: dict[str, tuple[Any, Callable[[], Any]]] = {
    "gpt-2": ("gpt-2", tokenizer),
    "gpt-2 with ends": ("gpt-2", lambda: tokenizer(post="<s> $A </s>", added=token("<think>"))),
    "smollm": ("smollm", lambda: tokenizer(sequence(DIGITS, WORDS))),
    "llama 3": ("llama-bpe", lambda: tokenizer(sequence(split(LLAMA3), BYTES), ignore_merges=True)),
    "llama 3, merged": ("smaug-bpe", lambda: tokenizer(sequence(split(LLAMA3), BYTES))),
    "qwen 2": ("qwen2", lambda: tokenizer(sequence(split(LLAMA3.replace("{1,3}", "")), BYTES))),
    "llama 2": (True, lambda: spelled(added=token("<think>"))),
    "llama 2 without space": (False, lambda: spelled(norm=normalizers.Replace(" ", "▁"))),
    "metaspace": (
        False,
        lambda: spelled(pre_tokenizers.Metaspace(prepend_scheme="never", split=False), None),
    ),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "normalizer .*Lowercase": lambda: tokenizer(norm=normalizers.Lowercase()),
    "normalizer .*NFKC": lambda: spelled(norm=normalizers.Sequence([normalizers.NFKC(), LEGACY])),
    'normalizer .*"content": "e"': lambda: tokenizer(norm=normalizers.Replace("a", "e")),
    "pre_tokenizer .*add_prefix_space.: true": lambda: tokenizer(
        pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "pre_tokenizer .*individual_digits.: false": lambda: tokenizer(sequence(pre_tokenizers.Digits(), WORDS)),
    "pre_tokenizer .*Split.*": lambda: tokenizer(sequence(split(LLAMA3, "removed"), BYTES)),
    "pre_tokenizer .*Split": lambda: tokenizer(sequence(split(LLAMA3, invert=True), BYTES)),
    "pre_tokenizer .*Metaspace.*first": lambda: spelled(metaspace("first"), None),
    "pre_tokenizer .*Digits": lambda: spelled(DIGITS),
    "ignore_merges true": lambda: tokenizer(ignore_merges=True),
    "dropout 0.1": lambda: tokenizer(dropout=0.1),
    "end_of_word_suffix '</w>'": lambda: tokenizer(end_of_word_suffix="</w>"),
    "post_processor": lambda: tokenizer(post="<s> <s> $A"),
    "no eos_token": lambda: tokenizer(eos=None),
    "'<m>' with lstrip": lambda: tokenizer(added=token("<m>", lstrip=True)),
    "'<m>' with rstrip": lambda: tokenizer(added=token("<m>", rstrip=True)),
    "'m' with single_word": lambda: tokenizer(added=token("m", single_word=True)),
    "'<m>' with normalized": lambda: spelled(added=token("<m>", normalized=True)),
    "'abc' and 'bcde', which overlap": lambda: tokenizer(added=token("abc") + token("bcde")),
    "'m' and '<m>', which overlap": lambda: tokenizer(added=token("m") + token("<m>", normalized=True)),
    "[0-9]+ tokens, and the model 420": lambda: tokenizer(added=[f"<{number}>" for number in range(200)]),
    "merges that are not all": lambda: spelled(drop=1),
    'model "Unigram"': lambda: hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)]))
    ),
}


@pytest.mark.parametrize("part", REFUSED)
def test_what_llama_cpp_would_do_otherwise_is_refused_by_name(part: str) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=f"tokenizer TokenizersBackend has .*{part}"):
        add_tokenizer(gguf.GGUFWriter(Path(), "deci"), REFUSED[part](), SIZE)


@cache
def model() -> Any:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            head_dim=16,
            vocab_size=SIZE,
        )
    )


def said(file: Path, *names: str) -> list[Any]:
    fields = gguf.GGUFReader(file).fields
    return [fields[name].contents() if name in fields else None for name in names]


KEYS = [f"tokenizer.ggml.{name}" for name in ("pre", "add_space_prefix")]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", WRITTEN)
def test_llama_cpp_makes_the_same_tokens(kind: str, tmp_path: Path) -> None:
    expected, make = WRITTEN[kind]
    made, file = make(), tmp_path / "model.gguf"
    write_gguf(file, model(), "", made)
    assert expected in said(file, *KEYS)
    ends = said(file, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
    assert ends == [made("a").input_ids[0] == 0, made("a").input_ids[-1] == 1]
    if missing():
        pytest.skip(f"no llama.cpp: {missing()}")
    for text, own in zip(NASTY, predictions(file, NASTY, tmp_path), strict=True):
        assert own == made(text, add_special_tokens=False).input_ids, text


@pytest.fixture
def source(tmp_path: Path) -> Any:
    """A tokenizer that transformers read from a GGUF file, forgetting that digits stand alone."""
    own = model().config
    (tmp_path / "source").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "source" / "llama.gguf", "llama")
    writer.add_name("A Llama")
    writer.add_block_count(own.num_hidden_layers)
    writer.add_context_length(own.max_position_embeddings)
    writer.add_embedding_length(own.hidden_size)
    writer.add_feed_forward_length(own.intermediate_size)
    writer.add_head_count(own.num_attention_heads)
    writer.add_layer_norm_rms_eps(own.rms_norm_eps)
    add_tokenizer(writer, tokenizer(sequence(DIGITS, WORDS)), SIZE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return hf.AutoTokenizer.from_pretrained(tmp_path / "source", gguf_file="llama.gguf")


def test_what_a_gguf_file_says_of_its_tokenizer_is_kept(source: Any, tmp_path: Path) -> None:
    says = "splits text as 'smollm', and transformers otherwise"
    names = ("general.name", "tokenizer.ggml.pre")
    with pytest.warns(fasp_fx.errors.CalibrationWarning, match=says):
        write_gguf(tmp_path / "model.gguf", model(), "", source)
    assert said(tmp_path / "model.gguf", *names) == ["A Llama", "smollm"]
    # and from a folder of another format
    dense = Pruned(model(), *read_told(GOLDEN / "plain"), source, "plain")
    again = fasp_fx.load(dense.save_pretrained(tmp_path / "plain"))
    file = convert(again, "gguf").save_pretrained(tmp_path / "gguf") / "model.gguf"
    assert said(file, *names) == ["A Llama", "smollm"]
    with pytest.raises(fasp_fx.ArgumentError, match="has other tokens than its GGUF file"):
        add_tokenizer(gguf.GGUFWriter(Path(), "deci"), source, SIZE + 1)
