"""The module of a result, made of a rewritten program: a graph module that can be copied and pickled."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fasp_fx.base import (
    PRESERVED,
    codegen_of,
    is_view,
    non_persistent_buffers,
    pytree,
    trees_of,
    with_parts,
    with_values,
    without_values,
)
from fasp_fx.capturing import (
    Assembly,
    CallerCodeGen,
    CallSignature,
    ExportFacts,
    Guards,
    Program,
    attribute,
    export_again,
    float_types,
    graph_module,
    guard_calls,
    make_traceable,
    own_names,
    read_stamps,
    ready,
    target_name,
    views_may_copy,
)
from fasp_fx.errors import StoreError
from fasp_fx.storage import program_from_json, program_to_json


class PrunedModule(fx.GraphModule):
    """A program behind the caller's signature.

    A graph module writes its code into a pickle and traces it again, which keeps neither the caller's
    signature nor the sizes that may vary. This one writes the program as :meth:`fasp_fx.Result.save` does,
    and its tensors as they are now. The pickle is read by ``pickle.load`` and by ``torch.load(…,
    weights_only=False)``, in any process that can import fasp_fx.

    Attributes:
        fasp_fx_origin: what it was made of, without the weights; no model has a part of that name.
    """

    fasp_fx_origin: Origin
    #: else transformers' Trainer gives the loss's own arguments to a model that takes **kwargs
    accepts_loss_kwargs = False

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickle holds.

        Raises:
            StoreError: the program holds something that cannot be stored; names it.
        """
        program, signature = self.fasp_fx_origin.program, self.fasp_fx_origin.signature
        weights, constants = values_now(self, program)
        # Types of arguments may be those of a function or script, which no other process finds.
        parameters = signature.parameters.parameters.values()
        plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
        return _rebuilt, (
            program_to_json(program),
            weights,
            constants,
            replace(signature, parameters=inspect.Signature(plain)),
            self.meta.get(PRESERVED, {}),
            self.training,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedModule:
        # The structure of arguments and outputs never changes, and torch warns where a leaf of one is copied.
        memo.update({id(part): part for spec in trees_of(self) for part in _specs(spec)})
        # Never written into, and holds fake tensors that cannot be copied.
        memo[id(self.fasp_fx_origin)] = self.fasp_fx_origin
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, PrunedModule)
        copied.fasp_fx_origin = self.fasp_fx_origin
        for name, module in self.named_modules():
            # A copy of a graph module saves all its buffers, those that a model leaves out as well.
            non_persistent_buffers(copied.get_submodule(name)).update(non_persistent_buffers(module))
        copied.own_guards()
        return copied

    def own_guards(self) -> None:
        """Let the guards ask this module for its types."""
        for part in self.children():
            if isinstance(part, Guards):
                part.owner = weakref.ref(self)


class Origin:
    """What a pruned module was made of, without the values of its weights.

    Args:
        source: an exported program, or what one is put together of when it is asked for.
        signature: the caller's.
    """

    def __init__(self, source: ExportedProgram | Assembly, signature: CallSignature) -> None:
        self._made, self.signature = source, signature

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Positional and keyword arguments as the program takes them, where it has any."""
        return self._made.example_inputs if isinstance(self._made, ExportedProgram) else self._made.example

    @property
    def facts(self) -> ExportFacts:
        """How the program is called and what its sizes may be."""
        return ExportFacts.of(self._made) if isinstance(self._made, ExportedProgram) else self._made.facts

    @property
    def program(self) -> ExportedProgram:
        """The exported program."""
        if not isinstance(self._made, ExportedProgram):
            self._made = self._made.program()
        return self._made

    def body(self) -> tuple[fx.Graph, pytree.TreeSpec, pytree.TreeSpec]:
        """What the program computes, over the names of its tensors, and the trees of its inputs and outputs;
        the graph is not to be changed.
        """
        if isinstance(self._made, ExportedProgram):
            graph, call = self._made.module(check_guards=False).graph, self._made.call_spec
        else:
            graph, call = self._made.graph, self._made.frame.call_spec
        return graph, call.in_spec, call.out_spec


def wrap(exported: ExportedProgram, signature: CallSignature) -> PrunedModule:
    """The module of an exported program behind the caller's signature."""
    lifted = exported.module(check_guards=True)
    recorded = (node.meta.get("val") for node in exported.graph.find_nodes(op="placeholder"))
    guard_calls(lifted, exported, float_types(recorded))
    program = with_parts(
        exported,
        state_dict={name: without_values(tensor) for name, tensor in exported.state_dict.items()},
        constants={
            name: without_values(value) if isinstance(value, Tensor) else value
            for name, value in exported.constants.items()
        },
    )
    return _wrapped(lifted, lifted, Origin(program, signature))


