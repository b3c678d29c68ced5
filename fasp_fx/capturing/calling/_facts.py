"""What an exported program knows besides its graph and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import SymInt, fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import InputKind

from ...base.compat import ShapeEnv, guards_of


@dataclass(frozen=True)
class ExportFacts:
    """How a captured program is called and what its sizes may be.

    Attributes:
        call: how the whole module is called.
        inputs: what the caller's inputs are, in order.
        ranges: the sizes that each symbol can have.
        guards: what else is assumed of the sizes of the inputs, in Python.
        assumed: how much was assumed of the symbols when the capture was done.
    """

    call: ModuleCallEntry
    inputs: tuple[Any, ...]
    ranges: dict[Any, Any]
    guards: tuple[str, ...]
    assumed: int

    @classmethod
    def of(cls, exported: ExportedProgram) -> ExportFacts:
        """What is known of this one."""
        inputs = tuple(
            spec.arg for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
        )
        return cls(
            exported.module_call_graph[0],
            inputs,
            dict(exported.range_constraints),
            guards_of(exported),
            assumed(exported.graph),
        )


def environment_of(graph: fx.Graph) -> ShapeEnv | None:
    """What is known of the symbols in the sizes of a graph's inputs."""
    sizes = (
        size
        for node in graph.find_nodes(op="placeholder")
        for size in getattr(node.meta.get("val"), "shape", ())
    )
    return next((size.node.shape_env for size in sizes if isinstance(size, SymInt)), None)


def assumed(graph: fx.Graph) -> int:
    """How many guards and settled symbols the sizes of a graph's inputs come with."""
    environment = environment_of(graph)
    return 0 if environment is None else len(environment.guards) + len(environment.replacements)


__all__ = ["ExportFacts", "assumed", "environment_of"]
