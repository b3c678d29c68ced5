"""The command line on exported programs."""

import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import made, randomise
from oracle import error, zeroed
from safetensors.torch import save_file
from test_cli import failed, invoke, printed, refused
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import fasp_fx
from fasp_fx.cli._exported import PLAN

ROWS = {"images": torch.randn(23, 3, 6, 6, generator=torch.Generator().manual_seed(0))}


def _vision() -> nn.Module:
    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 16, 3), "norm": nn.BatchNorm2d(16), "head": nn.Linear(16, 5)}

    def forward(self: Any, images: Tensor) -> Tensor:
        return self.head(torch.relu_(self.norm(self.stem(images))).mean((2, 3)))

    return randomise(made(forward, **layers)).eval()


def _pair() -> nn.Module:
    """Takes two tensors, of which one goes by name, in fours."""
    torch.manual_seed(0)

    def forward(
        self: Any, batch: dict[str, Tensor], *, extra: Tensor, flag: bool = True
    ) -> tuple[Tensor, ...]:
        h = self.two(torch.tanh(self.one(batch["a"])))
        return (h, h + extra) if flag else (h,)

    return made(forward, one=nn.Linear(6, 32), two=nn.Linear(32, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    bounds = ({0: Dim("batch", max=7)},)
    torch.export.save(export(_vision(), (ROWS["images"][:2],), dynamic_shapes=bounds), folder / "vision.pt2")
    example = ({"a": torch.randn(4, 6)},), {"extra": torch.randn(4, 3), "flag": True}
    torch.export.save(export(_pair(), *example), folder / "pair.pt2")
    save_file(ROWS, folder / "rows.safetensors")
    save_file({"pictures": ROWS["images"]}, folder / "name.safetensors")
    save_file({"images": ROWS["images"].double()}, folder / "double.safetensors")
    save_file({"images": ROWS["images"] * torch.nan}, folder / "nan.safetensors")
    np.savez(folder / "uneven.npz", batch_a=np.zeros((9, 6), "f"), extra=np.zeros((8, 3), "f"))
    np.savez(folder / "few.npz", batch_a=np.zeros((3, 6), "f"), extra=np.zeros((3, 3), "f"))
    torch.save([ROWS], folder / "list.pt")
    (folder / "junk.npz").write_text("junk")
    (folder / "mine.pt2").write_text("mine")
    (folder / "cut.pt2").write_bytes((folder / "pair.pt2").read_bytes()[:-3000])
    return folder


def _read(file: Path) -> tuple[ExportedProgram, fasp_fx.PruningPlan]:
    extra = {PLAN: ""}
    program = torch.export.load(file, extra_files=extra)
    return program, fasp_fx.PruningPlan.from_json(extra[PLAN])


def test_without_data_it_is_the_masked_program_within_the_same_bounds(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.pt2"
    shown = printed("prune", folder / "vision.pt2", "--macs", "50%", "--out", out)
    assert "(the example inputs in the file, as none was held out)" in shown
    program, plan = _read(out)
    assert [int(bound.upper) for bound in program.range_constraints.values()] == [7]
    masked, smaller = zeroed(_vision(), plan), program.module()
    for count in (1, 5, 7):
        assert error(smaller(ROWS["images"][:count]), masked(ROWS["images"][:count])) < 1e-6
    assert program.state_dict["stem.weight"].shape[0] <= 8
    assert "multiply-accumulates stay" in printed("inspect", out)
    assert "exists" in refused("prune", folder / "vision.pt2", "--out", out)
    printed("prune", folder / "vision.pt2", "--out", out, "--overwrite")
    assert "prunable" in printed("inspect", folder / "vision.pt2", "--html", tmp_path / "page.html")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.html", "small.pt2"]


def test_an_example_of_zeros_measures_nothing(folder: Path, tmp_path: Path) -> None:
    result = fasp_fx.prune(_vision(), (ROWS["images"][:2],), score="magnitude", restore=None, sparsity=0.3)
    loaded = fasp_fx.load(result.save(tmp_path / "saved"))
    torch.export.save(loaded.program, tmp_path / "loaded.pt2")
    shown = printed("prune", tmp_path / "loaded.pt2", "--sparsity", 0.3, "--dry-run")
    assert "unknown: no row held out was run" in " ".join(shown.split())
    assert "nothing was repaired" in shown


@torch.no_grad()
def test_rows_calibrate_and_the_last_fifth_of_them_measures(folder: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    rows = {"batch_a": torch.randn(43, 6, generator=draw), "extra": torch.randn(43, 3, generator=draw)}
    torch.save(rows, tmp_path / "rows.pt")
    command = ("prune", folder / "pair.pt2", "--calibration", tmp_path / "rows.pt", "--sparsity", 0.5)
    assert "nothing was written" in printed(*command, "--dry-run")
    shown = printed(*command, "--out", tmp_path / "small.pt2")
    smaller = _read(tmp_path / "small.pt2")[0].module()
    worst = []
    for number in range(2):  # of 40 rows that fill fours, 32 calibrate
        pairs = [
            (model({"a": rows["batch_a"][at : at + 4]}, extra=rows["extra"][at : at + 4], flag=True)[number])
            for model in (_pair(), smaller)
            for at in (32, 36)
        ]
        dense, pruned = torch.cat(pairs[:2]), torch.cat(pairs[2:])
        worst.append(float((dense - pruned).norm() / dense.norm()))
    assert f"outputs differ by {100 * max(worst):.2f} % ± " in shown
    assert "on 8 rows (held out), which neither a choice nor a repair has seen" in shown
    swept = printed("sweep", folder / "pair.pt2", "--calibration", tmp_path / "rows.pt", "--at", 0.5)
    assert re.search(r"50\.0% outputs differ by [\d.]+ % [\d.]+ % ± [\d.]+ %", swept), (
        "predicted, and measured"
    )
    command = "sweep", folder / "pair.pt2", "--calibration", tmp_path / "rows.pt", "--at", 0.5
    assert re.search(r"50\.0% 53\.1% ", printed(*command, "--round-to", 3)), "15 of 32 stay"
    assert "--sparsity" in failed(*command, "--sparsity", 0.5), "of which there are many"
    assert "--length is for language models" in refused(*command, "--length", 9)


def _calibrated(program: str, file: str) -> list[str]:
    return [f"@{program}.pt2", "--calibration", f"@{file}", "--out", "@out.pt2"]


#: what is said, and what of
REFUSED: dict[str, list[list[str]]] = {
    "holds pictures, and the program takes images": [_calibrated("vision", "name.safetensors")],
    "input 'images': dtype": [_calibrated("vision", "double.safetensors")],
    "not finite": [_calibrated("vision", "nan.safetensors")],
    "{'batch_a': 9, 'extra': 8}": [_calibrated("pair", "uneven.npz")],
    "takes 4 samples at a time": [_calibrated("pair", "few.npz")],
    "tensors by name": [_calibrated("pair", "list.pt")],
    "none of a kind": [_calibrated("pair", "mine.pt2")],
    "cannot be read": [_calibrated("pair", "junk.npz"), ["@cut.pt2", "--out", "@out.pt2"]],
    "is for language models": [
        ["@pair.pt2", "--out", "@out.pt2", *more] for more in (["--recover", "1"], ["--stream"])
    ],
    "give --calibration": [["@pair.pt2", "--out", "@out.pt2", "--restore"]],
    "nothing to write to": [["@pair.pt2"], ["@pair.pt2", "--macs", "50%"]],
    "ends in .pt2": [["@pair.pt2", "--out", "@out"]],
    "is not replaced": [["@pair.pt2", "--out", "@mine.pt2", "--overwrite"]],
}


@pytest.mark.parametrize(
    ("says", "arguments"), [(says, case) for says, cases in REFUSED.items() for case in cases]
)
def test_what_cannot_be_is_refused_and_leaves_nothing(folder: Path, says: str, arguments: list[str]) -> None:
    before = sorted(folder.iterdir())
    assert says in refused("prune", *(argument.replace("@", f"{folder}/") for argument in arguments))
    assert sorted(folder.iterdir()) == before


@pytest.fixture
def limited() -> Any:
    """Limits the size of a file that this process may write."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_disk_that_is_full_and_an_interrupt_leave_nothing(
    folder: Path, tmp_path: Path, limited: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("prune", folder / "pair.pt2", "--out", tmp_path / "small.pt2")
    limited(4096)
    assert "cannot be written" in refused(*command)
    monkeypatch.setattr(
        "fasp_fx.pruning._prune.with_agreement", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert invoke(*command).exit_code == 130
    assert not list(tmp_path.iterdir())
