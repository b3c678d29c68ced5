"""The reference: the dense program in which what was removed is masked where it is consumed.

To multiply the removed entries of a consumer's input by zero is to zero the columns of its weight, in that
use and no other. The operators that lead from the weight to the use are repeated on the masked weight, so
that nothing is believed of how they move it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...analysis._analysis import Analysis
from ...analysis.channels import Product, Slot, Use, Value
from ...analysis.groups import APPROXIMATE, EXEMPT
from ...calibration._matrices import ConsumerMatrices
from ...calibration._products import lying_along
from ...calibration._visit import Decision
from ...capturing._fx import arguments, attribute, way_from_weight
from ...capturing._program import Program
from ...patterns import lookup

#: zero in the kind of what it is put into: as a number of floats it would make floats of integers
_ZERO = False


def masked_program(analysis: Analysis, decision: Decision) -> Program:
    """The analysed program with the decided weights in place of its own and what was removed masked; tensors
    are shared. It can be run node by node, and neither be compiled nor exported.

    Args:
        analysis: of the program, perhaps with fused weights split.
        decision: what is removed, and the repaired weights.
    """
    made = _Masking(analysis, decision)
    made.mask_uses()
    if EXEMPT in analysis.include:
        made.mask_products()
    made.mask_routers()
    made.silence_producers()
    return made.program


class _Masking:
    """Writes masks into a copy of the analysed program."""

    def __init__(self, analysis: Analysis, decision: Decision) -> None:
        self.program, self.analysis = analysis.program.copy(), analysis
        self.gone = np.append(decision.gone, False)  # the last entry serves NONE (-1): never removed
        self.graph = self.program.module.graph
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.canonical, aliases = analysis.program.canonical(), analysis.program.aliases()
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
            node, (weight, *moves) = self.nodes[name], way_from_weight(self.nodes[operand])
            with self.graph.inserting_before(node):
                made = {weight: self.graph.call_function(_zeroed, (weight, mask))}
                for move in moves:
                    made[move] = self.graph.node_copy(move, lambda node, made=made: made.get(node, node))  # type: ignore[misc]
            node.replace_input_with(self.nodes[operand], made[self.nodes[operand]])

    def mask_products(self) -> None:
        """Take the removed channels out of products of activations: zeros in the first operand of each."""
        for product in self.analysis.walk.facts.products:
            self._mask_operand(product, _ZERO)

    def mask_routers(self) -> None:
        """Let no router choose an expert that is gone: its logit is -inf where experts compete by value."""
        experts = [group.sets for group in self.analysis.chosen if group.granularity == "expert"]
        sets = np.concatenate(experts) if experts else np.zeros(0, dtype=np.int64)
        numbers = np.flatnonzero(np.isin(self.analysis.labels, sets))
        for node in self.analysis.walk.values if len(numbers) else ():
            rule = lookup(node.target) if node.op == "call_function" else None
            if rule is None or not rule.all("choose"):
                continue
            given = arguments(node)
            source, dim = given[rule.alternatives[0].operands[0].name], given[rule.all("choose")[0].words[0]]
            value = self.analysis.walk.values.get(source)
            if isinstance(value, Value):
                axes = value.axes if dim is None else value.at(dim % len(value.shape))
                if any(np.isin(axis.numbers.numpy(), numbers).any() for axis in axes):
                    self._mask_operand(Product(node, (source,), numbers), float("-inf"))

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
                    masked = self.graph.call_function(_zeroed, (node, masks[name]))
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

    def _mask_operand(self, product: Product, value: float) -> None:
        """Put a value where channels that go lie along the first operand of a product."""
        gone = np.zeros_like(self.gone)
        gone[product.numbers] = self.gone[product.numbers]
        table, lying = torch.from_numpy(gone), lying_along(self.analysis, product, 0) if gone.any() else []

        def masked(given: Tensor) -> Tensor:
            for numbers in lying:
                given = torch.where(table[numbers.at(given.shape)].to(given.device), value, given)
            return given

        node, source = self.nodes[product.node.name], self.nodes[product.operands[0].name]
        if lying:
            with self.graph.inserting_before(node):
                node.replace_input_with(source, self.graph.call_function(masked, (source,)))


def _zeroed(given: Tensor, stays: Tensor) -> Tensor:
    """Zeros where elements do not stay."""
    return torch.where(stays.to(given.device), given, _ZERO)


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
