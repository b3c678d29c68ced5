"""Put an exported program together from a rewritten graph, where nothing has to be traced anew, when somebody
asks for it.

The operators of a rewritten program are those of the capture and of the passes, all functional. What is left
of an exporter's work is to record what each makes under the capture's symbolic sizes, to turn the weights
into inputs, and to say which input is which.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)

from fasp_fx.base import (
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    OpOverload,
    guards_of,
    guards_of_module,
    quiet,
    refuse_new_guards,
    schema_of,
    take_guards,
    tolerable,
    without_values,
)
from fasp_fx.errors import VerificationError

from ._fx import attribute, results, target_name
from ._program import ExportFacts, Program, assumed, environment_of
from ._runner import record

_log = logging.getLogger("fasp_fx")

#: what an exporter calls the inputs that it makes of a module's tensors begins so
_PREFIXES = {InputKind.PARAMETER: "p", InputKind.BUFFER: "b", InputKind.CONSTANT_TENSOR: "c"}
_KINDS: tuple[tuple[type, Any], ...] = (
    (Tensor, TensorArgument),
    (torch.SymInt, SymIntArgument),
    (torch.SymFloat, SymFloatArgument),
    (torch.SymBool, SymBoolArgument),
)


class _Weight(NamedTuple):
    """What is known of a tensor of a program without its values.

    Attributes:
        recorded: the tensor as a node makes it under the program's symbols.
        persistent: of a buffer, whether it is in the state dict.
        held: a tensor of its kind on the meta device.
    """

    kind: InputKind
    name: str
    recorded: FakeTensor
    persistent: bool | None
    held: Tensor


@dataclass(frozen=True)
class Assembly:
    """All that an exported program is put together of, but for the values of its tensors.

    Attributes:
        graph: of a rewritten program, with what its nodes make recorded, under the capture's symbols.
        weights: its tensors, in the order in which exporters have them.
        facts: of the capture that the graph was made of.
        example: positional and keyword arguments as the graph takes them.
    """

    graph: fx.Graph
    weights: tuple[_Weight, ...]
    facts: ExportFacts
    example: tuple[tuple[Any, ...], dict[str, Any]]

    def program(self) -> ExportedProgram:
        """The exported program; its tensors have no values."""
        exported = self._exported(whole=True)
        take_guards(exported, guards_of(self.frame))  # whatever was assumed of the symbols since
        return exported

    @cached_property
    def frame(self) -> ExportedProgram:
        """A program with the inputs, the guards and as many outputs, which computes nothing."""
        return self._exported(whole=False)

    def fill(
        self, graph: fx.Graph, tensors: dict[str, fx.Node], seen: dict[fx.Node, fx.Node]
    ) -> tuple[Any, ...]:
        """Copy into a graph what the program computes; its results.

        Args:
            tensors: the nodes that hold the program's tensors there, by name.
            seen: the nodes that hold its inputs; gets all others.
        """
        for node in self.graph.nodes:
            if node.op == "get_attr":
                seen[node] = tensors[target_name(node)]
            elif node.op not in ("placeholder", "output"):
                copied = seen[node] = graph.node_copy(node, seen.__getitem__)
                copied.meta.pop("tensor_meta", None)  # an exporter's, of the shapes before
        return tuple(fx.map_arg(results(self.graph), seen.__getitem__))

    def _lift(
        self, graph: fx.Graph, weights: tuple[_Weight, ...]
    ) -> tuple[dict[str, fx.Node], list[InputSpec]]:
        """Inputs of a graph for these tensors."""
        taken = {str(node.target) for node in self.graph.find_nodes(op="placeholder")}
        lifted, specs = {}, []
        for weight in weights:
            wanted = f"{_PREFIXES[weight.kind]}_{weight.name.replace('.', '_')}"
            while wanted in taken:
                wanted += "_"
            node = lifted[weight.name] = graph.placeholder(wanted)
            taken.add(node.name)
            node.meta["val"] = weight.recorded
            specs.append(InputSpec(weight.kind, TensorArgument(node.name), weight.name, weight.persistent))
        return lifted, specs

    def _take_inputs(self, graph: fx.Graph, seen: dict[fx.Node, fx.Node]) -> list[InputSpec]:
        """The caller's inputs of a graph."""
        specs = []
        for node, argument in zip(self.graph.find_nodes(op="placeholder"), self.facts.inputs, strict=True):
            # By the caller's name, which a weight can have too.
            placeholder = seen[node] = graph.placeholder(str(node.target))
            placeholder.meta = dict(node.meta)
            more = (argument.value,) if isinstance(argument, ConstantArgument) else ()
            specs.append(InputSpec(InputKind.USER_INPUT, type(argument)(placeholder.name, *more), None))
        return specs

    def _exported(self, whole: bool) -> ExportedProgram:
        """The program, or one without tensors that computes nothing."""
        graph, seen, weights = fx.Graph(), dict[fx.Node, fx.Node](), self.weights if whole else ()
        lifted, specs = self._lift(graph, weights)
        specs += self._take_inputs(graph, seen)
        outputs = self.fill(graph, lifted, seen) if whole else (None,) * len(results(self.graph))
        graph.output(outputs).meta.update(self.graph.find_nodes(op="output")[0].meta)
        returned = [OutputSpec(OutputKind.USER_OUTPUT, argument_of(output), None) for output in outputs]
        stored = {
            weight.name
            for weight in weights
            if weight.kind is InputKind.PARAMETER or (weight.kind is InputKind.BUFFER and weight.persistent)
        }
        return ExportedProgram(
            nn.Module(),
            graph,
            ExportGraphSignature(specs, returned),
            {weight.name: weight.held for weight in weights if weight.name in stored},
            dict(self.facts.ranges),
            [self.facts.call],
            self.example,
            {weight.name: weight.held for weight in weights if weight.name not in stored},
        )


