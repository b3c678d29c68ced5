"""What is seen of a model on calibration batches: which channels go, and what repairs the rest."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
