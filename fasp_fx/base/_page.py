"""What shows itself in a notebook."""

from __future__ import annotations

import html
from importlib import import_module


class Page:
    """Shows itself in a notebook as the page that :func:`fasp_fx.to_html` makes of it."""

    def _repr_html_(self) -> str:
        # The page draws what lower rooms return, and so stands above them: it is looked up by its name.
        page = import_module(f"{__package__.removesuffix('.base')}.interop").to_html(self)
        return (
            f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts"'
            ' style="width: 100%; height: 640px; border: 0"></iframe>'
        )
