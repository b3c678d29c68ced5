"""The command line on a tiny Llama with a byte-level tokenizer."""

import json
import math
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from models import make_model
from safetensors.torch import load_file, save_file
from saved import GOLDEN
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import fasp_fx
from fasp_fx import PruningConfig, Report
from fasp_fx.cli import _prune
from fasp_fx.cli._app import _texts, app
from fasp_fx.cli._models import SELF, Texts
from fasp_fx.pruning import Figure, Line, read_told
from fasp_fx.storage import MANIFEST, write_manifest

LENGTH = 32
SMALL = f"--length {LENGTH} --batches 4 --eval-batches 3 --device cpu".split()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def printed(*arguments: object) -> str:
    """What a command prints that does what it was asked for, in one line."""
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split())


def failed(*arguments: object) -> str:
    """What a command says that was refused."""
    done = invoke(*arguments)
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert not re.search("Traceback|\x1b", done.output)
    return done.stderr


def refused(*arguments: object) -> str:
    """The message of a command that was refused: one line, nothing else on the error stream but finished
    stages.
    """
    shown = failed(*arguments)
    (said,) = [line for line in shown.splitlines() if line.startswith("fasp-fx: error: ")]
    assert shown.rstrip().endswith(said)
    assert len(said) < 800
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    make_model(made / "model", layers=1)
    (made / "text.txt").write_text("Größe matters: a smaller model answers sooner. " * 12, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def prune(folder: Path) -> list[str | Path]:
    """A command that prunes the model, calibrated and measured on a file; its output is still to be named."""
    text = folder / "text.txt"
    return ["prune", folder / "model", "--calibration", text, "--text", text, "--no-own-text", *SMALL]


@pytest.mark.parametrize("form", ["fasp-fx", "gguf"])
def test_room_for_the_result_is_looked_for_before_the_work(
    form: str, prune: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr("fasp_fx.calibration.Visit.run", pytest.fail)
    said = refused(*prune, "--out", tmp_path / "small", "--format", form, "--sparsity", 0.2)
    assert re.search(r"small' will take .* GiB at least, and 9.31e-07 GiB are free there", said)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def from_file(folder: Path, prune: list[str | Path]) -> tuple[Path, Result]:
    """What that gives, and what the command printed."""
    out = folder / "from_file"
    return out, invoke(*prune, "--out", out)


def _chunks(folder: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder / "model")(
        (folder / "text.txt").read_text(encoding="utf-8"), add_special_tokens=False
    )["input_ids"]
    return torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def _perplexity(model: Callable[..., Any], chunks: torch.Tensor) -> float:
    with torch.no_grad():
        losses = [
            functional.cross_entropy(
                model(input_ids=chunk[None], use_cache=False).logits[0, :-1], chunk[1:]
            ).item()
            for chunk in chunks
        ]
    return math.exp(sum(losses) / len(losses))


def _figures(shown: str) -> list[float]:
    """The perplexities in a table, of a model each."""
    return [
        float(cell)
        for cell in re.findall(r"│ *([\d.]+) ", shown.split("perplexity on")[1].split("next tokens")[0])
    ]


def _dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


def _loaded(out: Path) -> Any:
    """With the code that is saved along, as the command says."""
    return AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()


# --- prune


def test_prune_from_file(from_file: tuple[Path, Result], folder: Path) -> None:
    out, done = from_file
    assert done.exit_code == 0, done.output
    for words in (
        "prunable",
        "gate_proj, up_proj",
        "parameters",
        "measured: outputs differ by",
        "perplexity on chunks 4 to 6 of text.txt",
        f'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)',
    ):
        assert words in done.stdout
    dense, pruned, (_, report) = _dense(folder), _loaded(out), read_told(out)
    assert report.parameters == (dense.num_parameters(), sum(p.numel() for p in pruned.parameters()))
    assert abs(report.sparsity - 0.2) < 0.02
    assert report.config == PruningConfig(), "as in Python"
    held_out = _chunks(folder)[4:7]
    expected = [_perplexity(dense, held_out), _perplexity(pruned, held_out)]
    assert _figures(done.stdout)[:2] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    (measured,) = report.figures
    assert [measured.dense, measured.pruned] == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        before, after = (model(held_out).logits.double() for model in (dense, pruned))
    agreed, same = report.agreement, (before.argmax(-1) == after.argmax(-1)).double().mean(1)
    assert agreed.error[0] == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-3)
    assert agreed.same == pytest.approx((float(same.mean()), float(same.std() / 3**0.5)))
    assert (agreed.rows, agreed.source) == (3, "chunks 4 to 6 of text.txt (3 x 32 tokens)")


def test_prune_by_itself(folder: Path, tmp_path: Path) -> None:
    """Also what only other options reach: the same seed writes the same text."""
    command = ["prune", folder / "model", "--out", tmp_path / "out", *SMALL]
    options = ["--score", "magnitude", "--no-restore", "--sparsity", "0.1", "--exclude", "model.layers.0.mlp"]
    first = printed(*command, *options)
    assert "text that the model wrote itself, not seen by this calibration (3 x 32 tokens)" in first
    assert _figures(first) == _figures(printed(*command, *options, "--overwrite"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert [child.name for child in tmp_path.iterdir()] == ["out"]
    _, report = read_told(tmp_path / "out")
    assert all(line.error_restored is None for line in report.lines)
    whole = [line.name for line in report.lines if line.status == "prunable" and line.before == line.after]
    assert "model.layers.0.mlp.down_proj.weight" in whole


def test_prune_to_a_plain_checkpoint(
    folder: Path, from_file: tuple[Path, Result], prune: list[str | Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = invoke(*prune, "--format", "plain", "--out", out)
    assert done.exit_code == 0, done.output
    assert f'AutoModelForCausalLM.from_pretrained("{out}")' in "".join(done.stdout.splitlines()[-2:])
    assert "the config says it with intermediate_size 48 ->" in " ".join(done.stdout.split())
    _, report = read_told(out)
    assert str(report) in invoke("inspect", out).stdout
    plain, dense = AutoModelForCausalLM.from_pretrained(out).eval(), _dense(folder)
    assert type(plain) is type(dense)
    assert plain.config.intermediate_size < 48
    held_out = _perplexity(plain, _chunks(folder)[4:7])
    assert _figures(done.stdout)[1] == pytest.approx(held_out, rel=1e-3, abs=1e-3)
    made = tmp_path / "made"
    assert f"llama-cli -m {made}/model.gguf" in printed("convert", out, "--format", "gguf-f16", "--out", made)
    shown = printed("eval", made, "--text", folder / "text.txt", "--length", str(LENGTH), "--chunks", "4:7")
    found = re.search(r"([\d.]+) *│ *\+0\.0%", shown)
    assert found is not None
    assert float(found[1]) == pytest.approx(held_out, rel=1e-4)


def test_a_folder_that_was_written_anew_has_layers_of_their_own_sizes(
    from_file: tuple[Path, Result], folder: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(from_file[0], tmp_path / "trained"))
    (out / MANIFEST).unlink()  # as docs/loading.md says of what transformers wrote over
    width = _loaded(out).model.layers[0].mlp.up_proj.out_features
    assert width < 48
    assert f"│ {width} " in printed("inspect", out)
    shown = printed("eval", from_file[0], out, "--text", folder / "text.txt", "--length", LENGTH)
    before, after = _figures(shown)[:2]
    assert before == after


FILE = PruningConfig(granularity=("head", "channel"), sparsity=0.1, quality="fast")
#: options beside a file stand in the place of its own
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "--round-to 16": {"round_to": 16},
    "--exclude lm_head --exclude layers.0.*": {"exclude": ("lm_head", "layers.0.*")},
    "--loss outputs --drift 0.5": {"loss": "outputs", "drift": 0.5},
    "--no-restore": {"restore": None},
    "--macs 70% --bytes 1MB": {
        "budget": (fasp_fx.allocation.Macs(0.7), fasp_fx.allocation.Bytes(1_000_000)),
    },
    "--sparsity 0.5 --include approximate --config config.json": {
        "granularity": ("head", "channel"),
        "sparsity": 0.5,
        "quality": "fast",
        "include": ("approximate",),
    },
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_those_of_python(options: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[PruningConfig] = []

    def run(model: str, out: Path, config: PruningConfig, *rest: Any, **more: Any) -> None:
        asked.append(config)

    monkeypatch.setattr(_prune, "run", run)
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(FILE.to_json())
    printed("prune", "model", "--out", tmp_path / "out", *options.split())
    assert asked == [PruningConfig(**OPTIONS[options])]


# --- inspect


def _on_page(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


def test_inspect_table_and_page(folder: Path, tmp_path: Path) -> None:
    shown = printed("inspect", folder / "model", "--html", tmp_path / "dense.html")
    for word in ("prunable", "exempt", "approximate", "frozen", "gate_proj, up_proj", "reaches output 0"):
        assert word in shown
    data = _on_page(tmp_path / "dense.html")
    assert (data["title"], data["pruned"]) == (str(folder / "model"), False)
    assert "model.layers.0.mlp.down_proj.weight" in {group["name"] for group in data["groups"]}
    experts = printed("inspect", folder / "model", "--granularity", "expert", "--include", "exempt")
    assert "at most 0.0% of the linear weights of" in experts


def test_inspect_a_pruned_folder(from_file: tuple[Path, Result], folder: Path, tmp_path: Path) -> None:
    out, _ = from_file
    _, report = read_told(out)
    assert str(report) in invoke("inspect", out, "--html", tmp_path / "pruned.html").stdout
    data = _on_page(tmp_path / "pruned.html")
    assert any("Perplexity on chunks 4 to 6 of text.txt" in tile["label"] for tile in data["tiles"])


# --- eval


def test_eval_dense_and_pruned(from_file: tuple[Path, Result], folder: Path) -> None:
    arguments = ["--text", folder / "text.txt", "--length", str(LENGTH), "--device", "cpu"]
    names = [folder / "model", from_file[0]]
    models = (_dense(folder), _loaded(names[1]))
    for option, chosen in ((), slice(None)), (("--chunks", "2:5"), slice(2, 5)):
        expected = [_perplexity(model, _chunks(folder)[chosen]) for model in models]
        assert _figures(printed("eval", *names, *arguments, *option)) == pytest.approx(expected, rel=1e-4)
    assert "--dtype" in refused("eval", names[1], *arguments, "--dtype", "float16")


# --- what is refused, and what is kept


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--sparsity 0.99", "out of reach"),
        ("--round-to 64 --format fasp-fx", "out of reach"),
        ("--length 4096", "4096"),
        ("--batches 999", "leaving none"),
        ("--length 1000", "less than one chunk"),
        ("--format plain --parameters 0.8", "at least 20,064 of 24,288 parameters stay"),
    ],
)
def test_prune_refuses_what_cannot_be(
    prune: list[str | Path], tmp_path: Path, options: str, says: str
) -> None:
    assert says in refused(*prune, "--out", tmp_path / "out", *options.split())
    assert not list(tmp_path.iterdir())


def test_damaged_recover_and_taken_places(
    from_file: tuple[Path, Result], folder: Path, tmp_path: Path
) -> None:
    broken, taken = tmp_path / "broken", tmp_path / "taken.html"
    broken.mkdir()
    (broken / "manifest.json").write_bytes((from_file[0] / "manifest.json").read_bytes())
    assert "cannot be loaded" in refused("eval", broken, "--text", folder / "text.txt")
    taken.write_text("mine")
    for model in (from_file[0], folder / "model"):
        assert "did not write" in refused("inspect", model, "--html", taken)
    assert taken.read_text() == "mine"
    command = ("prune", folder / "model", "--out", tmp_path / "out", "--checkpoint", taken)
    assert "; choose another --checkpoint" in refused(*command, *SMALL)
    inside = ("prune", folder / "model", "--out", tmp_path / "out", "--checkpoint", tmp_path / "out" / "run")
    assert "lies in --out" in refused(*inside, *SMALL)
    assert "was pruned already" in refused("prune", from_file[0], "--out", tmp_path / "out", *SMALL)
    assert "was pruned already" in refused("sweep", from_file[0])


def test_a_result_is_kept_when_measuring_is_interrupted(
    from_file: tuple[Path, Result], prune: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = fasp_fx.load(from_file[0])
    monkeypatch.setattr("fasp_fx.cli._prune.prune", lambda *args, **options: pruned)
    monkeypatch.setattr("fasp_fx.cli._prune.with_agreement", Mock(side_effect=KeyboardInterrupt))
    assert invoke(*prune, "--out", tmp_path / "out").exit_code == 130
    assert read_told(tmp_path / "out")[1] == pruned.report
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_exits_with_130_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasp_fx.cli._models.write_texts", Mock(side_effect=KeyboardInterrupt))
    done = invoke("prune", folder / "model", "--out", tmp_path / "out", *SMALL)
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1].startswith("fasp-fx: interrupted")
    assert not list(tmp_path.iterdir())


# --- help


@pytest.mark.parametrize("arguments", ["--help", "prune --help", "prune model --out small --sparsity 1.5"])
def test_help_and_bad_options_do_not_wait_for_torch(arguments: str) -> None:
    code = f"""
import sys
from fasp_fx.cli import main
sys.argv = {["fasp-fx", *arguments.split()]}
try:
    main()
finally:
    print("\\n", sorted({{"torch", "numpy", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 * ("1.5" in arguments), done.stderr
    assert done.stdout.splitlines()[-1].strip() == "[]"


def test_help_has_an_example_and_nine_options_come_first() -> None:
    assert printed("--version") == f"fasp-fx {fasp_fx.__version__}"
    for command in ("prune", "recover", "inspect", "eval"):
        assert "Example:" in printed(command, "--help")
    common, _ = printed("prune", "--help").split("─ Options ─")[1].split("─ More ─")
    assert len(set(re.findall(r"│ (?:\* )?(--[a-z-]+) ", common))) == 9 + len(["--help"])


@pytest.mark.parametrize(
    ("sources", "own", "asked", "found"),
    [
        (None, True, (None, None, None), (256, 16, 64)),
        (["self"], False, (None, 3, None), (256, 3, 64)),
        (["a.txt"], False, (None, None, 5), (1024, 8, 5)),
        (["a.txt"], True, (9, None, None), (9, 8, 32)),
    ],
)
def test_amounts_of_text_are_as_usual_where_none_is_asked_for(
    sources: list[str] | None, own: bool, asked: tuple[int | None, ...], found: tuple[int, ...]
) -> None:
    """Own text alone is more and shorter texts than a file's chunks."""
    length, eval_batches, batches = asked
    texts = _texts(sources, length, eval_batches, batches, own_text=own, text=None, seed=0)
    assert (texts.length, texts.eval_batches, texts.batches) == found


@pytest.mark.parametrize(("there", "used", "measured"), [(40, 6, 5), (8, 6, 2), (7, 6, 1), (3, 3, 0)])
def test_a_file_is_measured_on_where_no_other_is_given(
    there: int, used: int, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model would write, token by token, takes longer than all else."""
    chunks = torch.arange(there)[:, None].expand(-1, 4)
    monkeypatch.setattr("fasp_fx.cli._models.read_chunks", lambda *given: chunks)
    texts = Texts(("data.txt",), 6, None, 5, 4, 0)
    texts.read(None)
    assert texts.used["data.txt"][:, 0].tolist() == list(range(used))
    found = [number for chunks in texts.evaluation.values() for number in chunks[:, 0].tolist()]
    assert found == list(range(used, used + measured))


@pytest.mark.parametrize(
    ("there", "times", "used", "trained", "passes"),
    [
        ((40,), 1, (6,), (6,), 1),
        ((40,), 3, (6,), (18,), 1),
        ((16,), 3, (6,), (12,), 2),
        ((7,), 3, (6,), (6,), 3),
        ((3,), 4, (3,), (3,), 4),
        ((40, 4), 3, (3, 3), (9, 3), 1),
        ((5, 4), 3, (3, 3), (4, 3), 3),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_more_text_is_trained_on_before_the_same_again(
    there: tuple[int, ...],
    times: int,
    used: tuple[int, ...],
    trained: tuple[int, ...],
    passes: int,
    own: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is trained on begins with what calibrates, which is the same for any number of times."""
    files = {str(number): torch.arange(count)[:, None] for number, count in enumerate(there)}
    monkeypatch.setattr("fasp_fx.cli._models.read_chunks", lambda file, *more: files[file.name])
    write = lambda *given, **more: torch.arange(given[2])[:, None]  # noqa: E731
    monkeypatch.setattr("fasp_fx.cli._models.write_texts", write)
    share = 6 // len(there)
    batches = share * len(there) * (1 + own)
    texts = Texts((*files, SELF) if own else (*files,), batches, None, 5, 1, 0, recover=times)
    texts.read(None)
    texts.write(None, None, Mock())
    assert texts.passes == passes
    for name, one, more in zip(files, used, trained, strict=True):
        assert texts.used[name].flatten().tolist() == list(range(one))
        assert texts.training[name].flatten().tolist() == list(range(more))
    own_parts = [name for name in texts.used if name not in files]
    assert [len(texts.used[name]) for name in own_parts] == [share] * len(there) * own
    for name in own_parts:
        assert torch.equal(texts.training[name][:share], texts.used[name])
        assert len(texts.training[name]) == -(-share * times // passes)
    measured = [chunks for label, chunks in texts.evaluation.items() if label.startswith("chunks")]
    assert all(int(chunks[0]) in trained for chunks in measured), "behind what is trained on"


def test_several_texts_calibrate_and_are_measured_by_themselves(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text((folder / "text.txt").read_text("utf-8")[::-1], "utf-8")
    command = ["prune", folder / "model", "--out", tmp_path / "out", *SMALL, "--quality", "fast"]
    texts = ["--calibration", folder / "text.txt", "--calibration", tmp_path / "other.txt"]
    shown = printed(*command, *texts)
    for words in (
        "perplexity on chunks",
        "of other.txt (",
        "of text.txt (",
    ):
        assert words in shown
    _, report = read_told(tmp_path / "out")
    assert [each.source.split(" of ")[1].split()[0] for each in report.agreement.by_source] == [
        "text.txt",
        "other.txt",
    ]
    assert len(report.figures) == 2
    with pytest.raises(fasp_fx.ArgumentError, match=r"two sources of text are named 'text\.txt'"):
        Texts(("a/text.txt", "b/text.txt"), 6, None, 5, 4, 0)


# --- whatever the command line is given, it works or says in one line what is wrong


SHORT = ["--length", "16", "--batches", "2", "--eval-batches", "1", "--device", "cpu"]
PRUNE, EVAL = ["prune", "@model", "--out", "out", *SHORT], ["eval", "@model", "--length", "16"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts, and things that are neither; tests must not change them."""
    made = tmp_path_factory.mktemp("bad")
    make_model(made / "model", layers=1)
    (made / "taken").mkdir()
    for name, data in {
        "text.txt": b"A smaller model answers sooner. " * 12,
        "short.txt": b"short",
        "latin1.txt": "Größe ".encode("latin-1") * 50,
        "garbage.gguf": b"not a model at all",
        "cut.gguf": b"GGUF" + struct.pack("<IQQ", 3, 2, 2),
        "taken/precious.txt": b"mine",
        "mine.html": b"mine",
    }.items():
        (made / name).write_bytes(data)
    (made / "small").mkdir()
    for name in ("small/model.gguf", "many.gguf"):
        writer = gguf.GGUFWriter(made / name, "llama")
        writer.add_uint64("llama.block_count", 9_000_000_000)
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    write_manifest(made / "small", "plain")
    shutil.copytree(made / "model", made / "changed")
    for name in ("plan.json", "report.json"):
        shutil.copy(GOLDEN / "plain" / name, made / "changed")
    write_manifest(made / "changed", "plain")
    weights(lambda held: held[DOWN].mul_(2))(made / "changed")
    return made


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline, in an empty folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def at(base: Path, arguments: Sequence[str]) -> list[str]:
    """``@`` stands for the folder of the fixture."""
    return [argument.replace("@", f"{base}/") for argument in arguments]


#: what the parser of the arguments says
WRONG_KINDS = [
    *([*PRUNE, option, "a"] for option in ("--sparsity", "--round-to", "--batches", "--score", "--dtype")),
    *([*PRUNE, option, "0"] for option in ("--batches", "--length")),
    *([*command, option, "nowhere.txt"] for command, option in ((PRUNE, "--text"), (EVAL, "--text"))),
    [*PRUNE, "--config", "@taken"],
    ["prune", "--out", "out"],
    [*PRUNE, "--unheard"],
    ["inspect"],
    EVAL,
    ["nonsense"],
]


@pytest.mark.parametrize("arguments", WRONG_KINDS, ids=lambda arguments: " ".join(arguments)[-50:])
def test_usage(base: Path, tmp_path: Path, arguments: list[str]) -> None:
    assert "Error" in failed(*at(base, arguments)), "drawn in a box"
    assert not list(tmp_path.iterdir())


#: commands, and a part of what is said
REFUSED = {
    "is not in (0, 1)": [
        *([*PRUNE, "--sparsity", value] for value in ("0", "1", "-1", "nan", "1e999")),
    ],
    "round_to": [[*PRUNE, "--round-to", "0"]],
    "drift": [[*PRUNE, "--drift", "2"]],
    "granularity": [[*PRUNE, "--granularity", "neuron"]],
    "device": [[*PRUNE, "--device", value] for value in ("toaster", "cuda:99", "meta", "")],
    "JSON": [[*PRUNE, "--config", "@text.txt"]],
    "no amount": [[*PRUNE, "--parameters", "much"]],
    "nothing to write to": [["prune", "@model"]],
    "--recover trains": [[*PRUNE, "--stream", "--recover", "1"]],
    "nowhere.txt": [[*PRUNE, "--calibration", "@nowhere.txt"]],
    "short.txt": [
        [*PRUNE, "--calibration", "@short.txt"],
        [*EVAL, "--text", "@short.txt"],
    ],
    "not UTF-8": [[*PRUNE, "--calibration", "@latin1.txt"], [*EVAL, "--text", "@latin1.txt"]],
    "did not write": [["inspect", "@model", "--html", "@mine.html"]],
    "exists; choose another path, or pass --overwrite to": [[*PRUNE, "--out", "@taken"]],
    "was written for llama.cpp": [
        ["eval", "@small/model.gguf", *EVAL[2:], "--text", "@text.txt"],
        ["prune", "@small/model.gguf", *PRUNE[2:]],
        ["inspect", "@small/model.gguf"],
    ],
    "holds weights of 1 layers, and its configuration says [9000000000]": [
        ["eval", "@many.gguf", *EVAL[2:], "--text", "@text.txt"],
        ["prune", "@many.gguf", *PRUNE[2:]],
        ["inspect", "@many.gguf"],
    ],
    "model.safetensors was changed": [
        ["eval", "@changed", *EVAL[2:], "--text", "@text.txt"],
        ["prune", "@changed", *PRUNE[2:]],
        ["prune", "@changed", *PRUNE[2:], "--stream"],
        ["convert", "@changed", "--out", "out", "--format", "per-layer"],
        ["recover", "@changed", "--dense", "@model", "--out", "out"],
    ],
    "is not replaced": [
        [*PRUNE, "--out", value, "--overwrite", *plain]
        for value in ("@taken", "@text.txt", "/dev/null")
        for plain in ([], ["--format", "plain"])
    ],
    "cannot be": [[*PRUNE, "--out", value] for value in ("@text.txt/out", "/proc/out", "@" + "x" * 250)],
    "positions": [[*EVAL, "--length", "200", "--text", "@text.txt"]],
    "is not a range": [[*EVAL, "--text", "@text.txt", "--chunks", value] for value in ("", "5", "a:b")],
    "holds none": [[*EVAL, "--text", "@text.txt", "--chunks", "9:3"]],
    "cannot be loaded": [
        command
        for model in (
            "@nowhere",
            "@taken",
            "@text.txt",
            "@garbage.gguf",
            "@cut.gguf",
            "a/b/c",
            "\x1b]0;owned",
        )
        for command in (
            ["inspect", model],
            ["prune", model, *PRUNE[2:]],
            ["eval", model, *EVAL[2:], "--text", "@text.txt"],
        )
    ],
}


@pytest.mark.parametrize(
    ("says", "arguments"),
    [(says, arguments) for says, cases in REFUSED.items() for arguments in cases],
    ids=lambda value: (
        (value if isinstance(value, str) else " ".join(value)[-40:]).encode("unicode_escape").decode()
    ),
)
def test_requests_that_cannot_be_met(base: Path, tmp_path: Path, says: str, arguments: list[str]) -> None:
    before = sorted(base.rglob("*"))
    assert says in refused(*at(base, arguments))
    assert not list(tmp_path.iterdir())
    assert sorted(base.rglob("*")) == before
    assert (base / "mine.html").read_text() == "mine"


# --- models

Change = Callable[[Path], object]


def config(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **fields}))

    return change


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def content(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def write(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return write


DOWN = "model.layers.0.mlp.down_proj.weight"
#: a part of what is said, and what is changed of a model, which every command refuses
CONFIGS: dict[str, tuple[str, Change]] = {
    "no config": ("cannot be loaded", without("config.json")),
    "config is not JSON": ("cannot be loaded", content("config.json", b"{not JSON")),
    "unknown kind": ("unheard", config(model_type="unheard")),
    "a model of images": ("cannot be loaded", config(model_type="vit")),
    "no heads": ("cannot be loaded", config(num_attention_heads=0)),
    "a size that none has": ('"hidden_size": 1099511627776', config(hidden_size=2**40)),
    "endless layers": ('"num_hidden_layers": 9000000000', config(num_hidden_layers=9_000_000_000)),
}
#: and this where weights, tokens or text are needed
LOADED: dict[str, tuple[str, Change]] = {
    "other widths": ("lacks the weights", config(intermediate_size=64)),
    "another vocabulary": ("lacks the weights", config(vocab_size=300)),
    "more layers than stored": ("lacks the weights", config(num_hidden_layers=3)),
    "bogus quantisation": (
        "quantisation",
        config(quantization_config={"quant_method": "unheard", "bits": 3}),
    ),
    "no weights": ("cannot be loaded", without("model.safetensors")),
    "endless header": ("", content("model.safetensors", struct.pack("<Q", 2**60) + b"{}")),
    "a weight is missing": (DOWN, weights(lambda held: held.pop(DOWN))),
    "one value is NaN": ("not finite", weights(lambda held: held[DOWN][3, 4].fill_(float("nan")))),
    "no tokenizer": ("the tokenizer of", without("tokenizer.json", "tokenizer_config.json")),
}


@pytest.mark.parametrize("name", [*CONFIGS, *LOADED])
def test_damaged_models(base: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(base / "model", tmp_path / "model")
    says, change = {**CONFIGS, **LOADED}[name]
    change(tmp_path / "model")
    commands = [["prune", "model", *PRUNE[2:]], ["prune", "model", *PRUNE[2:], "--calibration", "@text.txt"]]
    if name in CONFIGS:
        commands = [commands[0], ["inspect", "model"], ["eval", "model", *EVAL[2:], "--text", "@text.txt"]]
    for command in commands:
        assert says in refused(*at(base, command))
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_weights_of_more_layers_than_the_configuration_says(tmp_path: Path) -> None:
    make_model(tmp_path / "model", layers=2)
    config(num_hidden_layers=1)(tmp_path / "model")
    for options in ([], ["--stream"]):
        said = refused("prune", "model", *PRUNE[2:], *options)
        assert "weights of more layers than its configuration says (model.layers.1." in said


# --- folders that prune wrote

REPORT = Report(
    0.25, 0.25, (100, 80), (400, 320), (Line("a.weight", "prunable", 8, 6, 1, ""),), notes=("a note",)
)


def pruned(folder: Path, report: Report = REPORT) -> Path:
    """As much of a pruned folder as ``inspect`` reads."""
    folder.mkdir()
    (folder / "report.json").write_text(report.to_json())
    write_manifest(folder, "hf")
    return folder


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"{")], ids=["none", "cut"])
def test_reports_that_are_none(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    damage(pruned(tmp_path / "small") / "report.json")
    assert "report" in refused("inspect", "small", "--html", "page.html")
    assert not (tmp_path / "page.html").exists()


ORDER = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egone"


def test_orders_to_the_terminal_are_shown_and_not_sent(tmp_path: Path) -> None:
    from fasp_fx.cli._console import console, table

    line, figure = Line(ORDER, ORDER, 8, 6, 1, ORDER), Figure(ORDER, 1.0, 2.0)
    report = replace(REPORT, notes=(ORDER,), lines=(line,), figures=(figure,))
    done = invoke("inspect", pruned(tmp_path / "small", report))
    assert done.exit_code == 0, done.output
    assert r"\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egone" in done.stdout
    shown_on = console()
    with shown_on.capture() as said:
        shown_on.print(table(["[red]", "[/]"], [(f"[/]{ORDER}", "2")]))
    assert "[red]" in said.get()
    assert not set(done.stdout + said.get()) & set("\x1b\x07\r\x9b\u202e")
