"""Weights in files: what is pruned so is what is pruned in memory, and little of it is in memory at once."""

import ast
import copy
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from elsewhere import CASES
from models import Spec, block, build, make_model, tokens, wide
from oracle import error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

import fasp_fx
import fasp_fx.hf
from fasp_fx.base import Scratch, addresses, keep, keep_values, keep_weights, offload
from fasp_fx.base._offload import _SCRATCH, FILE_BYTES, SMALLEST, mapped_bytes
from fasp_fx.calibration import Columns, random
from fasp_fx.calibration._restoration import SKETCHED, _sketch
from fasp_fx.capturing import Runner
from fasp_fx.errors import ArgumentError, OffloadError

BATCHES = [torch.arange(64).reshape(2, 32) * step % 97 for step in (3, 5, 7)]


def _model() -> Any:
    """Wide enough for its weights to be kept in files, two of them one, and a buffer that calls
    write into.
    """

    def forward(self: Any, tokens: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.table(tokens)
        return self.head(hidden + block(self, hidden))

    torch.manual_seed(0)
    table, head = nn.Embedding(97, 256), nn.Linear(256, 97, bias=False)
    head.weight = table.weight
    return wide(forward, 256, 640, table=table, head=head, calls=torch.zeros((), dtype=torch.long))


def _prune(model: nn.Module) -> fasp_fx.Result:
    return fasp_fx.prune(model, (BATCHES[0],), calibration=BATCHES, sparsity=0.3)


@pytest.fixture(scope="module")
def in_memory() -> fasp_fx.Result:
    return _prune(_model())


@pytest.mark.parametrize("smallest", [SMALLEST, 1])
def test_the_result_is_that_of_memory(
    in_memory: fasp_fx.Result, tmp_path: Path, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasp_fx.base._offload.SMALLEST", smallest)
    with offload(tmp_path, resident=1) as scratch:  # so that everything is released again and again
        model = _model()
        keep_weights(model, scratch)
        assert model.head.weight is model.table.weight
        found = _prune(model)
    assert found.plan == in_memory.plan
    weights = (dict(each.module.named_parameters()) for each in (found, in_memory))
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    saved = fasp_fx.load(found.save(tmp_path / "saved"))
    assert torch.equal(saved.module(BATCHES[0]), in_memory.module(BATCHES[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "the files have no names"


def test_what_no_tensor_uses_is_freed(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    first = scratch.empty((FILE_BYTES // 4,), torch.float32)
    part = first[5:7]
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    del first
    part.fill_(2)  # still there, with the view
    scratch.empty((FILE_BYTES // 4,), torch.float32)
    del part
    scratch.empty((FILE_BYTES // 4,), torch.float32)
    gc.collect()
    assert len(scratch._maps) == 1
    assert not descriptors or len(os.listdir("/proc/self/fd")) <= descriptors


def _views() -> dict[str, Any]:
    """Values as a model makes them: views of one another, in lists, small ones."""
    base = torch.arange(2.0 * SMALLEST).reshape(4, -1)
    return {
        "view": base[1:, 3:].T,
        "whole": base,
        "list": [base.flatten(), 3],
        "small": torch.ones(3),
        "expanded": torch.arange(float(SMALLEST))[:, None].expand(-1, 5),
        "halves": torch.randn(2, SMALLEST, dtype=torch.complex64).imag,
    }


def test_values_are_kept_as_they_lie(tmp_path: Path) -> None:
    values, held = _views(), torch.zeros(SMALLEST)
    values |= {"held": held[3:], "recorded": torch.zeros(SMALLEST, requires_grad=True)}
    with offload(tmp_path / "made" / "deep") as scratch:
        assert _SCRATCH.get() is scratch
        found = keep_values(values, addresses([held]))
        again = keep_values(found)
    assert all(again[name] is found[name] for name in ("view", "whole", "small")), "once is enough"
    for name in ("view", "whole", "expanded", "halves"):
        assert torch.equal(found[name], values[name])
        assert found[name].stride() == values[name].stride()
        assert scratch._lies_within(found[name].untyped_storage())
    assert all(found[name] is values[name] for name in ("small", "held", "recorded"))
    assert found["list"][1] == 3
    found["whole"].fill_(-7)
    assert bool((found["view"] == -7).all() and (found["list"][0] == -7).all()), "they share memory again"
    assert not bool((values["whole"] == -7).any())
    assert _SCRATCH.get() is None
    assert keep_values(values)["whole"] is keep(values["whole"]) is values["whole"], "outside nothing is kept"


@torch.no_grad()
def test_no_activation_waits_in_memory(tmp_path: Path) -> None:
    """Wherever a run stops, whatever is large lies in files, the batches and the weights excepted."""
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.ReLU()).eval()
    program = fasp_fx.capture(model, (x,)).program
    with offload(tmp_path) as scratch:
        runner = Runner(program, [[x]])
        for stop in range(1, len(runner.nodes)):
            runner.advance(stop)
            (live,) = runner._memory
            large = [value for value in live.values() if value is not x and value.nbytes >= SMALLEST]
            assert all(scratch._lies_within(value.untyped_storage()) for value in large)
        assert large
        assert torch.equal(next(runner.read(runner.nodes[-2])), model(x))


STAYS: dict[str, Callable[[], Tensor]] = {
    "small": lambda: torch.ones(3),
    "meta": lambda: torch.ones(SMALLEST, device="meta"),
    "sparse": lambda: torch.ones(SMALLEST).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(SMALLEST), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", STAYS.values(), ids=list(STAYS))
def test_what_stays_where_it_is(tmp_path: Path, make: Callable[[], Tensor]) -> None:
    tensor = make()
    assert Scratch(tmp_path).keep(tensor) is tensor


def test_a_model_stays_what_it_is(tmp_path: Path) -> None:
    """Optimisers, views of buffers and weights that share memory go on."""
    model = _model()
    model.register_buffer("trace", torch.zeros(SMALLEST))
    model.register_buffer("part", model.trace[:8])
    model.up.weight.grad = torch.ones_like(model.up.weight)
    before = model.up.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scratch = Scratch(tmp_path)
    keep_weights(model, scratch)
    optimizer.step()
    assert torch.equal(model.up.weight, before - 0.5)
    model.trace.add_(1)
    assert float(model.part.sum()) == 8
    assert len(scratch._maps) == 1
    with pytest.raises(ArgumentError, match="scratch is a"):
        keep_weights(model, None)  # type: ignore[arg-type]


def test_little_is_in_memory(tmp_path: Path) -> None:
    """Several times what may be in memory is read, all of it again and again."""
    before = mapped_bytes()
    if before is None:
        pytest.skip("the system does not say how much of mapped files is in memory")
    resident, highest = 2**26, 0
    with offload(tmp_path, resident=resident) as scratch:
        tensors = [scratch.keep(torch.full((2**22,), float(index))) for index in range(32)]
        for tensor in tensors * 2:
            tensor.sum()
            time.sleep(0.02)  # the watch looks from time to time
            highest = max(highest, (mapped_bytes() or 0) - before)
        assert [float(tensor[0]) for tensor in tensors] == list(range(32))
    assert highest < 2 * resident


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"folder": __file__}, "give another folder"),
        ({"device": "moon"}, "'moon' cannot be used"),
    ],
    ids=str,
)
def test_what_no_offload_can_be_of(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ArgumentError, OffloadError), match=says), offload(**options):
        raise AssertionError("not entered")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with offload(tmp_path), pytest.raises(OffloadError, match=r"bytes of weights do not fit .*No space left"):
        _prune(_model())
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offloaded") / "model"
    make_model(folder)
    return folder


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_checkpoint_is_loaded_as_transformers_load_it(
    checkpoint: Path, tmp_path: Path, sharded: bool, dtype: torch.dtype | None
) -> None:
    expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype or "auto").eval()
    folder = checkpoint
    if sharded:
        folder = tmp_path / "shards"
        AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(folder, max_shard_size="50KB")
        assert (folder / "model.safetensors.index.json").is_file()
    with offload(tmp_path / "scratch") as scratch:
        model = fasp_fx.hf.load_offloaded(folder, scratch, dtype=dtype)
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == dict(expected.named_parameters(remove_duplicate=False)).keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.named_parameters())
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert not model.training


def test_the_dtype_is_that_of_transformers(tmp_path: Path) -> None:
    """The configuration's before the stored one; what a class keeps in float32 is not rounded first; one file
    before shards.
    """
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "model")
    _say(tmp_path / "model", dtype="bfloat16")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "other.safetensors"}})
    )
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    with offload(tmp_path / "scratch") as scratch:
        found = fasp_fx.hf.load_offloaded(tmp_path / "model", scratch)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    assert {tensor.dtype for tensor in found.state_dict().values()} >= {torch.float32, torch.bfloat16}


