"""Recurrent layers of one layer and one direction; the capture takes others apart into such.

A hidden channel goes from every gate's rows, from the columns that meet the state of the step before, and
from the states. Cells of an LSTM with projections stay: what is projected is not a tensor of the graph.
"""

from __future__ import annotations

_WEIGHTS = "input[x y i], params.0[(g h) i], params.1[(g h) k], params.2[(g h)], params.3[(g h)]"
_CELLS = "input[x y i], params.0[(g c) i], params.1[(g c) k]"
_PROJECTED = "hx.0[l b h], hx.1[l b c] -> [x y h], [l b h], [l b c]"
_SINGLE = "freeze x; freeze y; freeze b; only num_layers 1; only bidirectional 0"

RECURRENT: dict[str, str] = {
    "aten.lstm.input": (
        f"{_CELLS}, params.2[(g c)], params.3[(g c)], params.4[h c], {_PROJECTED} if params.4"
        f" | {_WEIGHTS}, hx.0[l b h], hx.1[l b h] -> [x y h], [l b h], [l b h]"
        f" | {_CELLS}, params.2[h c], {_PROJECTED}"
        f"; gates g 4; recur k h hx.0 batch_first; freeze c; {_SINGLE}"
    ),
    "aten.gru.input": (
        f"{_WEIGHTS}, hx[l b h] -> [x y h], [l b h]; gates g 3; recur k h hx batch_first; {_SINGLE}"
    ),
    **{
        f"aten.rnn_{kind}.input": (
            "input[x y i], params.0[h i], params.1[h k], params.2[h], params.3[h], hx[l b h] -> [x y h], [l"
            f" b h]; recur k h hx batch_first; {_SINGLE}"
        )
        for kind in ("tanh", "relu")
    },
}
