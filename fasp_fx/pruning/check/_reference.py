"""The reference: the dense program in which what was removed is masked where it is consumed.

To multiply the removed entries of a consumer's input by zero is to zero the columns of its weight, in that
use and no other. The operators that lead from the weight to the use are repeated on the masked weight, so
that nothing is believed of how they move it.
"""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from ...analysis.channels import Repeating, Slot, Use, Value, repeating
from ...analysis.groups import APPROXIMATE, EXEMPT
from ...base._stamps import WRITTEN_BY
from ...calibration.observe._matrices import ConsumerMatrices
from ...calibration.observe._products import lying_along
from ...capturing._fx import arguments, attribute, way_from_weight
from ...capturing._program import Program, SplitWeight
from ...errors import VerificationError
from ...patterns import lookup

if TYPE_CHECKING:
    from ...analysis._analysis import Analysis
    from ...calibration.observe._visit import Decision

_WHERE = torch.ops.aten.where.ScalarOther
#: zero in the kind of what it is put into: as a number of floats it would make floats of integers
_ZERO = False


def masked_program(program: Program, analysis: Analysis, decision: Decision) -> Program:
    """The captured program with the decided weights in place of its own and what was removed masked; tensors
    are shared.

    Args:
        program: as it was captured; where a pass has taken weights apart in a way that cannot be put back,
            the analysed program serves.
        analysis: of the program, perhaps with fused weights split.
        decision: what is removed, and the repaired weights.
    """
    whole = _whole_weights(program, analysis)
    made = _Masking(analysis.program if whole is None else program, analysis, decision, whole or {})
    made.restore()
    made.mask_uses()
    if EXEMPT in analysis.include:
        made.mask_products()
    made.mask_routers()
    made.silence_producers()
    made.program.module.graph.lint()
    return made.program


def is_of_the_captured(program: Program, analysis: Analysis) -> bool:
    """Whether the reference is made of the captured program, and not of the analysed one."""
    return _whole_weights(program, analysis) is not None


def _put(part: SplitWeight, values: Tensor, into: Tensor) -> None:
    """Write the values of a part of a weight into a tensor of the shape of the whole; they may be
    broadcast.
    """
    rows = torch.tensor(part.rows, device=into.device)
    shape = [*into.shape[: part.dim], len(rows), *into.shape[part.dim + 1 :]]
    into.index_copy_(part.dim, rows, values.to(into).expand(shape))


def _whole_weights(program: Program, analysis: Analysis) -> dict[str, SplitWeight] | None:
    """The parts of which the weights of the captured program are made up, or ``None`` if the captured program
    cannot serve.
    """
    if analysis.program is program:
        return {}
    parts, known = analysis.program.parts, program.weights()
    if any(part.source not in known for part in parts.values()):
        return None
    nodes = {node.name: node for node in program.module.graph.nodes}
    allowed: dict[fx.Node, set[fx.Node]] = {}
    others = [
        node for product in analysis.walk.facts.products for node in (product.node, product.operands[0])
    ]
    others += [item for node, source, _ in _choosing(analysis) for item in (node, source)]
    for use in analysis.walk.facts.uses:
        path = [*way_from_weight(use.operand), use.node]
        if use.weight in parts:
            for node, user in pairwise(path):
                allowed.setdefault(node, set()).add(user)
        else:
            others += path
    if any(set(node.users) != users for node, users in allowed.items()):
        return None  # a part is used in other ways as well, in which its columns stay
    return dict(parts) if all(_same(nodes.get(node.name), node) for node in others) else None


def _same(found: fx.Node | None, node: fx.Node) -> bool:
    """Whether a node of the captured program is that of the analysed one which has its name."""
    return (
        found is not None
        and WRITTEN_BY not in node.meta
        and (found.op, found.target) == (node.op, node.target)
    )


def _choosing(analysis: Analysis) -> list[tuple[fx.Node, fx.Node, int | None]]:
    """The nodes in which positions compete by their values, what holds the values, and along which of its
    dimensions; ``None``: along all.
    """
    found = []
    for node in analysis.walk.values:
        rule = lookup(node.target) if node.op == "call_function" else None
        if rule is not None and rule.all("choose"):
            given = arguments(node)
            source = given[rule.alternatives[0].operands[0].name]
            if isinstance(source, fx.Node):
                found.append((node, source, given[rule.all("choose")[0].words[0]]))
    return found


