"""What operators do to channels, one line each.

``_rules`` holds the rules as data. The grammar is described in ``_grammar`` and in the documentation's
*Writing a rule*.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
