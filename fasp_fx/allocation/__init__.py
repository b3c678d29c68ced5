"""How much goes of each coupled group: budgets, cost curves, and the allocations that meet them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
