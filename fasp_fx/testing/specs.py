"""Specifications of small models: frozen data that prints as the code that makes it.

>>> Net(blocks=(Linear(width=4), Activation(), Linear(width=2)))
Net(blocks=(Linear(width=4), Activation(), Linear(width=2)))

A :class:`Net` takes one or more inputs through blocks to one or more outputs. Every block knows which shapes
it can follow; a net whose blocks do not fit together cannot be made. :func:`fasp_fx.testing.build` turns a
net into a module.
"""

from ._channels import (
    Activation,
    Branches,
    Collapse,
    Conv,
    Gated,
    Linear,
    MixTokens,
    Move,
    Norm,
    Pool,
    Residual,
    Resize,
    Scale,
    Split,
    SqueezeExcite,
    Tied,
)
from ._large import Attention, Experts
from ._net import Images, Net, Sequences, Source, Tokens, Vectors
from ._odd import Across, Foreign, Fused, Odd, Pick, Regroup, Remember, Reuse, Sized
from ._spec import Block, Shape, Spec

__all__ = [
    "Across",
    "Activation",
    "Attention",
    "Block",
    "Branches",
    "Collapse",
    "Conv",
    "Experts",
    "Foreign",
    "Fused",
    "Gated",
    "Images",
    "Linear",
    "MixTokens",
    "Move",
    "Net",
    "Norm",
    "Odd",
    "Pick",
    "Pool",
    "Regroup",
    "Remember",
    "Residual",
    "Resize",
    "Reuse",
    "Scale",
    "Sequences",
    "Shape",
    "Sized",
    "Source",
    "Spec",
    "Split",
    "SqueezeExcite",
    "Tied",
    "Tokens",
    "Vectors",
]
