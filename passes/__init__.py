"""The only code that takes channels out of a program, in small steps with the verifier after each.

``Prune(plan)`` is a function ``ExportedProgram -> ExportedProgram``; ``Pipeline`` runs it among the passes of
others.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
