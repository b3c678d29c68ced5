"""What a pruning is asked for: every option with its default, checked."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypedDict

from ..allocation._allocation import Allocation, CostAllocation, Global, Search, uniform
from ..allocation.budgets import Cap, budget_data, budget_from_data, read_budget
from ..base._identity import identity_of
from ..base._json import from_document, to_document
from ..base._options import configured, is_number, names_of
from ..calibration._scores import resolve_score
from ..calibration.losses import Loss, resolve_loss
from ..calibration.restoration import Restoration, Window
from ..calibration.scoring import Score
from ..errors import ArgumentError, SparsityError

#: what goes where nothing is asked for
SPARSITY = 0.2
#: one in so many calibration sequences shows gradients and the dense model's activations to predictions of
#: losses, where they are wanted, by quality
MEASURED = {"fast": 8, "balanced": 8, "best": 2}
_GRANULARITIES, _INCLUDED = ("channel", "head", "expert"), ("approximate", "depth", "exempt")
_PRECISIONS = ("auto", "highest", "medium")


class PruningOptions(TypedDict, total=False):
    """The fields of :class:`PruningConfig` as keyword arguments, for type checkers."""

    sparsity: float | Mapping[str, float] | None
    budget: Cap | Iterable[Cap] | None
    quality: Literal["fast", "balanced", "best"]
    score: Literal["fasp", "obs", "magnitude", "random"] | Score | None
    restore: Literal["least-squares", "window"] | Window | Restoration | None
    allocation: Literal["uniform", "global", "search"] | Allocation | None
    loss: Literal["auto", "outputs", "next-token"] | Loss | None
    propagate: bool
    drift: float | None
    granularity: Iterable[str]
    include: Iterable[str]
    exclude: Iterable[str]
    round_to: int
    uniform_layers: bool
    padding_mask: str | None
    precision: Literal["auto", "highest", "medium"]


@dataclass(frozen=True)
class PruningConfig:
    """The options of one pruning. :func:`fasp_fx.prune` takes each as a keyword, or all of them as
    ``config=``.

    Attributes:
        sparsity: the fraction to remove of the weights of linear operators in prunable and exempt groups, in
            (0, 1). Or a mapping from name patterns to the fraction of channel sets that each group loses: the
            first pattern that matches a weight that loses columns with the group counts (a group bears the
            name of one), and groups that no pattern matches stay whole. ``None``: 0.2, unless there is a
            ``budget``.
        budget: how much may stay of something else, instead of ``sparsity``: one of :mod:`fasp_fx.budgets`,
            such as ``Parameters(0.8)``, or a tuple of several, which are all met. As much stays as steps of
            whole channel sets allow, and never more than may.
        quality: what stands for ``score=None`` and ``allocation=None``. ``"fast"``: ``"fasp"`` and
            ``"uniform"``, the paper's method; ``"balanced"``: ``"obs"`` and ``"global"``, measured on an
            eighth of the calibration data; ``"best"``: on half of it (docs/choosing.md has times and
            figures). Without ``restore``, which ``"obs"`` counts on, as ``"fast"``.
        score: what goes first. ``"fasp"``: the paper's score; ``"obs"``: the least loss once what stays was
            repaired (:class:`fasp_fx.obs.OBS`); ``"magnitude"``, ``"random"``: without data; or a callable or
            :class:`fasp_fx.scoring.GroupScore` of your own.
        restore: ``"least-squares"``; ``"window"``: after that, the weights that stay are trained block by
            block, for as long as it takes to choose and repair (:class:`fasp_fx.restoration.Window`); one of
            your own (:data:`fasp_fx.restoration.Restoration`); or ``None``: what stays is left as it is.
        allocation: ``"uniform"``: every prunable group loses the same fraction; ``"global"``: one threshold
            for all, by predicted losses that are measured first (:class:`fasp_fx.allocation.Global`);
            ``"search"``: from there on by running pruned candidates, which takes many more forward passes
            (:class:`fasp_fx.allocation.Search`); or one of your own (:data:`fasp_fx.allocation.Allocation`).
            ``None``: ``"global"`` with the score ``"obs"``, and ``"uniform"`` otherwise.
        loss: what ``score="obs"`` and ``allocation="global"`` predict the rise of, by its gradients on some
            of the calibration batches, and ``"search"`` judges by: ``"next-token"``, ``"outputs"``: the
            squared error of all outputs; or a function of outputs and arguments (:mod:`fasp_fx.losses`).
            ``"auto"``: next tokens in :func:`fasp_fx.hf.prune`, else outputs. ``None``: no gradients; each
            consumer counts by the relative error of its own output.
        propagate: later layers are observed behind the already pruned earlier ones.
        drift: how much of what earlier removals changed in the value that a consumer's output is added to (a
            residual stream) its repair makes up for, from 0 to 1. The dense model runs beside the pruned one
            then. ``None``: 0.3 with ``quality="best"``, else 0.
        granularity: what goes together: ``"channel"``, single channels; ``"head"``, whole attention heads
            with their rows of W_Q, W_K and W_V and columns of W_O (a KV head takes its query heads along);
            ``"expert"``, whole experts of a mixture with their rows of the router, as if they were never
            chosen. With ``("head",)`` nothing but heads goes; with both, heads in attention and channels
            elsewhere.
        include: ``"approximate"`` prunes also groups that cross a norm (the residual stream of a
            transformer). Norms by mean squares, and layer norms, go on to divide by the dense count, so that
            the result is that of the dense model whose producers are zero there. ``"exempt"`` prunes also
            channels contracted between two activations (rows of W_Q and W_K), by what the loss loses with
            them where costs are measured, else by the norms of both; the queries that stay make up for them.
            ``"depth"`` lets all channels of a residual block go where that costs least, so that an identity
            stays in its place: feed-forward and convolutional blocks, and with the granularity ``"head"``
            those of attention.
        exclude: name patterns of weights or groups; the groups, and those that hold one of the weights, stay
            whole.
        round_to: kept widths (per block) are multiples of this, here and on the command line (kernels like
            16); numbers of whole heads and experts are not.
        uniform_layers: groups of one shape lose equally many channel sets, so that layers that are alike stay
            alike, as some runtimes need it.
        padding_mask: name of the input ``[batch, tokens]`` (``"attention_mask"``, say) that is zero where a
            token of the first input is padding; such tokens of the calibration data enter neither scores nor
            repairs. ``None``: every token counts.
        precision: of products of float32 while calibration data run and their Gram matrices are added up, in
            the words of :func:`torch.set_float32_matmul_precision`: ``"medium"`` rounds the factors to
            bfloat16 (TF32 on CUDA) and adds them up in float32; what is solved is solved in full. ``"auto"``:
            ``"medium"`` where the device multiplies bfloat16 in hardware, which takes a fraction of the time;
            a precision that torch was asked for before stays.

    A name pattern is that of a weight (``"layers.0.mlp.up.weight"``) or of a module that holds it
    (``"layers.0"``), and may have the wildcards ``*``, ``?`` and ``[...]`` (``"layers.*.mlp"``). A tied
    weight goes by each of its names, a folded one also by those of what it is computed of. A pattern that
    matches nothing is an error.

    Raises:
        ArgumentError, SparsityError: an option is out of range or not known.
    """

    sparsity: float | Mapping[str, float] | None = None
    budget: Cap | Iterable[Cap] | None = ()
    quality: Literal["fast", "balanced", "best"] = "balanced"
    score: Literal["fasp", "obs", "magnitude", "random"] | Score | None = None
    restore: Literal["least-squares", "window"] | Window | Restoration | None = "least-squares"
    allocation: Literal["uniform", "global", "search"] | Allocation | None = None
    loss: Literal["auto", "outputs", "next-token"] | Loss | None = "auto"
    propagate: bool = True
    drift: float | None = None
    granularity: Iterable[str] = ("channel",)
    include: Iterable[str] = ()
    exclude: Iterable[str] = ()
    round_to: int = 1
    uniform_layers: bool = False
    padding_mask: str | None = None
    precision: Literal["auto", "highest", "medium"] = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", () if self.budget is None else read_budget(self.budget))
        if self.budget and self.sparsity is not None:
            raise ArgumentError(
                f"sparsity={self.sparsity!r} and budget={self.budget!r} both say how much goes; leave one of"
                " them out (sparsity=None)"
            )
        for name in ("score", "restore", "allocation", "loss"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, (str, Window)) or callable(value)):
                raise ArgumentError(
                    f"{name}={value!r:.80} is not known; pass a name that is, or an object of its kind"
                )
        if self.padding_mask is not None and not isinstance(self.padding_mask, str):
            raise ArgumentError(
                f"padding_mask={self.padding_mask!r:.80} is no name; pass that of an input, such as"
                " 'attention_mask'"
            )
        if isinstance(self.restore, type):
            name = self.restore.__name__
            raise ArgumentError(f"restore={name} is a class; make one: restore={name}()")
        if self.sparsity is not None:
            _check_sparsity(self.sparsity)
        if isinstance(self.sparsity, Mapping):
            object.__setattr__(self, "sparsity", dict(self.sparsity))
        if not isinstance(self.quality, str) or self.quality not in MEASURED:
            raise ArgumentError(
                f"quality={self.quality!r} is not known; use {', '.join(map(repr, MEASURED))}"
            )
        resolve_score(self.named_score)
        if (
            self.restore not in ("least-squares", "window", None)
            and not isinstance(self.restore, Window)
            and not callable(self.restore)
        ):
            said = (
                "use 'least-squares', 'window', a fasp_fx.restoration.Window, a callable"
                " (fasp_fx.restoration.Restoration) or None"
            )
            raise ArgumentError(f"restore={self.restore!r} is not known; {said}")
        if self.window is not None and not self.propagate:
            raise ArgumentError(
                "windows are trained behind earlier removals; leave propagate= out, or use"
                " restore='least-squares'"
            )
        if self.loss is not None:
            resolve_loss(self.loss)
        if isinstance(self.allocation, type):
            name = self.allocation.__name__
            raise ArgumentError(f"allocation={name} is a class; make one: allocation={name}()")
        if self.allocation not in (None, "uniform", "global", "search") and not callable(self.allocation):
            said = "use 'uniform', 'global', 'search' or a callable (fasp_fx.allocation.Allocation)"
            raise ArgumentError(f"allocation={self.allocation!r} is not known; {said}")
        if self.allocation not in (None, "uniform") and isinstance(self.sparsity, Mapping):
            raise ArgumentError(
                "a sparsity for each pattern is an allocation by itself; leave allocation= out, or give one"
                " sparsity"
            )
        if not isinstance(self.round_to, int) or isinstance(self.round_to, bool) or self.round_to < 1:
            raise ArgumentError(f"round_to={self.round_to!r} is not a positive integer")
        if not isinstance(self.precision, str) or self.precision not in _PRECISIONS:
            raise ArgumentError(
                f"precision={self.precision!r} is not known; use {', '.join(map(repr, _PRECISIONS))}"
            )
        for name in ("propagate", "uniform_layers"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}={getattr(self, name)!r} is neither True nor False")
        if self.uniform_layers and isinstance(self.sparsity, Mapping):
            raise ArgumentError(
                "a sparsity for each pattern tells layers apart; leave uniform_layers= out, or give one"
                " sparsity"
            )
        if self.drift is not None and (
            isinstance(self.drift, bool)
            or not isinstance(self.drift, (int, float))
            or not 0 <= self.drift <= 1
        ):
            raise ArgumentError(f"drift={self.drift!r} is not in [0, 1]; 0.3 makes up for a third")
        if self.drift and not (self.propagate and self.restore is not None):
            raise ArgumentError(
                "drift= is for repairs behind earlier removals; leave it out without restore= or propagate="
            )
        for name, known in (("granularity", _GRANULARITIES), ("include", _INCLUDED), ("exclude", None)):
            object.__setattr__(self, name, names_of(name, getattr(self, name), known))
        if not self.granularity:
            raise ArgumentError(
                f"granularity={self.granularity!r} is not known; pass a tuple of"
                f" {', '.join(map(repr, _GRANULARITIES))}"
            )

    @classmethod
    def of(cls, config: PruningConfig | None, options: Mapping[str, Any]) -> PruningConfig:
        """A configuration with some options in the place of its own; ``None`` stands for the defaults.

        Raises:
            ArgumentError: an option is not known, out of range, or ``config`` is no configuration.
        """
        return configured(cls, config, options)

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is needed."""
        return (
            resolve_score(self.named_score).needs_data
            or self.restore is not None
            or isinstance(self.allocator, CostAllocation)
        )

    @property
    def named_score(self) -> Literal["fasp", "obs", "magnitude", "random"] | Score:
        """The score, or what stands for it where none is given."""
        if self.score is not None:
            return self.score
        return "obs" if self.quality != "fast" and self.restore is not None else "fasp"

    @property
    def score_name(self) -> str:
        """The score's name; that of its class or function, and what tells it from others of that name, where
        it is one of the user's.

        Raises:
            ArgumentError: nothing tells it from others.
        """
        score = self.named_score
        if isinstance(score, str):
            return score
        name = getattr(score, "__qualname__", type(score).__qualname__)
        identity = identity_of(score, "score", "costs=", code=True)
        return f"{name} {hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    @property
    def drift_part(self) -> float:
        """The drift, or what stands for it where none is given."""
        if self.drift is not None:
            return self.drift
        return 0.3 if self.quality == "best" and self.propagate and self.restore is not None else 0.0

    def beyond(self, names: Collection[str]) -> list[str]:
        """The options besides these that are not as usual, in alphabetical order."""
        usual = PruningConfig()
        return sorted(
            field.name
            for field in fields(self)
            if field.name not in names and getattr(self, field.name) != getattr(usual, field.name)
        )

    @property
    def window(self) -> Window | None:
        """How windows are trained, if they are."""
        return (
            self.restore
            if isinstance(self.restore, Window)
            else Window()
            if self.restore == "window"
            else None
        )

    @property
    def allocator(self) -> Allocation:
        """The function that the allocation stands for."""
        if callable(self.allocation):
            return self.allocation
        if self.allocation == "search":
            return Search()
        is_global = (
            self.named_score == "obs" and not isinstance(self.sparsity, Mapping)
            if self.allocation is None
            else self.allocation == "global"
        )
        return Global() if is_global else uniform

    @property
    def caps(self) -> tuple[Cap, ...]:
        """The budgets."""
        return read_budget(self.budget)

    @property
    def requested(self) -> float | None:
        """The sparsity asked for, or what stands for it where nothing else was."""
        if self.budget or isinstance(self.sparsity, Mapping):
            return None
        return SPARSITY if self.sparsity is None else float(self.sparsity)

    def to_json(self) -> str:
        """The configuration as text.

        Raises:
            ArgumentError: an option is a function, which text cannot hold.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("score", "restore", "allocation", "loss"):
            if callable(values[name]):
                raise ArgumentError(
                    f"{name}={values[name]!r} is a function, which cannot be stored; keep it in code and pass"
                    " it again"
                )
        if isinstance(self.restore, Window):
            values["restore"] = asdict(self.restore)
        sparsity = dict(self.sparsity) if isinstance(self.sparsity, Mapping) else self.sparsity
        return to_document(
            "config", {**values, "sparsity": sparsity, "budget": budget_data(self.caps)}, indent=1
        )

    @classmethod
    def from_json(cls, text: str) -> PruningConfig:
        """The configuration that :meth:`to_json` wrote.

        Raises:
            ArgumentError: the text is none, or of a version that is not read here.
        """
        remedy = "write it again with PruningConfig.to_json()"
        held = from_document("config", dict[str, Any], text, remedy, ArgumentError)
        values = {name: value for name, value in held.items() if name not in ("format", "kind")}
        if isinstance(window := values.get("restore"), dict):
            if not window.keys() <= {field.name for field in fields(Window)}:
                raise ArgumentError(
                    f"restore={window!r} is no window; write the configuration again with"
                    " PruningConfig.to_json()"
                )
            values["restore"] = Window(**window)
        return cls.of(None, {**values, "budget": budget_from_data(values.get("budget", []))})


def _check_sparsity(sparsity: Any) -> None:
    if isinstance(sparsity, Mapping):
        if not sparsity or not all(isinstance(pattern, str) for pattern in sparsity):
            raise SparsityError(
                f"sparsity={dict(sparsity)!r} is no mapping from name patterns to fractions; for example"
                " {'layers.*.mlp': 0.3}"
            )
        for pattern, fraction in sparsity.items():
            if not _is_fraction(fraction):
                raise SparsityError(
                    f"sparsity={fraction!r} for '{pattern}' is not in (0, 1); 0.2 removes a fifth"
                )
    elif not _is_fraction(sparsity):
        raise SparsityError(f"sparsity={sparsity!r} is not in (0, 1); 0.2 removes a fifth")


def _is_fraction(value: Any) -> bool:
    return is_number(value) and 0 < value < 1


__all__ = ["PruningConfig", "PruningOptions"]
