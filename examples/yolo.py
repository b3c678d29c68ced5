"""YOLO: train a detector of ultralytics on drawn images, prune it to half its multiply-accumulates, train what
is left inside ultralytics' own trainer, export it by its own exporter.

`python yolo.py` draws and trains; `--model yolo11n.pt` starts from weights of yours. It needs ultralytics
(AGPL-3.0), which fasp_fx neither needs nor brings.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils import _pytree as pytree
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.autobackend import AutoBackend
from ultralytics.nn.modules import C2f

import fasp_fx
from fasp_fx.allocation import Budget, Global, Macs

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="yolo11n.yaml", help="a .yaml of ultralytics, or a .pt")
parser.add_argument("--out", type=Path, default=Path("yolo"), help="a new folder")
parser.add_argument("--epochs", type=int, default=16, help="of the dense model; the smaller one gets half")
parser.add_argument("--macs", type=float, default=0.5, help="the share of multiply-accumulates that stays")
parser.add_argument("--size", type=int, default=96, help="of images")
parser.add_argument("--format", default="torchscript", help="of ultralytics' exporter")
options = parser.parse_args()


def draw(folder: Path, count: int, random: np.random.Generator) -> torch.Tensor:
    """Write images of bright and dark boxes, and a text file of their places for each."""
    size, images = options.size, []
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        image, lines = random.integers(100, 150, (size, size, 3), dtype=np.uint8), []
        for left, top in random.integers(0, size // 2, (2, 2)) + [[0, 0], [size // 4, size // 4]]:
            width, height = random.integers(size // 6, size // 4, 2)
            kind = int(random.integers(2))
            image[top : top + height, left : left + width] = (20, 235)[kind]
            box = (left + width / 2, top + height / 2, width, height)
            lines.append(" ".join(map(str, (kind, *(value / size for value in box)))))
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        (folder / "labels" / f"{number}.txt").write_text("\n".join(lines))
        images.append(torch.from_numpy(image).permute(2, 0, 1) / 255)
    return torch.stack(images)


class Even(Global):
    """Halves of a `chunk` lose as much as each other, since the model's own class splits in the middle."""

    def __call__(self, budget: Budget, round_to: int, costs: fasp_fx.Costs) -> list[int]:
        places: dict[Any, int] = {}
        split = [(group.producers[0].name, group.size) for group in budget.groups]
        fewer = budget.narrowed([places.setdefault(one, len(places)) for one in split])
        return fewer.spread(super().__call__(fewer, round_to, fewer.joined(costs)), budget)


random = np.random.default_rng(0)
images = draw(options.out / "train", 96, random)
draw(options.out / "val", 32, random)
data = options.out / "data.yaml"
data.write_text(f"path: {options.out.resolve()}\ntrain: train\nval: val\nnames: [dark, bright]\n")
common: dict[str, Any] = {"data": data, "imgsz": options.size, "device": "cpu", "workers": 0, "plots": False}
common |= {"project": options.out.resolve(), "verbose": False}
training = {**common, "optimizer": "AdamW", "batch": 8, "mosaic": 0.0, "warmup_epochs": 0.0}

yolo = YOLO(options.model, task="detect")
scores = {"dense": yolo.train(**training, epochs=options.epochs, lr0=3e-3, name="dense")}
dense = yolo.model.eval()
head = dense.model[-1]
head.shape = None  # forget the size seen last, to which the number of images would be fixed
head.export = True  # return the boxes alone, so that the features that lead to them may go
result = fasp_fx.prune(
    dense,
    (images[:2],),
    calibration=list(images.split(8)),
    budget=Macs(options.macs),
    allocation=Even(),
    round_to=8,
    exclude=("*.attn.*", "model.10.cv1.*"),  # its class takes the width of the heads from its input
)
print(result.report)
small = result.eager(dense)
small.model[-1].export = False
for module in small.modules():
    if isinstance(module, C2f):
        module.c = module.cv1.conv.out_channels // 2  # which only the exporter reads


class Trainer(DetectionTrainer):
    """Trains the pruned model, rather than one that it builds of a configuration."""

    def get_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return small


pruned, tuned = YOLO(options.model, task="detect"), YOLO(options.model, task="detect")
pruned.model = copy.deepcopy(small)
scores["pruned"] = pruned.val(**common)
scores["fine-tuned"] = tuned.train(
    trainer=Trainer, **training, epochs=options.epochs // 2, lr0=1e-3, name="tuned"
)
file = tuned.export(format=options.format, imgsz=options.size)
scores["exported"] = YOLO(file, task="detect").val(**common)
for name, score in scores.items():
    print(f"{name}: mAP50 {score.box.map50:.3f}")
here, there = (pytree.tree_leaves(AutoBackend(one)(images[:4]))[0] for one in (tuned.trainer.best, file))
print(f"{Path(file).name}: {(here - there).abs().max() / here.abs().max():.1e} from the checkpoint")