class _Masking:
    """Writes masks into a copy of a program."""

    def __init__(
        self, program: Program, analysis: Analysis, decision: Decision, parts: dict[str, SplitWeight]
    ) -> None:
        self.program, self.analysis, self.decision, self.parts = program.copy(), analysis, decision, parts
        self.gone = np.append(decision.gone, False)  # the last entry serves NONE (-1): never removed
        self.graph = self.program.module.graph
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.weights, self.canonical, self.aliases = program.weights(), program.canonical(), program.aliases()
        self._count = 0

    def restore(self) -> None:
        """Put repaired weights in place of the captured ones."""
        values: dict[str, Tensor] = {}
        for name, value in self.decision.weights.items():
            part = self.parts.get(name)
            whole = self.canonical[name if part is None else part.source]
            if part is None:
                values[whole] = value.detach()
                continue
            if whole not in values:
                values[whole] = self.weights[whole].detach().clone()
            _put(part, value.detach(), values[whole])
        for name, value in values.items():
            self.program.replace_weight(self.aliases[name], value)

    def mask_uses(self) -> None:
        """Zero the removed columns of every use of a weight."""
        masks: dict[tuple[str, str], Tensor] = {}
        whole: dict[str, Tensor] = {}
        for use in self.analysis.walk.facts.uses:
            mask = self._columns(use)
            if mask is None:
                continue
            if use.weight in self.parts:
                self._add(whole, use.weight, mask)
            else:
                key = (use.node.name, use.operand.name)
                masks[key] = mask & masks.get(key, mask)
        for (node, operand), mask in masks.items():
            self._mask_operand(self.nodes[node], self.nodes[operand], mask)
        self._mask_weights(whole)

    def _add(self, masks: dict[str, Tensor], name: str, mask: Tensor) -> None:
        """Add the mask of a weight, or of a part of one, to those of whole weights."""
        part = self.parts.get(name)
        whole = self.canonical[name if part is None else part.source]
        into = masks.setdefault(whole, torch.ones(self.weights[whole].shape, dtype=torch.bool))
        if part is None:
            into &= mask
        else:
            _put(part, mask & into.index_select(part.dim, torch.tensor(part.rows)), into)

    def mask_products(self) -> None:
        """Take the removed channels out of products of activations: zeros in the first operand of each."""
        for product in self.analysis.walk.facts.products:
            masks = []
            for lying in lying_along(self.analysis, product, 0):
                gone = self.gone[lying.numbers.numpy()] & np.isin(lying.numbers.numpy(), product.numbers)
                if gone.any():
                    masks.append((lying, torch.from_numpy(~gone)))
            self._mask_argument(
                self.nodes[product.node.name], self.nodes[product.operands[0].name], masks, _ZERO
            )

    def mask_routers(self) -> None:
        """Let no router choose an expert that is gone: its logit is -inf wherever experts compete."""
        experts = [group.sets for group in self.analysis.chosen if group.granularity == "expert"]
        if not experts:
            return
        numbers = np.append(np.isin(self.analysis.labels, np.concatenate(experts)) & self.gone[:-1], False)
        for node, source, dim in _choosing(self.analysis):
            value = self.analysis.walk.values[source]
            masks = []
            own = value.axes if isinstance(value, Value) else ()
            for axis in own if dim is None else [axis for axis in own if axis.dim == dim % len(value.shape)]:
                lying = repeating(axis.numbers, _recorded(source, axis.numbers))
                gone = numbers[axis.numbers.numpy()]
                if gone.any() and lying is None:
                    raise VerificationError(
                        f"the experts of '{source.name}' lie along a size that varies; nothing is returned,"
                        " because they cannot be masked"
                    )
                if gone.any() and lying is not None:
                    masks.append((lying, torch.from_numpy(~numbers[lying.numbers.numpy()])))
            self._mask_argument(self.nodes[node.name], self.nodes[source.name], masks, float("-inf"))

    def silence_producers(self) -> None:
        """Let the producers of groups that cross a norm give zero: all that holds a removed channel of theirs
        is zero there.
        """
        masks: dict[str, Tensor] = {}
        # What a copied table turns is at zero already, and the table that it was copied from serves groups
        # that stay.
        copied = {made.name for made in self.analysis.program.copies}
        for group in self.analysis.chosen if APPROXIMATE in self.analysis.include else ():
            own = np.isin(self.analysis.labels, group.sets) & self.gone[:-1]
            for slot in group.slots if group.status == APPROXIMATE else ():
                is_own = slot.kind == "weight" and slot.name not in copied
                if is_own and own[slot.base : slot.base + slot.size].any():
                    shape = attribute(self.analysis.program.module, slot.name).shape
                    self._add(masks, slot.name, _along(slot, shape, own))
        self._mask_weights(masks)

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

    def _hold(self, mask: Tensor, like: fx.Node) -> fx.Node:
        """A node that gives a mask, on the device of the node that it will meet."""
        name = f"fasp_fx_mask_{self._count}"
        self._count += 1
        self.program.module.register_buffer(name, mask.to(self._device(like)), persistent=False)
        return self.graph.get_attr(name)

    def _device(self, node: fx.Node) -> torch.device:
        recorded = node.meta.get("val")
        return recorded.device if isinstance(recorded, Tensor) else self.program.device()

    def _mask_operand(self, node: fx.Node, operand: fx.Node, mask: Tensor) -> None:
        """Repeat the way from a weight to one node on the masked weight."""
        weight, *moves = way_from_weight(operand)
        with self.graph.inserting_before(node):
            masked = self.graph.call_function(_WHERE, (self._hold(mask, weight), weight, _ZERO))
            made = {weight: masked}
            for move in moves:
                made[move] = self.graph.node_copy(move, lambda argument: made.get(argument, argument))
        node.replace_input_with(operand, made[operand])

    def _mask_argument(
        self, node: fx.Node, source: fx.Node, masks: list[tuple[Repeating, Tensor]], value: float
    ) -> None:
        """Mask what a node reads, by masks in the shape of the numbers beside them."""
        masked = source
        with self.graph.inserting_before(node):
            for lying, mask in masks:
                masked = self.graph.call_function(
                    _WHERE, (self._laid_out(lying, self._hold(mask, source), source), masked, value)
                )
        if masked is not source:
            node.replace_input_with(source, masked)

    def _laid_out(self, lying: Repeating, mask: fx.Node, source: fx.Node) -> fx.Node:
        """A mask as long as its source along the dimensions whose sizes vary."""
        call, aten = self.graph.call_function, torch.ops.aten
        for dim, (runs, varies) in enumerate(zip(lying.in_runs, lying.varies, strict=True)):
            if varies:
                own, size = lying.numbers.shape[dim], call(aten.sym_size.int, (source, dim))
                places = call(aten.arange.default, (size,), {"device": self._device(source)})
                if runs:
                    each = call(operator.floordiv, (size, own))
                    places = call(aten.floor_divide.default, (places, each))
                else:
                    places = call(aten.remainder.Scalar, (places, own))
                mask = call(aten.index_select.default, (mask, dim, places))
        return mask

    def _mask_weights(self, masks: dict[str, Tensor]) -> None:
        """Mask weights wherever they are read."""
        for node in self.graph.find_nodes(op="get_attr"):
            mask = masks.get(self.canonical.get(str(node.target), ""))
            if mask is not None:
                with self.graph.inserting_after(node):
                    held = self._hold(mask, node)
                with self.graph.inserting_after(held):
                    masked = self.graph.call_function(_WHERE, (held, node, _ZERO))
                node.replace_all_uses_with(masked, delete_user_cb=lambda user, own=masked: user is not own)


def _recorded(node: fx.Node, numbers: Tensor) -> torch.Size:
    """The shape of a node as it was captured; of one that a pass has written, that of its numbers."""
    recorded = node.meta.get("val")
    return recorded.shape if isinstance(recorded, Tensor) else numbers.shape


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


__all__ = ["masked_program"]
