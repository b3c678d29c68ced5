"""Abstract interpretation of a program on channel numbers (private mechanism; the README in this folder
explains it).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
