"""Specifications of small models: frozen data that prints as the code that makes it.

>>> Net(blocks=(Linear(width=4), Activation(), Linear(width=2)))
Net(blocks=(Linear(width=4), Activation(), Linear(width=2)))

A :class:`Net` takes one or more inputs through blocks to one or more outputs. Every block knows which shapes it can follow; a net whose blocks do not
fit together cannot be made. :func:`fasp_fx.testing.build` turns a net into a module.
"""

from __future__ import annotations

from ._channel_blocks import Activation, Branches, Gated, Linear, MixTokens, Move, Norm, Residual, Scale, Split, Tied
from ._image_blocks import Collapse, Conv, Pool, Resize, SqueezeExcite
from ._large_blocks import Attention, Experts
from ._net import Images, Net, Sequences, Source, Tokens, Vectors
from ._spec import Block, Shape, Spec

__all__ = [
    "Activation",
    "Attention",
    "Block",
    "Branches",
    "Collapse",
    "Conv",
    "Experts",
    "Gated",
    "Images",
    "Linear",
    "MixTokens",
    "Move",
    "Net",
    "Norm",
    "Pool",
    "Residual",
    "Resize",
    "Scale",
    "Sequences",
    "Shape",
    "Source",
    "Spec",
    "Split",
    "SqueezeExcite",
    "Tied",
    "Tokens",
    "Vectors",
]
