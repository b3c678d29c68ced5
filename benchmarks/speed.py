"""How fast SmolLM2-135M pruned with round_to=16 is, against the dense model: a prefill of 1,024 tokens, and
tokens per second of ``generate()``, eager and compiled, beside the ratio of multiply-accumulates.

Every subject runs in turn, in one process; figures are medians over rounds. A prefill is held against the
Hugging Face model and against the captured dense program. Both sides of a generation compile their forward
with ``torch.compile(dynamic=True)``, since sizes grow with every token; the dense model also with a static
cache, and its better way counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from _protocol import arguments, chunks, interleaved, macs, ratio, smollm2
from torch import Tensor

import fasp_fx
from fasp_fx import hf
from fasp_fx.passes import finish


def report(
    label: str, subjects: dict[str, Callable[[], Any]], rounds: int, ideal: float, unit: float
) -> None:
    """One line: the amount of work (``unit``) per second of each, and how much faster the pruned model is."""
    with torch.no_grad():
        times = interleaved(subjects, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    faster = {name: ratio(times, name, "pruned") for name in times if name != "pruned"}
    print(
        f"  {label:<9}"
        + ", ".join(f"{name} {1000 * s:.0f} ms ({unit / s:.1f} per second)" for name, s in medians.items())
        + "; pruned is "
        + ", ".join(f"{x:.3f} times as fast as {name} = {x / ideal:.2f} of it" for name, x in faster.items()),
        flush=True,
    )


def generating(model: Any, ids: Tensor, new: int, forward: Any = None, **options: Any) -> Callable[[], Any]:
    """Greedy generation, with another forward in the model's place if one is given."""
    settings = {"do_sample": False, "num_beams": 1, "pad_token_id": 0, "disable_compile": True}
    settings |= {"max_new_tokens": new, "min_new_tokens": new, **options}

    def run() -> Any:
        model.forward = forward or type(model).forward.__get__(model)
        try:
            return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        finally:
            del model.forward

    return run


def prefill(options: Any, model: Any, data: Tensor) -> None:
    example = {"input_ids": data[:1], "use_cache": False}
    captured = fasp_fx.capture(model, (), example)
    result = fasp_fx.prune(
        captured, score="magnitude", restore=None, sparsity=options.sparsity, round_to=options.round_to
    )
    called = {"Hugging Face": model, "dense": finish(captured.program), "pruned": result.module}
    ideal = macs(lambda: called["dense"](**example)) / macs(lambda: called["pruned"](**example))
    print(f"prefill: sparsity {result.report.sparsity:.4f}, ratio of the operations {ideal:.3f}", flush=True)
    for label in ("eager", "compiled"):
        made = {k: torch.compile(m, dynamic=False) if label == "compiled" else m for k, m in called.items()}
        subjects = {name: lambda module=module: module(**example) for name, module in made.items()}
        report(label, subjects, options.rounds, ideal, data.shape[1])


def generation(options: Any, model: Any, tokenizer: Any, data: Tensor) -> None:
    batches = [chunk[None] for chunk in data[: options.chunks]]
    pruned = hf.prune(
        model,
        tokenizer,
        calibration=batches,
        held_out=(),
        sparsity=options.sparsity,
        round_to=options.round_to,
    ).model
    compiled = {m: torch.compile(m.forward, dynamic=True) for m in (model, pruned)}
    static = torch.compile(model.forward, dynamic=False)
    for batch in options.batch:
        given = (data[100 : 100 + batch, : options.prompt], options.new)
        eager = {"dense": generating(model, *given), "pruned": generating(pruned, *given)}
        ideal = macs(eager["dense"]) / macs(eager["pruned"])
        print(f"generation, batch {batch}: ratio of the operations {ideal:.3f}", flush=True)
        report("eager", eager, options.rounds, ideal, batch * options.new)
        torch._dynamo.reset()
        subjects = {
            "dense": generating(model, *given, compiled[model]),
            "dense, static cache": generating(model, *given, static, cache_implementation="static"),
            "pruned": generating(pruned, *given, compiled[pruned]),
        }
        report("compiled", subjects, options.rounds, ideal, batch * options.new)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8], help="of generations")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt of a generation")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    model, tokenizer = smollm2(options.device)
    data = chunks(tokenizer, options.text, options.device)
    prefill(options, model, data)
    generation(options, model, tokenizer, data)


if __name__ == "__main__":
    main()
