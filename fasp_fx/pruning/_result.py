"""The smaller model: module, program, plan and report; and its folder of JSON and safetensors files, without
pickle.

``graph.json`` holds the program, ``weights.safetensors`` the parameters and persistent buffers (tied ones
once), ``constants.safetensors`` the constants and other buffers, ``plan.json``, ``report.json`` and
``signature.json`` what their names say, and ``manifest.json`` the size and SHA-256 of each file. The sums
find damage, not forgery; against a forged folder, everything that torch would evaluate, import or turn into
code is checked first, as is how much of it there is (see ``fasp_fx/storage/_untrusted.py``). Operators run as
they are named, so load only what you would also run.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, cast

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fasp_fx.analysis import PruningPlan
from fasp_fx.base import (
    Page,
    __version__,
    check_kind,
    fingerprint,
    in_usual_modes,
    one_at_a_time,
    parse,
    path_of,
    tolerable,
)
from fasp_fx.capturing import CallSignature, model_copy, replace_submodule, with_attributes_of
from fasp_fx.errors import ArgumentError, CaptureError, PlanError, StoreError
from fasp_fx.passes import PrunedModule, program_now, wrap
from fasp_fx.storage import (
    check_weights,
    new_save,
    parsing,
    program_from_json,
    program_to_json,
    read_json,
    read_manifest,
    read_tensors,
    read_text,
    signature_from_json,
    signature_to_json,
    verify,
    write_json,
    write_tensors,
)

from ._config import PruningConfig
from ._report import Report

KIND = "whole"
TOLD = ("plan.json", "report.json")
PARTS_KIND = PARTS = "parts"
FILES = ("graph.json", "weights.safetensors", "constants.safetensors", "signature.json", *TOLD)
PARTS_FILES = ("parts.json", "rest.safetensors", "signature.json", *TOLD)
#: the file that a hub shows, and a line in it: with that it is written anew with each save
CARD = "README.md"
MARK = "<!-- written by fasp_fx, and anew with each save; take this line out to keep a card of your own -->"
_Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Result(Page):
    """What :func:`fasp_fx.prune` returns.

    Attributes:
        module: the smaller model behind the caller's signature; trains, moves, compiles and exports again. Of
            a model that cannot be captured as a whole, a copy with smaller parts in it.
        plan: what was removed.
        report: what it cost, and what was asked for.
        parts: of such a model, the result of each captured submodule, by its path; plans and reports in them
            use the names of the submodule.
        left: for each submodule that stayed whole, why.

    Examples:
        >>> print(result.eager(model)[0])  # the caller's own class, smaller
        Linear(in_features=8, out_features=20, bias=True)
        >>> result.program.module()(x).shape  # an ExportedProgram
        torch.Size([64, 4])
    """

    module: fx.GraphModule
    plan: PruningPlan
    report: Report
    signature: CallSignature = field(repr=False)
    parts: Mapping[str, Result] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        before, after = self.report.parameters
        return f"Result(sparsity={self.plan.sparsity:.4f}, parameters={before:,} -> {after:,})"

    @property
    def program(self) -> ExportedProgram:
        """The same as an exported program, which shares its weights with ``module``, as they are now; put
        together when it is first asked for.

        Raises:
            StoreError: the module has lost a weight, or computes it from others; names it.
            CaptureError: the model was pruned in parts.
        """
        if self.is_in_parts:
            raise CaptureError(
                "a model pruned in parts has no single program; result.parts holds the result of each part,"
                " with its program"
            )
        return program_now(self.module)

    @property
    def is_in_parts(self) -> bool:
        """Whether the model was not captured as a whole."""
        return not isinstance(self.module, PrunedModule)

    @property
    def config(self) -> PruningConfig | None:
        """What was asked for, as far as it is known (:class:`fasp_fx.pruning.Report`)."""
        return self.report.config

    def with_report(self, **fields: Any) -> Self:
        """The same, sharing its module, with some fields of its report replaced."""
        return replace(self, report=self.report.with_fields(fields, self.module))

    def following(self, earlier: PruningPlan) -> Self:
        """The same, sharing its module, for the model that was there before earlier prunings: ``eager`` takes
        that model too, also where it was loaded from a folder.

        Args:
            earlier: the plan by which the model was made that this result was made of.

        Examples:
            >>> small = result.eager(model)
            >>> second = fasp_fx.prune(small, (x,), calibration=batches, sparsity=0.2)
            >>> _ = second.following(result.plan).save("chain")
            >>> type(fasp_fx.load("chain").eager(model)) is type(model)
            True
        """
        return replace(self, plan=earlier.then(self.plan))

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Not a module.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("a Result is not called; call result.module, the smaller model")

    if not TYPE_CHECKING:  # a type checker sees itself that there is none

        def __getattr__(self, name: str) -> None:
            is_of_modules = hasattr(nn.Module, name) and not name.startswith("_")
            more = "; the smaller model, which has, is result.module" if is_of_modules else ""
            raise AttributeError(f"a Result has no attribute '{name}'{more}", name=name, obj=self)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the result to a new folder, whole or not at all (:mod:`fasp_fx.pruning` says what the files
        hold). Of a model pruned in parts, the code between them is not stored: :func:`fasp_fx.load` takes the
        dense model for it.

        Raises:
            StoreError: the path is taken or cannot be written, the result holds something that cannot be
                stored, or a copy that :meth:`eager` made was trained since.
        """
        path = path_of(path, "path").absolute()
        check_copies(self.module, self._weights)
        told = replace(self, report=self.report.without_stale(self.module))
        with new_save(path, PARTS_KIND if self.is_in_parts else KIND, overwrite=overwrite) as folder:
            (_write_parts if self.is_in_parts else _write_whole)(folder, told)
            dense = ", model=dense" if self.is_in_parts else ""
            loading = f'import fasp_fx\n\nmodel = fasp_fx.load("this/folder"{dense}).module'
            write_card(folder, told.report, loading, "library_name: pytorch", path)
        return path

    @one_at_a_time
    @in_usual_modes
    def eager(self, model: nn.Module) -> nn.Module:
        """Make a smaller copy of the caller's own module, which trains as the caller's does: norms and
        dropouts follow ``train()`` and ``eval()``.

        The copy is of the model's class and holds the weights that ``module`` holds now, under their names in
        the model. Attributes that are sizes (``out_features``, ``num_heads``, …) are set to what the pruned
        program has in their places; captured as the model was, the copy is that program, node by node. Which
        parameters are trained, and which submodules are in training mode, is as in the model, and around the
        parts of a model in parts as in ``module`` (docs/eager.md).

        Args:
            model: the model that was pruned, or another one of its class and sizes, such as one that was
                never trained; of a chain of prunings, also the first one. It is left as it was, and shares no
                storage with the copy, which has its values in what the program does not use.

        Raises:
            EagerError: no copy is the program; says where they part, and what to do.
            PlanError: the model is not one that the plan was made for; names a weight.
        """
        from ._eager import eager

        check_kind("model", model, nn.Module, "pass the module that was pruned")
        if not self.is_in_parts:
            smaller = eager(self.module, self.plan, model)
        else:
            smaller = model_copy(self.module)
            for path, part in self.parts.items():
                places = _places(smaller, smaller.get_submodule(path))
                replace_submodule(smaller, places, eager(part.module, part.plan, model.get_submodule(path)))
        note_copy(smaller, self.module)
        return smaller

    def _weights(self) -> dict[str, Tensor]:
        """The weights that the module holds now, by their names in the model that was pruned."""
        from ._eager import weights_by_original_name

        weights = self.module.state_dict() if self.parts else {}
        for path, part in (self.parts or {"": self}).items():
            weights |= {
                f"{path}.{name}" if path else name: tensor
                for name, tensor in weights_by_original_name(part.module, part.plan).items()
            }
        return weights


