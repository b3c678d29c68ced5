"""What mkdocs is told of this repository: pages from outside of docs/, links to files there, and the public
names that the reference lists.
"""

from __future__ import annotations

import ast
import functools
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
#: pages from outside of docs/, by their names there
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "channel-numbers.md": "fasp_fx/analysis/channels/README.md",
}
_LINK = re.compile(r"(?<!\!)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
_ROOM = re.compile(r"^:::room ([\w.]+)(?:: (.+))?$", flags=re.MULTILINE)


def public_names(room: str) -> dict[str, str]:
    """The names in ``__all__`` of a room's door, but for rooms, and the modules that define them."""
    folder = ROOT / room.replace(".", "/")
    tree = ast.parse((folder / "__init__.pyi").read_text(encoding="utf-8"))
    sources = {
        each.asname or each.name: f"{room}.{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for each in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            return {name: sources.get(name, room) for name in names if not (folder / name).is_dir()}
    raise PluginError(f"{room} has no __all__")


@functools.cache
def shown_names() -> frozenset[str]:
    """The full names that the reference has a place for."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    lent, shown = public_names("fasp_fx"), set()
    for room, some in _ROOM.findall(text):
        names = dict.fromkeys(some.split(), "") if some else public_names(room)
        shown |= {f"{room}.{name}" for name in names if room == "fasp_fx" or lent.get(name) != names[name]}
    return frozenset(shown)


def on_files(files: Any, config: Any) -> Any:
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are in the repository, to what is in the site; a file that is no page comes along."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    sites = {path: name for name, path in PAGES.items()}

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            raise PluginError(f"{source} links to {target}, which does not exist")
        if path in sites:
            uri = sites[path]
        elif path.startswith("docs/"):
            uri = path.removeprefix("docs/")
        else:
            uri = f"files/{path}" if (ROOT / path).is_file() else f"files/{path}.txt"
            if files.get_file_from_path(uri) is None:
                text = (ROOT / path).read_bytes() if (ROOT / path).is_file() else "\n".join(_listed(path))
                files.append(File.generated(config, uri, content=text))
        return f"]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    def room(match: re.Match[str]) -> str:
        names = match[2].split() if match[2] else public_names(match[1])
        shown = [name for name in names if f"{match[1]}.{name}" in shown_names()]
        also = [name for name in names if name not in shown]
        own = [f"::: {match[1]}.{name}" for name in shown]
        links = ", ".join(f"[{name}][fasp_fx.{name}]" for name in also)
        return "\n\n".join([*([f"Also here: {links}."] if also else []), *own])

    return _ROOM.sub(room, _LINK.sub(link, markdown))


def _listed(folder: str) -> list[str]:
    return sorted(path.name for path in (ROOT / folder).iterdir() if not path.name.startswith("_"))
