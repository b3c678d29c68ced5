"""What a pruned model holds: weights in a tree of modules, programs that look them up, and the programs'
constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.plan import PruningPlan
from ..capturing._fx import written_names
from ..capturing._program import copy_graph
from ..passes._pruned_module import Origin
from ..pruning.report import Report
from ..storage._graph_json import program_to_json
from ._fast import grouped, one_token, without_checks
from ._flat import FlatProgram, refuse_pickling

CONSTANTS = "_constants"


class Written:
    """One program as it is written to disk.

    Args:
        made: that, or what the program is made of when it is first written.
    """

    def __init__(self, made: Mapping[str, Any] | Origin) -> None:
        self._made = made

    @property
    def data(self) -> Mapping[str, Any]:
        """The program as JSON.

        Raises:
            StoreError: it holds something that cannot be stored; names it.
        """
        if isinstance(self._made, Origin):
            self._made = program_to_json(self._made.program)
        return self._made

    def __deepcopy__(self, memo: Any) -> Written:
        return self  # nobody changes it

    def __getstate__(self) -> dict[str, Any]:
        refuse_pickling()


@dataclass(frozen=True)
class StoredProgram:
    """One program: as it is written to disk, and as it runs, with its weights under the model's names."""

    written: Written
    flat: FlatProgram


@dataclass(frozen=True)
class Parts:
    """What a pruned model is made of.

    Attributes:
        programs: by name.
        weights: parameters and persistent buffers by the names of the original model; tied ones are one
            object.
        constants: for each program, its constants and other buffers by the names in its graph.
        plan: what was removed.
        report: what it cost.
    """

    programs: Mapping[str, StoredProgram]
    weights: Mapping[str, Tensor]
    constants: Mapping[str, Mapping[str, Tensor]]
    plan: PruningPlan
    report: Report


class Branch(nn.Module):
    """A part of the tree of weights; nothing is computed by it."""

    main_input_name = "input_ids"  # generate() asks an encoder for it


def place(root: nn.Module, name: str, tensor: Tensor, *, persistent: bool) -> None:
    """Put a parameter or buffer where its dotted name says, making the modules on the way."""
    path, _, leaf = name.rpartition(".")
    owner = root
    for part in path.split(".") if path else ():
        if part not in owner._modules:
            owner.add_module(part, Branch())
        owner = owner._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)


def adopt_constants(model: nn.Module, parts: Parts) -> dict[str, dict[str, str]]:
    """Hold constants as buffers outside of the state dict, equal ones once; returns their names in the model,
    for each program.

    A constant that a program writes into is shared with none that is only equal now: it is the buffer of its
    own name.
    """
    changing = {name for program in parts.programs.values() for name in written_names(program.flat.graph)}
    held: list[tuple[str | None, Tensor]] = []  # the name of one that is written into, and what it holds
    names: dict[str, dict[str, str]] = {}
    for program, constants in parts.constants.items():
        names[program] = {}
        for name, tensor in constants.items():
            own = name if name in changing else None
            index = next(
                (i for i, (other, known) in enumerate(held) if other == own and _equal(known, tensor)), None
            )
            if index is None:
                index = len(held)
                held.append((own, tensor))
                place(model, f"{CONSTANTS}.c{index}", tensor.clone(), persistent=False)
            names[program][name] = f"{CONSTANTS}.c{index}"
    return names


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def served(flat: FlatProgram, names: Mapping[str, str]) -> FlatProgram:
    """A program as it runs, with its constants under their names in the model."""
    graph = copy_graph(flat.graph)
    for node in graph.find_nodes(op="get_attr"):
        node.target = names.get(str(node.target), node.target)
    without_checks(graph)
    grouped(graph)
    return flat.rewritten(graph)


def step(program: FlatProgram) -> FlatProgram:
    """The program for a query of one token."""
    graph = copy_graph(program.graph)
    one_token(graph)
    return program.rewritten(graph)


__all__ = ["Parts", "StoredProgram", "Written", "adopt_constants", "place", "served", "step"]
