from ._backend import (
    backend as backend,  # A backend for torch.compile that computes the pruned model from the whole one
)
from .page import (
    to_html as to_html,  # Show a report or an analysis as one page of HTML that needs nothing else: figures
    write_page as write_page,  # Write the page, whole or not at all; an earlier page is replaced, and nothing else
)

__all__ = [
    "backend",
    "to_html",
]
