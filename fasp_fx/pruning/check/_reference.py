"""The reference: the dense program in which what was removed is masked where it is consumed.

To multiply the removed entries of a consumer's input by zero is to zero the columns of its weight, in that
use and no other. The operators that lead from the weight to the use are repeated on the masked weight, so
that nothing is believed of how they move it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from ...analysis.channels import Repeating, Slot, Use, Value, repeating
from ...analysis.groups import APPROXIMATE, EXEMPT
from ...calibration._matrices import ConsumerMatrices
from ...calibration._products import lying_along
from ...capturing._fx import arguments, attribute, way_from_weight
from ...capturing._program import Program
from ...errors import VerificationError
from ...patterns import lookup

if TYPE_CHECKING:
    from ...analysis._analysis import Analysis
    from ...calibration._visit import Decision

_WHERE = torch.ops.aten.where.ScalarOther
#: zero in the kind of what it is put into: as a number of floats it would make floats of integers
_ZERO = False


def masked_program(analysis: Analysis, decision: Decision) -> Program:
    """The analysed program with the decided weights in place of its own and what was removed masked; tensors
    are shared.

    Args:
        analysis: of the program, perhaps with fused weights split.
        decision: what is removed, and the repaired weights.
    """
    made = _Masking(analysis, decision)
    made.mask_uses()
    if EXEMPT in analysis.include:
        made.mask_products()
    made.mask_routers()
    if APPROXIMATE in analysis.include:
        made.silence_producers()
    made.program.module.graph.lint()
    return made.program


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
    """Writes masks into a copy of the analysed program."""

    def __init__(self, analysis: Analysis, decision: Decision) -> None:
        self.program, self.analysis = analysis.program.copy(), analysis
        self.gone = np.append(decision.gone, False)  # the last entry serves NONE (-1): never removed
        self.graph = self.program.module.graph
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.canonical, aliases = analysis.program.canonical(), analysis.program.aliases()
        self._count = 0
        for name, value in decision.weights.items():
            self.program.replace_weight(aliases[self.canonical[name]], value.detach())

    def mask_uses(self) -> None:
        """Zero the removed columns of every use of a weight, from which the way to it is repeated."""
        masks: dict[tuple[str, str], Tensor] = {}
        for use in self.analysis.walk.facts.uses:
            mask, key = self._columns(use), (use.node.name, use.operand.name)
            if mask is not None:
                masks[key] = mask & masks.get(key, mask)
        for (name, operand), mask in masks.items():
            node, way = self.nodes[name], way_from_weight(self.nodes[operand])
            with self.graph.inserting_before(node):
                made = self._repeated(way, mask)
            node.replace_input_with(way[-1], made)

    def _repeated(self, way: list[fx.Node], mask: Tensor) -> fx.Node:
        """What leads from a weight to an operand, once more on the masked weight."""
        weight, *moves = way
        made = {weight: self.graph.call_function(_WHERE, (self._hold(mask, weight), weight, _ZERO))}
        for move in moves:
            made[move] = self.graph.node_copy(move, lambda node: made.get(node, node))
        return made[way[-1]]

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
        for group in self.analysis.chosen:
            own = np.isin(self.analysis.labels, group.sets) & self.gone[:-1]
            for slot in group.slots if group.status == APPROXIMATE else ():
                if slot.kind == "weight" and own[slot.base : slot.base + slot.size].any():
                    shape = attribute(self.analysis.program.module, slot.name).shape
                    mask, name = _along(slot, shape, own), self.canonical[slot.name]
                    masks[name] = mask & masks.get(name, mask)
        for node in self.graph.find_nodes(op="get_attr"):
            name = self.canonical.get(str(node.target), "")
            if name in masks:
                with self.graph.inserting_after(node):
                    held = self._hold(masks[name], node)
                with self.graph.inserting_after(held):
                    masked = self.graph.call_function(_WHERE, (held, node, _ZERO))
                node.replace_all_uses_with(masked, delete_user_cb=lambda user, own=masked: user is not own)

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
        for dim, varies in enumerate(lying.varies):
            if varies:
                size = call(aten.sym_size.int, (source, dim))
                places = call(aten.arange.default, (size,), {"device": self._device(source)})
                places = call(aten.remainder.Scalar, (places, lying.numbers.shape[dim]))
                mask = call(aten.index_select.default, (mask, dim, places))
        return mask


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
