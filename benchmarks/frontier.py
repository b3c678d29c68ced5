"""Draws docs/recovery.svg: what is lost after how many processor seconds, from the table in docs/recovery.md
that has such a column. Needs the extra "docs".
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
SECONDS = "seconds"


def main() -> None:
    lines = (DOCS / "recovery.md").read_text(encoding="utf-8").splitlines()
    first = next(place for place, line in enumerate(lines) if f"| {SECONDS} |" in line)
    last = next(place for place in range(first, len(lines)) if not lines[place])
    head, _, *rows = ([cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in lines[first:last])
    seconds = [float(row[head.index(SECONDS)].replace(",", "")) for row in rows]
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "recovery", "font.size": 11}
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for column, marker in ((1, "o"), (2, "s")):
        lost = [float(row[column]) for row in rows]
        axes.plot(seconds, lost, marker=marker, label=head[column])
    for row, place in zip(rows, seconds, strict=True):
        axes.annotate(row[0], (place, float(row[1])), (0, -16), textcoords="offset points", ha="center")
    axes.margins(0.12)
    axes.set(xlabel="processor seconds of the command", ylabel="nats above the dense model", ylim=(0, None))
    axes.legend()
    figure.savefig(DOCS / "recovery.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
