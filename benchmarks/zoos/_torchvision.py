"""The torchvision zoo: every model of ``list_models()`` that is not quantised, at small images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision.models as zoo
from torch import nn
from x.benchmarks.zoos import Draw, Entry, constant, image, noise

#: measured in float64: with random weights their own float32 outputs are 0.4 % and 1.3 % from their float64
#: outputs
CHAOTIC = frozenset({"efficientnet_v2_m", "efficientnet_v2_l"})
#: the side of the images, where 64 does not do
SIZES = {
    "inception_v3": 96,
    "vit_h_14": 56,
    "maxvit_t": 224,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
}
#: no detection would reach the usual score under random weights, and each of a thousand proposals costs a
#: pass through the heads
_RCNN = {
    "min_size": 96,
    "max_size": 96,
    "box_score_thresh": 0.0,
    "rpn_post_nms_top_n_test": 100,
    "box_detections_per_img": 20,
}
#: builder arguments, by the beginning of a model's name
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "vit_": {"image_size": 64},
    "vit_h_14": {"image_size": 56},
    "fasterrcnn": _RCNN,
    "maskrcnn": _RCNN,
    "keypointrcnn": _RCNN,
    "retinanet": {"min_size": 96, "max_size": 96},
    "fcos": {"min_size": 96, "max_size": 96},
}
#: clips of (frames, side)
CLIPS = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224)}
SMALL_CLIP = (8, 64)


def entries() -> list[Entry]:
    """Every model of the zoo."""
    return [_entry(name) for name in zoo.list_models() if not name.startswith("quantized_")]


def _entry(name: str) -> Entry:
    builder = zoo.get_model_builder(name)
    family = builder.__module__.rpartition("models.")[2].partition(".")[0]
    options: dict[str, Any] = {"weights": None}
    if family in ("detection", "segmentation"):
        options["weights_backbone"] = None
    for prefix, extra in OPTIONS.items():
        if name.startswith(prefix):
            options |= extra

    size = SIZES.get(name, 64)
    keywords: dict[str, Draw] = {}
    if family == "video":
        frames, side = CLIPS.get(name, SMALL_CLIP)
        positional: tuple[Draw, ...] = (noise(3, frames, side, side),)
    elif family == "optical_flow":
        positional, keywords = (image(128), image(128)), {"num_flow_updates": constant(3)}
    elif family == "detection":
        positional = (_list(size if name in SIZES else 96),)
    else:
        positional = (image(size),)
    known = {"detection", "segmentation", "video", "optical_flow"}
    kind = family.replace("_", " ") if family in known else "classification"
    batches = (1, 2) if name in CLIPS else (2, 3)
    # A rounding error can change which boxes a detection model keeps.
    double = family == "detection" or name in CHAOTIC
    return Entry(name, kind, _maker(builder, options, double), positional, keywords, double, batches)


def _maker(
    builder: Callable[..., nn.Module], options: dict[str, Any], double: bool
) -> Callable[[], nn.Module]:
    return lambda: builder(**options).to(torch.float64 if double else torch.float32)


def _list(side: int) -> Draw:
    """Images of a detection model: a list, one tensor each."""
    return lambda batch, generator: [torch.rand(3, side, side, generator=generator) for _ in range(batch)]