# --- Writing.


@dataclass(frozen=True)
class Layout:
    """Every place of each part in the model, and what stayed whole, with the reason."""

    parts: list[Annotated[list[_Text], Field(min_length=1)]]
    left: dict[str, str]


def is_inside(name: str, paths: Iterable[str]) -> bool:
    """Whether a weight is one of a submodule at one of these paths."""
    return any(name.startswith(f"{path}.") for path in paths)


def _places(model: nn.Module, module: nn.Module) -> list[str]:
    """Where a submodule stands in a model."""
    return [path for path, other in model.named_modules(remove_duplicate=False) if other is module]


def _write_whole(folder: Path, result: Result) -> None:
    program = result.program
    check_weights(program)
    write_json(folder / "signature.json", signature_to_json(result.signature))
    write_json(folder / "graph.json", program_to_json(program))
    write_tensors(folder / "weights.safetensors", program.state_dict)
    write_tensors(folder / "constants.safetensors", program.constants)
    write_told(folder, result.plan, result.report)


def _write_parts(folder: Path, result: Result) -> None:
    """Write the program of each part and the weights of everything else."""
    places = []
    for index, (name, part) in enumerate(result.parts.items()):
        paths = _places(result.module, part.module)
        if name not in paths:
            raise StoreError(
                f"the part '{name}' no longer stands at its place in result.module, so it cannot be saved;"
                " save before exchanging modules"
            )
        places.append([name, *(path for path in paths if path != name)])
        part_folder = folder / PARTS / str(index)
        part_folder.mkdir(parents=True)
        _write_whole(part_folder, part)
    inside = list(chain(*places))
    rest = {
        name: value
        for name, value in result.module.state_dict(keep_vars=True).items()
        if not is_inside(name, inside)
    }
    write_tensors(folder / "rest.safetensors", rest)
    write_json(folder / "signature.json", signature_to_json(result.signature))
    write_json(folder / "parts.json", asdict(Layout(places, dict(result.left))))
    write_told(folder, result.plan, result.report)


