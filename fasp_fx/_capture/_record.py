"""Record what every node of a graph makes, under the symbolic sizes of the capture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .._compat import FakeTensor, FakeTensorMode, enable_python_dispatcher
from ..errors import VerificationError, first_line


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return (
            self.mode.from_tensor(value, static_shapes=True)
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor)
            else value
        )

    def run_node(self, node: fx.Node) -> Any:
        try:
            made = super().run_node(node)
        except Exception as error:
            raise VerificationError(
                f"node '{node.name}' ({node.target}) does not execute: {first_line(error)}"
            ) from error
        if node.op not in ("placeholder", "output"):
            node.meta["val"] = made
        return made


def record(module: fx.GraphModule) -> None:
    """Bring ``node.meta["val"]`` of every node up to date; placeholders keep theirs.

    Raises:
        VerificationError: a node does not execute; names it.
    """
    given = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    mode = next((value.fake_mode for value in given if isinstance(value, FakeTensor)), None)
    if mode is None:
        return
    recorder = _Recorder(module, mode)
    recorder.extra_traceback = False
    # operators that are made of others take symbolic sizes only in Python
    with torch.no_grad(), mode, enable_python_dispatcher():
        recorder.run(*given, enable_io_processing=False)
