"""Every result is run beside the dense program with its removed columns masked before it is returned.

The check takes one thing from the analysis, which columns of which uses were removed, and none of what makes
the analysis believe that they can be. Whatever a rule, a layout or a pass gets wrong shows in the numbers.

The reference is the dense program in which what was removed is masked where it is consumed. To multiply the
removed entries of a consumer's input by zero is to zero the columns of its weight, in that use and no other.
The operators that lead from the weight to the use are repeated on the masked weight, so that nothing is
believed of how they move it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.analysis import APPROXIMATE, EXEMPT, Analysis, Group, Product, Slot, Use, Value
from fasp_fx.base import largest_passing_subset, tensors_in, tolerable, warn
from fasp_fx.calibration import ConsumerMatrices, Decision, decided, layouts_along, restricted
from fasp_fx.capturing import Program, arguments, attribute, draws, is_dynamic, put_behind, way_from_weight
from fasp_fx.errors import CallError, VerificationError, VerificationWarning, first_line
from fasp_fx.passes import finish, remove
from fasp_fx.patterns import lookup

from ._compare import Inputs, ReferenceFailedError, compare, inputs_for

#: inputs of how many sizes are compared, the example among them; where nothing but batches vary, each sample
#: of which is a run by itself
_SIZES, _BATCHES = 3, 2


@dataclass(frozen=True)
class Checked:
    """What was carried out.

    Attributes:
        decision: what really went.
        module: the program without it.
        whole: the groups that were decided and stay whole, by name, with what was seen when they went.
        notes: for the report.
    """

    decision: Decision
    module: fx.GraphModule
    whole: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a decision, in words, and whether its outputs can be compared, and differ."""

    text: str
    differs: bool = False


class Checker:
    """Takes out of a program what was decided for its analysis, as far as what is left computes what the
    masked dense program does.
    """

    def __init__(self, program: Program, analysis: Analysis, decision: Decision) -> None:
        self.program, self.analysis, self.decision = program, analysis, decision
        self.inputs = tuple(inputs_for(program))
        self.notes: list[str] = []

    def run(self, strict: bool) -> Checked:
        """Check all groups; on failure keep the largest passing subset.

        Args:
            strict: leave nothing out: what does not pass is an error.

        Raises:
            VerificationError: nothing of what was decided passes, or not all of it does and ``strict`` is
                given.
        """
        groups = decided(self.analysis, self.decision)
        if not groups:  # the program stays as it was captured, fused producers included
            return Checked(self.decision, finish(self.program))
        module, fault = self._tried(groups)
        whole: dict[str, str] = {}
        if fault is not None:
            first, (groups, whole) = fault, self._passing(groups)
            if not groups or (strict and whole):
                raise VerificationError(
                    f"what was decided cannot be removed: {first.text}; nothing is returned. A rule says what"
                    " its operator does not do, or a pass is wrong"
                )
            module, fault = self._tried(groups)
        if fault is not None:
            names = ", ".join(f"'{group.name}'" for group in groups if group.status == APPROXIMATE)
            if not fault.differs or not names:
                raise VerificationError(
                    f"{fault.text}, and no group alone makes the difference; nothing is returned"
                )
            self.notes.append(f"approximate groups were asked for ({names}): {fault.text}")
        assert module is not None
        messages = [
            f"group '{name}' stays whole, because pruning it is not exact: {difference}"
            for name, difference in whole.items()
        ]
        for message in messages:
            warn(message, VerificationWarning)
        decision = restricted(self.analysis, self.decision, groups)
        return Checked(decision, module, whole, tuple(dict.fromkeys([*self.notes, *messages])))

    def _passing(self, groups: list[Group]) -> tuple[list[Group], dict[str, str]]:
        """The largest part of groups that passes, and what was seen of each of the others.

        Approximate groups, which no masked program equals, come last, all or none; they only have to run.
        """

        def wrong(some: list[Group]) -> str | None:
            fault = self._tried(some)[1]
            return None if fault is None else fault.text

        kept, faulty = largest_passing_subset(
            [group for group in groups if group.status != APPROXIMATE], wrong
        )
        whole = {group.name: text for group, text in faulty}
        approximate = [group for group in groups if group.status == APPROXIMATE]
        if approximate:
            fault = self._tried([*kept, *approximate])[1]
            if fault is None or fault.differs:
                kept += approximate
            else:
                whole |= {group.name: fault.text for group in approximate}
        return kept, whole

    def _tried(self, groups: list[Group]) -> tuple[fx.GraphModule | None, _Fault | None]:
        """The program without what was decided for these groups, and what is wrong with it."""
        decision = restricted(self.analysis, self.decision, groups)
        try:
            rewritten = remove(self.analysis, decision.gone, decision.weights)
        except tolerable(VerificationError) as error:
            return None, _Fault(str(error))
        try:
            module = finish(rewritten)
        except tolerable(Exception) as error:  # an exporter raises what it likes
            return None, _Fault(
                f"what is left of the program cannot be exported: {type(error).__name__}: {first_line(error)}"
            )
        return module, self._difference(
            masked_program(self.analysis, decision, self.program), rewritten, module
        )

    def _difference(self, reference: Program, pruned: Program, module: fx.GraphModule) -> _Fault | None:
        """How a program differs from its reference, on the first inputs that both take.

        Sizes that the dense program does not take are passed over, and those that an exporter has ruled out
        for no good reason, unless it is the example or nothing else is left.
        """
        if _drawn(reference.module.graph) != _drawn(module.graph):
            self.notes.append(
                "the result was not compared with the dense program, because the random numbers that it draws"
                " are fewer"
            )
            return None
        compared, refused = 0, None
        beyond = any(dim != 0 for inputs in self.inputs for _, dim in inputs.sizes)
        for inputs in self.inputs:
            try:
                seen = compare(reference, module, pruned, inputs)
            except ReferenceFailedError as error:
                if inputs is self.inputs[0]:
                    return _Fault(
                        f"{inputs.text} the dense program with the removed channels masked fails:"
                        f" {first_line(error)}"
                    )
            except CallError as error:
                refused = refused or _failed(inputs, first_line(error))
                if inputs is self.inputs[0]:
                    return refused
            except tolerable(Exception) as error:  # a program raises what it likes
                return _failed(inputs, f"{type(error).__name__}: {first_line(error)}")
            else:
                compared += 1
                if not seen.equal:
                    size = (
                        f"by {seen.deviation:.1e} of its largest value"
                        if math.isfinite(seen.deviation)
                        else "in its integers, its shape or where it is not finite"
                    )
                    return _Fault(
                        f"{inputs.text} an output differs from that of the dense program with the removed"
                        f" channels masked, {size}",
                        differs=True,
                    )
                if seen.alone:
                    self.notes.append(
                        "the result was compared with the dense program in its own precision alone, since it"
                        " does not run in a higher one"
                    )
                if compared == (_SIZES if beyond else _BATCHES):
                    return None
        return None if compared > 1 else refused