def wrap_graph(assembly: Assembly, tensors: nn.Module, signature: CallSignature) -> PrunedModule:
    """The module of a program that was not put together yet, as :func:`wrap` would make it of that program.

    Args:
        tensors: holds the program's tensors under their names; gets the guards.
    """
    lifted = assembly.frame.module(check_guards=True)
    inputs = lifted.graph.find_nodes(op="placeholder")
    with lifted.graph.inserting_before(next(iter(lifted.graph.nodes))):
        lookups = {
            weight.name: lifted.graph.create_node("get_attr", weight.name) for weight in assembly.weights
        }
    for weight in assembly.weights:
        lookups[weight.name].meta["val"] = weight.recorded
    seen = dict(zip(assembly.graph.find_nodes(op="placeholder"), inputs, strict=True))
    (output,) = lifted.graph.find_nodes(op="output")
    with lifted.graph.inserting_before(output):
        output.args = (assembly.fill(lifted.graph, lookups, seen),)
    guard_calls(lifted, assembly.frame, float_types(weight.recorded for weight in assembly.weights))
    for name, guards in lifted.named_children():
        tensors.add_module(name, guards)
    return _wrapped(lifted, tensors, Origin(assembly, signature))


def _wrapped(lifted: fx.GraphModule, tensors: nn.Module, origin: Origin) -> PrunedModule:
    own_names(tensors, lifted.graph)
    # Strides were settled without gradients; with them attention can pick another kernel, whose result a view
    # does not fit.
    views_may_copy(lifted.graph)
    for node in lifted.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        written: Any = node.args[0]
        if written.op != "get_attr":
            continue
        # Models write without gradients, which no exporter keeps: an embedding with a largest norm into its
        # parameter, running averages into buffers, which would drag the graph of one call into the next.
        place = 0 if isinstance(attribute(tensors, target_name(written)), nn.Parameter) else 1
        with lifted.graph.inserting_before(node):
            node.update_arg(
                place, lifted.graph.call_function(torch.ops.aten.detach.default, (node.args[place],))
            )
    make_traceable(lifted.graph)
    module = graph_module(tensors, lifted.graph, lifted.meta, PrunedModule)
    assert isinstance(module, PrunedModule)
    module.fasp_fx_origin = origin
    module.own_guards()
    module.graph.set_codegen(CallerCodeGen(origin.signature, codegen_of(lifted.graph).pytree_info))
    module.recompile()
    module.eval()
    return module


def program_now(module: nn.Module) -> ExportedProgram:
    """The program of a :class:`PrunedModule`, with the weights and constants that the module holds now.

    Raises:
        StoreError: see :func:`values_now`.
    """
    assert isinstance(module, PrunedModule)
    program = module.fasp_fx_origin.program
    weights, constants = values_now(module, program)
    return with_parts(program, state_dict=weights, constants=constants)


def values_now(module: nn.Module, program: ExportedProgram) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the constants of a module that was made of a program, as they are now; tensors may have
    been replaced by others since.

    Raises:
        StoreError: one is gone, or is no plain tensor any more; names it.
    """
    weights, constants = (
        {name: _now(module, name, value) for name, value in tensors.items()}
        for tensors in (program.state_dict, program.constants)
    )
    return weights, constants


def _now(module: nn.Module, name: str, value: Any) -> Any:
    """What the module holds under a name; constants that are no tensors are part of the program."""
    if not isinstance(value, Tensor):
        return value
    try:
        tensor = attribute(module, name)
    except AttributeError:
        raise StoreError(
            f"the module has no '{name}' any more, which its program reads; undo the change, or export the"
            " module again"
        ) from None
    if type(tensor) not in (Tensor, nn.Parameter):
        raise StoreError(
            f"'{name}' is a {type(tensor).__name__} now, and only plain tensors are stored; save the result"
            " before it is changed, and change what is loaded"
        )
    if isinstance(value, nn.Parameter) and not isinstance(tensor, nn.Parameter):
        raise StoreError(
            f"'{name}' is no parameter any more but is computed; undo that (as"
            " torch.nn.utils.parametrize.remove_parametrizations does), or save the result before"
        )
    return tensor


def _specs(spec: pytree.TreeSpec | None) -> list[pytree.TreeSpec]:
    return [] if spec is None else [spec, *(part for child in spec.children() for part in _specs(child))]


def _rebuilt(
    program: dict[str, Any],
    weights: dict[str, Tensor],
    constants: dict[str, Any],
    signature: CallSignature,
    preserved: dict[str, Any],
    training: bool,
) -> PrunedModule:
    module = wrap(program_from_json(program, weights, constants, None, alike=("shape",)), signature)
    module.meta[PRESERVED] = preserved
    for name, value in preserved.items():
        setattr(module, name, value)
    return module.train(training)


def own_storage(program: Program) -> Program:
    """The same program with every tensor copied, tied ones together, so that nothing is shared with the
    caller's model.
    """
    program = program.copy()
    weights = program.weights()
    for name, names in program.aliases().items():
        tensor = weights[name]
        if (
            name in program.numbers
            and isinstance(tensor, nn.Parameter)
            and not is_view(tensor)
            and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        ):
            continue  # made by a pass
        program.replace_weight(names, with_values(tensor, tensor.detach().clone()))
    return program


def finish(program: Program) -> PrunedModule:
    """The module of a rewritten program. Its exported program is put together when it is asked for
    (``program_now``) where that can be, and traced at once where not: nothing else tells whether it can be.
    """
    program = own_storage(program)
    assembly = None if program.facts is None else ready(program.module, program.example, program.facts)
    if assembly is not None:
        module = wrap_graph(assembly, program.module, program.signature)
        assembly.graph.owning_module = None  # or it would keep the weights alive
        return module
    exported = export_again(program.module, program.example)
    read_stamps(exported.graph)
    return wrap(exported, program.signature)
