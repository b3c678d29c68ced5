"""A configuration says what every keyword says, refuses what it does not know, and survives JSON; groups are
picked by the names of their weights.
"""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from models import Spec, build, made, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.allocation import Macs, Parameters
from fasp_fx.base._records import DOCUMENT
from fasp_fx.pruning import PruningOptions, Report

SPEC = Spec(
    layers=1, hidden=8, kv_heads=2, repeat=2, head_dim=4, ffn=12, bias=True, gated=True, positions="rope"
)
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def layers() -> nn.Module:
    """Three hidden layers of their own width, one under another's name."""

    def forward(self: Any, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](F.relu(layer["up"](x)))
        return self.head(x)

    torch.manual_seed(0)
    parts = ({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)} for _ in range(3))
    return made(forward, layers=nn.ModuleList(map(nn.ModuleDict, parts)), head=nn.Linear(6, 2))


def widths(**options: Any) -> list[int]:
    """What is left of the hidden layers."""
    result = fasp_fx.prune(layers(), (X,), score="magnitude", restore=None, **options)
    assert torch.isfinite(result.module(X)).all()
    return [result.module.get_parameter(f"layers.{index}.up.weight").shape[0] for index in range(3)]


CONFIGS = st.builds(
    fasp_fx.PruningConfig,
    sparsity=st.one_of(
        st.floats(0.01, 0.99), st.dictionaries(st.text(min_size=1), st.floats(0.01, 0.99), min_size=1)
    ),
    score=st.sampled_from(["fasp", "magnitude", "random"]),
    restore=st.sampled_from(["least-squares", None]),
    granularity=st.lists(st.sampled_from(["channel", "head", "expert"]), min_size=1).map(tuple),
    include=st.lists(st.sampled_from(["approximate", "exempt"])).map(tuple),
    exclude=st.lists(st.text()).map(tuple),
    round_to=st.integers(1, 64),
)


@given(config=CONFIGS)
def test_a_configuration_survives_json(config: fasp_fx.PruningConfig) -> None:
    """By itself, and in a report."""
    assert fasp_fx.PruningConfig.from_json(config.to_json()) == config
    report = Report(0.1, 0.1, (2, 1), (8, 4), (), config=config)
    assert Report.from_json(report.to_json()) == report


def test_a_result_says_what_was_asked_for_and_keeps_it(tmp_path: Path) -> None:
    config = fasp_fx.PruningConfig(sparsity={"*": 0.3}, score="magnitude", restore=None)
    model = layers()
    result = fasp_fx.prune(model, (X,), config=config, round_to=2)
    assert result.config == dataclasses.replace(config, round_to=2)
    assert fasp_fx.prune(model, (X,), config=result.config).plan == result.plan
    assert fasp_fx.apply(model, result.plan, (X,)).config is None
    assert fasp_fx.load(result.save(tmp_path / "saved")).config == result.config
    own = fasp_fx.prune(model, (X,), calibration=[X], score=fasp_fx.calibration.magnitude, restore=None)
    assert own.config is not None
    assert own.report.requested == 0.2
    assert fasp_fx.load(own.save(tmp_path / "own")).config is None  # no file holds a function
    with pytest.raises(fasp_fx.ArgumentError, match="is a function, which cannot be stored"):
        own.config.to_json()


def test_options_have_one_declaration() -> None:
    """Their texts are those of the documentation, too."""
    for field in dataclasses.fields(fasp_fx.PruningConfig):
        assert f"        {field.name}: {field.metadata['text']}" in str(fasp_fx.PruningConfig.__doc__)
        assert field.metadata["check"](field.name, field.default) == field.default


