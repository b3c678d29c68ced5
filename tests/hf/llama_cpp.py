"""Stock llama.cpp as a judge of GGUF files: the prebuilt one of the package node-llama-cpp."""

import fcntl
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

#: where it is installed once, beside the tests of a clone
HOME = Path(__file__).resolve().parents[2] / "build" / "llama_cpp"
VERSION = "3.22.1"


@cache
def missing() -> str:
    """Why there is no llama.cpp here, or nothing: it is installed if it can be, by one process of a run."""
    if shutil.which("npm") is None:
        return "no npm"
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (HOME / "node_modules" / "node-llama-cpp").is_dir():
            names = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/linux-x64@{VERSION}"]
            command = [
                "npm",
                "install",
                "--omit=optional",
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
                *names,
            ]
            done = subprocess.run(command, cwd=HOME, capture_output=True, text=True)
            if done.returncode:
                return f"npm install: {done.stderr.strip()[-200:]}"
        judge, ours = HOME / "judge.mjs", Path(__file__).with_suffix(".mjs").read_text()
        if not judge.exists() or judge.read_text() != ours:
            judge.write_text(ours)
    return ""


def predictions(file: Path, chunks: list[Any], work: Path, cache: str = "F32") -> list[list[Any]]:
    """What llama.cpp predicts after each token of each chunk: ``following``, the probability of the next one,
    and ``likeliest``, twenty tokens with theirs. Of a chunk that is text, its tokens; of ``{"write": tokens,
    "count": count}``, so many that follow, each the likeliest.

    Args:
        cache: the type of the key-value cache.
    """
    asked, told = work / "chunks.json", work / "predictions.json"
    asked.write_text(json.dumps(chunks))
    subprocess.run(
        ["node", str(HOME / "judge.mjs"), str(file), str(asked), str(told), cache],
        cwd=HOME,
        check=True,
        capture_output=True,
    )
    return list(json.loads(told.read_text()))
