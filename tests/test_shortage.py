"""A shortage of memory or disk, or an interrupt, is never taken for anything else."""

import ast
import errno
import functools
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
import typer
from models import made
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fasp_fx
from fasp_fx.base import _offload, short_of_memory, tolerable
from fasp_fx.cli._console import session
from fasp_fx.errors import OffloadError, StoreError, TrainingMemoryError

#: the project's folder
ROOT = Path(__file__).resolve().parent.parent


# --- memory that is short at one place, or a disk that is full from there on


#: what is said where something is short, in capitals so that nothing else says it
_MEMORY, _DISK = "CUDA OUT OF MEMORY", os.strerror(errno.ENOSPC)


def _of(run: Callable[[], Any]) -> Exception:
    """What something raises, as it comes out of what it interrupted."""
    with pytest.raises((RuntimeError, OffloadError)) as caught:
        run()
    return caught.value


#: what is raised, by kind; how each is told from other errors
RAISED: dict[str, Callable[[], Exception]] = {
    "device": lambda: torch.OutOfMemoryError(f"{_MEMORY}: tried to allocate 3.00 GiB"),
    "host": lambda: _of(lambda: torch.empty(1 << 46)).with_traceback(None),
    "disk": lambda: OSError(errno.ENOSPC, _DISK),
}
WORDS = (_MEMORY, "can't allocate memory", _DISK)


@dataclass
class Places:
    """Counts the places where something is taken, and raises at one of them.

    Attributes:
        kind: of the shortage.
        at: the number of the place, from 1; 0: it is short nowhere.
        count: how many places there were.
    """

    kind: str
    at: int = 0
    count: int = 0

    def take(self, raised: Callable[[], Exception] | None = None) -> None:
        self.count += 1
        if self.count == self.at or (self.kind == "disk" and self.count > self.at > 0):
            raise (raised or RAISED[self.kind])()


