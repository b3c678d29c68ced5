"""Find values for the sizes among a copy's attributes with which it computes what the pruned program does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from types import CodeType

from torch import nn

from ..plan import PruningPlan
from ._rebuild import Rebuilder
from ._sizes import Assignment, Cuts, Size, inner_sizes, is_within, outward, records, sizes, write
from ._trial import Outcome, Trial

#: how many times the copy is run at most in search of sizes, and half as often in search of those in a
#: configuration
TRIALS = 160
#: how many runs are left at least to undo what was not needed, and to see what is not read
_AFTERWARDS = 24
#: inputs are made no longer than this to see whether a size is a length as well
_LONGEST = 1024
#: how many kinds of changes are combined at most, one after the other
_DEPTH = 4
#: how many where only the module that fails is changed
_LONGEST_WAY = 16


@dataclass(frozen=True)
class Change:
    """One way to change the attributes of all modules of a class that are alike.

    Attributes:
        kind: of the modules.
        effect: the attributes and their values.
    """

    kind: type[nn.Module]
    effect: Mapping[Size, int]


class Search:
    """Sets the sizes of a copy.

    Args:
        cuts: what has become smaller in it.
        trial: runs it.
        plan: says how many whole heads have gone, and of which weights.
        model: the caller's; what the copy shares with it is not changed.
    """

    def __init__(self, cuts: Cuts, trial: Trial, plan: PruningPlan, model: nn.Module) -> None:
        self.cuts, self.trial, self.plan, self.module = cuts, trial, plan, trial.module
        shared = {id(record) for record in records(model)}
        self.sizes = {path: sizes(inner, path) for path, inner in cuts.modules.items()}
        self.inner = {path: inner_sizes(inner, path, shared) for path, inner in cuts.modules.items()}
        self.dense = {
            size: value
            for found in (self.sizes, self.inner)
            for own in found.values()
            for size, value in own.items()
        }
        self.left = TRIALS
        self._tried: dict[frozenset[tuple[Size, int]], Outcome] = {}
        self._written: dict[Size, int] = {}
        #: the modules of which their classes say what their sizes are
        self.known: set[str] = set()

    def run(self) -> Outcome:
        """Set the sizes by the natural guess, and if that does not do, by search; then those that nothing
        reads.

        Returns:
            What came of it, or of the guess if nothing did.
        """
        sure, others = self._of_classes()
        guess = sure | {size: value for path in self.cuts.own for size, value in self._named(path).items()}
        guessed = self._try(guess)
        found = guess if guessed.equal else self._from(guess, others)
        if found is None and any(self.inner.values()):
            # A configuration is kept by many modules, so that it comes last.
            self.sizes = {path: {**own, **self.inner[path]} for path, own in self.sizes.items()}
            self.left = TRIALS // 2
            found = self._from(guess, others)
        if found is None:
            return guessed
        self.left = max(self.left, _AFTERWARDS)
        needed = self._needed(found, sure)
        self._write(needed | self._unread(needed))
        guessed_at = [
            self.dense[size] for size in needed if size not in sure and self.dense[size] <= _LONGEST
        ]
        if guessed_at:
            self.trial.ask_beyond(max(guessed_at))  # what is a width may be the length of a window as well
        for old, new in self._in_doubt(needed, sure).items():
            self.trial.ask_between(new, old)  # or bound the integers that the model is given
        return self.trial.run()

    def _in_doubt(self, needed: dict[Size, int], sure: dict[Size, int]) -> dict[int, int]:
        """For each old value of sizes that could mean something else as well, the greatest new one.

        In doubt are the sizes that were guessed, and those that classes say where a class outside torch reads
        them, maybe from another module.
        """
        mine = [inner for inner in self.cuts.modules.values() if not _is_of_torch(type(inner))]
        read = {name: _is_read(mine, name, _MAKING) for name in {size.name for size in sure}}
        found: dict[int, int] = {}
        for size, new in needed.items():
            if new < self.dense[size] and (size not in sure or read[size.name]):
                found[self.dense[size]] = max(new, found.get(self.dense[size], new))
        return found

    # --- the natural guess

    def _of_classes(self) -> tuple[dict[Size, int], list[Change]]:
        """What the class of each module that holds a cut tensor says of its sizes, and what else they could
        be.
        """
        rebuilder = Rebuilder()
        sure: dict[Size, int] = {}
        others: dict[tuple[type[nn.Module], int], dict[Size, int]] = {}
        for path, cuts in self.cuts.own.items():
            inner = self.cuts.modules.get(path)
            if inner is None:
                continue  # another name of a module that is held in several places
            before, after = self.cuts.tensors(path, inner)
            ways = rebuilder.fitting(inner, path, before, after, cuts)
            if ways:
                self.known.add(path)
            for index, way in enumerate(ways):
                if index:
                    others.setdefault((type(inner), index), {}).update(way)
                else:
                    sure |= way
        return sure, [Change(kind, effect) for (kind, _), effect in others.items()]

    def _named(self, path: str) -> dict[Size, int]:
        """The attributes of a module that have the value of a dimension at or below it that was cut, where no
        dimension that stays has had it.

        None of a module whose class says what its sizes are.
        """
        if path in self.known:
            return {}
        new: dict[int, set[int]] = {}
        for cut in self.cuts.within(path):
            new.setdefault(cut.before, set()).add(cut.after)
        new = {
            before: after
            for before, after in new.items()
            if len(after) == 1 and before not in self.cuts.whole(path)
        }
        return {
            size: min(new[value])
            for size, value in self.sizes.get(path, {}).items()
            if value in new and size not in self.inner[path]
        }

    # --- the search

    def _from(self, assignment: dict[Size, int], others: list[Change]) -> dict[Size, int] | None:
        """Sizes with which the copy computes the program, looked for from an assignment on; ``None`` if none
        are found.

        First the module that fails is changed, as long as that brings the copy further; a model of many
        classes is gone through class by class so. Then single changes anywhere, wherever they lead: what
        brings the copy to an end that is not the program's must not use up what the way to the program needs.
        Then pairs, the furthest on first.
        """
        found = self._by_failing_modules(assignment, others, _LONGEST_WAY)
        if found is not None:
            return found
        passed: list[tuple[dict[Size, int], list[Change]]] = []
        found = self._by_single_changes(assignment, others, _DEPTH, passed)
        return self._by_pairs(passed) if found is None else found

    def _by_failing_modules(
        self, assignment: dict[Size, int], others: list[Change], depth: int
    ) -> dict[Size, int] | None:
        """Change the class of the module that fails, ``depth`` times at most."""
        start = self._try(assignment)
        if start.equal or depth == 0 or not start.stack:
            return assignment if start.equal else None
        changes = self._changes(start, assignment, others)
        further = self._further(start, assignment, [c for c in changes if c.kind is changes[0].kind])
        for _, tried in further:
            found = self._by_failing_modules(tried, others, depth - 1)
            if found is not None:
                return found
        return None

    def _by_single_changes(
        self,
        assignment: dict[Size, int],
        others: list[Change],
        depth: int,
        passed: list[tuple[dict[Size, int], list[Change]]],
    ) -> dict[Size, int] | None:
        """Make one change after another as long as each brings the copy further, ``depth`` at most.

        Args:
            passed: is given each assignment that was gone on from and what could be changed there, the
                furthest on first.
        """
        start = self._try(assignment)
        if start.equal or depth == 0:
            return assignment if start.equal else None
        changes = self._changes(start, assignment, others)
        for _, tried in self._further(start, assignment, changes):
            found = self._by_single_changes(tried, others, depth - 1, passed)
            if found is not None:
                return found
        passed.append((assignment, changes))
        return None

    def _further(
        self, start: Outcome, assignment: dict[Size, int], changes: list[Change]
    ) -> list[tuple[tuple[int, float], dict[Size, int]]]:
        """The assignments after one change that bring the copy further, the furthest first; one with which it
        computes the program alone.
        """
        found: list[tuple[tuple[int, float], dict[Size, int]]] = []
        for change in changes:
            if self.left <= 0:
                break
            tried = assignment | dict(change.effect)
            outcome = self._try(tried)
            if outcome.equal:
                return [(outcome.progress, tried)]
            if outcome.progress > start.progress:
                found.append((outcome.progress, tried))
        return sorted(found, key=lambda item: item[0], reverse=True)

    def _by_pairs(self, passed: list[tuple[dict[Size, int], list[Change]]]) -> dict[Size, int] | None:
        for assignment, changes in passed:
            for one, other in combinations(changes, 2):
                if self.left <= 0:
                    return None
                tried = assignment | dict(one.effect) | dict(other.effect)
                if self._try(tried).equal:
                    return tried
        return None

    def _try(self, assignment: Mapping[Size, int]) -> Outcome:
        key = frozenset(assignment.items())
        if key not in self._tried:
            self.left -= 1
            self._write(assignment)
            self._tried[key] = self.trial.run(counting=True)
        return self._tried[key]

    def _write(self, assignment: Mapping[Size, int]) -> None:
        """Set these sizes, and put back those that were set before."""
        back = {size: self.dense[size] for size in self._written if size not in assignment}
        write(self.module, {**back, **assignment})
        self._written = dict(assignment)

    def _changes(self, start: Outcome, assignment: Assignment, others: list[Change]) -> list[Change]:
        """What can be changed, the most promising first: where the copy failed and around it, or if it ran,
        in all that holds a cut tensor.
        """
        elsewhere = [] if start.stack else [path for path, own in self.sizes.items() if own]
        kinds = list(
            dict.fromkeys(
                type(self.cuts.modules[path]) for path in [*start.stack, *self.cuts.enclosing(), *elsewhere]
            )
        )
        known = {type(self.cuts.modules[path]) for path in self.known}
        kinds.sort(key=lambda kind: kind in known)  # classes that say their sizes themselves come last
        found = {
            frozenset(change.effect.items()): change
            for kind in kinds
            for change in [*(o for o in others if o.kind is kind), *self._of(kind, assignment)]
        }
        return [
            change
            for change in found.values()
            if any(assignment.get(size, self.dense[size]) != value for size, value in change.effect.items())
        ]

    def _of(self, kind: type[nn.Module], assignment: Assignment) -> Iterator[Change]:
        """The changes of one attribute, in all modules of a class together: it goes with a dimension of one
        of the tensors below, or stays what it was. Of a tuple or list that is all of it, and each position.

        The attributes of a module that holds nothing that was cut go with the tensors of the nearest module
        around it that does.
        """
        effects: dict[tuple[str, int | None, str, int], dict[Size, int]] = {}
        back: dict[tuple[str, int | None], dict[Size, int]] = {}
        for path, inner in self.cuts.modules.items():
            if type(inner) is not kind:
                continue
            scope = next((outer for outer in outward(path) if self.cuts.within(outer)), None)
            if scope is None:
                continue
            cuts = self.cuts.within(scope)
            for size, value in self.sizes[path].items():
                if path not in self.known and assignment.get(size, value) != value:
                    back.setdefault((size.name, size.position), {})[size] = value
                for cut in sorted(cuts, key=lambda cut: cut.before != value):
                    new = cut.scale(value)
                    if new is not None:
                        effects.setdefault(
                            (size.name, size.position, cut.name.removeprefix(f"{scope}."), cut.dim), {}
                        )[size] = new
        whole: dict[tuple[str, str, int], dict[Size, int]] = {}
        for (name, _, cut_name, dim), effect in effects.items():
            whole.setdefault((name, cut_name, dim), {}).update(effect)
        for effect in [*whole.values(), *effects.values(), *back.values()]:
            yield Change(kind, effect)

    # --- what nothing reads

    def _needed(self, found: dict[Size, int], sure: dict[Size, int]) -> dict[Size, int]:
        """What classes say, and of the rest what the copy does not compute the program without."""
        loose = [size for size in found if size not in sure]
        kinds = list(
            dict.fromkeys((type(self.cuts.modules[size.path]), size.name, size.position) for size in loose)
        )
        for kind in [None, *kinds] if loose else []:  # first all of them at once
            without = {
                size: value
                for size, value in found.items()
                if size in sure
                or (
                    kind is not None
                    and (type(self.cuts.modules[size.path]), size.name, size.position) != kind
                )
            }
            if self.left > 0 and self._try(without).equal:
                found = without
        return found

    def _unread(self, needed: dict[Size, int]) -> dict[Size, int]:
        """The attributes that name a size which is now another, where that is not in doubt and nothing reads
        them.

        What is read without needing another value, by forward or by another method, could mean something
        else, such as a greatest length.
        """
        named = {
            size: value
            for path in self._homes()
            for size, value in self._named(path).items()
            if size not in needed
        } | self._heads(needed)
        named = {
            size: value
            for size, value in named.items()
            if not hasattr(type(self.cuts.modules[size.path]), size.name)
        }
        named = {
            size: value
            for size, value in named.items()
            if not _is_read(self.cuts.modules.values(), size.name)
        }
        if not named or self._runs_without(needed, named):
            return named
        return {size: value for size, value in named.items() if self._runs_without(needed, [size])}

    def _runs_without(self, needed: dict[Size, int], absent: Iterable[Size]) -> bool:
        """Whether the copy computes the program if some attributes are not there."""
        self.left -= 1
        if self.left < 0:
            return False
        self._write(needed)
        places = {(size.path, size.name) for size in absent}
        held = {(path, name): self.cuts.modules[path].__dict__.pop(name) for path, name in places}
        try:
            return self.trial.run(counting=True).equal
        finally:
            for (path, name), value in held.items():
                self.cuts.modules[path].__dict__[name] = value

    def _homes(self) -> list[str]:
        """The modules that hold cut tensors, and for each coupled group the innermost that holds
        all of it.
        """
        groups = [[part.name for part in (*group.producers, *group.consumers)] for group in self.plan.groups]
        return list(dict.fromkeys([*self.cuts.own, *(_holder(names) for names in groups)]))

    def _heads(self, needed: dict[Size, int]) -> dict[Size, int]:
        """The attributes that count heads of which some have gone, where a module that holds their producers
        has a single one of that value.
        """
        found = {}
        for group in (group for group in self.plan.groups if group.granularity == "head"):
            producers = [part.name for part in group.producers]
            for path in {
                _holder(producers),
                _holder([*producers, *(part.name for part in group.consumers)]),
            } & self.cuts.modules.keys():
                counts = [
                    size
                    for size, value in self.sizes[path].items()
                    if value == group.size and size not in self.inner[path]
                ]
                if len(counts) == 1 and counts[0] not in needed:
                    found[counts[0]] = group.size - group.removed_sets
        return found


#: methods that say what a module was made with, or that were tried
_MAKING = frozenset({"__init__", "extra_repr", "__repr__", "__str__", "reset_parameters"})
_TELLING = _MAKING | {"forward"}


def _is_read(modules: Iterable[nn.Module], name: str, but: frozenset[str] = _TELLING) -> bool:
    """Whether a method of some module's class looks up an attribute of this name, other than those named in
    ``but``.
    """
    kinds = {
        kind
        for module in modules
        for kind in type(module).__mro__
        if kind is not nn.Module and issubclass(kind, nn.Module)
    }
    return any(
        name in code.co_names or name in code.co_consts
        for kind in kinds
        for own, held in vars(kind).items()
        if own not in but
        for code in _codes(held)
    )


def _is_of_torch(kind: type[nn.Module]) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _codes(held: object) -> Iterator[CodeType]:
    """The code of a method, property or the like, and of the functions written in it."""
    for part in (
        held,
        *(getattr(held, inner, None) for inner in ("fget", "fset", "func", "__func__", "__wrapped__")),
    ):
        pending = [code] if isinstance(code := getattr(part, "__code__", None), CodeType) else []
        while pending:
            yield (found := pending.pop())
            pending += [inner for inner in found.co_consts if isinstance(inner, CodeType)]


def _holder(names: list[str]) -> str:
    """The innermost module that holds all of these weights."""
    owners = [name.rpartition(".")[0] for name in names]
    return next(path for path in outward(owners[0]) if all(is_within(owner, path) for owner in owners))


__all__ = ["Search"]
