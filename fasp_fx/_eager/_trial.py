"""Run a module of the caller's kind as it is now, beside a program that it is to compute: a copy beside the
pruned program, say.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._capture._unchanged import rewound
from .._compat import TorchDispatchMode, pytree
from .._exactness._compare import Seen, coarsest, deviations, settled
from .._exactness._execution import Ran, default_type, remembers, run, wide, widened, widened_types
from .._exactness._execution import copied as as_now
from .._program import Program
from .._pruned_module import PrunedModule
from ..channels import written_names
from ..errors import EagerError, first_line
from ._call import OTHERS, Question, call_of, integer_questions, longer_question, questions

if TYPE_CHECKING:
    from .._result import Result


@dataclass(frozen=True)
class Outcome:
    """What came of one trial.

    Attributes:
        equal: whether the copy computes what the program does, on all inputs.
        said: what is wrong, in words.
        passed: how many inputs it computed what the program does on.
        reached: how many operators ran before the copy failed on the next; infinite if it ran, and differed.
        stack: the submodules that were running when it failed, the innermost first.
    """

    equal: bool
    said: str = ""
    passed: int = 0
    reached: float = math.inf
    stack: tuple[str, ...] = field(default=(), repr=False)

    @property
    def progress(self) -> tuple[int, float]:
        """How far the copy came."""
        return self.passed, self.reached


class Trial:
    """Holds a copy against a program.

    Args:
        module: the copy; it is as before after every trial.
        program: is run on the same inputs.
        others: on how many inputs besides the example.

    Raises:
        EagerError: the program runs on none of the inputs.
    """

    def __init__(self, module: nn.Module, program: Program, others: int = OTHERS) -> None:
        self.module, self.program, self.pruned = module, program, program.module
        self.calls = 2 if remembers(self.pruned) else 1
        self.written = written_names(self.pruned.graph)
        tensors = [*self.pruned.parameters(), *self.pruned.buffers()]
        self.precision = max(
            [
                torch.finfo(coarsest(self.program)).eps,
                *(torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point()),
            ]
        )
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        self._answers: dict[tuple[int, torch.dtype | None], Ran] = {}
        self.questions: list[Question] = []
        failure: Exception | None = None
        self._device = device
        for question in questions(self.program, device):
            refused = self._asked(question)
            failure = failure or refused
            if len(self.questions) > others:
                break
        if not self.questions:
            why = first_line(failure) if failure is not None else "it has none"
            raise EagerError(
                f"the pruned program does not run on its example inputs ({why}), so that nothing can be held"
                " against it; use result.module"
            )

    def _asked(self, question: Question) -> Exception | None:
        """Ask the program; a question whose sizes it does not take is passed over."""
        try:
            answer = run(self.pruned, question.copied(), self.calls)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return error
        self._answers[(len(self.questions), None)] = answer
        self.questions.append(question)
        return None

    def ask_beyond(self, length: int) -> None:
        """Run on inputs longer than ``length`` as well from now on, if there can be such."""
        for question in longer_question(self.program, self._device, length):
            self._asked(question)

    def ask_between(self, least: int, most: int) -> None:
        """Run on integers from ``least`` to ``most`` as well from now on, in each input that takes such."""
        # What is asked of single integers needs few of them.
        smallest = min(
            self.questions,
            key=lambda asked: sum(leaf.numel() for leaf in asked.leaves if isinstance(leaf, Tensor)),
        )
        for offered in integer_questions(smallest, least, most, held=self._device.type != "cpu"):
            for question in offered:
                if self._asked(question) is None:
                    break

    def run(self, counting: bool = False, watching: AbstractContextManager[object] | None = None) -> Outcome:
        """Run the copy on all inputs, up to the first on which it fails or differs.

        Args:
            counting: see how far it comes if it fails, which takes watching every operator.
            watching: is entered for each run of the copy instead, a mode that sees the operators.
        """
        for index, question in enumerate(self.questions):
            count = _Counting() if counting else watching or nullcontext()
            try:
                seen = settled(partial(self._seen, index, count), self.precision)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a module raises what it likes
                stack = _stack(error, self.module)
                where = _named(self.module, stack[0] if stack else "")
                return Outcome(
                    False,
                    f"{question.said} {where} fails: {type(error).__name__}: {first_line(error)}",
                    index,
                    getattr(count, "count", 0),
                    stack,
                )
            if not seen.equal:
                size = (
                    "in its integers, its shape or where it is not finite"
                    if math.isinf(seen.deviation)
                    else f"by {seen.deviation:.1e} of its largest value"
                )
                return Outcome(
                    False, f"{question.said} an output differs from that of the pruned program, {size}", index
                )
        return Outcome(True, passed=len(self.questions))

    def _seen(
        self, index: int, watching: AbstractContextManager[object], precision: torch.dtype | None
    ) -> Seen:
        if (index, precision) not in self._answers:
            self._answers[(index, precision)] = run(
                self.pruned, self.questions[index].copied(), self.calls, precision
            )
        expected = self._answers[(index, precision)]
        with watching:
            found = self._answer(self.questions[index], precision)
        worst, at = 0.0, 0
        for call, deviation in deviations(found, Ran([_present(leaves) for leaves in expected.outputs])):
            if deviation > worst:
                worst, at = deviation, call
        return Seen(worst, True, call=at)

    def _answer(self, question: Question, precision: torch.dtype | None) -> Ran:
        ran = Ran()
        leaves = [widened(leaf, precision) for leaf in question.copied()]
        with self._running(precision) as module:
            for _ in range(self.calls):
                args, kwargs = call_of(self.program, leaves)
                ran.outputs.append(
                    _present([as_now(leaf) for leaf in pytree.tree_leaves(module(*args, **kwargs))])
                )
        return ran

    @contextmanager
    def _running(self, precision: torch.dtype | None) -> Iterator[nn.Module]:
        """The copy in evaluation mode, without gradients, uncompiled and in a precision, as it was before
        afterwards.
        """
        module = self.module if precision is None else _widened_copy(self.module, precision)
        modes = [(inner, inner.training) for inner in module.modules()]
        try:
            with torch.no_grad(), rewound(module, self.written), torch.compiler.set_stance("force_eager"):
                module.eval()
                if precision is None:
                    yield module
                else:
                    with default_type(wide(torch.get_default_dtype(), precision)), _Widening(precision):
                        yield module
        finally:
            for inner, training in modes:
                inner.training = training


def program_of(result: Result) -> Program:
    """The pruned program of a result, with its example inputs.

    Raises:
        EagerError: it holds none.
    """
    assert isinstance(result.module, PrunedModule)
    example = result.module.fasp_fx_origin.example
    if example is None:
        raise EagerError(
            "the program of the result holds no example inputs, so that nothing can be held against it; use"
            " result.module"
        )
    return Program(result.module, result.signature, example)


def _present(leaves: list[Any]) -> list[Any]:
    """Without what is not there; exporters drop that in some structures."""
    return [leaf for leaf in leaves if leaf is not None]


def _widened_copy(module: nn.Module, precision: torch.dtype) -> nn.Module:
    made = copy.deepcopy(module)
    for tensor in [*made.parameters(), *made.buffers()]:
        tensor.data = widened(tensor.data, precision)
    return made


class _Widening(TorchDispatchMode):
    """Nothing is computed in a lower precision."""

    supports_higher_order_operators = True

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self.precision = precision

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = widened_types(args, self.precision), widened_types(kwargs or {}, self.precision)
        return func(*args, **kwargs)


class _Counting(TorchDispatchMode):
    """Counts the operators that run."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        return result


def _stack(error: BaseException, module: nn.Module) -> tuple[str, ...]:
    """The submodules whose methods were running when an error was raised, the innermost first."""
    paths = {id(inner): path for path, inner in module.named_modules()}
    found, at = [], error.__traceback__
    while at is not None:
        owner = at.tb_frame.f_locals.get("self")
        if id(owner) in paths:
            found.append(paths[id(owner)])
        at = at.tb_next
    return tuple(dict.fromkeys(reversed(found)))


def _named(module: nn.Module, path: str) -> str:
    kind = type(module.get_submodule(path)).__name__
    return f"'{path}' ({kind})" if path else kind


__all__ = ["Outcome", "Trial", "program_of"]
