"""What a command works on: causal language models and their tokenizers, from a folder, the hub or a GGUF
file, dense or pruned; and text, of a file or of the model itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from fasp_fx.base import Scratch, device_of, keep_weights, reading_gguf, tolerable
from fasp_fx.errors import ArgumentError, CalibrationError, FaspError, StoreError, first_line
from fasp_fx.hf import (
    KIND,
    PLAIN,
    Pruned,
    check_layers,
    class_in,
    load_offloaded,
    read_pruned,
    refuse_incomplete,
    write_texts,
)
from fasp_fx.pruning import Report
from fasp_fx.storage import MANIFEST, is_save, read_manifest, read_text, verify

from ._console import Stages

# Transformers and the hub do not write to the terminal.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

#: lies beside models whose layers have sizes of their own
_OWN_CODE = "modeling_per_layer.py"


def _named(model: str) -> tuple[str, dict[str, Any]]:
    """What transformers' loaders take for a command line argument: a GGUF file is named beside its folder.

    Raises:
        FaspError: it says a number of layers that it does not hold, which transformers would list one by one,
            or it is a GGUF file that was written for llama.cpp.
    """
    path = Path(model)
    if path.suffix.lower() != ".gguf" or not path.is_file():
        if (path / "config.json").is_file():
            check_layers(json.loads((path / "config.json").read_text("utf-8")))
        return model, {}
    if (path.parent / MANIFEST).is_file():
        raise ArgumentError(
            f"'{model}' was written for llama.cpp, whose own tools measure it; give its folder,"
            f" '{path.parent}', which holds the same model for all else, with weights that are not quantised"
        )
    reader = gguf.GGUFReader(path)
    layers = {block[1] for tensor in reader.tensors if (block := re.match(r"blk\.(\d+)\.", tensor.name))}
    said = [field.contents() for name, field in reader.fields.items() if name.endswith(".block_count")]
    if said != [len(layers)]:
        raise ArgumentError(
            f"'{model}' holds weights of {len(layers)} layers, and its configuration says {said}; give the"
            " complete model"
        )
    return str(path.parent), {"gguf_file": path.name}


def load_tokenizer(model: str) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        ArgumentError: it cannot be loaded.
    """
    with _loading(model, "the tokenizer of ") as (where, options):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    tokenizer.name_or_path = model  # the very file: transformers remembers its folder alone
    return tokenizer


def load_model(
    model: str, *, dtype: str = "auto", device: torch.device | str = "cpu", scratch: Scratch | None = None
) -> Any:
    """The model in evaluation mode, with its weights on ``device``.

    Args:
        dtype: ``"auto"`` for the one it was stored in, or its name.
        scratch: files to hold the weights instead. Those of a folder are then never all in memory; others
            are, while they are loaded.

    Raises:
        ArgumentError: it cannot be loaded.
    """
    with _loading(model) as (where, options):
        if scratch is not None and not options and Path(where).is_dir():
            return load_offloaded(
                where, scratch, dtype=None if dtype == "auto" else getattr(torch, dtype)
            ).to(device)
        options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        kind: Any = _own_class(where) or AutoModelForCausalLM
        loaded, info = kind.from_pretrained(where, **options)
    refuse_incomplete(loaded, info, model)
    if getattr(loaded.config, "quantization_config", None) and getattr(loaded, "hf_quantizer", None) is None:
        raise ArgumentError(
            f"the configuration of '{model}' names a quantisation that transformers does not know, so the"
            ' weights cannot be read as they are meant; remove "quantization_config" if they are not'
            " quantised, or give the model before quantisation"
        )
    if scratch is not None:
        keep_weights(loaded, scratch)
    return loaded.eval().to(device)


