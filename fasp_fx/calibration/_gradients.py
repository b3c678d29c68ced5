"""Run batches forward and back through a graph, and show scores what they asked for at every consumer's
input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fasp_fx.analysis import Product, Use
from fasp_fx.base import codegen_of, device_of, pytree, tolerable
from fasp_fx.capturing import Program, Runner, results
from fasp_fx.errors import CalibrationError, first_line

from ._calibration import Piece, ran
from ._consumers import Consumer, Consumers, counting
from ._losses import Loss, Outputs, Padding, evaluated
from ._matrices import ConsumerMatrices, states_before
from ._products import EFFECT
from ._ranks import Ranks
from ._roles import TokenRoles
from ._statistics import InputGradients, MakeStatistic

#: tokens for each column of a consumer from which its Gram matrix says enough to predict losses
ENOUGH = 2.5


@dataclass(frozen=True)
class Observation:
    """What is observed of the dense model: activations at every consumer, and where there is a loss, its
    gradients with respect to them.

    The gradient of no weight is computed. What autograd keeps of one piece has to fit the device
    (:func:`~fasp_fx.calibration._calibration.in_pieces`).

    Attributes:
        consumers: get what is seen.
        pieces: of calibration batches.
        roles: which tokens are padding.
        wanted: what to observe beside the Gram matrix.
        loss: what gradients are of; ``None``: none are taken.
        ranks: the processes that share the pieces: each runs its own, and in the end all have the sums.
    """

    consumers: Consumers
    pieces: Sequence[Piece]
    roles: TokenRoles
    wanted: Mapping[str, MakeStatistic]
    loss: Loss | None
    ranks: Ranks

    @property
    def program(self) -> Program:
        """What is run."""
        return self.consumers.analysis.program

    def run(self, at_least: int, enough: float, progress: Callable[[float], None]) -> None:
        """Observe.

        Args:
            at_least: so many pieces are run, and more where a consumer saw few tokens for its columns, if
                there are.
            enough: tokens for each column that a consumer is to see.

        Raises:
            CalibrationError: the pieces do not run forward or back, the loss fails or does not depend on the
                consumers, or something is not finite.
        """
        ranks, consumers = self.ranks, self.consumers
        if isinstance(self.loss, Outputs):
            self._settle(self.loss, at_least)
        terms = 0
        failure: CalibrationError | None = None
        for index, piece in enumerate(self.pieces):
            if index % ranks.size == ranks.rank and failure is None:
                try:
                    terms += self._observe(piece, index)
                except CalibrationError as error:
                    failure = error
            if done := index + 1 >= at_least:
                ranks.check_all(failure)
                done = _saw_enough(consumers, ranks, enough)
            progress(1.0 if done else min(index + 1, at_least) / max(at_least, index + 2))
            if done:
                break
        ranks.check_all(failure)
        for consumer in consumers:
            consumer.prepare(self.wanted, device_of(self.program.module))  # no batch may be of this process
            ranks.add_up([*(consumer.grams or ()), *consumer.statistics])
        for product in consumers.products.all:
            for what in (*range(len(product.operands)), *(() if self.loss is None else (EFFECT,))):
                consumers.products.add_up(product, what, ranks)
        terms = int(ranks.add(torch.tensor(terms)))
        consumers.products.terms = terms
        self._check()
        for statistic in (one for consumer in consumers for one in _gradients(consumer)):
            statistic.terms = terms

    def _observe(self, piece: Piece, index: int) -> int:
        """Show one piece to the consumers; how many terms the loss has."""
        with torch.inference_mode(False), torch.set_grad_enabled(self.loss is not None):
            run = _Run(self, piece, index)
            leaves = run.outputs()
            if self.loss is None:
                return 0
            terms = self._terms(leaves, piece, index, self.loss)
            try:
                if terms.numel() and terms.requires_grad and run.leaves:  # others are seen in the end
                    torch.autograd.backward(terms.sum(), inputs=run.leaves)
            except tolerable(RuntimeError) as error:
                raise CalibrationError(
                    f"the model cannot be run backwards on calibration batch {piece.batch}:"
                    f" {first_line(error)}; pass loss=None"
                ) from error
            return terms.numel()

    def _settle(self, loss: Outputs, at_least: int) -> None:
        """Run the first pieces forward until it is known how large the outputs are: of one image alone, a
        number may come out as almost nothing.
        """
        for index, piece in enumerate(self.pieces):
            outputs, _, padding = outcome(self.program, ran(self.program, piece), piece, self.roles, index)
            if loss.settle(outputs, padding) or (index + 1 >= at_least and loss.has_size):
                return

    def _terms(self, leaves: list[Any], piece: Piece, index: int, loss: Loss) -> Tensor:
        """The terms of the loss on one piece; none where a loss of ours finds nothing to predict."""
        results = outcome(self.program, leaves, piece, self.roles, index)
        if isinstance(loss, Outputs):
            loss.begin(piece.first, piece.rows)
        try:
            terms = evaluated(loss, *results)
        except tolerable(RuntimeError, IndexError) as error:
            raise CalibrationError(
                f"the loss fails on calibration batch {piece.batch}: {type(error).__name__}:"
                f" {first_line(error)}"
            ) from error
        kind = terms.dtype if isinstance(terms, Tensor) else type(terms).__name__
        if not isinstance(terms, Tensor) or not terms.is_floating_point():
            raise CalibrationError(
                f"the loss returned a {kind}; it must return floating-point terms, or their sum as a tensor"
            )
        if not bool(torch.isfinite(terms.detach()).all()):
            raise CalibrationError(
                f"the loss is not finite on calibration batch {piece.batch}; check the batches and the"
                " model's dtype"
            )
        return terms

    def _check(self) -> None:
        """Refuse what is not finite, or gradients that are all zero."""
        gradients = self.consumers.products.effects()
        for consumer in self.consumers:
            consumer.check_finite()
            gradients += [statistic.diagonal() for statistic in _gradients(consumer)]
        is_finite = all(bool(torch.isfinite(squares).all()) for squares in gradients)
        vanish = bool(gradients) and not any(bool((squares > 0).any()) for squares in gradients)
        if not is_finite or (self.loss is not None and vanish):
            raise CalibrationError(
                "the gradients of the loss are not finite, or vanish at every weight that can be pruned;"
                " check the batches, or pass another loss=, or loss=None"
            )


def _saw_enough(consumers: Consumers, ranks: Ranks, enough: float) -> bool:
    """Whether all consumers whose tokens are not routed saw enough of them for their columns, in all
    processes together.
    """
    steady = [consumer for consumer in consumers if all(use.route is None for use in consumer.uses)]
    seen = torch.tensor([consumer.grams[0].tokens if consumer.grams else 0 for consumer in steady])
    columns = torch.tensor([consumer.matrices.columns.shape[1] for consumer in steady])
    return bool((ranks.add(seen) >= enough * columns).all())


class _Run(Runner):
    """One batch on its way, with a view of the activation at each consumer through which its gradient can be
    told from that of other readers.
    """

    def __init__(self, observation: Observation, piece: Piece, index: int) -> None:
        super().__init__(observation.program, [piece.inputs], numbers=[piece.batch])
        self.observation, self.piece_index, self.consumers = observation, index, observation.consumers
        self.leaves: list[Tensor] = []
        self._uses = [(consumer, use) for consumer in self.consumers for use in consumer.uses]
        self._products = self.consumers.products.all
        self._stops = {use.node for _, use in self._uses} | {product.node for product in self._products}

    def _load(self, argument: fx.Node, number: int) -> Any:
        value = super()._load(argument, number)
        return value.detach() if argument.op == "get_attr" and isinstance(value, Tensor) else value

    def _execute(self, node: fx.Node, number: int) -> Any:
        if node not in self._stops:
            return super()._execute(node, number)
        uses = [(consumer, use) for consumer, use in self._uses if use.node is node]
        products = [product for product in self._products if product.node is node]
        memory = self._memory[number]
        read = [*(use.activation for _, use in uses), *(product.operands[0] for product in products)]
        values = {activation: memory[activation] for activation in read if activation in memory}
        has_loss = self.observation.loss is not None
        probes = {name: self._probe(value) for name, value in values.items()} if has_loss else {}
        memory.update(probes)
        output = super()._execute(node, number)
        memory.update(values)
        for consumer, use in uses:
            activation = self._load(
                use.activation if use.recurrence is None else use.recurrence.start, number
            )
            if use.recurrence is not None:
                activation = states_before(activation, output[0], use.recurrence.steps)
            alone = sum(other.activation is use.activation for _, other in uses) == 1
            probe = probes.get(use.activation) if alone and _is_apart(use) else None
            self._see(consumer, use, activation.detach(), probe, output)
        for product in products:
            self._see_product(product, probes.get(product.operands[0]), number)
        return output

    def _see_product(self, product: Product, probe: Tensor | None, number: int) -> None:
        products, roles, index = self.consumers.products, self.observation.roles, self.piece_index
        for operand, node in enumerate(product.operands):
            products.see(product, operand, self._load(node, number), roles, index)
        if probe is not None and probe.requires_grad:
            value = probe.detach()

            def at_operand(gradient: Tensor) -> None:
                """What the loss loses with each channel of the first operand."""
                products.see(product, EFFECT, (value * gradient.conj()).real, roles, index)

            probe.register_hook(at_operand)

    def _probe(self, value: Tensor) -> Tensor:
        if value.requires_grad:
            return value.view_as(value)
        if value.is_floating_point() or value.is_complex():
            value = value.detach().requires_grad_(True)
            self.leaves.append(value)
        return value

    def _see(
        self, consumer: Consumer, use: Use, activation: Tensor, probe: Tensor | None, output: Any
    ) -> None:
        matrices = ConsumerMatrices(use, self.consumers.analysis.walk.values)
        ends = None if use.route is None else self._load(use.route, 0)
        roles, index = self.observation.roles, self.piece_index
        of_tokens = roles.at(index, use, activation, ends)
        is_apart = probe is not None and probe.requires_grad
        consumer.prepare(self.observation.wanted, activation.device)
        consumer.see(
            matrices.tokens(activation, of_tokens, ends),
            lambda statistic: not (statistic.needs_gradient and is_apart),
        )
        seen, result = consumer.seen, output[0] if isinstance(output, (tuple, list)) else output

        def at_input(gradient: Tensor) -> None:
            both = (matrices.tokens(each, of_tokens, ends) for each in (activation, gradient.detach()))
            for (block, tokens, kinds), (_, change, _) in zip(*both, strict=True):
                for statistic in (one for one in seen[block].values() if one.needs_gradient):
                    # Copies: what it does to them in place is its own business, not autograd's.
                    statistic.update(tokens.clone(), change.clone(), counting(kinds, tokens))

        def at_output(gradient: Tensor) -> None:
            counted, count = roles.without_padding(index, use.node, gradient)
            for statistic in _gradients(consumer):
                statistic.update_output(counted, count)

        if probe is not None and is_apart:
            probe.register_hook(at_input)
        elif self.observation.loss is not None and isinstance(result, Tensor) and result.requires_grad:
            result.register_hook(at_output)


def _is_apart(use: Use) -> bool:
    """Whether the gradient with respect to a use's activation is laid out as its tokens are: no position is
    read twice, and each block reads its own.
    """
    layout = use.activation_layout
    return (
        use.recurrence is None
        and all(window.size == 1 for window in layout.windows)
        and (len(use.columns) == 1 or bool(layout.blocks) or use.route is not None)
    )


def outcome(
    program: Program, leaves: list[Any], piece: Piece, roles: TokenRoles, index: int
) -> tuple[Any, dict[str, Any], Padding]:
    """What the model returned for a piece in its own structure, without caches, the arguments of the call by
    name, and what is padding in each output.
    """
    shown = [None if place in program.state_outputs else leaf for place, leaf in enumerate(leaves)]
    padding = {
        id(leaf): roles.of_output(index, node, leaf)
        for node, leaf in zip(results(program.module.graph), shown, strict=True)
        if isinstance(node, fx.Node) and isinstance(leaf, Tensor)
    }
    info: Any = getattr(codegen_of(program.module.graph), "pytree_info", None)
    if info is None or info.out_spec is None or info.in_spec is None:
        names = (node.name for node in program.placeholders())
        return shown, dict(zip(names, piece.inputs, strict=True)), lambda leaf: padding.get(id(leaf))
    args, kwargs = pytree.tree_unflatten(piece.inputs, info.in_spec)
    named = {**dict(zip(program.signature.given(), args, strict=False)), **kwargs}
    return pytree.tree_unflatten(shown, info.out_spec), named, lambda leaf: padding.get(id(leaf))


def _gradients(consumer: Consumer) -> list[InputGradients]:
    return [
        statistic
        for seen in consumer.seen
        for statistic in seen.values()
        if isinstance(statistic, InputGradients)
    ]
