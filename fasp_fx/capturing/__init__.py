"""How a model becomes a functional graph, and a graph an exported program."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