def write_told(folder: Path, plan: PruningPlan, report: Report) -> None:
    """Write what was removed, and what it cost."""
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")


def write_card(folder: Path, report: Report, loading: str, header: str, before: Path) -> None:
    """Write what to know of a pruned model: what went, how far it agrees, how it is loaded and was made.

    Args:
        loading: the code that loads it.
        header: lines of YAML for the hub.
        before: the folder that is replaced; a card in it that somebody wrote stays.
    """
    there = (before / CARD).read_text(encoding="utf-8") if (before / CARD).is_file() else MARK
    text = (
        *("---", header, "tags:", "- fasp_fx", "- pruned", "---", "", MARK, ""),
        *(f"# A model, {report.sparsity:.1%} of it removed", ""),
        *(f"* *{what}*: {line}" for what, line in report.said()),
        *("", "## Loading", "", "```python", loading, "```", "", "## How it was made", ""),
        f"By fasp_fx {__version__} with torch {torch.__version__} and these options:",
        *("", "```json", json.dumps(json.loads(report.to_json())["config"], indent=1), "```", ""),
    )
    (folder / CARD).write_text("\n".join(text) if MARK in there else there, encoding="utf-8")


def read_told(folder: Path) -> tuple[PruningPlan, Report]:
    """The plan and the report of a save of any kind, without loading anything else.

    Raises:
        StoreError: a file is missing or damaged.
    """
    try:
        plan = PruningPlan.from_json(read_text(folder / "plan.json"))
    except PlanError as error:
        raise StoreError(f"plan.json is damaged: {error}; save the result again") from error
    return plan, Report.from_json(read_text(folder / "report.json"))


# --- Reading.


#: the kinds of saves that :func:`read_result` reads
SAVES = (KIND, PARTS_KIND)


def read_result(folder: Path, model: nn.Module | None, device: torch.device | None) -> Result:
    """Read what :meth:`Result.save` wrote; arguments and errors as for :func:`fasp_fx.load`."""
    if read_manifest(folder).kind == PARTS_KIND:
        return _load_parts(folder, model, device)
    verify(folder, KIND, FILES)
    return _read_program(folder, device)


def _read_program(folder: Path, device: torch.device | None) -> Result:
    """Read the files of a result, which were held against their manifest.

    Raises:
        StoreError: a file is damaged; names it and what to do.
    """
    plan, report = read_told(folder)
    signature = signature_from_json(read_text(folder / "signature.json"))
    weights, constants = (
        read_tensors(folder / f"{name}.safetensors", device) for name in ("weights", "constants")
    )
    program = program_from_json(read_json(folder / "graph.json"), weights, constants, device)
    with parsing("graph.json or signature.json"):  # each may be well-formed, and not fit the other
        return Result(wrap(program, signature), plan, report, signature)


