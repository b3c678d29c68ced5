"""Processes that share the calibration batches: each runs some of them, and what they see is added up."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fasp_fx.base import __version__, check_kind, digest_of, tolerable
from fasp_fx.errors import ArgumentError, CalibrationError, RankError, first_line

P = ParamSpec("P")
T = TypeVar("T")
_CURRENT: ContextVar[Ranks | None] = ContextVar("fasp_fx_ranks", default=None)


def ended_together(function: Callable[P, T]) -> Callable[P, T]:
    """Have what a process raises end a function in all processes of its keyword ``group``: that process
    raises its own error, and the others a :class:`RankError` that says which it was and what it raised.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        group: Any = kwargs.get("group")
        if group is None or _CURRENT.get() is not None:
            return function(*args, **kwargs)
        ranks = Ranks(group)
        token = _CURRENT.set(ranks)
        try:
            ranks.with_all(lambda: None)
            result = function(*args, **kwargs)
        except BaseException as error:
            if not ranks.parted:
                with contextlib.suppress(RankError):
                    ranks.meet(error)
            raise
        finally:
            _CURRENT.reset(token)
        ranks.with_all(lambda: None)
        return result

    return run


class Ranks:
    """The processes of a group; without one, this process alone.

    All of them do the same work but for the batches, and so decide alike. Every method is called by all of
    them, in the same order. They meet before whatever they do together, so that one that has failed tells the
    others there.

    Args:
        group: of ``torch.distributed``; ``None``: this process works alone.

    Attributes:
        rank: the number of this process.
        size: how many there are.
        parted: whether the processes cannot be told of a failure any more: they have been, or one is gone, or
            this one has left them in the middle of what they do together.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        check_kind(
            "group",
            group,
            dist.ProcessGroup | None,
            "pass a process group of torch.distributed, such as dist.group.WORLD once it is made, or leave it"
            " out",
        )
        self._group, self.parted = group, False
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if self.rank < 0:
            raise ArgumentError(
                "this process is not of the group that was given; call with it in the processes that are"
            )

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """Those that :func:`ended_together` has made of a group."""
        return _CURRENT.get() or cls(group)

    def own(self, count: int) -> range:
        """Which of so many batches this process runs.

        Raises:
            CalibrationError: there are fewer than processes.
        """
        if count < self.size:
            raise CalibrationError(
                f"{count} calibration batches are too few for {self.size} processes, each of which runs some;"
                " give more, or start fewer"
            )
        return range(self.rank, count, self.size)

    def check_alike(
        self, fingerprint: Callable[[], str], batches: Iterable[Iterable[Any]], options: Mapping[str, Any]
    ) -> None:
        """Refuse to work together on different things.

        Args:
            fingerprint: makes that of the model, which takes reading all of it.

        Raises:
            ArgumentError: another process has another model, other batches, options or releases.
        """
        if self.size == 1:
            return
        plain = {name: value for name, value in options.items() if not callable(value)}
        mine = {
            "model": fingerprint(),
            "calibration data": digest_of(batches),
            "options": repr(plain),
            "release of fasp_fx": __version__,
            "release of torch": torch.__version__,
        }
        others = self._gathered(mine)
        if different := [what for what in mine if any(other[what] != mine[what] for other in others)]:
            raise ArgumentError(
                f"the processes were given other {' and other '.join(different)}; all are given the same, and"
                " divide it"
            )

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes, which takes the place of this one's."""
        if self.size > 1:
            self.with_all(lambda: dist.all_reduce(tensor, group=self._group))
        return tensor

    def add_up(self, sums: Iterable[Any]) -> None:
        """Add up what the processes have seen, each in a :class:`fasp_fx.calibration.Statistic` or the
        like.
        """
        for one in sums if self.size > 1 else ():
            one.reduce(self.add)

    def first(self, value: T) -> T:
        """What the first process has."""
        return cast(T, self.share(0, value))

    def check_all(self, error: CalibrationError | None) -> None:
        """Raise if any process has failed, in all of them.

        Raises:
            CalibrationError: of this process, or else of the first that failed.
        """
        failures = [
            each for each in self._gathered(None if error is None else str(error)) if each is not None
        ]
        if failures:
            raise error or CalibrationError(failures[0])

    def share(self, owner: int, value: Any) -> Any:
        """What the owner has made; what others give does not count."""
        if self.size == 1:
            return value
        values = [value]
        self.with_all(lambda: dist.broadcast_object_list(values, group=self._group, group_src=owner))
        return values[0]

    def _gathered(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self.with_all(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def with_all(self, work: Callable[[], Any]) -> None:
        """Do what all processes do at once, unless one of them has failed.

        Raises:
            RankError: another process has failed, or is gone.
        """
        self.meet()
        with self._connected():
            work()

    def meet(self, error: BaseException | None = None) -> None:
        """Wait for all processes, and tell them what this one has raised, if it has.

        Raises:
            RankError: another process has failed, or is gone.
        """
        if self.size == 1:
            return
        failures: list[Any] = [None] * self.size
        failure = None if error is None else f"{type(error).__name__}: {first_line(error)}"
        with self._connected():
            dist.all_gather_object(failures, failure, group=self._group)
        failed = next((rank for rank, text in enumerate(failures) if text is not None), None)
        self.parted |= failed is not None
        if failed is not None and error is None:
            raise RankError(
                f"process {failed} of {self.size} has failed ({failures[failed]}), so that process"
                f" {self.rank} stops; start all of them again once that is mended"
            )

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Turn what a backend says of a process that is gone into one error.

        Raises:
            ArgumentError: the group is for accelerators alone.
        """
        try:
            yield
        except tolerable(RuntimeError) as error:
            self.parted = True
            if "no backend" in str(error).lower():  # counts lie on the CPU
                raise ArgumentError(
                    "the group does not serve the CPU; make it with"
                    ' dist.init_process_group("cpu:gloo,cuda:nccl")'
                ) from error
            raise RankError(
                f"process {self.rank} of {self.size} lost the others: {first_line(error)}; start all of them"
                " again"
            ) from error
        except BaseException:
            self.parted = True
            raise
