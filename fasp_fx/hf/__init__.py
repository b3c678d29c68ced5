"""Pruned language models that generate, are saved and are fine-tuned as those of transformers.

:func:`prune` makes one; importing ``fasp_fx.hf`` lets ``AutoModelForCausalLM`` and
``AutoModelForSeq2SeqLM`` load it.
"""

import lazy_loader

from . import _config

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# The models register themselves: importing them takes long, and only who has a configuration needs them.
_config.load_models = lambda: __getattr__("PrunedModel")
