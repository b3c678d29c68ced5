"""What mkdocstrings is told of our docstrings: roles become links, pages of docs/ too, and what an option
does is what its declaration says.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from mkdocs_hooks import shown_names

_ROLE = re.compile(r":\w+:`~?([\w.]+)`")
_PAGE = re.compile(r"\bdocs/([\w-]+)\.md")


def _link(match: re.Match[str]) -> str:
    name = match[1]
    return f"[`{name}`][{name}]" if name in shown_names() else f"`{name}`"


class Docstrings(griffe.Extension):
    """Our docstrings are of Sphinx's roles, which Python's users know; the site is of Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _PAGE.sub(r"[\1](\1.md)", _ROLE.sub(_link, obj.docstring.value))

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        call = getattr(node, "value", None)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "_option":
            texts = [ast.literal_eval(each) for each in call.args[2:4]]
            attr.docstring = griffe.Docstring(" ".join(texts), parent=attr)
            attr.value = ast.unparse(call.args[0])
            self.on_object(obj=attr)
