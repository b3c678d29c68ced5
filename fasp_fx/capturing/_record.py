"""Record what every node of a graph makes, under the symbolic sizes of the capture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..base._tolerable import tolerable
from ..base.compat import FakeTensor, FakeTensorMode, enable_python_dispatcher
from ..errors import VerificationError, first_line


class _Recorder(fx.Interpreter):
    """Runs a graph without data; what is known to be made as before is not run.

    Args:
        before: the nodes of the graph that it was made of, by name.
    """

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode, before: dict[str, fx.Node]) -> None:
        super().__init__(module)
        self.mode, self.before = mode, before
        #: nodes that make what those of their names made before
        self.same: set[fx.Node] = set()

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return (
            self.mode.from_tensor(value, static_shapes=True)
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor)
            else value
        )

    def run_node(self, node: fx.Node) -> Any:
        old = self.before.get(node.name)
        known = None if old is None else old.meta.get("val")
        if self._makes_the_same(node, old):
            self.same.add(node)
            node.meta["val"] = known
            return known
        try:
            made = super().run_node(node)
        except tolerable(Exception) as error:
            raise VerificationError(
                f"node '{node.name}' ({node.target}) does not execute: {first_line(error)}"
            ) from error
        if _is_alike(made, known):
            self.same.add(node)
            made = known
        if node.op not in ("placeholder", "output"):
            node.meta["val"] = made
        return made

    def _makes_the_same(self, node: fx.Node, old: fx.Node | None) -> bool:
        """Whether a call is the one it was, of what makes the same as it did."""
        if old is None or node.op != "call_function" or not self._is_here(old.meta.get("val")):
            return False
        return (
            node.target is old.target
            and self.same.issuperset(node.all_input_nodes)
            and _by_name(node) == _by_name(old)
        )

    def _is_here(self, value: Any) -> bool:
        """Whether a value was recorded, in the mode that this graph is run in."""
        if isinstance(value, (list, tuple)):
            return all(map(self._is_here, value))
        return value is not None and (not isinstance(value, FakeTensor) or value.fake_mode is self.mode)


def _by_name(node: fx.Node) -> Any:
    """The arguments of a call, with names in the places of nodes."""
    return fx.map_arg((node.args, dict(node.kwargs)), lambda given: f"%{given.name}")


def _is_alike(made: Any, known: Any) -> bool:
    """Whether two recorded values say the same, without assuming anything of their sizes."""
    if isinstance(made, FakeTensor) and isinstance(known, FakeTensor):
        return (
            made.fake_mode is known.fake_mode
            and (made.dtype, made.device, made.layout) == (known.dtype, known.device, known.layout)
            and type(made) is type(known)
            and made.requires_grad == known.requires_grad
            and made.layout is torch.strided
            and _sizes(made) == _sizes(known)
        )
    if isinstance(made, (list, tuple)) and isinstance(known, (list, tuple)):
        return len(made) == len(known) and all(map(_is_alike, made, known))
    if isinstance(made, (torch.SymInt, int)) and isinstance(known, (torch.SymInt, int)):
        return _size(made) == _size(known)
    return False


def _sizes(value: Tensor) -> list[Any]:
    return [_size(size) for size in (*value.shape, *value.stride(), value.storage_offset())]


def _size(size: torch.SymInt | int) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def record(module: fx.GraphModule, before: fx.Graph | None = None) -> None:
    """Bring ``node.meta["val"]`` of every node up to date; placeholders keep theirs.

    Args:
        before: the graph that the module's was made of, whose values are up to date: what makes the same as
            there is not run again.

    Raises:
        VerificationError: a node does not execute; names it.
    """
    given = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    mode = next((value.fake_mode for value in given if isinstance(value, FakeTensor)), None)
    if mode is None:
        return
    recorder = _Recorder(module, mode, {} if before is None else {node.name: node for node in before.nodes})
    recorder.extra_traceback = False
    # operators that are made of others take symbolic sizes only in Python
    with torch.no_grad(), mode, enable_python_dispatcher():
        recorder.run(*given, enable_io_processing=False)
