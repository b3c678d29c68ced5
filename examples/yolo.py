"""YOLO: train a detector of ultralytics (AGPL-3.0, not a part of fasp_fx) on drawn images, prune it to half
its multiply-accumulates, train what is left inside ultralytics' own trainer, and export it by its exporter.

`python yolo.py` draws and trains; `--model yolo11n.pt` starts from weights of yours.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image
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
parser.add_argument("--size", type=int, default=96, help="of images")
options = parser.parse_args()


def draw(folder: Path, count: int) -> torch.Tensor:
    """Write images of two boxes, bright or dark, and a text file of their places for each."""
    size, images = options.size, 0.4 + 0.2 * torch.rand(count, 3, options.size, options.size)
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for number, image in enumerate(images):
        lines = ""
        for corner in (0, size // 4):
            (left, top), kind = (corner + torch.randint(size // 2, (2,))).tolist(), int(torch.randint(2, ()))
            width, height = (size // 6 + torch.randint(size // 12, (2,))).tolist()
            image[:, top : top + height, left : left + width] = (0.1, 0.9)[kind]
            places = left + width / 2, top + height / 2, width, height
            lines += " ".join(map(str, (kind, *(place / size for place in places)))) + "\n"
        to_pil_image(image).save(folder / "images" / f"{number}.png")
        (folder / "labels" / f"{number}.txt").write_text(lines)
    return images


class Even(Global):
    """Halves of a `chunk` lose as much as each other, since the model's own class splits in the middle."""

    def __call__(self, budget: Budget, round_to: int | None, costs: fasp_fx.Costs) -> list[int]:
        places: dict[Any, int] = {}
        split = [(group.producers[0].name, group.size) for group in budget.groups]
        fewer = budget.narrowed([places.setdefault(one, len(places)) for one in split])
        return fewer.spread(super().__call__(fewer, round_to, fewer.joined(costs)), budget)


torch.manual_seed(0)
images = draw(options.out / "train", 96)
draw(options.out / "val", 32)
data = options.out / "data.yaml"
data.write_text(f"path: {options.out.resolve()}\ntrain: train\nval: val\nnames: [dark, bright]\n")
common: dict[str, Any] = {"data": data, "imgsz": options.size, "device": "cpu", "workers": 0, "plots": False}
common |= {"project": options.out.resolve(), "verbose": False}
training = {**common, "optimizer": "AdamW", "batch": 8, "mosaic": 0.0, "warmup_epochs": 0.0}

yolo = YOLO(options.model, task="detect")
scores = {"dense": yolo.train(**training, epochs=options.epochs, lr0=3e-3, name="dense")}
dense: Any = yolo.model.eval()
dense.model[-1].shape = None  # forget the size seen last, to which the number of images would be fixed
dense.model[-1].export = True  # return the boxes alone, so that the features that lead to them may go
calibration = list(images.split(8))
whole = "*.attn.*", "model.10.cv1.*"  # attention, whose class takes the width of its heads from its input
half: dict[str, Any] = {"budget": Macs(0.5), "round_to": 8, "allocation": Even()}
result = fasp_fx.prune(dense, calibration[0], calibration=calibration, exclude=whole, **half)
print(result.report)
small: Any = result.eager(dense)
small.model[-1].export = False
for block in filter(lambda module: isinstance(module, C2f), small.modules()):
    block.c = block.cv1.conv.out_channels // 2  # which only the exporter reads


class Trainer(DetectionTrainer):
    def get_model(self, *args: Any, **kwargs: Any) -> Any:
        return small  # rather than one that is built of a configuration


pruned, tuned = YOLO(options.model, task="detect"), YOLO(options.model, task="detect")
pruned.model = copy.deepcopy(small)
scores["pruned"] = pruned.val(**common)
training |= {"trainer": Trainer, "epochs": options.epochs // 2, "lr0": 1e-3}
scores["fine-tuned"] = tuned.train(**training, name="tuned")
file = tuned.export(format="torchscript", imgsz=options.size)
scores["exported"] = YOLO(file, task="detect").val(**common)
print("mAP50", {name: round(float(score.box.map50), 3) for name, score in scores.items()})
here, there = AutoBackend(tuned.trainer.best)(images[:4])[0], AutoBackend(file)(images[:4])
print(f"{Path(file).name}: {(here - there).abs().max() / here.abs().max():.1e} from the checkpoint")