def _say(folder: Path, **fields: Any) -> None:
    """Change a configuration."""
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **fields}))


def test_a_checkpoint_of_another_size(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    _say(folder, intermediate_size=64)
    with offload(tmp_path / "scratch") as scratch, pytest.raises(Exception, match=r"mismatch|lacks"):
        fasp_fx.hf.load_offloaded(folder, scratch)


def _killed(folder: Path) -> None:
    torch.set_num_threads(1)  # there are no others in a process that was forked
    held = Scratch(folder).keep(torch.ones(2**20))
    os.kill(os.getpid(), signal.SIGKILL if held.sum() == 2**20 else signal.SIGTERM)


def test_the_files_go_with_the_process(tmp_path: Path) -> None:
    """Nothing is left behind by a process that is killed."""
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process prints that knows the device."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("elsewhere.py"), tmp_path_factory.mktemp("scratch")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_batches_on_a_device_decide_and_repair_as_on_the_cpu(found: dict[str, Any], name: str) -> None:
    seen = found["runs"][name]
    assert seen["plan"]
    assert (seen["differing"], seen["devices"]) == ([], ["cpu"])
    assert seen["nodes"] > 3, "they ran there"
    assert seen["repaired"] > 0


def test_what_a_device_does_not_serve_is_refused(found: dict[str, Any]) -> None:
    assert found["refusals"]["costs"].startswith("ArgumentError: gradients are taken where the weights are")


# --- the same on a GPU, where there is one


SPEC = Spec(
    layers=2, hidden=8, kv_heads=2, repeat=2, head_dim=4, ffn=12, bias=True, gated=True, positions="rope"
)
TEXTS = [tokens(4, 9, seed=seed) for seed in range(4)]

SOURCES = Path(fasp_fx.__file__).parent


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.cuda(skip(test))


@on_gpu
def test_activations_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = (
        build(Spec(layers=2, hidden=16, kv_heads=2, head_dim=8, ffn=32), 0).cuda(),
        tokens(4, 8).cuda(),
    )
    moved: list[int] = []
    original = torch.Tensor.cpu

    def watch(self: torch.Tensor) -> torch.Tensor:
        moved.append(self.numel())
        return original(self)

    monkeypatch.setattr(torch.Tensor, "cpu", watch)
    fasp_fx.prune(model, (example,), calibration=[example], sparsity=0.2)
    assert max(moved, default=0) <= 256, "something larger than the hashes of weights went to the host"


@on_gpu
@pytest.mark.parametrize("moved", [True, False], ids=["model on the device", "device argument"])
def test_restored_results_agree(moved: bool) -> None:
    model = build(SPEC)
    expected = fasp_fx.prune(model, (TEXTS[0],), calibration=TEXTS, sparsity=0.3)
    if moved:
        other = copy.deepcopy(model).cuda()
        batches = [batch.cuda() for batch in TEXTS]
        found = fasp_fx.prune(other, (batches[0],), calibration=batches, sparsity=0.3)
    else:
        found = fasp_fx.prune(model, (TEXTS[0],), calibration=TEXTS, sparsity=0.3, device="cuda")
        assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert all(parameter.device.type == "cuda" for parameter in found.module.parameters())
    assert found.plan.slices() == expected.plan.slices()
    unseen = tokens(3, 6)
    assert error(found.module(unseen.cuda()).cpu(), expected.module(unseen)) < 1e-2


@on_gpu
def test_weights_in_files_and_batches_on_the_device(tmp_path: Path) -> None:
    model = build(SPEC)
    expected = fasp_fx.prune(model, (TEXTS[0],), calibration=TEXTS, sparsity=0.3, quality="fast")
    torch.cuda.reset_peak_memory_stats()
    with fasp_fx.offload(tmp_path, device="cuda"):
        found = fasp_fx.prune(model, (TEXTS[0],), calibration=TEXTS, sparsity=0.3, quality="fast")
    assert torch.cuda.max_memory_allocated() > 0
    assert all(parameter.device.type == "cpu" for parameter in found.module.parameters())
    assert found.plan.slices() == expected.plan.slices()
    unseen = tokens(3, 6)
    assert error(found.module(unseen), expected.module(unseen)) < 1e-2


def test_draws_are_the_same_whatever_the_default_device_is() -> None:
    rows = torch.ones(SKETCHED + 3, 2)
    columns = Columns(torch.ones(2, 5), None, None, name="a")
    expected = _sketch(rows), random(columns, 1)
    with torch.device("meta"):
        found = _sketch(rows), random(columns, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)  # on the same device


def test_every_draw_from_a_generator_says_where() -> None:
    """A generator of the CPU does not draw on another device."""
    silent = []
    for file in SOURCES.rglob("*.py"):
        if file.relative_to(SOURCES).parts[0] in ("testing", "training"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            given = {keyword.arg for keyword in node.keywords} if isinstance(node, ast.Call) else set()
            if "generator" in given and "device" not in given:
                silent.append(f"{file.relative_to(SOURCES)}:{node.lineno}")
    assert not silent
