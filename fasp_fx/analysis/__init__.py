"""Which channels go together: the coupled groups of a program, found on channel numbers; a plan is data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
