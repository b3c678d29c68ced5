"""An exported program as JSON, in a schema of ours, and back (docs/saves.md).

Nothing that is read is evaluated: operators are looked up by name, sizes are put together of known functions,
and what generated code or an import would see is checked first (:mod:`._untrusted`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fasp_fx.base import (
    SIZE_FUNCTIONS,
    Symbols,
    guards_of,
    hint_of,
    pytree,
    quiet,
    ranges_of,
    take_guards,
    tolerable,
)
from fasp_fx.capturing import argument_of, results
from fasp_fx.errors import StoreError, first_line

from . import _untrusted
from ._folder import parsing
from ._values import constant_of, device_of, readers_with, to_device, value_from_json, value_to_json

#: what a graph of that version holds is read by every later one
VERSION = 1
#: elements of all example inputs of a program together
EXAMPLE = 2**28
#: what of a weight must be as it was at the capture
ALIKE = ("shape", "dtype", "device")
#: dimensions of a tensor
_DIMENSIONS = 64
#: how the structure of arguments and outputs names a device
_DEVICE = re.compile(r'(\\*"_t\\*": \\*"device\\*", \\*"s\\*": \\*")\w+(:\d+)?')
_INPUTS = {name: InputKind[name] for name in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR", "USER_INPUT")}
_ASSUMPTIONS = ("integer", "positive", "nonnegative")


def program_to_json(program: ExportedProgram) -> dict[str, Any]:
    """The graph, its signature, ranges and guards, and the shapes of the example inputs; no tensor.

    Raises:
        StoreError: the program holds something that JSON cannot.
    """
    if (text := next((item for item in results(program.graph) if isinstance(item, str)), None)) is not None:
        raise StoreError(
            f"the model returns the text {text!r} among its outputs, which is not stored; let forward return"
            " tensors and numbers"
        )
    try:
        return {"program": _Writer().program(program)}
    except StoreError:
        raise
    except tolerable(Exception) as error:
        raise StoreError(f"the program cannot be written as JSON: {first_line(error)}") from error


class _Writer:
    """Writes one program; what is refused on loading is refused here."""

    def __init__(self) -> None:
        self.symbols: dict[str, sympy.Symbol] = {}
        self.environment: Any = None

    def program(self, program: ExportedProgram) -> dict[str, Any]:
        call = program.module_call_graph[0].signature
        assert call is not None  # or it would not be the whole module's
        signature, graph = program.graph_signature, list(map(self.node, program.graph.nodes))
        for symbol in program.range_constraints:
            self.expression(symbol)
        ranges = ranges_of(program)
        return {
            "version": VERSION,
            "torch": torch.__version__,
            "nodes": graph,
            "inputs": [
                [_INPUTS[spec.kind.name].name, spec.target, spec.persistent] for spec in signature.input_specs
            ],
            "outputs": [[spec.kind.name, spec.target] for spec in signature.output_specs],
            "symbols": {
                name: [
                    [assumption for assumption in _ASSUMPTIONS if getattr(symbol, f"is_{assumption}")],
                    *ranges.get(symbol, (None, None)),
                    None if self.environment is None else hint_of(symbol, self.environment),
                ]
                for name, symbol in sorted(self.symbols.items())
            },
            "guards": [_untrusted.check_guard(guard) for guard in guards_of(program)],
            "arguments": call.forward_arg_names,
            "structures": [_structure_to_json(spec) for spec in (call.in_spec, call.out_spec)],
        }

    def node(self, node: fx.Node) -> list[Any]:
        """What :class:`_Reader` reads of a node."""
        target: Any = node.target
        if node.op == "call_function":
            target = _untrusted.name_of(target)
        elif node.op == "get_attr":
            function = getattr(node.graph.owning_module, str(target))
            target = [_untrusted.check_name(target), list(map(self.node, function.graph.nodes))]
        args = [value_to_json(value, self.argument) for value in node.args]
        kwargs = {name: value_to_json(value, self.argument) for name, value in node.kwargs.items()}
        recorded = None if node.op == "output" else value_to_json(node.meta.get("val"), self.record)
        if node.op == "placeholder" and not str(target).isidentifier():
            target = node.name  # of a weight, which is known by its path
        return [_untrusted.check_name(node.name), node.op, target, args, kwargs, recorded, _about(node)]

    def argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, (immutable_list, immutable_dict)):  # as fx has them
            return value_to_json((list if isinstance(value, list) else dict)(value), self.argument)
        raise TypeError(f"a {type(value).__name__} is not stored")

    def record(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.layout != torch.strided:
                raise TypeError(f"a tensor of the layout {value.layout} is not stored")
            dtype, device = (str(part).removeprefix("torch.") for part in (value.dtype, value.device))
            shape, strides = ([self.size(size) for size in sizes] for sizes in (value.shape, value.stride()))
            return {"tensor": [dtype, shape, strides, device, value.requires_grad]}
        for tag, kind in (("size", torch.SymInt), ("real", torch.SymFloat), ("truth", torch.SymBool)):
            if isinstance(value, kind):
                return {tag: self.size(value)}
        return None if isinstance(value, fx.GraphModule) else self.argument(value)

    def size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        self.environment = size.node.shape_env
        return _untrusted.check_expression(self.expression(size.node.expr))

    def expression(self, expression: Any) -> Any:
        if expression.is_Symbol:
            if not expression.is_integer and hint_of(expression, self.environment) is not None:
                raise TypeError(f"{expression} is no whole number, and varies from call to call")
            self.symbols[expression.name] = expression
            return expression.name
        if expression.is_Integer or expression.is_Float:
            return int(expression) if expression.is_Integer else float(expression)
        if expression in (sympy.true, sympy.false):
            return bool(expression)
        if expression.is_Rational:
            return ["Rational", expression.p, expression.q]
        return [type(expression).__name__, *map(self.expression, expression.args)]


def _about(node: fx.Node) -> dict[str, Any]:
    """What else is known of a node, by which quantisers find modules and torch unflattens a program."""
    about: dict[str, Any] = {}
    if stack := node.meta.get("nn_module_stack"):
        about["modules"] = [
            [key, path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"]
            for key, (path, kind) in stack.items()
        ]
    if "torch_fn" in node.meta:
        about["function"] = list(node.meta["torch_fn"])
    return about


def _structure_to_json(spec: pytree.TreeSpec) -> Any:
    """A structure as ``[type, context, children]``, a leaf as nothing; the context is that of the type."""

    def part(tree: dict[str, Any]) -> Any:
        children = list(map(part, tree["children_spec"]))
        return None if tree["type"] is None else [tree["type"], tree["context"], children]

    return _untrusted.check_structure(part(json.loads(pytree.treespec_dumps(spec))[1]))


def _structure_from_json(written: Any, device: torch.device | None) -> pytree.TreeSpec:

    def part(tree: Any) -> dict[str, Any]:
        kind, context, children = (None, None, []) if tree is None else tree
        return {"type": kind, "context": context, "children_spec": list(map(part, children))}

    text = json.dumps([1, part(_untrusted.check_structure(written))])
    return pytree.treespec_loads(text if device is None else _DEVICE.sub(rf"\g<1>{device}", text))


# --- Reading.


def program_from_json(
    data: Mapping[str, Any],
    weights: dict[str, Tensor],
    constants: dict[str, Tensor],
    device: torch.device | None,
    alike: tuple[str, ...] = ALIKE,
) -> ExportedProgram:
    """The program over the given tensors.

    Args:
        data: what :func:`program_to_json` returned.
        weights, constants: tensors by name.
        device: where the program shall run; ``None`` keeps the devices of the save.
        alike: what of the tensors must be as it was at the capture; those of a module can be of another type
            by now, as after ``double()``.

    Raises:
        StoreError: the data holds anything that :func:`program_to_json` does not write.
    """
    with parsing("graph.json"), quiet():
        program = _Reader(data["program"], device).program(weights, constants)
        check_weights(program, alike)
        return program


class _Reader:
    """Reads what :class:`_Writer` wrote, and nothing else: whatever else it meets raises."""

    def __init__(self, fields: Mapping[str, Any], device: torch.device | None) -> None:
        if fields["version"] != VERSION:
            raise StoreError(
                f"the graph is of the version {fields['version']!r:.80}, and {VERSION} is read; save again,"
                " or load with the fasp_fx that saved it"
            )
        self.fields, self.device, self.made = fields, device, Symbols()
        taken, returned = (_structure_from_json(written, device) for written in fields["structures"])
        self.structures = taken, returned
        self.symbols: dict[str, sympy.Symbol] = {}
        for name, (assumptions, *bounds, hint) in fields["symbols"].items():
            known = dict.fromkeys(set(assumptions) & {*_ASSUMPTIONS}, True)
            symbol = self.symbols[name] = sympy.Symbol(_untrusted.check_symbol(name), **known)
            lower, upper, example = (None if one is None else int(one) for one in (*bounds, hint))
            self.made.add(symbol, (lower, upper), example)
        self.records = readers_with(
            tensor=self.tensor,
            size=lambda part: self.made.size(self.size(part)),
            real=lambda part: self.made.real(self.size(part)),
            truth=lambda part: self.made.truth(self.size(part)),
        )

    def program(self, weights: dict[str, Tensor], constants: dict[str, Any]) -> ExportedProgram:
        """The program over these tensors."""
        root = nn.Module()
        fields, graph = self.fields, self.graph(self.fields["nodes"], root)
        placeholders = graph.find_nodes(op="placeholder")
        inputs = [
            InputSpec(_INPUTS[kind], argument_of(node), _path(target), persistent)
            for node, (kind, target, persistent) in zip(placeholders, fields["inputs"], strict=True)
        ]
        outputs = [
            OutputSpec(OutputKind[kind], argument_of(result), _path(target))
            for result, (kind, target) in zip(results(graph), fields["outputs"], strict=True)
        ]
        names = None if fields["arguments"] is None else list(map(_untrusted.check_name, fields["arguments"]))
        call = ModuleCallSignature([], [], *self.structures, names)
        program = ExportedProgram(
            root,
            graph,
            ExportGraphSignature(inputs, outputs),
            weights,
            dict(self.made.ranges),
            [ModuleCallEntry("", call)],
            self.example(
                [
                    node.meta["val"]
                    for node, spec in zip(placeholders, inputs)
                    if spec.kind is InputKind.USER_INPUT
                ]
            ),
            constants,
        )
        take_guards(program, [_untrusted.check_guard(guard) for guard in fields["guards"]])
        return program

    def example(self, values: list[Any]) -> Any:
        """Inputs of the sizes of the capture's example, all zero, in the structure of a call.

        Args:
            values: what is recorded of the inputs.
        """
        elements = sum(
            math.prod(self.made.example(value.shape)) for value in values if isinstance(value, Tensor)
        )
        if elements > EXAMPLE:
            raise StoreError(
                f"the example inputs in graph.json have {elements:,} elements, and at most {EXAMPLE:,} are"
                " made; save with smaller ones"
            )
        zeros = (
            to_device(torch.zeros(self.made.example(value.shape), dtype=value.dtype), value.device)
            if isinstance(value, Tensor)
            else value
            for value in values
        )
        return pytree.tree_unflatten(list(zeros), self.structures[0])

    def graph(self, listed: list[Any], root: nn.Module) -> fx.Graph:
        """A graph whose functions are put into ``root``."""
        graph, nodes = fx.Graph(), dict[str, fx.Node]()
        tags = readers_with(node=nodes.__getitem__, device=lambda name: self.device or device_of(name))
        for name, op, target, args, kwargs, recorded, about in listed:
            if op == "call_function":
                target = _untrusted.operator_called(target)
            elif op == "get_attr":
                path, function = target
                _untrusted.check_path(path)
                inner = nn.Module()
                root.add_module(path, fx.GraphModule(inner, self.graph(function, inner)))
                target = path
            elif op == "placeholder":
                _untrusted.check_name(target)
            elif op != "output":
                raise _untrusted.refuse("operation", op)
            if _untrusted.check_name(name) in nodes:
                raise _untrusted.refuse("second node", name)
            by_name = {
                _untrusted.check_keyword(key): value_from_json(value, tags) for key, value in kwargs.items()
            }
            node = graph.create_node(op, target, tuple(value_from_json(args, tags)), by_name, name)
            node.name, nodes[name] = name, node
            self.describe(node, recorded, about)
        return graph

    def describe(self, node: fx.Node, recorded: Any, about: Mapping[str, Any]) -> None:
        """Note on a node what it makes, and where it comes from."""
        if node.op == "output":
            node.meta["val"] = fx.map_arg(node.args[0], lambda one: one.meta["val"])
            return
        node.meta["val"] = value_from_json(recorded, self.records)
        if node.op == "call_function":
            words = _untrusted.check_word
            node.meta["nn_module_stack"] = {
                words(key): (words(path), words(kind)) for key, path, kind in about.get("modules", ())
            }
        if "function" in about:
            node.meta["torch_fn"] = tuple(map(_untrusted.check_word, about["function"]))
        self.made.note(node)

    def tensor(self, content: Any) -> Tensor:
        dtype, shape, strides, device, trained = content
        if len(shape) > _DIMENSIONS or len(strides) != len(shape):
            raise _untrusted.refuse("shape", shape)
        sizes, steps = ([self.made.size(self.size(size)) for size in part] for part in (shape, strides))
        kind, place = constant_of(torch.dtype)(dtype), self.device or device_of(device)
        with self.made.mode:
            return torch.empty_strided(sizes, steps, dtype=kind, device=place, requires_grad=bool(trained))

    def size(self, part: Any) -> Any:
        """An expression of sizes."""
        _untrusted.check_expression(part)
        return self.expression(part)

    def expression(self, part: Any) -> Any:
        if isinstance(part, str):
            return self.symbols[part]
        is_call = isinstance(part, list)
        return SIZE_FUNCTIONS[part[0]](*map(self.expression, part[1:])) if is_call else sympy.sympify(part)


def _path(name: Any) -> str | None:
    return None if name is None else _untrusted.check_path(name)


def check_weights(program: ExportedProgram, alike: tuple[str, ...] = ALIKE) -> None:
    """Refuse weights that are not what the graph takes them for, as after ``module.half()``.

    Args:
        alike: what of them must be as it was at the capture.

    Raises:
        StoreError: names one.
    """
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    inputs = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    for placeholder, name in names.items():
        expected = inputs[placeholder]
        tensor = program.state_dict.get(name, program.constants.get(name))
        for what in alike:
            actual, wanted = getattr(tensor, what, None), getattr(expected, what)
            if actual != wanted:
                raise StoreError(
                    f"'{name}' has {what} {actual}, the program was captured with {wanted}; undo the change,"
                    " or export the module again"
                )
