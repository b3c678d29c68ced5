"""What a pruning is asked for: every option, declared once with its default, its check and its text. The
keywords of :func:`fasp_fx.prune` and the options of ``fasp-fx prune`` are made of these declarations.
"""
# ruff: noqa: RUF009 (declaring an option is a call of dataclasses.field)

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, get_args

from fasp_fx.base import Options, from_document, is_number, names_of, to_document
from fasp_fx.calibration import ScoreName
from fasp_fx.errors import ArgumentError, SparsityError

if TYPE_CHECKING:  # the command line shows and checks options before torch is there
    from fasp_fx.allocation import Allocation, Cap
    from fasp_fx.calibration import Loss, Restoration, Score

#: what goes where nothing is asked for
SPARSITY = 0.2
#: one in so many calibration sequences shows gradients and the dense model's activations to predictions of
#: losses, where they are wanted, by quality
MEASURED = {"fast": 8, "balanced": 8, "best": 2}

Quality = Literal["fast", "balanced", "best"]
RestoreName = Literal["least-squares"]
AllocationName = Literal["uniform", "global", "search"]
LossName = Literal["auto", "outputs", "next-token"]
Granularity = Literal["channel", "head", "expert"]
#: formats of the files of language models (:mod:`fasp_fx.hf`)
FormatName = Literal[
    "fasp-fx", "per-layer", "plain", "decilm", "gguf", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q4_0"
]
Include = Literal["approximate", "depth", "exempt"]

#: gives the value of the option of that name as the configuration keeps it, or refuses it
Check = Callable[[str, Any], Any]


def _option(default: Any, check: Check, text: str, python: str = "", *, form: Any = None) -> Any:
    """Declare an option.

    Args:
        text: what it does, for the command line and for Python.
        python: what only Python can say.
        form: the type of its value on the command line; ``None``: it is not there.
    """
    return field(default=default, metadata={"check": check, "text": text, "python": python, "form": form})


def _where(fits: Callable[[Any], bool], says: str) -> Check:
    """Values of which something is true."""

    def check(option: str, value: Any) -> Any:
        if not fits(value):
            raise ArgumentError(f"{option}={value!r:.80} is {says}")
        return value

    return check


def _named(kind: Any, called: str = "") -> Check:
    """One of the names of a literal type; where ``called`` says what is called instead, also a callable, or
    ``None``.
    """
    names = get_args(kind)
    known = f"not known; use {', '.join(map(repr, names))}" + f", a fasp_fx.{called} or None" * bool(called)

    def fits(value: Any) -> bool:
        is_code = value is None or (callable(value) and not isinstance(value, type))
        return (isinstance(value, str) and value in names) or (bool(called) and is_code)

    return _where(fits, known)


def _fraction(option: str, value: Any) -> Any:
    """A fraction, or one for each of some patterns."""
    by_pattern = isinstance(value, Mapping)
    if by_pattern and not (value and all(isinstance(pattern, str) for pattern in value)):
        raise SparsityError(
            f"{option}={dict(value)!r} is no mapping from name patterns to fractions; for example"
            " {'layers.*.mlp': 0.3}"
        )
    for pattern, fraction in value.items() if by_pattern else [("", value)]:
        if not (is_number(fraction) and 0 < fraction < 1) and value is not None:
            of = f" for '{pattern}'" if pattern else ""
            raise SparsityError(f"{option}={fraction!r}{of} is not in (0, 1); 0.2 removes a fifth")
    return dict(value) if by_pattern else value


def _budgets(option: str, value: Any) -> Any:
    """Budgets, as a tuple."""
    if value is None or (isinstance(value, tuple) and not value):
        return ()
    from fasp_fx.allocation import read_budget

    return read_budget(value)


def key_of(code: Any, option: str, use: str) -> str | None:
    """The text that says which code of the user's this is: its attribute ``key``; ``None`` for a name.

    Raises:
        ArgumentError: it has none; says which ``use`` wants to know.
    """
    key = getattr(code, "key", None)
    if not isinstance(code, str | None) and not isinstance(key, str):
        raise ArgumentError(
            f"{option}{code!r:.80} is code of your own, of which {use} cannot tell whether it is the same;"
            f" say which it is by a text, its attribute key, or leave out {use}"
        )
    return key


class PruningOptions(TypedDict, total=False):
    """The fields of :class:`PruningConfig` as keyword arguments, for type checkers."""

    sparsity: float | Mapping[str, float] | None
    budget: Cap | Iterable[Cap] | None
    quality: Quality
    score: ScoreName | Score | None
    restore: RestoreName | Restoration | None
    allocation: AllocationName | Allocation | None
    loss: LossName | Loss | None
    drift: float | None
    granularity: Collection[Granularity]
    include: Collection[Include]
    exclude: Iterable[str]
    round_to: int | None


