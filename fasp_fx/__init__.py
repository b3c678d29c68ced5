"""fasp_fx: make PyTorch models physically smaller, whatever their architecture.

A declarative structured-pruning compiler pass over ``torch.fx``, after FASP (arXiv 2501.09412). What is
public stands here and in the ``__init__.pyi`` of each room: ``fasp_fx.allocation`` and so on.
"""

import lazy_loader

from .base import __version__ as __version__

# Names are imported when they are used: all of them take longer than torch itself.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
