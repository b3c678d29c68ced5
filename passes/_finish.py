"""From a rewritten program to a module of its own."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fasp_fx.base._stamps import read_stamps
from fasp_fx.capturing import export_again
from fasp_fx.capturing._assemble import ready
from fasp_fx.capturing._program import Program

from ._pruned_module import PrunedModule, wrap, wrap_graph


def own_storage(program: Program) -> Program:
    """The same program with every tensor copied, tied ones together, so that nothing is shared with the
    caller's model.
    """
    program = program.copy()
    held = program.weights()
    for name, names in program.aliases().items():
        tensor = held[name]
        if (
            name in program.numbers
            and isinstance(tensor, nn.Parameter)
            and tensor._base is None
            and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        ):
            continue  # made by a pass
        with torch.no_grad():
            copy: Tensor = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
        program.replace_weight(names, copy)
    return program


def finish(program: Program, trace: bool = False, before: fx.Graph | None = None) -> PrunedModule:
    """The module of a rewritten program. Its exported program is put together when it is asked for
    (``program_now``) where that can be, and traced at once where not: nothing else tells whether it can be.

    Args:
        trace: trace in any case, which gives nodes the names that the exporter would.
        before: the graph of the capture that the program was made of, whose recorded values are up to date.
    """
    program = own_storage(program)
    assembly = (
        None
        if trace or program.facts is None
        else ready(program.module, program.example, program.facts, before)
    )
    if assembly is not None:
        made = wrap_graph(assembly, program.module, program.signature)
        assembly.graph.owning_module = None  # or it would keep the weights alive
        return made
    exported = export_again(program.module, program.example)
    read_stamps(exported.graph)
    return wrap(exported, program.signature)


__all__ = ["finish", "own_storage"]
