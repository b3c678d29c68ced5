"""Models with everything that a save must keep, a folder of each kind, and how to change what was saved."""

import enum
import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from models import BATCH, X, made
from torch import Tensor, nn

import fasp_fx


class Mode(enum.Enum):
    PLAIN = 1
    OTHER = 2


class Small(nn.Module):
    """Tied, frozen, transposed and non-persistent tensors, a constant, defaults of several kinds and a
    structured output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.randn(8, 8).t())
        self.down.bias.requires_grad_(False)
        self.register_buffer("shift", torch.randn(8))
        self.register_buffer("scratch", torch.randn(8), persistent=False)

    def forward(
        self,
        ids: Tensor,
        scale: float = 2.0,
        *,
        flag: bool = True,
        limit: float = 9.0,
        sizes: tuple[int, ...] = (1, 2),
        mode: Mode = Mode.PLAIN,
    ) -> dict[str, Any]:
        hidden = self.embed(ids) @ self.turned + self.shift * scale + self.scratch + torch.tensor(0.5)
        hidden = (hidden + self.down(torch.relu(self.up(hidden)))).clamp(max=limit)
        return {"logits": self.head(hidden), "extra": [hidden, 3]}


def small_result(model: nn.Module | None = None, **kwargs: Any) -> fasp_fx.Result:
    model = Small().eval() if model is None else model
    ids = torch.randint(0, 11, (2, 5))
    return fasp_fx.prune(model, (ids,), kwargs, calibration=[(torch.randint(0, 11, (2, 5)),)], sparsity=0.3)


@cache
def forked() -> nn.Module:
    """Cannot be captured as a whole."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return x + m.second(x) if x.sum() < 1e6 else x

    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(2))
    return made(forward, first=first, second=second)


#: token numbers, for the models that read such
IDS = torch.arange(10).reshape(2, 5)
FAST: dict[str, Any] = {"sparsity": 0.3, "score": "magnitude", "restore": None}


def make_whole(folder: Path) -> None:
    torch.manual_seed(0)
    small_result().save(folder)


def make_parts(folder: Path) -> None:
    fasp_fx.prune(forked(), (X,), calibration=[BATCH], **FAST).save(folder)


def make_hf(folder: Path, *, format: str = "fasp-fx") -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        vocab_size=32,
        max_position_embeddings=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    fasp_fx.hf.prune(model, format=format, **FAST).save_pretrained(folder)


#: what makes a folder of each kind; fasp_fx.load reads them all
MAKERS: dict[str, Callable[[Path], None]] = {
    "whole": make_whole,
    "parts": make_parts,
    "hf": make_hf,
    "plain": partial(make_hf, format="plain"),
}


def loaded(folder: Path) -> Callable[[], Tensor]:
    """The model in a folder of any kind, to be called."""
    parts = (folder / "parts.json").exists()
    held = fasp_fx.load(folder, model=forked() if parts else None)
    if isinstance(held, fasp_fx.hf.Pruned):
        return lambda: held.model(input_ids=IDS, use_cache=False).logits
    return lambda: held.module(X) if parts else held.module(IDS)["logits"]


@torch.no_grad()
def outputs(folder: Path) -> Tensor:
    """What that model computes."""
    return loaded(folder)()


def forge(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    """Change a JSON file, or what a file of tensors says of them, and make the manifest agree, as someone
    who wants to deceive would.
    """
    file = folder / name
    content = file.read_bytes()
    if file.suffix == ".json":
        data = json.loads(content)
        change(data)
        file.write_text(json.dumps(data))
    else:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        entries = json.loads(header["__metadata__"]["fasp_fx"])
        change(entries)
        header["__metadata__"]["fasp_fx"] = json.dumps(entries)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    seal(folder, name)


def seal(folder: Path, name: str) -> None:
    """Make the manifest agree with a file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


#: saves that every later version reads
GOLDEN = Path(__file__).parent / "golden" / "saves"


def write_golden(folder: Path) -> None:
    """One folder of each kind with what its model computes, and one document of each kind."""
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    for kind, make in MAKERS.items():
        make(folder / kind)
    save_file({kind: outputs(folder / kind).contiguous() for kind in MAKERS}, folder / "outputs.safetensors")
    fasp_fx.measure(forked().first, (X,), calibration=[BATCH]).save(folder / "costs.json")
    config = fasp_fx.PruningConfig(budget=fasp_fx.allocation.Parameters(0.8), exclude=("lm_head",), drift=0.3)
    (folder / "config.json").write_text(config.to_json())


if __name__ == "__main__":  # PYTHONPATH=. python tests/saved.py, once for each new version of a format
    write_golden(GOLDEN)
