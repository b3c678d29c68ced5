"""Kill a calibration at random moments, many times over, and hold what the last run writes against what an
undisturbed one does.

    python tests/killing.py 20 /tmp/killed [SEED]

A Llama made here is pruned by the command line with a checkpoint, in a process of its own that SIGKILL ends
after a random time; the same command goes on. The last one ends by itself. All files of its folder have to be
equal to the byte, but for the seconds in the report.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from models import make_model

COMMAND = (
    "--sparsity",
    "0.3",
    "--length",
    "64",
    "--batches",
    "48",
    "--eval-batches",
    "2",
    "--quality",
    "balanced",
)


def command(folder: Path, out: Path, checkpoint: Path) -> list[str]:
    given = [
        str(folder / "model"),
        "--calibration",
        str(folder / "text.txt"),
        "--out",
        str(out),
        "--checkpoint",
        str(checkpoint),
    ]
    return [sys.executable, "-m", "fasp_fx", "prune", *given, *COMMAND]


def contents(folder: Path) -> dict[str, bytes | str]:
    """What the files of a folder hold, without what a clock says."""
    found: dict[str, bytes | str] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        if file.suffix == ".json":
            text = json.loads(data)
            _forget(text)
            found[str(file.relative_to(folder))] = json.dumps(text, sort_keys=True)
        else:
            found[str(file.relative_to(folder))] = data
    return found


def _forget(data: object) -> None:
    if isinstance(data, dict):
        of_clocks = ("dense", "pruned") if str(data.get("what", "")).startswith("milliseconds") else ()
        for name in ("seconds", "sha256", "digest", "checksums", "files", *of_clocks):
            data.pop(name, None)
        for value in data.values():
            _forget(value)
    elif isinstance(data, list):
        for value in data:
            _forget(value)


def main(times: int, folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_model(folder / "model", layers=8)
    (folder / "text.txt").write_text(" ".join(str(draw.random()) for _ in range(4000)), encoding="utf-8")
    started = time.perf_counter()
    subprocess.run(command(folder, folder / "whole", folder / "unused"), check=True, capture_output=True)
    whole = time.perf_counter() - started
    killed = rounds = 0
    while killed < times:
        rounds += 1
        out, checkpoint = folder / f"out{rounds}", folder / f"checkpoint{rounds}"
        ended, own = False, 0
        while not ended:
            process = subprocess.Popen(
                command(folder, out, checkpoint), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            try:
                process.wait(draw.uniform(0.2, 1.3) * whole if killed < times else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed, own = killed + 1, own + 1
                assert (
                    not out.exists() or (out / "manifest.json").exists() or (out / "config.json").exists()
                ), "what is half written stands where a user looks for it"
                ended = out.exists()  # it was killed when all was written
                continue
            ended = True
            assert process.returncode == 0, process.stderr.read().decode() if process.stderr else ""
        expected, found = contents(folder / "whole"), contents(out)
        assert expected.keys() == found.keys(), sorted(expected.keys() ^ found.keys())
        other = [name for name, data in expected.items() if data != found[name]]
        print(f"round {rounds}: killed {own} times, {other or 'equal'}", flush=True)
        assert not other
    print(f"{killed} kills in {rounds} rounds of some {whole:.0f} s: all equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