def load_structure(model: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model on the meta device, without any weight in memory, and what it is called with.

    Raises:
        ArgumentError: its configuration cannot be loaded.
    """
    with _loading(model) as (where, options):
        own = _own_class(where)
        config = (own.config_class if own else AutoConfig).from_pretrained(where, **options)
        with torch.device("meta"):
            empty = (own(config) if own else AutoModelForCausalLM.from_config(config)).eval()
    return empty, {"input_ids": torch.zeros(1, 16, dtype=torch.long), "use_cache": False}


def _own_class(where: str) -> Any:
    """The class of a folder whose layers have sizes of their own, which somebody trained and wrote anew; its
    code is here, so that the file of it in the folder is not run.
    """
    return class_in(Path(where))[1] if (Path(where) / _OWN_CODE).is_file() else None


def report_in(model: str) -> Report | None:
    """The report in a folder that ``prune`` wrote; ``None`` of another model.

    Raises:
        StoreError: it is missing or damaged.
    """
    folder = Path(model)
    if not (is_saved(model) or is_save(folder, PLAIN)):
        return None
    verify(folder, read_manifest(folder).kind, ["report.json"])
    return Report.from_json(read_text(folder / "report.json"))


def is_saved(model: str) -> bool:
    """Whether a command line argument is a folder that fasp_fx wrote, rather than a model of transformers."""
    folder = Path(model)
    stock = is_save(folder, PLAIN) and not (folder / _OWN_CODE).is_file()
    return (folder / MANIFEST).is_file() and not stock


def load_pruned(folder: Path, device: torch.device) -> Pruned:
    """A pruned model as :func:`fasp_fx.hf.prune` returned it, of either kind of folder.

    Raises:
        StoreError: a file is missing, damaged or of another version, or the folder is no pruned model.
        ArgumentError: there is no tokenizer with it.
    """
    if not (folder / MANIFEST).is_file() or read_manifest(folder).kind not in (KIND, PLAIN):
        raise StoreError(
            f"'{folder}' holds no pruned language model; give a folder that `fasp-fx prune` wrote"
        )
    pruned = read_pruned(folder, device)
    return replace(pruned, tokenizer=pruned.tokenizer or load_tokenizer(str(folder)))


def load_any(model: str, device: torch.device, dtype: str) -> tuple[Any, Any]:
    """A dense or a pruned model and its tokenizer.

    Raises:
        FaspError: it cannot be loaded, or not in that dtype.
    """
    if not is_saved(model):
        return load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    if dtype != "auto":
        raise ArgumentError(
            "--dtype does not apply to a pruned model: it was chosen when the model was pruned"
        )
    pruned = load_pruned(Path(model), device)
    return pruned.model, pruned.tokenizer


def check_length(model: Any, length: int) -> None:
    """Refuse chunks longer than the model has positions for, if it says how many that is.

    Raises:
        ArgumentError: names both.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or length
    if length > limit:
        raise ArgumentError(
            f"--length {length} is more than the {limit} positions of the model; use a smaller --length"
        )


def check_tokens(model: Any, tokens: Tensor, what: str) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        what: what holds them, for the message.

    Raises:
        ArgumentError: names the token and the size of the vocabulary.
    """
    size = model.config.get_text_config().vocab_size
    if int(tokens.max()) >= size:
        raise ArgumentError(
            f"{what} has the token {int(tokens.max())}, and the model knows those from 0 to {size - 1}; give"
            " the tokenizer that belongs to the model"
        )


@contextmanager
def _loading(model: str, what: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Gives what :func:`_named` does, to load a model, or ``what`` of it, inside."""
    try:
        with reading_gguf():
            yield _named(model)
    except FaspError:
        raise
    except tolerable(Exception) as error:  # loaders raise whatever the files make them trip over
        raise ArgumentError(
            f"{what}'{model}' cannot be loaded: {first_line(error)}; give a causal language model with its"
            " tokenizer: anything that AutoModelForCausalLM loads"
        ) from error


# --- Text to calibrate or train on, and to measure on.


#: stands for text that the model writes itself
SELF = "self"
#: tokens of such a text, at most
_OWN = 256


@dataclass
class Texts:
    """The text of one command: chunks to use, and chunks to measure on, which the first do not hold.

    Attributes:
        sources, batches: files, and :data:`SELF`, of which chunks to use come, and how many of all together:
            as many tokens of each file, as far as it goes, and of what the model writes as many as of all
            files.
        text, eval_batches: where chunks to measure on come from, and how many; ``None``: what is left of the
            files, and where that is nothing, the model writes them.
        length: tokens of each chunk.
        seed: of what the model writes.
        use: what the chunks are for that are not measured on.
        recover: how many times as many tokens are trained on as calibrate.
        used, evaluation: the chunks ``[chunks, length]`` by what they are, once they are read or written.
        training: those that are used, and more of the same sources, to train on.
        passes: how often these are trained on: until the file that goes farthest was as often as asked for.
        named: the sources, in words.
    """

    sources: tuple[str, ...]
    batches: int
    text: Path | None
    eval_batches: int
    length: int
    seed: int
    use: str = "calibration"
    recover: int = 1
    passes: int = 1
    used: dict[str, Tensor] = field(default_factory=dict)
    training: dict[str, Tensor] = field(default_factory=dict)
    evaluation: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [source if source == SELF else Path(source).name for source in self.sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ArgumentError(f"two sources of text are named '{twice[0]}'; give each once, or rename one")
        self._names, self.named = dict(zip(self.sources, names, strict=True)), ", ".join(names)
        # As many sources as there are files, so that own text counts for as much as all of them.
        self._parts = max(len(names) - 1, 1) if SELF in names else 0
        self._share = -(-self.batches // (len([name for name in names if name != SELF]) + self._parts))
        alone = self.sources == (SELF,)
        self._own = self.length if alone else min(self.length, _OWN)

    def read(self, tokenizer: Any) -> None:
        """Read what comes from files.

        Raises:
            CalibrationError: a file does not hold enough.
        """
        passes = []
        for source, name in self._names.items():
            if source != SELF:
                chunks = read_chunks(Path(source), tokenizer, self.length)
                # Where no other text is given, what is measured on is of this one: a quarter at least.
                most = len(chunks) - len(chunks) // 4
                self.used[name] = chunks[: min(self._share, most if self.text is None else len(chunks))]
                asked = len(self.used[name]) * self.recover
                self.training[name] = chunks[: max(len(self.used[name]), min(asked, most))]
                passes.append(-(-asked // len(self.training[name])))
                if self.text is None and len(chunks) > len(self.training[name]):
                    self._measure_on(name, chunks, len(self.training[name]))
        self.passes = min(passes, default=1)
        if self.text is not None:
            chunks = read_chunks(self.text, tokenizer, self.length)
            files = ((source, name) for source, name in self._names.items() if source != SELF)
            first = next(
                (len(self.training[name]) for source, name in files if self.text.samefile(source)), 0
            )
            if first >= len(chunks):
                raise CalibrationError(
                    f"all {len(chunks)} chunks of '{self.text}' are used, leaving none to measure on;"
                    " use fewer --batches or a smaller --length"
                )
            self._measure_on(self.text.name, chunks, first)

    def _measure_on(self, name: str, chunks: Tensor, first: int) -> None:
        some = chunks[first : first + self.eval_batches]
        label = f"chunks {first} to {first + len(some) - 1} of {name} ({len(some)} x {self.length} tokens)"
        self.evaluation[label] = some

    def check_against(self, model: Any) -> None:
        """Refuse text that the model does not take, and a model that does not compute.

        Raises:
            FaspError: says why.
        """
        check_length(model, self.length)
        for use, texts in ((f"for {self.use}", self.training), ("to measure on", self.evaluation)):
            for name, chunks in texts.items():
                check_tokens(model, chunks, f"the text {use}, {name},")
                check_output(model, chunks[0])

    def write(self, model: Any, tokenizer: Any, stages: Stages, to_use: bool = True) -> None:
        """Let the model write what no file gives and what it has not written yet.

        Args:
            to_use: whether more is needed than what is measured on.
        """
        needed = to_use and SELF in self.sources and SELF not in self.used
        used = -(-self._share * self.length // self._own)
        to_train = -(-used * self.recover // self.passes)
        count = self._parts * to_train if needed else 0
        to_measure = 0 if self.evaluation else self.eval_batches
        if count + to_measure:
            stages.begin(f"letting the model write {count + to_measure} texts of {self._own} tokens")
            how: dict[str, Any] = {"seed": self.seed, "progress": stages.update}
            written = write_texts(model, tokenizer, count + to_measure, self._own, **how)
            for place, part in enumerate(written[:count].split(to_train) if count else ()):
                name = SELF if not place else f"{SELF}, {place + 1}"
                self.used[name], self.training[name] = part[:used], part
            label = (
                f"text that the model wrote itself, not seen by this {self.use}"
                f" ({to_measure} x {self._own} tokens)"
            )
            self.evaluation |= {label: written[count:]} if to_measure else {}


def read_chunks(file: Path, tokenizer: Any, length: int) -> Tensor:
    """A text file, tokenised whole without special tokens and cut into consecutive chunks; a shorter rest is
    dropped.

    Returns:
        Tokens ``[chunks, length]``.

    Raises:
        CalibrationError: the file is no text, or holds less than one chunk.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"'{file}' is not UTF-8 text; convert it") from error
    tokens = torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
    )
    count = len(tokens) // length
    if count == 0:
        raise CalibrationError(
            f"'{file}' holds {len(tokens)} tokens, less than one chunk of {length}; use a smaller --length or"
            " more text"
        )
    return tokens[: count * length].reshape(count, length)


def check_output(model: Any, chunk: Tensor) -> None:
    """Refuse a model that does not compute: one whose predictions for a text are not finite.

    Args:
        chunk: tokens ``[length]``.

    Raises:
        CalibrationError: says so.
    """
    with torch.no_grad():
        logits = model(input_ids=chunk[None].to(device_of(model)), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise CalibrationError(
            "what the model predicts is not finite; give an undamaged model, or another --dtype"
        )
