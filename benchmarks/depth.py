"""What each attention, each feed-forward block and each layer of SmolLM2-135M is worth: the rise of the loss
without it, nothing repaired.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from _protocol import chunks, smollm2
from torch import nn


@contextmanager
def silent(block: nn.Module) -> Iterator[None]:
    """Let a block add nothing to the residual stream inside."""

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        return (
            (torch.zeros_like(output[0]), *output[1:])
            if isinstance(output, tuple)
            else torch.zeros_like(output)
        )

    handle = block.register_forward_hook(nothing)
    try:
        yield
    finally:
        handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--text", type=pathlib.Path, required=True, help="WikiText-2 validation text (wikitext2-valid.txt)"
    )
    parser.add_argument("--chunks", type=int, default=4, help="chunks of 1,024 tokens, from the first on")
    options = parser.parse_args()
    model, tokenizer = smollm2("cpu")
    ids = chunks(tokenizer, options.text, "cpu")[: options.chunks]

    def loss(*without: nn.Module) -> float:
        with torch.no_grad(), ExitStack() as stack:
            for block in without:
                stack.enter_context(silent(block))
            return float(model(input_ids=ids, labels=ids, use_cache=False).loss)

    dense = loss()
    print(f"dense: {dense:.3f}")
    for number, layer in enumerate(model.model.layers):
        attention, feed_forward = layer.self_attn, layer.mlp
        rises = [
            loss(*without) - dense for without in ((attention,), (feed_forward,), (attention, feed_forward))
        ]
        print(
            f"layer {number}: attention {rises[0]:.3f}, feed-forward {rises[1]:.3f}, both {rises[2]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