def ready(
    module: fx.GraphModule,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    facts: ExportFacts,
) -> Assembly | None:
    """What the exported program of a graph module is put together of, when somebody asks for it.

    Args:
        module: a graph module with its weights as attributes; what its nodes make is recorded in it.
        example: positional and keyword arguments as the graph takes them.
        facts: of the capture that the module was made of.

    Returns:
        ``None`` for a program that has to be traced: it writes into its inputs or weights, has regions of its
            own or sizes that data decide, or needs something of its sizes that the capture did not.
    """
    values = (node.meta.get("val") for node in module.graph.nodes)
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if (
        mode is None
        or not all(_is_functional(node) for node in module.graph.nodes)
        or not all(
            isinstance(attribute(module, target_name(node)), Tensor)
            for node in module.graph.find_nodes(op="get_attr")
        )
        or assumed(module.graph) != facts.assumed
    ):
        return None
    if not _recorded(module):
        return None
    module.graph.eliminate_dead_code()
    return Assembly(module.graph, tuple(_weights(module, mode)), facts, example)


def size_check(program: Program) -> Callable[..., None]:
    """A function that holds inputs of a captured graph, in order, against the guards that its results will
    have, and raises an AssertionError where a size does not fit.
    """
    assert program.facts is not None  # or it was not captured
    assembly = Assembly(program.module.graph, (), program.facts, program.example)
    return guards_of_module(assembly.frame.module(check_guards=True)) or (lambda *inputs: None)


def _weights(module: fx.GraphModule, mode: FakeTensorMode) -> Iterator[_Weight]:
    """The tensors of a module, in the order in which exporters have them."""
    stored = module.state_dict(keep_vars=True).keys()
    every = (
        (InputKind.PARAMETER, module.named_parameters(remove_duplicate=False)),
        (InputKind.BUFFER, module.named_buffers(remove_duplicate=False)),
    )
    tensors = {name: (kind, value) for kind, named in every for name, value in named}
    for node in module.graph.find_nodes(op="get_attr"):
        name = target_name(node)
        tensors.setdefault(name, (InputKind.CONSTANT_TENSOR, attribute(module, name)))
    for name, (kind, value) in tensors.items():
        persistent = name in stored if kind is InputKind.BUFFER else None
        yield _Weight(
            kind, name, mode.from_tensor(value, static_shapes=True), persistent, without_values(value)
        )


def _is_functional(node: fx.Node) -> bool:
    """Whether a node may stand in an exported graph as it is."""
    if isinstance(node.target, OpOverload):
        return not schema_of(node.target).is_mutable and "unbacked_bindings" not in node.meta
    return node.op != "call_module" and not isinstance(node.target, HigherOrderOperator)


def _recorded(module: fx.GraphModule) -> bool:
    """Record what every node makes; whether that can be, without assuming anything new of the sizes."""
    try:
        with quiet(), refuse_new_guards(environment_of(module.graph)):
            record(module, everything=False)
    except tolerable(VerificationError) as error:
        _log.info("the program is traced: %s", error)
        return False
    return True


def argument_of(node: Any) -> Any:
    """What an exported program says of an input or an output: a node, or a constant among the outputs."""
    if not isinstance(node, fx.Node):
        return ConstantArgument("", node)
    value = node.meta.get("val")
    argument = next((argument for kind, argument in _KINDS if isinstance(value, kind)), None)
    return ConstantArgument(node.name, value) if argument is None else argument(node.name)
