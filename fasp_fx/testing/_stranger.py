"""Run a script as somebody who does not have this library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fasp_fx":
            raise ImportError("fasp_fx is not to be had here")

sys.meta_path.insert(0, Blocked())
"""


def run_without_fasp_fx(script: str, *arguments: str, folder: Path) -> str:
    """What a script prints in a new process that cannot import fasp_fx.

    Args:
        script: Python code; finds ``arguments`` in ``sys.argv[1:]``.
        folder: where it works.

    Raises:
        subprocess.CalledProcessError: it failed; its error stream is that of this process.
    """
    command = [sys.executable, "-I", "-c", _WITHOUT + script, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=folder).stdout


__all__ = ["run_without_fasp_fx"]