def test_keywords_are_the_fields() -> None:
    fields = [field.name for field in dataclasses.fields(fasp_fx.PruningConfig)]
    assert [*PruningOptions.__annotations__] == fields
    for function in (fasp_fx.prune, fasp_fx.hf.prune):
        (options,) = [p for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
        assert options.annotation == "Unpack[PruningOptions]"
        # No default but those of the configuration.
        assert not set(fields) & set(inspect.signature(function).parameters)


CONFIG = {"format": DOCUMENT, "kind": "config"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tidy": True}, "the option 'tidy' is not known; there are sparsity, budget, quality, score"),
        ({"config": {"sparsity": 0.3}}, "config is a dict; pass a PruningConfig"),
        ({"granularity": [["head"]]}, r"granularity=\[\['head'\]\] is not known"),
        ({"granularity": ()}, r"granularity=\(\) is not known"),
        ({"exclude": "head"}, "exclude='head' is not known; pass a tuple of name patterns"),
        ({"exclude": (1,)}, r"exclude=\(1,\) is not known"),
        ({"exclude": ("layer.0",)}, "exclude: 'layer.0' matches no group, and no weight of a coupled group"),
        (
            {"sparsity": {"layers.9.*": 0.3}},
            r"0.3 of 'layers.9.\*', which matches no group",
        ),
        (
            {"sparsity": {"layers.1": 0.5, "layers.0": 0.5}, "exclude": ("layers.0",)},
            r"0\.5 of 'layers\.0', which matches no group .* not excluded",
        ),
        ({"sparsity": {"layers.0.up.bias": 0.3}}, "no weight that loses columns with one"),
        ({"sparsity": {}}, "is no mapping from name patterns to fractions"),
        ({"sparsity": {"layers.0": 1.5}}, r"sparsity=1.5 for 'layers.0' is not in \(0, 1\)"),
        (
            {"sparsity": {"layers.0": 0.5}, "allocation": lambda budget, round_to: []},
            "is an allocation by itself",
        ),
        ({"exclude": ("layers",)}, "exclude= leaves all whole"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    kinds = (fasp_fx.ArgumentError, fasp_fx.NothingPrunableError)
    with pytest.raises(kinds, match=message):
        fasp_fx.prune(layers(), (X,), **{"score": "magnitude", "restore": None, **options})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the config is damaged: Invalid JSON"),
        ("[]", "the config is damaged"),
        ('{"sparsity": 0.2}', "the config is of the format 'none'"),
        (json.dumps({**CONFIG, "format": "fasp_fx.document/9"}), "document/9'.*reads 'fasp_fx.document/1'"),
        (json.dumps({**CONFIG, "kind": "plan"}), "the kind 'plan'"),
        (json.dumps({**CONFIG, "sparsity": 2}), "is not in"),
        (json.dumps({**CONFIG, "taste": 2}), "the option 'taste' is not known"),
        *(
            (given, r"the config is damaged.*PruningConfig\.to_json\(\)")
            for given in ({}, None, Path("config.json"))
        ),
    ],
)
def test_other_configurations_are_refused(text: Any, message: str) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=message):
        fasp_fx.PruningConfig.from_json(text)


# --- by name


def test_excluded_groups_stay_whole_and_the_others_carry_the_sparsity() -> None:
    assert widths(sparsity=0.3) == [7, 7, 7]
    for pattern in ("layers.1", "layers.1.*", "layers.1.up.weight", "*.1.down*"):
        # Nine of thirty go from two layers.
        assert widths(sparsity=0.3, exclude=(pattern,)) in ([6, 10, 6], [5, 10, 5])
    assert widths(sparsity=0.1, exclude=("layers.0.up", "layers.1.up")) == [10, 10, 7]
    with pytest.raises(fasp_fx.SparsityError, match="out of reach"):
        widths(sparsity=0.7, exclude=("layers.[12]",))


@pytest.mark.parametrize(
    ("asked", "includes"),
    [
        ({"sparsity": 0.3}, ()),
        ({"sparsity": 0.9}, ("exempt",)),
        ({"budget": Macs(0.4)}, ()),
    ],
)
@pytest.mark.parametrize("also", [(), (nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1))], ids=["alone", "beside"])
def test_what_a_norm_mixes_is_named_where_more_was_asked_for(
    asked: dict[str, Any], includes: tuple[str, ...], also: tuple[nn.Module, ...]
) -> None:
    """As far as it would let more go."""
    norm = nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 4, 1)
    model, x = nn.Sequential(*norm, *also).eval(), torch.randn(2, 3, 4, 4)
    rest = {"score": "magnitude", "restore": None, **asked}
    with_norms = (*includes, "approximate")
    said = rf"ask for include={re.escape(str(with_norms))}, for 16 channel sets more"
    if also and asked == {"sparsity": 0.3}:
        fasp_fx.prune(model, (x,), include=includes, **rest)
        return
    kinds = fasp_fx.SparsityError, fasp_fx.BudgetError, fasp_fx.NothingPrunableError
    with pytest.raises(kinds, match=said):
        fasp_fx.prune(model, (x,), include=includes, **rest)
    with pytest.raises(kinds) as caught:
        fasp_fx.prune(model, (x,), include=includes, exclude=("1",), **rest)
    assert "include=" not in str(caught.value)
    if asked != {"sparsity": 0.9}:
        fasp_fx.prune(model, (x,), include=with_norms, **rest)


