"""Capture a model as a functional graph in which linear, attention and norms stay whole, for several analyses
and prunings.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.nn.parameter import is_lazy

from fasp_fx.base import (
    LazyGraphModule,
    check_device,
    check_kind,
    compile_graphs,
    pytree,
    rename,
    version_of,
    with_parts,
    without_collections,
)
from fasp_fx.errors import ArgumentError, CaptureError

from ._compare_with_model import compared
from ._export import CaptureOptions, Exported, export
from ._fold import fold
from ._functional import functional, is_functional, out_of_place, take_apart
from ._fx import read_stamps, remove_dead, remove_dropouts, results, weights_of, written_names
from ._parts import Parts
from ._program import ExportFacts, Program, graph_module
from ._rewrites import as_weights, check_names, own_names
from ._runner import record
from ._signature import CallSignature
from ._transformers import is_cache, is_transformers, register_caches


@without_collections()
def capture(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Program:
    """Capture ``model`` as it behaves on the example inputs.

    Args:
        model: a module in evaluation mode, a graph module, or an exported program.
        args, kwargs: example inputs; an exported program brings its own.
        options: those of :class:`CaptureOptions`.

    Raises:
        ArgumentError: the inputs do not fit the model.
        CaptureError: the model is in training mode, has gates, or cannot be exported; the message carries the
            exporter's reason.
    """
    how = CaptureOptions(**options)
    check_kind("kwargs", kwargs, Mapping | None, "pass a dict of arguments by name")
    if isinstance(how.state, str) or not isinstance(how.state, (tuple, list)):
        raise ArgumentError(f"state={how.state!r:.80} is no tuple of names of arguments and outputs")
    device = None if how.device is None else check_device(how.device)
    if isinstance(model, ExportedProgram):
        signature = _exported_signature(model, args, dict(kwargs or {}))
        exported = Exported(_without_writes(as_weights(model)))
    elif isinstance(model, nn.Module):
        signature, exported = _export(model, args, dict(kwargs or {}), how)
    else:
        inside = "; pass its .module" * isinstance(getattr(model, "module", None), nn.Module)
        raise ArgumentError(
            "model must be an nn.Module, fx.GraphModule or ExportedProgram, not"
            f" {type(model).__name__}{inside}"
        )
    program = exported.program
    if device is not None:
        program = move_to_device_pass(program, device)
    check_names((*program.state_dict, *program.constants))
    _check_generators(program)
    module = program.module(check_guards=False)
    own_names(module, module.graph)
    if isinstance(model, ExportedProgram):
        take_apart(module.graph)
    remove_dropouts(module.graph)
    remove_dead(module.graph)
    assert program.example_inputs is not None  # or there was no signature
    inputs, outputs = state_positions(module, program, signature.given(), how.state)
    captured = Program(
        module,
        signature,
        program.example_inputs,
        inputs,
        outputs,
        notes=exported.notes,
        order=tuple(model.state_dict if isinstance(model, ExportedProgram) else weights_of(model)),
        doubled=exported.doubled,
        seen=exported.seen,
        facts=ExportFacts.of(program),
    )
    captured = fold(captured) if how.fold else captured
    # without export's refusal of train() and eval(), and without its hooks
    return replace(captured, module=graph_module(module, module.graph, module.meta, LazyGraphModule))


def _export(
    model: nn.Module, args: Any, kwargs: dict[str, Any], how: CaptureOptions
) -> tuple[CallSignature, Exported]:
    """How a module is called, and what it becomes; errors as for :func:`capture`."""
    if any(getattr(module, "is_fasp_fx_gates", False) for module in model.modules()):
        raise CaptureError(
            "the model has gates on (fasp_fx.training.attach_gates); take their plan, and call gates.detach()"
            " before anything else is done with the model"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ArgumentError(
            f"{type(model).__name__} runs a model in several places; pass its .module, and wrap the result"
            " again"
        )
    training = next(in_training(model), None)
    if training is not None:
        part = f"'{training}' of {type(model).__name__}" if training else type(model).__name__
        raise CaptureError(
            f"{part} is in training mode, which the capture would make permanent; call model.eval() first"
        )
    _check_modes(model)
    compile_graphs(model)  # which is no attribute that forward sets
    if (
        isinstance(args, Mapping)
        and args
        and args.keys() <= inspect.signature(model.forward).parameters.keys()
    ):
        raise ArgumentError(
            f"args holds what {type(model).__name__} takes by name ({', '.join(map(repr, args))}); pass"
            " it as kwargs="
        )
    args = args if isinstance(args, tuple) else (args,)
    if is_transformers(model):
        register_caches(model)
    signature = CallSignature.of(model.forward, args, kwargs, how.own_defaults)
    bound = signature.bound(args, kwargs)
    inputs = pytree.tree_map(
        lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf,
        {name: bound[name] for name in signature.captured},
    )
    return signature, export(model, signature, inputs, how, len(args))


def _without_writes(exported: ExportedProgram) -> ExportedProgram:
    """A program of the caller's in functional operators; torch's own way takes its batch norms apart, where
    quantisers look for them.
    """
    if is_functional(exported):
        return exported
    copied = with_parts(exported, graph_module=copy.deepcopy(exported.graph_module))
    record(copied.graph_module)  # what is recorded in one that was loaded shares no memory
    out_of_place(copied.graph)
    copied.graph_module.recompile()
    return functional(copied)


def _check_generators(exported: ExportedProgram) -> None:
    """Refuse a program that holds a generator of random numbers."""
    if any(isinstance(constant, torch.Generator) for constant in exported.constants.values()):
        raise CaptureError(
            "forward makes a torch.Generator: a program keeps it and draws other numbers in each call, where"
            " forward begins anew; draw the numbers once, and keep them in a buffer"
        )


def _check_modes(model: nn.Module) -> None:
    """Refuse weights that were made in inference mode, which nothing outside of it may change, and those that
    have no shape yet.

    Raises:
        ArgumentError, CaptureError: names one.
    """
    for name, tensor in weights_of(model).items():
        if is_lazy(tensor):
            raise CaptureError(f"'{name}' is uninitialized; call the model once before it is captured")
        if tensor.is_inference():
            raise ArgumentError(
                f"'{name}' was made in torch's inference mode and cannot be exported; outside of it, pass"
                " copy.deepcopy(model)"
            )


def in_training(module: nn.Module, path: str = "") -> Iterator[str]:
    """Names of the submodules in training mode; graphs were captured in one mode and have no other."""
    if isinstance(module, fx.GraphModule):
        return
    if module.training:
        yield path
    for name, child in module.named_children():
        yield from in_training(child, f"{path}.{name}" if path else name)


def _exported_signature(
    exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CallSignature:
    if exported.example_inputs is None:
        raise ArgumentError("the exported program carries no example inputs; export it again from its model")
    args = args if isinstance(args, tuple) else (args,)
    example_args, example_kwargs = exported.example_inputs
    return CallSignature.of(
        exported.module(check_guards=False).forward, args or example_args, kwargs or example_kwargs
    )


def recapture(program: Program, exported: ExportedProgram) -> Program:
    """The same model after ``exported`` was made of it; inputs keep their names, weights are known by theirs.

    Raises:
        CaptureError: the exported program is not called as the model is.
    """
    exported = functional(exported)
    read_stamps(exported.graph)
    traced = exported.module(check_guards=False)
    module = graph_module(traced, traced.graph, traced.meta, LazyGraphModule)
    take_apart(module.graph)
    inputs, before = module.graph.find_nodes(op="placeholder"), program.placeholders()
    if len(inputs) != len(before) or len(results(module.graph)) != len(results(program.module.graph)):
        raise CaptureError("it changed the number of the program's inputs or outputs")
    for node, old in zip(inputs, before, strict=True):
        rename(node, old.name)
    own_names(module, module.graph)
    return replace(program, module=module, facts=ExportFacts.of(exported))


# --- Which inputs and outputs of a program hold state, and may become narrower.


class _CACHED:
    """Stands among the names on the way to a leaf of a cache."""


def _leaves(spec: pytree.TreeSpec, way: frozenset[Any] = frozenset()) -> Iterator[frozenset[Any]]:
    """The names on the way to each leaf of a structure."""
    if spec.is_leaf():
        yield way
        return
    way |= {_CACHED} if is_cache(spec.type) else set()
    names: Any = spec.context
    if not isinstance(names, (list, tuple)) or len(names) != spec.num_children:
        names = [None] * spec.num_children
    for name, child in zip(names, spec.children(), strict=True):
        yield from _leaves(child, way | ({name} if isinstance(name, str) else set()))


def state_positions(
    module: fx.GraphModule,
    exported: ExportedProgram,
    arguments: list[str],
    state: tuple[str, ...],
) -> tuple[frozenset[str], frozenset[int]]:
    """The names of the inputs and the numbers of the outputs that hold state: caches, and what goes by one of
    the names in ``state``.

    Args:
        arguments: names of the arguments in the order of ``forward``, those given by position first.

    Raises:
        ArgumentError: nothing goes by one of the names.
    """
    taken, returned = exported.call_spec.in_spec, exported.call_spec.out_spec
    by_position = zip(arguments, taken.child(0).children(), strict=False)
    inputs = [way for name, spec in by_position for way in _leaves(spec, frozenset({name}))]
    inputs += _leaves(taken.child(1))
    outputs = list(_leaves(returned))
    known = frozenset().union(*inputs, *outputs) - {_CACHED}
    if unknown := [name for name in state if name not in known]:
        raise ArgumentError(
            f"state: no argument or output is called {unknown[0]!r}; there are"
            f" {', '.join(map(repr, sorted(known))) or 'none with a name'}"
        )
    placeholders, wanted = module.graph.find_nodes(op="placeholder"), {_CACHED, *state}
    return (
        frozenset(node.name for node, way in zip(placeholders, inputs, strict=True) if way & wanted),
        frozenset(index for index, way in enumerate(outputs) if way & wanted),
    )


# --- A model that was captured once, for several analyses and prunings.


Model = nn.Module | fx.GraphModule | ExportedProgram


@dataclass(frozen=True)
class Captured:
    """A model as a graph over its own weights, which it shares.

    :func:`fasp_fx.analyze`, :func:`fasp_fx.prune` and :func:`fasp_fx.apply` take it in the place of a model
    and its example inputs, any number of times.

    Attributes:
        programs: the graph, and how it is called, under the empty path; of a model that was captured in parts
            (docs/submodules.md), those of the parts by their paths.
        in_parts: of such a model, what stands around the parts.

    Examples:
        >>> captured = fasp_fx.capture(model, (x,))
        >>> list(captured.programs)
        ['']
    """

    programs: dict[str, Program]
    _versions: dict[str, int | None] = field(repr=False)
    _model: Callable[[], object | None] = field(default=lambda: None, repr=False)
    _parameters: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)
    in_parts: Parts | None = field(default=None, repr=False)

    @property
    def program(self) -> Program:
        """The one program.

        Raises:
            CaptureError: the model was captured in parts.
        """
        if "" not in self.programs:
            raise CaptureError(
                "a model captured in parts has no single program; programs has those of the parts"
            )
        return self.programs[""]

    def device(self) -> torch.device:
        """Where it was captured."""
        return next(iter(self.programs.values())).device()

    def checked(self) -> Program:
        """The program, if its weights are what they were.

        Raises:
            ArgumentError: one has been written into, or the model has another in its place; names it.
        """
        now = _parameters(self._model())
        changed = [
            name for name, parameter in self._parameters.items() if now.get(name, parameter) is not parameter
        ]
        changed += [
            name for name, version in _versions(self.program).items() if version != self._versions.get(name)
        ]
        if changed:
            raise ArgumentError(f"'{changed[0]}' has changed since the model was captured; capture it again")
        return self.program

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        """The same over weights of its own, which one in parts has already."""
        if self.in_parts is not None:
            return self
        program = copy.deepcopy(self.checked(), memo)
        return Captured({"": program}, _versions(program))


def _parameters(model: object) -> dict[str, nn.Parameter]:
    """The parameters of a module by name."""
    return dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else {}


def capture_whole(
    model: Model, args: Any, kwargs: dict[str, Any] | None, *, run: bool = True, **options: Any
) -> Captured:
    """Capture a model as one program; arguments and errors as for :func:`fasp_fx.capture`.

    Args:
        run: whether the program is held against the model.
    """
    program = capture(model, args, kwargs, **options)
    if unread := program.unread():
        note = (
            f"forward computes nothing with '{unread[0]}'"
            + (f" and {len(unread) - 1} more" if len(unread) > 1 else "")
            + ", and the result keeps what nothing reads"
        )
        program = replace(program, notes=(*program.notes, note))
    if run:
        program = compared(program, model, args, kwargs, partial(capture, doubles=False, **options))
    origin = weakref.ref(model) if isinstance(model, nn.Module) else lambda: None
    return Captured({"": replace(program, seen=None)}, _versions(program), origin, _parameters(model))


def check_given(
    captured_on: torch.device,
    args: Any,
    kwargs: dict[str, Any] | None,
    *,
    state: tuple[str, ...],
    dynamic_shapes: Any,
    device: torch.device | str | None,
) -> None:
    """Refuse to say of a captured model what its capture was told.

    Raises:
        ArgumentError: names the argument.
    """
    is_said = {
        "args": args != (),
        "kwargs": bool(kwargs),
        "state": bool(state),
        "dynamic_shapes": dynamic_shapes is not None,
    }
    if name := next(filter(is_said.get, is_said), None):
        raise ArgumentError(
            f"a captured model holds what {name}= says already; give {name}= to fasp_fx.capture"
        )
    if device is not None and torch.device(device).type != captured_on.type:
        raise ArgumentError(
            f"the model was captured on {captured_on}; give device={str(device)!r} to fasp_fx.capture"
        )


def _versions(program: Program) -> dict[str, int | None]:
    """How often each weight was written into, and what weights were computed of at the capture, but for those
    that the model itself writes into; ``None`` where torch does not count.
    """
    written = set(written_names(program.module.graph))
    weights = {**program.weights(), **program.replaced}  # a folded weight can have the name of one of those
    return {name: version_of(tensor) for name, tensor in weights.items() if name not in written}