def _drawn(graph: fx.Graph) -> list[list[int | None]]:
    """The shapes of the random numbers that a graph draws, but for sizes that vary, which no pruning changes
    and each export names anew.
    """
    drawn = (number for node in graph.nodes if draws(node) for number in tensors_in(node.meta.get("val")))
    return [[None if is_dynamic(size) else int(size) for size in number.shape] for number in drawn]


def _failed(inputs: Inputs, cause: str) -> _Fault:
    return _Fault(f"{inputs.text} the pruned program fails, where the dense one runs: {cause}")


#: zero in the kind of what it is put into: as a number of floats it would make floats of integers
_ZERO = False


def masked_program(analysis: Analysis, decision: Decision, program: Program | None = None) -> Program:
    """A program with the decided weights in place of its own and what was removed masked; tensors are shared.
    It can be run node by node, and neither be compiled nor exported.

    Args:
        analysis: of the program, perhaps with fused weights split.
        decision: what is removed, and the repaired weights.
        program: the captured one, with its fused weights whole, so that nothing is believed of how they were
            split; ``None``: the analysed one.
    """
    masking = _Masking(analysis, decision, analysis.program if program is None else program)
    masking.mask_uses()
    for product in analysis.walk.facts.products if EXEMPT in analysis.include else ():
        masking.mask_operand(product, _ZERO)  # of the first operand of each product of activations
    masking.mask_routers()
    masking.silence_producers()
    return masking.program


