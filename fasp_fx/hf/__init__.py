"""Pruned language models that generate, are saved and are fine-tuned as those of transformers.

:func:`prune` makes one; importing ``fasp_fx.hf`` lets ``AutoModelForCausalLM`` and
``AutoModelForSeq2SeqLM`` load it.
"""

import lazy_loader

from . import _config as _config  # registers itself

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
