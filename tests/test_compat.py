"""Private names of torch and transformers whose failing nothing else would show do what is expected of them
(where they may stand: ``test_private_names.py``).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from models import made
from torch import Tensor, nn
from torch.export import Dim, export

from fasp_fx.base import compat as _compat
from fasp_fx.errors import VerificationError

ATEN = torch.ops.aten


def test_what_fake_tensors_raise_they_log_there(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger(_compat.FAKE_LOGGER)
    # not all versions hand on to the root what they log
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, caplog.handler])
    with _compat.FakeTensorMode(), pytest.raises(Exception, match="reduction dim"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert _compat.FAKE_LOGGER in {record.name for record in caplog.records}


def test_the_cache_of_fake_results_can_be_left_out() -> None:
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=True):  # as outside of tests
        assert _compat.FakeTensorMode().cache_enabled
        with _compat.traced_by({}, {}):
            assert not _compat.FakeTensorMode().cache_enabled


def plain() -> nn.Module:
    return made(lambda m, x: x + 1)


def recorded(program: Any) -> Tensor:
    """The input as a program has it."""
    return next(iter(program.graph.find_nodes(op="placeholder"))).meta["val"]


def test_new_guards_are_refused_each_time_they_are_asked_for() -> None:
    program = export(plain(), (torch.ones(4, 3),), dynamic_shapes=((Dim.AUTO, None),))
    symbol: Any = recorded(program).shape[0]
    environment = symbol.node.shape_env
    assert isinstance(environment, _compat.ShapeEnv)
    before = len(environment.guards)
    for _ in range(2):
        with (
            _compat.refuse_new_guards(environment),
            pytest.raises(VerificationError, match="would have to fulfil"),
        ):
            bool(symbol == 7)
    assert len(environment.guards) == before
    with _compat.refuse_new_guards(environment):
        assert bool(symbol + 1 > symbol), "what holds at every size is no new guard"
    bool(symbol == 7)
    assert len(environment.guards) > before, "and afterwards guards are taken again"


def test_the_line_that_settles_a_size_is_known() -> None:
    model = made(lambda self, x: x @ torch.ones(3, 2) + int(x.shape[0]))
    program = export(model, (torch.ones(4, 3),), dynamic_shapes=((Dim.AUTO, Dim.AUTO),), strict=False)
    asked, met = recorded(program).shape
    by_us, by_torch = _compat.settled_by(asked), _compat.settled_by(met)
    assert by_us is not None
    assert by_torch is not None
    assert (by_us.filename, by_us.name) == (__file__, "<lambda>")
    assert by_torch.filename.startswith(str(Path(torch.__file__).parent))


def test_a_program_takes_the_guards_of_another() -> None:
    asking = made(lambda m, x: x + 1 if x.shape[0] % 2 == 0 else x)
    program, even = (
        export(model, (torch.ones(4, 3),), dynamic_shapes=((Dim.AUTO, Dim.STATIC),))
        for model in (plain(), asking)
    )
    assert len(program.module()(torch.ones(5, 3))) == 5
    _compat.take_guards(program, _compat.guards_of(even))
    assert len(program.module()(torch.ones(6, 3))) == 6
    with pytest.raises(AssertionError):
        program.module()(torch.ones(5, 3))