def test_groups_that_one_weight_reads_are_told_apart_by_their_names() -> None:
    x = torch.randn(3, 6)
    model = made(
        lambda m, x: m.down(torch.cat([torch.relu(m.left(x)), torch.tanh(m.right(x))], -1)),
        left=nn.Linear(6, 10),
        right=nn.Linear(6, 12),
        down=nn.Linear(22, 4),
    )
    names = {group.producers[0].name: group.name for group in fasp_fx.analyze(model, (x,)).select("prunable")}
    assert sorted(names.values()) == ["down.weight", "down.weight#2"]
    asked = {"score": "random", "restore": None}
    kept = fasp_fx.prune(model, (x,), sparsity=0.2, exclude=("down.weight#2",), **asked)
    reasons = {line.name: line.reason for line in kept.report.lines if line.status == "prunable"}
    assert reasons == {"down.weight": "", "down.weight#2": "excluded by 'down.weight#2'"}
    (first,) = (weight for weight, name in names.items() if name == "down.weight")
    assert [member.name for group in kept.plan.groups for member in group.producers] == [
        first,
        first.replace("weight", "bias"),
    ]
    with pytest.raises(fasp_fx.NothingPrunableError, match="exclude="):  # the weight that both are read by
        fasp_fx.prune(model, (x,), sparsity=0.2, exclude=("down.weight",), **asked)
    only = fasp_fx.prune(model, (x,), sparsity={"down.weight#2": 0.5}, **asked)
    assert [group.name for group in only.plan.groups] == ["down.weight#2"]