class _Allocations(TorchDispatchMode):
    """Every tensor with values of its own is such a place."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(isinstance(one, FakeTensor) for one in torch.utils._pytree.tree_leaves((args, made))):
            return made
        results = made if isinstance(made, (list, tuple)) else [made]
        for one, said in zip(results, func._schema.returns, strict=False):
            if (
                isinstance(one, Tensor)
                and said.alias_info is None
                and one.device.type != "meta"
                and one.numel()
            ):
                self.places.take()
        return made


_WRITING: list[Places] = []
#: what writes without opening a file for it, by the name of the event
_MAKING = {"os.mkdir", "os.rename", "tempfile.mkdtemp", "tempfile.mkstemp", "shutil.copyfile"}


def _hook(event: str, given: tuple[Any, ...]) -> None:
    if not _WRITING:
        return
    if event == "open":
        path, _, flags = given
        if isinstance(path, int) or not isinstance(flags, int) or str(path) == os.devnull:
            return
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _WRITING[-1].take()
    elif event in _MAKING:
        _WRITING[-1].take()


@functools.cache  # a hook cannot be taken away
def _listen() -> None:
    sys.addaudithook(_hook)


@contextmanager
def _full_disk(places: Places) -> Iterator[None]:
    """Every file that is opened for writing, made or moved is such a place."""
    _listen()
    original = safetensors.torch.serialize_file  # which opens files without a word

    def serialize(*args: Any, **kwargs: Any) -> Any:
        places.take(lambda: SafetensorError(f"Error while serializing: I/O error: {_DISK} (os error 28)"))
        return original(*args, **kwargs)

    _WRITING.append(places)
    try:
        with mock.patch.object(safetensors.torch, "serialize_file", serialize):
            yield
    finally:
        _WRITING.pop()


def says_so(raised: BaseException | None) -> bool:
    """Whether an error names a shortage, itself or by what it was raised from."""
    waiting, seen = [raised], set[int]()
    while waiting:
        error = waiting.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            if any(word in str(error) for word in WORDS):
                return True
            waiting += [error.__cause__, error.__context__]
    return False


def tried(run: Callable[[], Any], kind: str, at: int = 0) -> tuple[BaseException | None, int]:
    """Run something with a shortage at one place.

    Returns:
        What it raised, if anything, and how many places it came by.
    """
    places, raised = Places(kind, at), None
    with warnings.catch_warnings(action="ignore"):
        try:
            with _full_disk(places) if kind == "disk" else _Allocations(places):
                run()
        except Exception as error:
            raised = error
    return raised, places.count


# --- errors


def _raise(error: BaseException) -> Callable[..., Any]:
    return mock.Mock(side_effect=error)


def _wrapped(error: BaseException, explicit: bool = True) -> Callable[[], Any]:
    def run() -> None:
        try:
            raise error
        except BaseException as caught:
            if explicit:
                raise OffloadError("it did not work") from caught
            raise ValueError("it did not work") from None

    return run


def _full(number: int) -> OSError:
    return OSError(number, os.strerror(number))


SHORT_OF_MEMORY = {
    "the allocator of the CPU": lambda: torch.empty(1 << 46),
    "Python": lambda: bytearray(1 << 60),
    "a device": _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")),
    "C++": _raise(RuntimeError("std::bad_alloc")),
    "a driver": _raise(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous")),
    "a map of a file": _raise(RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)")),
    "a library of a device": _raise(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x")),
    "the system": _raise(_full(errno.ENOMEM)),
    "training": _raise(TrainingMemoryError("it takes 3 GiB")),
    "from it": _wrapped(MemoryError()),
    "after it": _wrapped(torch.OutOfMemoryError("CUDA out of memory"), explicit=False),
}
SHORT_OF_FILES = {
    "a disk": _raise(_full(errno.ENOSPC)),
    "a quota": _wrapped(_full(errno.EDQUOT)),
    "descriptors": _raise(_full(errno.EMFILE)),
    "a writer": _raise(SafetensorError("Error while serializing: No space left on device (os error 28)")),
}
NOT_SHORT = {
    "a graph": _raise(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")),
    "no file": _raise(FileNotFoundError(errno.ENOENT, "No such file")),
    "from no file": _wrapped(FileNotFoundError(errno.ENOENT, "No such file")),
    "no text": _raise(ValueError(3)),
    "words of another": _raise(ValueError("not enough memory of the past: out of memory")),
    "words of a model": _raise(RuntimeError("not enough memory of the past")),
    "no member": lambda: signal.Handlers(77),  # of the class that handlers may be of
}


def _caught(run: Callable[[], Any]) -> str:
    try:
        try:
            run()
        except tolerable(ValueError, RuntimeError, OSError, OffloadError):
            return "tolerated"
    except short_of_memory():
        return "memory"
    except Exception:
        return "passed"
    return "nothing"


@pytest.mark.parametrize(
    ("expected", "run"),
    [
        *[pytest.param("memory", run, id=f"memory: {name}") for name, run in SHORT_OF_MEMORY.items()],
        *[pytest.param("passed", run, id=f"files: {name}") for name, run in SHORT_OF_FILES.items()],
        *[pytest.param("tolerated", run, id=f"not short: {name}") for name, run in NOT_SHORT.items()],
    ],
)
def test_a_shortage_is_told_from_other_errors(expected: str, run: Callable[[], Any]) -> None:
    assert _caught(run) == expected


def test_what_the_caller_was_handling_before_says_nothing() -> None:
    """A caller may try again with less after a shortage, and what is raised then may be tolerated."""
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError:
        assert _caught(NOT_SHORT["a graph"]) == "tolerated"


class _Handler:
    def __call__(self, *args: Any) -> None:
        raise RuntimeError("time is up")

    def method(self, *args: Any) -> None:
        raise RuntimeError("time is up")


@pytest.mark.parametrize(
    "handler", [_Handler(), _Handler().method, lambda *args: _Handler()(), functools.partial(_Handler(), 1)]
)
@pytest.mark.parametrize("wrap", [False, True])
def test_what_a_handler_of_a_signal_raises_is_not_tolerated(handler: Any, wrap: bool) -> None:
    def interrupted() -> None:
        try:
            signal.raise_signal(signal.SIGALRM)
        except RuntimeError as error:
            if not wrap:
                raise
            raise ValueError(str(error)) from error

    before = signal.signal(signal.SIGALRM, handler)
    try:
        assert _caught(interrupted) == "passed"
        assert _caught(_raise(RuntimeError("time is up"))) == "tolerated"
    finally:
        signal.signal(signal.SIGALRM, before)


def net(asks: bool = False) -> nn.Module:
    """Two coupled groups; if it ``asks``, it decides by its values, so that it is captured in parts."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(-x if asks and x.sum() > 1e6 else x)

    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
    return made(forward, first=first, second=second)