def _load_parts(folder: Path, model: nn.Module | None, device: torch.device | None) -> Result:
    """Read a result of a model pruned in parts.

    Args:
        folder: the folder.
        model: a model of the code that was pruned; its weights do not matter, and it is left as it was.
        device: where the model shall be; ``None``: where ``model`` is.

    Raises:
        StoreError: a file is missing or damaged, or the model is not of the code that was pruned.
        ArgumentError: there is no model.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"'{folder}' holds a model pruned in parts, without the code between them; give the dense model:"
            " fasp_fx.load(path, model=model)"
        )
    verify(folder, PARTS_KIND, PARTS_FILES)
    layout = parse(Layout, read_text(folder / "parts.json"), "parts.json")
    count = len(layout.parts)
    verify(folder, PARTS_KIND, [f"{PARTS}/{index}/{name}" for index in range(count) for name in FILES])
    rebuilt = model_copy(model).eval()
    tensors = chain(rebuilt.parameters(), rebuilt.buffers())
    target = device or next((tensor.device for tensor in tensors if tensor.device.type != "meta"), None)
    rest = read_tensors(folder / "rest.safetensors", target)
    parts = {
        paths[0]: _read_program(folder / PARTS / str(index), target)
        for index, paths in enumerate(layout.parts)
    }
    another = f"this {type(model).__name__} is not the model that was pruned, which has other weights around"
    try:
        for paths in layout.parts:
            replace_submodule(
                rebuilt, paths, with_attributes_of(parts[paths[0]].module, rebuilt.get_submodule(paths[0]))
            )
        # The very weights that were there, whatever types and ties those of the model have.
        missing, strange = rebuilt.load_state_dict(rest, strict=False, assign=True)
    except tolerable(AttributeError, RuntimeError) as error:  # no such submodule, or other sizes
        raise StoreError(f"{another} the parts: {error}; give that one") from error
    inside = list(chain(*layout.parts))
    stray = [*strange, *(name for name in missing if not is_inside(name, inside))]
    stray += [name for name, tensor in rebuilt.named_buffers() if tensor.device.type == "meta"]
    if stray:
        raise StoreError(f"{another} the parts, such as '{stray[0]}'; give that one, with its values")
    rebuilt = rebuilt if device is None else rebuilt.to(device)
    return Result(
        cast(fx.GraphModule, rebuilt),
        *read_told(folder),
        signature_from_json(read_text(folder / "signature.json")),
        parts,
        layout.left,
    )


# --- The copies of callers' models that results have made: a save would forget that one was trained since.

#: of each copy, the module that it is like, and what its weights were
_COPIES: MutableMapping[nn.Module, tuple[weakref.ref[nn.Module], dict[str, str]]] = (
    weakref.WeakKeyDictionary()
)


def note_copy(copy: nn.Module, module: nn.Module) -> None:
    """Remember the weights of a copy that is like the module of a result."""
    _COPIES[copy] = weakref.ref(module), _fingerprints(copy)


def check_copies(module: nn.Module, weights: Callable[[], Mapping[str, Tensor]]) -> None:
    """Refuse to write other weights than those of a copy that was trained since it was made.

    Args:
        module: of the result.
        weights: gives those that the module has now, by their names in the copies.

    Raises:
        StoreError: names one.
    """
    if _COPIES:
        gc.collect()  # a copy that nobody holds any more may be held by itself
    changed = [
        (name, copy.state_dict()[name])
        for copy, (other, before) in list(_COPIES.items())
        if other() is module
        for name, _ in sorted(_fingerprints(copy).items() - before.items())
    ]
    now = weights() if changed else {}
    for name, tensor in changed:
        if name in now and not torch.equal(tensor, now[name].to(tensor)):
            raise StoreError(
                f"a copy that result.eager made was trained since, and result.module has other values in"
                f" '{name}'; take them with result.module.load_state_dict(copy.state_dict()), or save"
                " the copy's state_dict() and delete the copy"
            )


def _fingerprints(module: nn.Module) -> dict[str, str]:
    """What tells the weights of a module from others, but for those that were quantised."""
    tensors = module.state_dict().items()
    plain = ((name, tensor) for name, tensor in tensors if type(tensor) is Tensor and not tensor.is_meta)
    return {name: fingerprint({"": tensor}) for name, tensor in plain}