class _Masking:
    """Writes masks into a copy of a program, in which nodes and weights have the names that they have in the
    analysed one, but for those that were split.
    """

    def __init__(self, analysis: Analysis, decision: Decision, program: Program) -> None:
        self.program, self.analysis = program.copy(), analysis
        self.gone = np.append(decision.gone, False)  # the last entry serves NONE (-1): never removed
        self.graph = self.program.module.graph
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.canonical, self.aliases = analysis.program.canonical(), analysis.program.aliases()
        self.split = {
            name: part for name, part in analysis.program.parts.items() if name not in program.parts
        }
        for name, value in decision.weights.items():
            self._put(name, lambda _, value=value: value.detach())  # type: ignore[misc]

    def _put(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Put what is made of a weight in its place; of one that was split off, among the rows it has."""
        if name not in self.split:
            self.program.replace_weight(
                self.aliases[self.canonical[name]], change(attribute(self.program.module, name).detach())
            )
            return
        part = self.split[name]
        whole = attribute(self.program.module, part.source).detach().clone()
        rows = torch.tensor(part.rows, device=whole.device)
        whole.index_copy_(part.dim, rows, change(whole.index_select(part.dim, rows)))
        self.program.replace_weight([part.source], whole)

    def mask_uses(self) -> None:
        """Zero the removed columns of every use of a weight, from which the way to it is repeated."""
        masks: dict[tuple[str, str], Tensor] = {}
        for use in self.analysis.walk.facts.uses:
            mask, key = self._columns(use), (use.node.name, use.operand.name)
            if mask is not None and use.weight in self.split:  # looked up once, and nowhere else
                self._put(use.weight, partial(_zeroed, stays=mask))
            elif mask is not None:
                masks[key] = mask & masks.get(key, mask)
        for (name, operand), mask in masks.items():
            node, (weight, *moves) = self.nodes[name], way_from_weight(self.nodes[operand])
            with self.graph.inserting_before(node):
                copies = {weight: self.graph.call_function(_zeroed, (weight, mask))}
                for move in moves:
                    copies[move] = self.graph.node_copy(
                        move,
                        lambda node, copies=copies: copies.get(node, node),  # type: ignore[misc]
                    )
            node.replace_input_with(self.nodes[operand], copies[self.nodes[operand]])

    def mask_routers(self) -> None:
        """Let no router choose an expert that is gone: its logit is -inf where experts compete by value."""
        experts = [group.sets for group in self.analysis.chosen if group.granularity == "expert"]
        sets = np.concatenate(experts) if experts else np.zeros(0, dtype=np.int64)
        numbers = np.flatnonzero(np.isin(self.analysis.labels, sets))
        for node in self.analysis.walk.values if len(numbers) else ():
            rule = lookup(node.target) if node.op == "call_function" else None
            if rule is None or not rule.all("choose"):
                continue
            named = arguments(node)
            source, dim = named[rule.alternatives[0].operands[0].name], named[rule.all("choose")[0].words[0]]
            value = self.analysis.walk.values.get(source)
            if isinstance(value, Value):
                axes = value.axes if dim is None else value.at(dim % len(value.shape))
                if any(np.isin(axis.numbers.numpy(), numbers).any() for axis in axes):
                    self.mask_operand(Product(node, (source,), numbers), float("-inf"))

    def silence_producers(self) -> None:
        """Let the producers of groups that cross a norm give zero: all that holds a removed channel of theirs
        is zero there.
        """
        masks: dict[str, Tensor] = {}
        for group in self.analysis.chosen:
            gone = np.isin(self.analysis.labels, group.sets) & self.gone[:-1]
            for slot in group.slots if group.status == APPROXIMATE else ():
                if slot.kind == "weight" and gone[slot.base : slot.base + slot.size].any():
                    shape = attribute(self.analysis.program.module, slot.name).shape
                    mask, name = _along(slot, shape, gone), self.canonical[slot.name]
                    masks[name] = mask & masks.get(name, mask)
        for name in masks.keys() & self.split.keys():
            self._put(name, partial(_zeroed, stays=masks[name]))
        for node in self.graph.find_nodes(op="get_attr"):
            name = self.canonical.get(str(node.target), "")
            if name in masks:
                put_behind(node, _zeroed, masks[name])

    def _columns(self, use: Use) -> Tensor | None:
        """Which elements of a weight stay in one use of it (see :func:`_along`); ``None`` if all do."""
        shape = attribute(self.analysis.program.module, use.weight).shape
        mask = torch.ones([1] * len(shape), dtype=torch.bool)
        for name, dim in use.slots:
            slot = self.analysis.numbering.get(name, dim)
            if slot is not None and name == use.weight:
                mask = mask & _along(slot, shape, self.gone)
        removed = self.gone[use.columns].any(-1)
        if bool(mask.all()) and removed.any():  # its columns lie along no single dimension of the weight
            matrices = ConsumerMatrices(use, self.analysis.walk.values)
            ones = torch.ones(shape)
            mask = matrices.write(matrices.read(ones) * torch.from_numpy(~removed)[:, None], ones).bool()
        return None if bool(mask.all()) else mask

    def mask_operand(self, product: Product, value: float) -> None:
        """Put a value where channels that go lie along the first operand of a product."""
        gone = np.zeros_like(self.gone)
        gone[product.numbers] = self.gone[product.numbers]
        table, layouts = (
            torch.from_numpy(gone),
            layouts_along(self.analysis, product, 0) if gone.any() else [],
        )

        def masked(operand: Tensor) -> Tensor:
            for numbers in layouts:
                operand = torch.where(table[numbers.at(operand.shape)].to(operand.device), value, operand)
            return operand

        node = self.nodes[product.node.name]
        source = node.all_input_nodes[product.node.all_input_nodes.index(product.operands[0])]
        if layouts:
            with self.graph.inserting_before(node):
                node.replace_input_with(source, self.graph.call_function(masked, (source,)))


def _zeroed(tensor: Tensor, stays: Tensor) -> Tensor:
    """Zeros where elements do not stay."""
    return torch.where(stays.to(tensor.device), tensor, _ZERO)


def _along(slot: Slot, shape: torch.Size, gone: np.ndarray) -> Tensor:
    """Which elements of a weight stay if these of its channels along one dimension go; of size 1 along
    dimensions where that makes no difference.
    """
    stays = ~torch.from_numpy(gone[slot.base : slot.base + slot.size]).reshape(slot.blocks, -1)
    sizes = [1] * len(shape)
    sizes[slot.dim] = shape[slot.dim]
    if slot.block_dim is None:
        return stays.reshape(sizes)
    sizes[slot.block_dim] = shape[slot.block_dim]
    # [positions along block_dim, positions along dim].
    by_position = stays.repeat_interleave(shape[slot.block_dim] // slot.blocks, 0)
    return (by_position if slot.block_dim < slot.dim else by_position.T).reshape(sizes)