def batches() -> list[Tensor]:
    return [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@functools.cache
def captured() -> fasp_fx.Captured:
    return fasp_fx.capture(net(), (batches()[0],))


@functools.cache
def pruned() -> fasp_fx.Result:
    return fasp_fx.prune(captured(), calibration=batches(), sparsity=0.3)


@pytest.fixture(scope="module")
def made_before() -> None:
    """What stages start from."""
    pruned()


def _capture(folder: Path) -> Any:
    return fasp_fx.capture(net(), (batches()[0],))


def _prune(folder: Path) -> Any:
    return fasp_fx.prune(captured(), calibration=batches(), sparsity=0.3)


def _save(folder: Path) -> Any:
    pruned().save(folder / "saved")
    return fasp_fx.load(folder / "saved")


def _resume(folder: Path) -> Any:
    """A run that is kept, of weights in files, which are small ones here."""
    with (
        mock.patch.multiple(_offload, SMALLEST=1, FILE_BYTES=2**12),
        fasp_fx.offload(folder / "weights") as scratch,
    ):
        fasp_fx.keep_weights(net(), scratch)
        return fasp_fx.prune(
            captured(), calibration=batches(), sparsity=0.3, quality="fast", checkpoint=folder / "run"
        )


def _in_parts(folder: Path) -> Any:
    return fasp_fx.prune(net(asks=True), (batches()[0],), calibration=batches(), sparsity=0.3)


#: what is run, with how many allocations and how many places on the disk at least
STAGES: dict[str, tuple[Callable[[Path], Any], int, int]] = {
    "capture": (_capture, 50, 0),
    "prune": (_prune, 1000, 0),
    "save": (_save, 5, 10),
    "resume": (_resume, 500, 20),
    "parts": (_in_parts, 500, 0),
}


def _held(stage: str, kind: str, at: int, folder: Path) -> None:
    error, _ = tried(lambda: STAGES[stage][0](folder), kind, at)
    assert error is not None, f"place {at} was passed over"
    if not says_so(error):
        raise AssertionError(f"place {at} ends in an error that says nothing of it") from error


@pytest.mark.parametrize(
    ("stage", "kind", "spread"),
    [
        pytest.param(stage, kind, spread, marks=() if spread == 3 and stage != "parts" else pytest.mark.slow)
        for stage, (_, *least) in STAGES.items()
        for kind in RAISED
        for spread in (3, 100)
        if least[kind == "disk"]
    ],
)
@pytest.mark.usefixtures("made_before")
def test_a_shortage_anywhere_ends_in_an_error_that_names_it(
    stage: str, kind: str, spread: int, tmp_path: Path
) -> None:
    """At some ``spread`` places of a run, one as far from the next as any other."""
    error, places = tried(lambda: STAGES[stage][0](tmp_path / "0"), kind)
    assert error is None
    assert places >= STAGES[stage][1 + (kind == "disk")]
    step = max(places // spread, 1)
    for at in range(1 + step // 2, places + 1, step):
        _held(stage, kind, at, tmp_path / str(at))


def _time_is_up(*args: Any) -> None:
    raise RuntimeError("time is up")


#: what is no fault of the model's, of a group's or of a pass
FOREIGN: dict[str, Callable[[], Exception]] = {
    **RAISED,
    "weights in files": lambda: _of(_wrapped(_full(errno.ENOSPC))),
    "timer": lambda: _of(lambda: signal.raise_signal(signal.SIGALRM)),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize(
    "place",
    [
        "capturing._runner.execute",
        "calibration._gradients.evaluated",
        "passes._run._verified",
        "pruning.check.finish",
        "pruning.check._compare.run",
    ],
)
def test_what_is_no_fault_is_taken_for_none(
    place: str, kind: str, made_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes out as it is, of the model, of a loss, of a pass, of the export and of the comparison."""
    before = signal.signal(signal.SIGALRM, _time_is_up)
    try:
        error = FOREIGN[kind]()
        monkeypatch.setattr(f"fasp_fx.{place}", _raise(error))
        with pytest.raises(type(error)) as caught:
            _prune(Path())
        assert caught.value is error
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_command_line_says_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, session():
        torch.empty(1 << 46)
    assert caught.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "memory is too short" in line
    assert "can't allocate memory" in line


def test_every_broad_handler_lets_shortages_through() -> None:
    """Beside those that raise what they caught, and the few whose own error names it."""
    naming = {"fasp_fx/training/_recovery.py"}
    broad = []
    for folder in ("fasp_fx", "passes", "patterns"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = str(file.relative_to(ROOT))
            if name in naming:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.ExceptHandler) or node.type is None:
                    continue
                kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                if {ast.unparse(kind) for kind in kinds} & {"Exception", "BaseException", "RuntimeError"}:
                    broad += [] if ast.unparse(node.body[-1]) == "raise" else [f"{name}:{node.lineno}"]
    assert broad == []


# --- a full disk


DATA = [torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Inside, no file can be longer."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def captured_once() -> fasp_fx.Captured:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    return fasp_fx.capture(model.eval(), (DATA[0],))


@pytest.mark.parametrize("size", [100, 3000, 6000])
def test_a_checkpoint_goes_on_after_it(captured_once: fasp_fx.Captured, size: int, tmp_path: Path) -> None:
    """From the first file, or from the weights of the first stop on, there is no room."""
    folder = tmp_path / "run"

    def prune(checkpoint: Path | None) -> fasp_fx.Result:
        return fasp_fx.prune(
            captured_once, calibration=DATA, sparsity=0.3, quality="fast", checkpoint=checkpoint
        )

    with room_for(size), pytest.raises(StoreError, match="cannot be written"):
        prune(folder)
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    found, expected = prune(folder), prune(None)
    assert found.plan == expected.plan
    weights = (list(each.module.parameters()) for each in (found, expected))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_what_was_left_when_the_process_was_killed_is_no_other_run(
    captured_once: fasp_fx.Captured, tmp_path: Path
) -> None:
    (tmp_path / ".run.json.0123456789ab.partial").write_text('{"for')
    fasp_fx.prune(captured_once, calibration=DATA, sparsity=0.3, quality="fast", checkpoint=tmp_path)
    assert (tmp_path / "run.json").is_file()


def test_what_a_file_held_stays(captured_once: fasp_fx.Captured, tmp_path: Path) -> None:
    costs, file = fasp_fx.measure(captured_once, calibration=DATA), tmp_path / "file"
    costs.save(file)
    before = file.read_text()
    for name in ("file", "other"):
        with room_for(200), pytest.raises(StoreError, match="cannot be written"):
            costs.save(tmp_path / name)
    assert (file.read_text(), list(tmp_path.iterdir())) == (before, [file])
    costs.save(file)
    assert fasp_fx.allocation.Costs.load(file).to_json() == costs.to_json()