def other_names() -> nn.Module:
    """A weight under two names, one computed of others, and a layer that stands at two places."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.dec(F.relu(m.again(F.relu(m.enc(F.relu(m.up(x))))))))
        return m.twice(F.relu(m.normed(x)))

    torch.manual_seed(0)
    enc, dec, last = nn.Linear(10, 8, bias=False), nn.Linear(10, 8), nn.Linear(12, 6)
    dec.weight = enc.weight
    held = {"up": nn.Linear(6, 10), "again": nn.Linear(8, 10), "enc": enc, "dec": dec}
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 12))
    return made(forward, **held, normed=normed, twice=last, other=last)


@pytest.mark.parametrize(
    ("second", "first", "shape"),
    [
        ("dec", "enc.weight", (8, 10)),
        pytest.param("dec.weight", "enc.weight", (8, 10), marks=pytest.mark.slow),
        ("d[a-f]*", "enc.weight", (8, 10)),
        ("*.original1", "normed.weight", (12, 8)),
        pytest.param("normed.parametrizations", "normed.weight", (12, 8), marks=pytest.mark.slow),
        ("other", "twice.weight", (6, 12)),
    ],
)
def test_a_weight_goes_by_each_of_its_names(second: str, first: str, shape: tuple[int, ...]) -> None:
    model = other_names()

    def shapes(**options: Any) -> dict[str, tuple[int, ...]]:
        pruned = fasp_fx.prune(model, (X,), score="magnitude", restore=None, **options).module
        return {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}

    assert shapes(sparsity=0.2, exclude=(second,))[first] == shape
    assert shapes(sparsity=0.2)[first] < shape
    assert shapes(sparsity={second: 0.5}) == shapes(sparsity={first: 0.5})


def test_a_part_goes_by_each_of_its_places() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.pad(m.free(x), (0, 4))
        return m.second["inner"](x) if x.sum() < 1e6 else m.first(x)

    first = layers()
    model = made(forward, free=layers(), first=first, second=nn.ModuleDict({"inner": first}))
    asked: dict[str, Any] = {"score": "magnitude", "restore": None, "sparsity": 0.3}
    result = fasp_fx.prune(model, (X,), exclude=("second", "free.layers.0"), **asked)
    shapes = {name: tuple(tensor.shape) for name, tensor in result.module.named_parameters()}
    assert shapes["first.layers.0.up.weight"] == shapes["free.layers.0.up.weight"] == (10, 6)
    assert shapes["free.layers.1.up.weight"][0] < 10
    said = {line.name: line.reason for line in result.report.lines if "excluded" in line.reason}
    assert said["free.layers.0.down.weight"] == "excluded by 'free.layers.0'"
    with pytest.raises(fasp_fx.ArgumentError, match="'third' matches no group, and no weight"):
        fasp_fx.prune(model, (X,), exclude=("third",), **asked)


def test_a_fraction_for_each_pattern() -> None:
    assert widths(sparsity={"layers.0": 0.5, "layers.2": 0.2}) == [5, 10, 8]
    assert widths(sparsity={"layers.0": 0.5, "layers.*": 0.2}) == [5, 8, 8]  # the first that matches counts
    assert widths(sparsity={"layers.*": 0.3, "layers.0": 0.5}) == [7, 7, 7]
    assert widths(sparsity={"layers.*": 0.5}, exclude=("layers.0.up",)) == [10, 5, 5]
    assert widths(sparsity={"layers.*": 0.5}, round_to=4) == [4, 4, 4]


@pytest.mark.parametrize(
    ("option", "value"),
    [("args", (X,)), ("kwargs", {"x": X}), ("state", ("past",)), ("dynamic_shapes", {"x": None})],
)
def test_what_a_capture_holds_is_not_given_again(option: str, value: Any) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=f"a captured model holds what {option}= says already"):
        fasp_fx.analyze(fasp_fx.capture(layers(), (X,)), **{option: value})


# --- plans from channel sets


def test_a_plan_from_sets_removes_their_indices() -> None:
    captured = fasp_fx.capture(build(SPEC), (tokens(2, 4),))
    groups = fasp_fx.analyze(captured).select("prunable")
    removed = {
        group.name: [int(np.flatnonzero(group.block_of == block)[1]) for block in np.unique(group.block_of)]
        for group in groups
    }
    plan = fasp_fx.plan_from_sets(captured, removed)
    lost = plan.slices()
    for group in groups:
        for member in (*group.producers, *group.consumers):
            assert set(member.sets) <= set(range(group.size))
            wanted = {index for index, own in zip(member.indices, member.sets) if own in removed[group.name]}
            assert {index for _, index in lost.get((member.name, member.dim), frozenset())} == wanted
    assert fasp_fx.apply(captured, plan).plan.slices() == lost


DOWN = "layers.0.down.weight"
#: sets by the names of groups, of three layers or (by the status of a group) of a decoder
SETS: list[tuple[dict[Any, Any], str]] = [
    ({"layers.0.down.wieght": [1]}, "'layers.0.down.wieght' cannot be pruned here"),
    ({DOWN: [10]}, "from 0 to 9"),
    ({DOWN: [-1]}, "from 0 to 9"),
    ({DOWN: range(10)}, "must lose the same number and keep one"),
    ({DOWN: torch.arange(10) < 3}, "of a mask, mask.nonzero"),
    ({DOWN: [True, False]}, "of a mask, mask.nonzero"),
    ({DOWN: [10**30]}, "give the numbers of channel sets"),
    ({3: [1]}, "'3' cannot be pruned"),
    ({"frozen": [0]}, "cannot be pruned here.*and why others cannot"),
    ({"exempt": [0]}, "cannot be pruned here.*include="),
    ({"blocks": [0]}, r"removes \[.*\] channel sets from blocks.*the same number"),
]


@pytest.mark.parametrize(("removed", "message"), SETS)
def test_sets_that_cannot_go(removed: Any, message: str) -> None:
    captured = fasp_fx.capture(layers(), (X,))
    if set(removed) & {"frozen", "exempt", "blocks"}:
        captured = fasp_fx.capture(build(SPEC), (tokens(2, 4),))
        groups = {group.status: group.name for group in reversed(fasp_fx.analyze(captured).groups)}
        groups["blocks"] = next(
            group.name for group in fasp_fx.analyze(captured).select("prunable") if group.blocks > 1
        )
        removed = {groups[status]: sets for status, sets in removed.items()}
    with pytest.raises(fasp_fx.FaspError, match=message):
        fasp_fx.plan_from_sets(captured, removed)


def test_sets_of_another_granularity() -> None:
    captured, heads = fasp_fx.capture(layers(), (X,)), ("head",)
    with pytest.raises(fasp_fx.PlanError, match="that can with this granularity="):
        fasp_fx.plan_from_sets(captured, {DOWN: [0]}, granularity=heads)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quality": ["best"]}, r"quality=\['best'\] is not known"),
        ({"score": np.ones(2)}, r"score=array\("),
        ({"restore": np.ones(2)}, r"restore=array\("),
        ({"restore": int}, r"restore=<class 'int'> is not known"),
        ({"allocation": np.ones(2)}, r"allocation=array\("),
        ({"loss": np.ones(2)}, r"loss=array\("),
        ({"exclude": torch.tensor(0.3)}, r"exclude=tensor\(0.3000\) is not known"),
        ({"include": torch.tensor(0.3)}, r"include=tensor"),
        ({"sparsity": 10**400}, r"is not in \(0, 1\)"),
        ({"drift": 10**400}, r"is not in \[0, 1\]"),
        ({"drift": 1.5}, "drift="),
        ({"drift": True}, "drift="),
        ({"drift": 0.3, "restore": None}, "drift="),
        ({"restore": "ridge"}, "restore="),
        ({"budget": 0.8}, "budget=0.8 is no budget; pass one of fasp_fx.allocation"),
        ({"budget": "parameters"}, "is no budget"),
        ({"budget": {"resource": "parameters", "amount": 0.5}}, "is no budget"),
        ({"budget": (Parameters(0.5), Parameters(1000))}, "speaks of one resource twice"),
        ({"budget": Parameters(0.5), "sparsity": 0.5}, r"0\.5 and the budget of .*leave one of them out"),
        ({"budget": Parameters(0.5), "sparsity": {"*": 0.5}}, "leave one of them out"),
        (
            {"allocation": "search", "sparsity": {"*": 0.3}},
            "a sparsity for each pattern is an allocation by itself",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=says):
        fasp_fx.PruningConfig(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kwargs": (1, 2)}, "kwargs is a tuple; pass a dict"),
        ({"kwargs": "x"}, "kwargs is a str"),
        ({"state": None}, "state=None is no tuple of names"),
        ({"state": "past"}, "state='past' is no tuple"),
    ],
)
def test_a_call_that_is_none_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=says):
        fasp_fx.capture(nn.Linear(3, 3).eval(), (torch.randn(2, 3),), **options)


def test_explain() -> None:
    analysis = fasp_fx.analyze(build(dataclasses.replace(SPEC, layers=2)), (tokens(2, 4),))
    path = analysis.explain("blocks.0.ffn.gate.weight", "blocks.0.ffn.down.weight")
    assert (path[0], path[-1]) == ("blocks.0.ffn.gate.weight", "blocks.0.ffn.down.weight")
    assert any("silu" in line for line in path)
    assert sum("linear" in line for line in path) == 2
    rows, columns = analysis.explain("blocks.0.ffn.gate.weight")
    assert rows.startswith("approximate")
    assert "mixed by aten.layer_norm" in rows
    assert columns.startswith("prunable")
    # weights of two layers meet in the hidden dimension alone; biases do not
    assert any(
        "add" in line for line in analysis.explain("blocks.0.ffn.gate.weight", "blocks.1.ffn.down.weight")
    )
    for first, second in (
        ("blocks.0.ffn.gate.bias", "blocks.1.ffn.up.bias"),
        ("blocks.0.attention.q.bias", "blocks.0.attention.out.weight"),
    ):
        with pytest.raises(fasp_fx.ArgumentError, match=f"couples channels of '{first}' with .* '{second}'"):
            analysis.explain(first, second)
    with pytest.raises(fasp_fx.ArgumentError, match="nowhere"):
        analysis.explain("nowhere", "blocks.0.ffn.down.weight")