@dataclass(frozen=True)
class PruningConfig(Options):
    """The options of one pruning. :func:`fasp_fx.prune` takes each as a keyword, or all of them as
    ``config=``.

    A name pattern is that of a weight (``"layers.0.mlp.up.weight"``) or of a module that holds it
    (``"layers.0"``), and may have the wildcards ``*``, ``?`` and ``[...]`` (``"layers.*.mlp"``). A tied
    weight goes by each of its names, a folded one also by those of what it is computed of. A pattern that
    matches nothing is an error.

    Raises:
        ArgumentError, SparsityError: an option is out of range or not known.

    Examples:
        >>> config = fasp_fx.PruningConfig(sparsity=0.5, round_to=8, exclude=("4",))
        >>> fasp_fx.PruningConfig.from_json(config.to_json()) == config
        True
        >>> fasp_fx.prune(captured, calibration=batches, config=config).report.parameters
        (884, 484)
    """

    sparsity: float | Mapping[str, float] | None = _option(
        None,
        _fraction,
        "The fraction to remove of the weights of linear operators in prunable and exempt groups, between 0"
        " and 1. Default: 0.2, unless there is a budget.",
        "Or a mapping from name patterns to the fraction of channel sets that each group loses: the first"
        " pattern that matches a weight that loses columns with the group counts (a group bears the name of"
        " one), and groups that no pattern matches stay whole.",
        form=float,
    )
    budget: Cap | Iterable[Cap] | None = _option(
        (),
        _budgets,
        "How much may stay of something else, instead of a sparsity.",
        "One of :mod:`fasp_fx.allocation`, such as ``Parameters(0.8)``, or a tuple of several, which are all"
        " met. As much stays as steps of whole channel sets allow, and never more than may.",
    )
    quality: Quality = _option(
        "balanced",
        _named(Quality),
        "What stands for score and allocation where they are not given. fast: fasp and uniform, the paper's"
        " method; balanced: obs and global, measured on an eighth of the calibration data; best: on half"
        " of it. Without repair as fast.",
        "docs/choosing.md has times and figures.",
        form=Quality,
    )
    score: ScoreName | Score | None = _option(
        None,
        _named(ScoreName, "calibration.Score"),
        "What goes first. fasp: the paper's score; obs: the least loss once what stays was repaired;"
        " magnitude, random: baselines that need no data. Default: by quality.",
        "Or a callable or :class:`fasp_fx.calibration.GroupScore` of your own.",
        form=ScoreName,
    )
    restore: RestoreName | Restoration | None = _option(
        "least-squares",
        _named(RestoreName, "calibration.Restoration"),
        "Repair the weights that stay, by least squares.",
        "Or one of your own (:data:`fasp_fx.calibration.Restoration`); or ``None``: what stays is left as it"
        " is.",
        form=bool,
    )
    allocation: AllocationName | Allocation | None = _option(
        None,
        _named(AllocationName, "allocation.Allocation"),
        "uniform: every prunable group loses the same fraction; global: one threshold for all, by predicted"
        " losses that are measured first; search: from there on by running pruned candidates, which takes"
        " many more forward passes. Default: global with the score obs, else uniform.",
        "Or one of your own (:data:`fasp_fx.allocation.Allocation`).",
        form=AllocationName,
    )
    loss: LossName | Loss | None = _option(
        "auto",
        _named(LossName, "calibration.Loss"),
        "What obs and global predict the rise of, by its gradients on some of the calibration data, and what"
        " search judges by. outputs: the squared error of all outputs. auto: next-token for a model that"
        " generates, else outputs.",
        "Or a function of outputs and arguments (:mod:`fasp_fx.calibration`). ``None``: no gradients; each"
        " consumer counts by the relative error of its own output.",
        form=LossName,
    )
    drift: float | None = _option(
        None,
        _where(
            lambda value: value is None or (is_number(value) and 0 <= value <= 1),
            "not in [0, 1]; 0.3 makes up for a third",
        ),
        "How much of what earlier removals changed in a residual stream the repair of what is added to it"
        " makes up for, from 0 to 1. The dense model runs beside the pruned one then. Default: 0.3 with the"
        " quality best, else 0.",
        form=float,
    )
    granularity: Collection[Granularity] = _option(
        ("channel",),
        partial(names_of, known=get_args(Granularity)),
        "What goes together: channel; head: whole attention heads with their rows of W_Q, W_K and W_V and"
        " columns of W_O (a KV head takes its query heads along); expert: whole experts of a mixture with"
        " their rows of the router. With head alone nothing but heads goes; with both, heads in attention"
        " and channels elsewhere. Default: channel.",
        form=list[str],
    )
    include: Collection[Include] = _option(
        (),
        partial(names_of, known=get_args(Include)),
        "Groups that stay unless they are asked for. approximate: those that cross a norm, such as the"
        " residual stream of a transformer; exempt: query and key channels; depth: whole residual blocks,"
        " where that costs least.",
        "Norms by mean squares, and layer norms, go on to divide by the dense count, so that the result is"
        " that of the dense model whose producers are zero there. Channels contracted between two activations"
        " (rows of W_Q and W_K) go by what the loss loses with them where costs are measured, else by the"
        " norms of both. A block of which all channels went leaves an identity in its place: feed-forward and"
        " convolutional blocks, and with the granularity ``head`` those of attention.",
        form=list[str],
    )
    exclude: Iterable[str] = _option(
        (),
        partial(names_of, known=None),
        "Name patterns of weights or groups, such as lm_head or layers.0.*; the groups, and those that hold"
        " one of the weights, stay whole.",
        form=list[str],
    )
    round_to: int | None = _option(
        None,
        _where(lambda value: value is None or (type(value) is int and value > 0), "not a positive integer"),
        "Kept widths (per block) are multiples of this; 1: any width. Numbers of whole heads and experts are"
        " not. Default: 16, which kernels like, or of a block below 128 the largest power of two that it has"
        " eight times.",
        form=int,
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(
                self, option.name, option.metadata["check"](option.name, getattr(self, option.name))
            )
        conflicts = (
            (
                not self.granularity,
                f"granularity={self.granularity!r} is not known; pass a tuple of"
                f" {', '.join(map(repr, get_args(Granularity)))}",
            ),
            (
                self.budget and self.sparsity is not None,
                f"sparsity={self.sparsity!r} and the budget of {', '.join(cap.name for cap in self.budgets)}"
                " both say how much goes; leave one of them out",
            ),
            (
                isinstance(self.sparsity, Mapping) and self.allocation not in (None, "uniform"),
                "a sparsity for each pattern is an allocation by itself; leave allocation= out, or give one"
                " sparsity",
            ),
            (
                self.drift and self.restore is None,
                "drift= is for repairs; leave it out without restore=",
            ),
        )
        for message in (message for met, message in conflicts if met):
            raise ArgumentError(message)

    @property
    def effective_score(self) -> ScoreName | Score:
        """The score, or what stands for it where none is given."""
        usual: ScoreName = "obs" if self.quality != "fast" and self.restore is not None else "fasp"
        return usual if self.score is None else self.score

    @property
    def score_name(self) -> str:
        """The score's name; that of its class or function with its ``key``, where it is one of the user's."""
        score = self.effective_score
        code = f"{getattr(score, '__qualname__', type(score).__qualname__)} {getattr(score, 'key', None)}"
        return score if isinstance(score, str) else code

    @property
    def effective_drift(self) -> float:
        """The drift, or what stands for it where none is given."""
        usual = 0.3 if self.quality == "best" and self.restore is not None else 0.0
        return usual if self.drift is None else self.drift

    def non_default_fields(self, names: Collection[str]) -> list[str]:
        """The options besides these that are not as usual, in alphabetical order."""
        usual = PruningConfig()
        return sorted(
            field.name
            for field in fields(self)
            if field.name not in names and getattr(self, field.name) != getattr(usual, field.name)
        )

    @property
    def budgets(self) -> tuple[Cap, ...]:
        """The budgets."""
        return cast("tuple[Cap, ...]", self.budget)

    @property
    def target_sparsity(self) -> float | None:
        """The sparsity asked for, or what stands for it where nothing else was."""
        if self.budget or isinstance(self.sparsity, Mapping):
            return None
        return SPARSITY if self.sparsity is None else float(self.sparsity)

    def to_json(self) -> str:
        """The configuration as text.

        Raises:
            ArgumentError: an option is a function, which text cannot hold.
        """
        from fasp_fx.allocation import budget_data

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("score", "restore", "allocation", "loss"):
            if callable(values[name]):
                raise ArgumentError(
                    f"{name}={values[name]!r} is a function, which cannot be stored; keep it in code and pass"
                    " it again"
                )
        sparsity = dict(self.sparsity) if isinstance(self.sparsity, Mapping) else self.sparsity
        return to_document(
            "config", {**values, "sparsity": sparsity, "budget": budget_data(self.budgets)}, indent=1
        )

    @classmethod
    def from_json(cls, text: str) -> PruningConfig:
        """The configuration that :meth:`to_json` wrote.

        Raises:
            ArgumentError: the text is none, or of a version that is not read here.
        """
        from fasp_fx.allocation import budget_from_data

        document = from_document(
            "config", dict[str, Any], text, "write it again with PruningConfig.to_json()", ArgumentError
        )
        # Earlier saves name options that are gone, and that few gave.
        known = {field.name for field in fields(cls)}
        values = {
            name: document[name]
            for name in document.keys() - {"format", "kind", "padding_mask"}
            if name in known or document[name]
        }
        return cls.of(None, {**values, "budget": budget_from_data(values.get("budget", []))})


PruningConfig.__doc__ = f"{PruningConfig.__doc__}\n    Attributes:\n" + "\n".join(
    f"        {option.name}: {option.metadata['text']} {option.metadata['python']}".rstrip()
    for option in fields(PruningConfig)
)
