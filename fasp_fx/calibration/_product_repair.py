"""Repair queries for the channels that they lose together with keys, so that their products stay as nearly
what they were as they can.

The product of queries Q and keys K is ``Q Kᵀ``. Without the channels P it is ``Q_M K_Mᵀ``. Queries ``Q B`` in
place of ``Q_M`` give the nearest product to it for ``B = C_K[:, M] C_K[M, M]⁻¹``, with ``C_K = KᵀK``: the
least-squares restoration of FASP (arXiv 2501.09412, section 3), with Q for the weight and K for its inputs. B
is a map of rows of W_Q and of its bias. Over several sequences no B is nearest for all: each sequence's C_K
counts by the energy of the queries that meet it.

Where a table of rotations lies between W_Q and the product, rows may only be multiplied, β_f for the set f of
channels that are turned into each other. With ``φ_f = Q_f K_fᵀ``, the part of the product that f gives, and
``H_fg = ⟨φ_f, φ_g⟩ = Σ (Q_fᵀ Q_g) ∘ (K_fᵀ K_g)``, the nearest product is that of ``β_M = H[M, M]⁻¹ H[M, :]
1``: the same restoration again, with a row of ones for the weight and H for the Gram matrix. Where all heads
share the rows (the gain of a norm of queries), their H are added.

Whatever was solved is judged by the products themselves, head by head, and kept where they come nearer, over
all tokens and over those held out.

A softmax does not see what is the same for all keys, so that keys of attention count without their mean over
a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..analysis._analysis import Analysis
from ..analysis.channels import Product
from ..base._offload import keep
from ..capturing._fx import attribute
from ..capturing._runner import Runner
from ._marks import Marks
from ._products import FORMS, Place, lying_along, tokens_of
from ._ranks import Ranks
from .restoration import Restore, Restored, damped, together
from .statistics import HELD, PADDING, precise


@dataclass(frozen=True)
class Mended:
    """A product that was repaired.

    Attributes:
        weights: repaired weights and biases by their canonical names.
        outcome: errors of the product, averaged over heads; its ``weight`` are the maps B, ``[blocks,
            channels, channels]``, zero in removed columns.
    """

    weights: dict[str, Tensor]
    outcome: Restored


class ProductEnergies:
    """Sums over the calibration data that say how far apart products are, for one product whose repair has a
    place.

    Args:
        analysis: of the program.
        product: the product.
        place: where its repair is written.
    """

    def __init__(self, analysis: Analysis, product: Product, place: Place) -> None:
        self.analysis, self.product, self.place = analysis, product, place
        self._keys = lying_along(analysis, product, 1)[0]
        self._sums: dict[str, Tensor] = {}

    def observe(self, runner: Runner, marks: Marks, ranks: Ranks) -> None:
        """Add up the operands of the product, which is about to be executed."""
        device = runner.device or attribute(self.analysis.program.module, self.place.weight).device
        blocks, channels = self.place.numbers.shape
        for name in ("queries", "fitted", "held"):
            self._sums[name] = torch.zeros(blocks, channels, channels, dtype=precise(device), device=device)
        for fitted, withheld, of_keys, of_blocks in self._matrices(runner, marks):
            if self.place.mixes:
                energies = [
                    part.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] for part in (fitted, withheld)
                ]
                sums = {
                    "queries": fitted + withheld,
                    "fitted": of_keys * energies[0],
                    "held": of_keys * energies[1],
                }
            else:
                sums = {"queries": fitted + withheld, "fitted": fitted * of_keys, "held": withheld * of_keys}
            for name, value in sums.items():
                self._sums[name].index_add_(0, of_blocks, value.to(self._sums[name]))
        for name in ("queries", "fitted", "held"):
            ranks.add(self._sums[name])

    def _matrices(self, runner: Runner, marks: Marks) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each batch the products with themselves of fitted queries, of those held out and of keys, a
        matrix for each sequence and head, and its block.
        """
        query, key = self.product.operands
        for number, queries, keys in zip(runner.numbers, runner.read(query), runner.read(key), strict=True):
            marked = marks.of(number, query, queries, tokens_of(self.place.lying)).expand(queries.shape)[
                ..., 0
            ]
            there = (marks.of(number, key, keys, tokens_of(self._keys)) != PADDING).expand(keys.shape)
            if FORMS[str(self.product.node.target)]:
                keys, there = keys.mT, there.mT
            found = self._of_batch(queries, marked, keys, there[..., 0])
            flat = [
                value.expand(*queries.shape[:-2], *value.shape[-2:]).reshape(-1, *value.shape[-2:])
                for value in found
            ]
            yield flat[0], flat[1], flat[2], self._blocks(queries).reshape(-1).to(queries.device)

    def _of_batch(
        self, queries: Tensor, marked: Tensor, keys: Tensor, there: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(queries.dtype, torch.float32)
        q, k = queries.detach().to(exact), keys.detach().to(exact)
        held, padded = (marked == HELD)[..., None], (marked == PADDING)[..., None]
        q, k = q.masked_fill(padded, 0), k.masked_fill(~there[..., None], 0)
        if not FORMS[str(self.product.node.target)]:
            k = (
                k - k.sum(-2, keepdim=True) / there.sum(-1).clamp_min(1)[..., None, None].to(exact)
            ).masked_fill(~there[..., None], 0)
        of_keys = _like(k.mT @ k, q)
        fitted, withheld = (part.mT @ part for part in (q.masked_fill(held, 0), q.masked_fill(~held, 0)))
        return fitted, withheld, of_keys

    def _blocks(self, queries: Tensor) -> Tensor:
        """The block that each matrix of the queries is, shape of their leading dimensions."""
        first = self.place.lying.at(queries.shape)[..., 0, 0]
        order = np.argsort(self.place.numbers[:, 0])
        blocks = order[np.searchsorted(self.place.numbers[order, 0], first.numpy())]
        return torch.from_numpy(blocks).expand(queries.shape[:-2])

    def solve(self, restore: Restore, gone: np.ndarray) -> Restored:
        """The maps B and what they leave of the product, with the channel numbers ``gone`` removed.

        Args:
            restore: see :func:`fasp_fx.restoration.ridge`.
        """
        sums = self._sums
        if len(self.place.rows) < len(self.place.numbers):  # all heads share the rows
            sums = {name: value.sum(0, keepdim=True) for name, value in sums.items()}
        parts = []
        for block in range(len(self.place.rows)):
            kept = torch.from_numpy(~gone[self.place.numbers[block]])
            solve = self._mixed if self.place.mixes else self._multiplied
            parts.append(
                solve(
                    restore,
                    {name: value[block] for name, value in sums.items()},
                    kept,
                    self.place.numbers[block],
                )
            )
        return together(parts)

    def judged(
        self, outcome: Restored, gone: np.ndarray, runner: Runner, marks: Marks, ranks: Ranks
    ) -> Restored:
        """The outcome by the products themselves: with the errors that they have, and with nothing repaired
        in heads where they come no nearer.

        Args:
            outcome: what was solved.
            gone: removed channel numbers.
        """
        maps = outcome.weight
        kept = torch.from_numpy(~gone[self.place.numbers]).to(maps)
        shared = len(maps) < len(kept)  # all heads share the rows
        same = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
        missing = {
            "cut": same - torch.diag_embed(kept),
            "repaired": same - (maps.expand(len(kept), -1, -1) if shared else maps),
            "whole": same.expand(len(kept), -1, -1),
        }
        errors = {name: torch.zeros(2, len(kept), dtype=maps.dtype, device=maps.device) for name in missing}
        for fitted, withheld, of_keys, of_blocks in self._matrices(runner, marks):
            for name, change in missing.items():
                own = change[of_blocks].to(of_keys)
                left = own @ of_keys @ own.mT
                for index, of_queries in enumerate((fitted, withheld)):
                    errors[name][index].index_add_(0, of_blocks, (of_queries * left).sum((-2, -1)).to(maps))
        for value in errors.values():
            ranks.add(value)
        if shared:
            errors = {name: value.sum(1, keepdim=True) for name, value in errors.items()}
        nearer = (errors["repaired"].sum(0) < errors["cut"].sum(0)) & (
            errors["repaired"][1] < errors["cut"][1]
        )
        kept_maps = torch.diag_embed(kept[: len(maps)])
        after = torch.where(nearer, errors["repaired"], errors["cut"])
        total = errors["whole"].sum(0).clamp_min(torch.finfo(maps.dtype).tiny)
        held = errors["whole"][1].clamp_min(torch.finfo(maps.dtype).tiny)
        return Restored(
            torch.where(nearer[:, None, None], maps, kept_maps),
            float((errors["cut"].sum(0) / total).mean()),
            float((after.sum(0) / total).mean()),
            float((errors["cut"][1] / held).mean()),
            float((after[1] / held).mean()),
            bool(nearer.any()),
            outcome.strength,
        )

    def carry(self, outcome: Restored, runner: Runner) -> None:
        """Give the product about to be executed the repaired queries, for all batches."""
        maps = outcome.weight

        def changed(queries: Tensor) -> Tensor:
            blocks = (
                self._blocks(queries) if len(maps) > 1 else torch.zeros(queries.shape[:-2], dtype=torch.long)
            )
            # In memory as they lay: what is computed of them lies as they do, and a view may depend on it.
            return torch.empty_like(queries).copy_(queries @ maps.to(queries)[blocks.to(queries.device)])

        runner.change(self.product.operands[0], changed)

    def _mixed(
        self, restore: Restore, sums: dict[str, Tensor], kept: Tensor, numbers: np.ndarray
    ) -> Restored:
        values, vectors = torch.linalg.eigh(sums["queries"])
        root = (
            vectors * values.clamp_min(0).sqrt()
        ).mT  # rootᵀ root are the queries' products with each other
        left = kept.nonzero()[:, 0].to(root.device)
        outcome = restore(root, sums["fitted"].clone(), sums["held"].clone(), left, False)
        same = torch.eye(len(kept), dtype=root.dtype, device=root.device)
        found = (
            damped(same, sums["fitted"] + sums["held"], left, outcome.strength)
            if outcome.used
            else same * kept.to(same)
        )
        return replace(outcome, weight=found)

    def _multiplied(
        self, restore: Restore, sums: dict[str, Tensor], kept: Tensor, numbers: np.ndarray
    ) -> Restored:
        sets, member = np.unique(self.analysis.labels[numbers], return_inverse=True)
        within = torch.zeros(
            len(sets), len(numbers), dtype=sums["fitted"].dtype, device=sums["fitted"].device
        )
        within[torch.from_numpy(member), torch.arange(len(numbers))] = 1
        fitted, held = (within @ sums[name] @ within.mT for name in ("fitted", "held"))
        stay = (within @ kept.to(within) > 0).nonzero()[:, 0]
        outcome = restore(torch.ones_like(fitted[:1]), fitted.clone(), held.clone(), stay, False)
        return replace(outcome, weight=torch.diag(outcome.weight[0] @ within))


def mend(place: Place, outcome: Restored, analysis: Analysis, repaired: dict[str, Tensor]) -> Mended:
    """Write the maps of a repair into the weight that has a place for them.

    Args:
        repaired: what weights have become already.
    """
    weights = {}
    for name, dim in ((place.weight, place.dim), (place.bias, 0)):
        if name is not None:
            before = repaired.get(name)
            value = (attribute(analysis.program.module, name) if before is None else before).detach()
            weights[name] = keep(
                _mapped(value.movedim(dim, 0), place.rows, outcome.weight).movedim(0, dim).contiguous()
            )
    return Mended(weights, outcome)


def _mapped(value: Tensor, rows: Tensor, maps: Tensor) -> Tensor:
    """Rows ``r`` of every block become ``Bᵀ r``; those that go stay as they are, since their channels go with
    the keys'.
    """
    made = value.clone()
    for own, change in zip(rows.to(value.device), maps.to(value.device), strict=True):
        kept = change.abs().sum(0) > 0
        old = value[own].to(change.dtype).reshape(len(own), -1)
        made[own[kept]] = (change[:, kept].mT @ old).reshape(-1, *value.shape[1:]).to(value.dtype)
    return made


def _like(of_keys: Tensor, queries: Tensor) -> Tensor:
    """Matrices of heads of keys, once for each head of queries that meets them; added up where one head of
    queries meets them all.
    """
    heads, own = queries.shape[-3], of_keys.shape[-3]
    if heads == 1 < own:
        return of_keys.sum(-3, keepdim=True)
    return of_keys if own in (1, heads) else of_keys.repeat_interleave(heads // own, -3)


__all__ = ["Mended", "ProductEnergies", "mend"]
