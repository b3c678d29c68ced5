"""Tokens per second of ``generate()`` of SmolLM2 pruned with round_to=16, against the dense Hugging Face
model, eager and compiled.

Every subject generates in turn, in one process; figures are medians over rounds of the same greedy
generation. Both sides compile their forward with ``torch.compile(dynamic=True)``, since sizes grow with every
token; the dense model also with a static cache and static shapes, and its better way counts. The ratio of
multiply-accumulates is that of all operators of a whole generation, prompt included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _protocol import arguments, chunks, smollm2
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fasp_fx import hf

Subject = Callable[[Tensor, int], Any]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="show where the time of the pruned model's single-token steps goes, and stop",
    )
    options = parser.parse_args()
    model, tokenizer = smollm2(options.device)
    data = chunks(tokenizer, options.text, options.device)
    pruned = hf.prune(
        model,
        tokenizer,
        calibration=[chunk[None] for chunk in data[: options.chunks]],
        sparsity=options.sparsity,
        round_to=options.round_to,
    )
    print(pruned.report, flush=True)
    if options.profile:
        for name, subject in (("dense", model), ("pruned", pruned.model)):
            print(name, _profile(subject, data[100:101, : options.prompt], options.new), sep="\n")
        return
    for batch in options.batch:
        ids = data[100 : 100 + batch, : options.prompt]
        macs = [_macs(_eager(subject), ids, options.new) for subject in (model, pruned.model)]
        ratio = macs[0] / macs[1]
        print(
            f"batch {batch}: {macs[0] / 1e9:.1f} -> {macs[1] / 1e9:.1f} GMAC, ratio {ratio:.3f}", flush=True
        )
        _report(
            "eager",
            _interleaved(
                {"dense": _eager(model), "pruned": _eager(pruned.model)}, ids, options.new, options.rounds
            ),
            ids,
            options.new,
            ratio,
        )
        if not options.no_compile:
            torch._dynamo.reset()
            subjects = {
                "dense": _compiled(model, dynamic=True),
                "dense, static cache": _compiled(model, dynamic=False, cache_implementation="static"),
                "pruned": _compiled(pruned.model, dynamic=True),
            }
            _report(
                "compiled", _interleaved(subjects, ids, options.new, options.rounds), ids, options.new, ratio
            )


def _generate(model: Any, ids: Tensor, new: int, **options: Any) -> Tensor:
    settings = {"do_sample": False, "num_beams": 1, "pad_token_id": 0, "disable_compile": True}
    found: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        **settings,
        **options,
    )
    return found


def _eager(model: Any) -> Subject:
    return lambda ids, new: _generate(model, ids, new)


def _compiled(model: Any, *, dynamic: bool, **options: Any) -> Subject:
    """Generation with a compiled forward, which takes the model's place while it generates."""
    compiled = torch.compile(model.forward, dynamic=dynamic)

    def run(ids: Tensor, new: int) -> Tensor:
        model.forward = compiled
        try:
            return _generate(model, ids, new, **options)
        finally:
            del model.forward

    return run


def _macs(subject: Subject, ids: Tensor, new: int) -> float:
    with FlopCounterMode(display=False) as counter:
        subject(ids, new)
    return counter.get_total_flops() / 2


def _interleaved(subjects: dict[str, Subject], ids: Tensor, new: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each subject, taken in turn, so that drift of the machine's speed meets all alike; two
    rounds go before, uncounted.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for count in range(rounds + 2):
        for name, subject in subjects.items():
            _wait(ids)
            start = time.perf_counter()
            subject(ids, new)
            _wait(ids)
            if count >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()


def _report(label: str, times: dict[str, list[float]], ids: Tensor, new: int, ratio: float) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min((name for name in times if name != "pruned"), key=medians.__getitem__)
    faster = statistics.median(a / b for a, b in zip(times[best], times["pruned"], strict=True))
    rates = ", ".join(f"{name} {len(ids) * new / seconds:.1f}" for name, seconds in medians.items())
    print(
        f"  {label:<9}tokens per second: {rates}; pruned is {faster:.3f} times as fast as {best} ="
        f" {faster / ratio:.2f} of the ratio",
        flush=True,
    )


def _profile(model: Any, ids: Tensor, new: int) -> str:
    _generate(model, ids, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _generate(model, ids, new)
    found: str = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
    return found


if __name__ == "__main__":
    main()
