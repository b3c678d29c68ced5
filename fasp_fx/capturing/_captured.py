"""A model that was captured once, for several analyses and prunings."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..errors import ArgumentError, CaptureError
from . import capture as capture_program
from ._compare_with_model import compared
from ._fx import written_names
from ._program import Program

Model = nn.Module | fx.GraphModule | ExportedProgram


@dataclass(frozen=True)
class Captured:
    """A model as a graph over its own weights, which it shares.

    :func:`fasp_fx.analyze`, :func:`fasp_fx.prune` and :func:`fasp_fx.apply` take it in the place of a model
    and its example inputs, any number of times.

    Attributes:
        programs: the graph, and how it is called, under the empty path; of a model that was captured in parts
            (docs/submodules.md), those of the parts by their paths.
    """

    programs: dict[str, Program]
    _versions: dict[str, int | None] = field(repr=False)
    _model: Callable[[], object | None] = field(default=lambda: None, repr=False)
    _parameters: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)

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
        changed = [name for name, held in self._parameters.items() if now.get(name, held) is not held]
        versions = _versions(self.program).items()
        changed += [name for name, version in versions if version != self._versions.get(name)]
        if changed:
            raise ArgumentError(f"'{changed[0]}' has changed since the model was captured; capture it again")
        return self.program

    def __copy__(self) -> Captured:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        """The same over weights of its own."""
        program = copy.deepcopy(self.checked(), memo)
        return Captured({"": program}, _versions(program))

    def __reduce__(self) -> NoReturn:
        raise ArgumentError(
            "a captured model shares its weights with the model, and is not pickled; pickle the model and"
            " capture it again, or save what prune() returned"
        )


def capture_whole(model: Model, args: Any, kwargs: dict[str, Any] | None, **options: Any) -> Captured:
    """Capture a model as one program; arguments and errors as for :func:`fasp_fx.capture`."""
    program = _captured(model, args, kwargs, **options)
    held = weakref.ref(model) if isinstance(model, nn.Module) else lambda: None
    return Captured({"": program}, _versions(program), held, _parameters(model))


def _parameters(model: object) -> dict[str, nn.Parameter]:
    """The parameters of a module by name."""
    return dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else {}


def _captured(
    model: Model, args: Any, kwargs: dict[str, Any] | None, *, run: bool = True, **options: Any
) -> Program:
    """Capture, and if ``run``, hold the program against the model."""
    program = capture_program(model, args, kwargs, **options)
    if unread := program.unread():
        note = (
            f"forward computes nothing with '{unread[0]}'"
            + (f" and {len(unread) - 1} more" if len(unread) > 1 else "")
            + ", and the result keeps what nothing reads"
        )
        program = replace(program, notes=(*program.notes, note))
    if not run:
        return program
    return compared(program, model, args, kwargs, partial(capture_program, doubles=False, **options))


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
    given = {
        "args": args != (),
        "kwargs": bool(kwargs),
        "state": bool(state),
        "dynamic_shapes": dynamic_shapes is not None,
    }
    for name, is_given in given.items():
        if is_given:
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
    own = set(written_names(program.module.graph))
    held = {**program.weights(), **program.replaced}  # a folded weight can have the name of one of those
    return {name: _version(tensor) for name, tensor in held.items() if name not in own}


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


__all__ = ["Captured", "Model", "capture_whole", "check_given"]
