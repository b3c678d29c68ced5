"""The command line: ``fasp-fx prune | recover | inspect | eval``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from ..base._version import __version__
from ..errors import ArgumentError
from ..pruning.config import PruningConfig
from ..training.recovery import DistillationConfig
from . import _models
from ._console import CAPTURING, USAGE, Stages, console, groups_json, groups_table, say, session, table
from ._options import check_path, check_text, named_as_options, option, read_options, with_pruning_options
from ._text import Texts, read_chunks
from .evaluation import perplexity, task_manager, tasks

app = typer.Typer(
    name="fasp-fx",
    help="Make language models physically smaller by structured pruning, without retraining.",
    epilog="Exit codes: 0 done, 2 the request cannot be met (one line says why), 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL = "A model folder, a hub id or a .gguf file; anything AutoModelForCausalLM loads."
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Out = Annotated[Path, option("The folder to write; it must not exist yet.", more=False)]
Device = Annotated[
    str | None,
    option("Where to work, such as cpu or cuda:1. Default: the accelerator if there is one.", more=False),
]
Dtype = Annotated[DtypeName, option("auto, the default: the dtype that the model was stored in.")]
Html = Annotated[
    Path | None,
    option(
        "Also write a page to look at: one file, no network. An earlier page there is replaced, anything else"
        " is not.",
        metavar="FILE",
    ),
]
Checkpoint = Annotated[
    Path | None, option("Keep the state of the work here; the same command goes on from it.", metavar="DIR")
]
Overwrite = Annotated[bool, option("Replace an earlier result at --out, and nothing else.", "--overwrite")]
Length = Annotated[
    int | None,
    option("Tokens per chunk. Default: 1024 of a file, 256 of 'self'.", min=2),
]
EvalBatches = Annotated[int, option("Chunks of text to measure perplexity on. Default: 8.", min=1)]
Text = Annotated[
    Path | None,
    option(
        "Measure perplexity on this text file; chunks that calibrate or train are left out. By default, what"
        " these leave of their own.",
        metavar="FILE",
        more=False,
    ),
]
Seed = Annotated[
    int,
    # torch takes no other for a seed
    option("Seed of the model's text, and of the order of training. Default: 0.", min=0, max=2**63 - 1),
]
Json = Annotated[bool, option("Print JSON.", "--json", more=False)]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"fasp-fx {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(USAGE)


@app.command()
@with_pruning_options
def prune(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Out,
    calibration: Annotated[
        str,
        option(
            "A text file, or 'self', the default: text that the model writes itself.",
            metavar="FILE|self",
            more=False,
        ),
    ] = "self",
    text: Text = None,
    recover: Annotated[
        int,
        option(
            "Train what is left towards the dense model, so often over the calibration text.",
            metavar="EPOCHS",
            min=0,
            more=False,
        ),
    ] = 0,
    plain: Annotated[
        bool,
        option(
            "Keep to what the model's own config can say, and write a standard checkpoint that needs no"
            " fasp_fx.",
            "--plain",
            more=False,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        option("Say what it would take of memory and disk, and do nothing.", "--dry-run", more=False),
    ] = False,
    config: Annotated[
        Path | None,
        option(
            "Options from a file, as PruningConfig.to_json() writes them; those given here stand in the place"
            " of its own.",
            metavar="FILE.json",
            more=False,
        ),
    ] = None,
    device: Device = None,
    batches: Annotated[
        int | None,
        option(
            "Chunks of text to calibrate on. Default: 32 of a calibration file, 96 with 'self'.",
            min=1,
        ),
    ] = None,
    length: Length = None,
    eval_batches: EvalBatches = 8,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    checkpoint: Checkpoint = None,
    stream: Annotated[
        bool,
        option(
            "Keep the weights in files, and in memory those that are used: for models larger than the"
            " memory. Batches run on --device.",
            "--stream",
        ),
    ] = False,
    scratch: Annotated[
        Path | None,
        option("Where --stream keeps the weights. Default: beside the folder to write.", metavar="DIR"),
    ] = None,
    html: Html = None,
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """Prune a language model, measure what it cost, and save it.

    Finds the coupled channels of the model by itself, predicts from the calibration text what losing them
    would cost, removes those that cost least, repairs the weights that stay, and writes a smaller model that
    generates like the original, with its tokenizer.

    With `--calibration self` (the default) nothing but the model is needed: it writes 96 texts of 256 tokens
    itself, which is quick and enough for a small model. The protocol behind published figures is real text at
    full length: 32 chunks of 1024 tokens of WikiText-2 to calibrate, chunks 100 to 139 to measure:

    `fasp-fx prune MODEL --calibration wiki.txt --batches 32 --length 1024 --out small`

    `fasp-fx eval small --text wiki.txt --length 1024 --chunks 100:140`

    With `--plain` the result is an ordinary checkpoint of the same architecture, for
    `AutoModelForCausalLM.from_pretrained` and whatever else reads those: feed-forward layers become narrower,
    and whole attention heads go where that is not enough.

    With `--recover 2` the weights that stay are then trained towards the dense model, twice over the same
    text; those that do best on a held-out tenth of it are kept. `fasp-fx recover` does the same later,
    longer, and with other text.

    Example: `fasp-fx prune model.gguf --sparsity 0.2 --out small`, and in Python, after
    `import fasp_fx`, `AutoModelForCausalLM.from_pretrained("small")`.
    """
    with session() as stages:
        from . import _prune

        _prune.run(
            model,
            out,
            *read_options(config, given),
            _texts(calibration, batches or 96, batches or 32, text, eval_batches, length, seed),
            stages,
            epochs=recover,
            device=device,
            dtype=dtype,
            plain=plain,
            overwrite=overwrite,
            html=html,
            checkpoint=checkpoint,
            dry_run=dry_run,
            stream=stream,
            scratch=scratch,
        )


def _texts(
    source: str,
    written: int,
    read: int,
    text: Path | None,
    eval_batches: int,
    length: int | None,
    seed: int,
    use: str = "calibration",
) -> Texts:
    """The text of a command.

    Args:
        source: a file, or ``"self"``.
        written, read: how many chunks of the model's own text are used, and how many of a file.
    """
    if source == "self":
        return Texts(None, written, text, eval_batches, length or 256, seed, use)
    return Texts(Path(source), read, text, eval_batches, length or 1024, seed, use)


@app.command()
def recover(
    folder: Annotated[str, typer.Argument(help="A folder that `fasp-fx prune` wrote.")],
    dense: Annotated[str, option(f"The model that was pruned. {MODEL}", more=False)],
    out: Out,
    data: Annotated[
        str,
        option(
            "A text file to train on, or 'self', the default: text that the dense model writes itself.",
            metavar="FILE|self",
            more=False,
        ),
    ] = "self",
    text: Text = None,
    epochs: Annotated[
        int, option("How often the text is trained on. Default: 2.", min=1, more=False)
    ] = DistillationConfig.epochs,
    learning_rate: Annotated[
        float, option("The highest; it rises at first and falls to zero. Default: 3e-5.", more=False)
    ] = DistillationConfig.learning_rate,
    train: Annotated[
        Literal["all", "vectors", "low-rank"],
        option(
            "all weights, the default; vectors: biases and gains of norms; low-rank: products of narrow"
            " matrices.",
            more=False,
        ),
    ] = "all",
    rank: Annotated[
        int, option("Columns of the matrices of --train low-rank. Default: 16.", min=1)
    ] = DistillationConfig.rank,
    batches: Annotated[
        int,
        option(
            "Chunks of text to train on, of which a tenth is held out. Default: 32.",
            min=2,
            more=False,
        ),
    ] = 32,
    length: Length = None,
    eval_batches: EvalBatches = 8,
    checkpoint: Checkpoint = None,
    device: Device = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """Train a pruned language model towards the dense one it was made of.

    The dense model runs once over the text, and what it predicts is kept on disk while the pruned model
    learns to predict the same (distillation; no labels are needed), 1,024 tokens a step, in texts of 256
    where chunks can be cut into such. A tenth of the text judges: the weights that do best on it are saved,
    which are the old ones if training brings nothing.

    Example: `fasp-fx recover small --dense model.gguf --data wiki.txt --batches 96 --out better`
    """
    with session() as stages:
        from . import _prune

        texts = _texts(data, batches, batches, text, eval_batches, length, seed, "training")
        with named_as_options(DistillationConfig):
            config = DistillationConfig(
                epochs=epochs, learning_rate=learning_rate, train=train, rank=rank, seed=seed
            )
        _prune.recover_and_save(folder, dense, out, texts, config, checkpoint, device, overwrite, stages)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=f"{MODEL[:-1]}, or a folder that `fasp-fx prune` wrote.")],
    as_json: Json = False,
    every: Annotated[
        bool,
        option(
            "One row for every group, with full names, instead of one for all identical layers.",
            "--all",
            more=False,
        ),
    ] = False,
    granularity: Annotated[
        list[str] | None,
        option("What goes as one: channel, the default, head or expert; may be given again.", more=False),
    ] = None,
    include: Annotated[
        list[str] | None,
        option(
            "Groups that stay unless they are asked for: approximate, depth or exempt; may be given again.",
            more=False,
        ),
    ] = None,
    html: Html = None,
) -> None:
    """Show the coupled groups of a language model: what can be pruned, what cannot, and why.

    Only the configuration is read; no weight is loaded. Prunable groups are the ones that `prune` shrinks;
    exempt ones are the query and key channels, which meet in a product of two activations; approximate ones
    cross an operator that mixes their channels, such as a norm; frozen ones cannot be removed, for the reason
    shown.

    Of a folder that `prune` wrote, the report of that pruning is shown. With `--html FILE` the same goes to a
    page with a graph of the groups, a chart of the widths and a table that sorts. With `--json` names,
    dimensions and index ranges `[first, last + 1]` of every group are printed.

    Example: `fasp-fx inspect HuggingFaceTB/SmolLM2-135M`
    """
    with session() as stages:
        from ..interop.page import check_page, write_page
        from ..pruning._prune import analyze
        from ..pruning.report import Report, counted
        from ..storage._folder import is_save, kind_of, read_text

        if html is not None:
            check_path("--html", html)
            check_page(html)
        asked = bool(granularity or include)  # a plain folder holds a model like any other
        is_saved, folder = _models.is_saved(model), Path(model)
        if is_saved and asked:
            raise ArgumentError(
                f"'{model}' was pruned already, so --granularity and --include change nothing in its report;"
                " leave them out"
            )
        if is_saved or (not asked and is_save(folder, "plain")):
            kind_of(folder)  # which refuses another version
            report = Report.from_json(read_text(folder / "report.json"))
            if html is not None:
                write_page(report, f"{folder.resolve().name}, {report.sparsity:.0%} removed", html)
            say(report.to_json() if as_json else str(report), keep="\n")
            return
        _models.quieten()
        stages.begin("reading the configuration")
        empty = _models.load_empty(_models.Source.of(model))
        stages.begin(CAPTURING)
        example = {"input_ids": torch.zeros(1, 16, dtype=torch.long), "use_cache": False}
        analysis = analyze(
            empty, (), example, granularity=granularity or PruningConfig.granularity, include=include or ()
        )
        stages.end()
        if html is not None:
            write_page(analysis, model, html)
        if as_json:
            say(json.dumps(groups_json(model, analysis)))
            return
        console().print(groups_table(analysis, every=every))
        for line in (
            f"at most {analysis.max_sparsity:.1%} of the linear weights of {counted(analysis.include)} can be"
            " removed",
            *(
                f"{name} has no rule and froze what it touches ({count} times)"
                for name, count in analysis.without_rule.items()
            ),
            *(f"note: {note}" for note in analysis.program.notes),
        ):
            say(line)


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL [OTHER ...]", help=f"{MODEL} Or what `fasp-fx prune` wrote."),
    ],
    text: Annotated[
        Path | None, option("Measure perplexity on this text file.", metavar="FILE", more=False)
    ] = None,
    task: Annotated[
        list[str] | None,
        option(
            "A task of lm-eval, or a YAML file that describes one; may be given again.",
            metavar="NAME|FILE.yaml",
            more=False,
        ),
    ] = None,
    length: Annotated[int, option("Tokens per chunk of text. Default: 1024.", min=2, more=False)] = 1024,
    chunks: Annotated[
        str | None,
        option("Only chunks A to B - 1 of the text. Default: all.", metavar="A:B", more=False),
    ] = None,
    limit: Annotated[
        int | None, option("Only so many examples of each task. Default: all.", min=1, more=False)
    ] = None,
    batch_size: Annotated[
        int, option("Texts per call of the model in tasks. Default: 8.", min=1, more=False)
    ] = 8,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure perplexity and zero-shot tasks of dense and pruned language models, side by side.

    Perplexity: the file is tokenised whole, without special tokens, and cut into consecutive chunks; each
    chunk's predictions count alike.

    Tasks run through EleutherAI's lm-evaluation-harness (`pip install "fasp_fx[eval]"`). Those it knows by
    name take their data from the Hugging Face hub; a YAML file may describe one over files of your own.

    Example: `fasp-fx eval model.gguf small --text wiki.txt --chunks 100:140 --task arc_challenge --limit 200`
    """
    with session() as stages:
        evaluate_models(
            models, text, task or (), length, chunks, limit, batch_size, as_json, device, dtype, stages
        )


def evaluate_models(
    models: Sequence[str],
    text: Path | None,
    task: Sequence[str],
    length: int,
    chunks: str | None,
    limit: int | None,
    batch_size: int,
    as_json: bool,
    device: str | None,
    dtype: str,
    stages: Stages,
) -> None:
    """Do what the command says, as its help describes it.

    Raises:
        FaspError: it cannot be met.
    """
    if text is None and not task:
        raise ArgumentError(
            "there is nothing to measure; give a text file with --text, or a task with --task"
        )
    check_text("--text", text)
    for name in task:
        check_path("--task", name)
    chosen = read_range(chunks)
    for index, model in enumerate(models):
        if model in models[:index]:
            raise ArgumentError(f"the model '{model}' is named twice; name each once")
        if not _models.is_saved(model):
            _models.Source.of(model)
        elif dtype != "auto":
            raise ArgumentError(
                "--dtype does not apply to a pruned model: it was chosen when the model was pruned"
            )
    _models.quieten()
    where = _models.find_device(device)
    if task:
        stages.begin("reading the tasks")
        task_manager(tuple(task))
    entries: list[dict[str, Any]] = []
    texts: list[Tensor] = []
    for model in models:  # one is in memory at a time
        stages.begin(f"loading {model}")
        if _models.is_saved(model):
            pruned = _models.load_pruned(Path(model), where)
            module, tokenizer = pruned.model, pruned.tokenizer
        else:
            source = _models.Source.of(model)
            tokenizer = _models.load_tokenizer(source)
            module = _models.load_model(source, dtype=dtype, device=where)
        entry: dict[str, Any] = {"model": model}
        if text is not None:
            stages.begin("reading the text")
            tokens = read_chunks(text, tokenizer, length)
            numbers = range(len(tokens))[chosen]
            if not numbers:
                raise ArgumentError(
                    f"the range {chunks} holds none of the {len(tokens)} chunks of the text; chunks are 0 to"
                    f" {len(tokens) - 1}"
                )
            texts.append(tokens[chosen])
            _models.check_length(module, length)
            _models.check_tokens(module, tokens, f"'{text}'")
            stages.begin(f"measuring perplexity of {model} on {len(numbers)} chunks", measured=True)
            entry["perplexity"] = perplexity(module, texts[-1], progress=stages.update)
            entry["chunks"] = [numbers.start, numbers.stop]
        if task:
            stages.begin(f"scoring the tasks of {model}")
            stages.end()  # lm-eval shows its own progress
            scores = tasks(module, tokenizer, task, limit=limit, batch_size=batch_size)
            entry["tasks"] = [asdict(score) for score in scores]
        entries.append(entry)
    stages.end()
    different = "the models cut the text into different tokens, so their perplexities cannot be compared"
    notes = [] if all(torch.equal(one, texts[0]) for one in texts) else [different]
    if as_json:
        source_of = None if text is None else {"file": str(text), "length": length}
        data = {"text": source_of, "limit": limit, "models": entries, "notes": notes}
        # What is infinite or no number becomes nothing, since JSON cannot say it.
        typer.echo(json.dumps(json.loads(json.dumps(data), parse_constant=lambda name: None)))
        return
    rows = _rows(entries, "" if text is None else f"of {text.name}", length)
    if len(models) == 1:
        for what, value, _ in rows:
            say(what.replace(" on ", f" {value} on ", 1))
    else:
        names = [Path(model).name or model for model in models]
        shown = [model if names.count(name) > 1 else name for model, name in zip(models, names)]
        console().print(table(["", *shown, "change" if len(models) == 2 else "first to last"], rows))
    for note in notes:
        say(f"note: {note}")


def read_range(text: str | None) -> slice:
    """``"a:b"``, ``"a:"``, ``":b"`` or ``None`` as the chunks to choose.

    Raises:
        ArgumentError: it does not parse.
    """
    found = re.fullmatch(r"(-?\d*):(-?\d*)", ":" if text is None else text)
    if found is None or "-" in found.groups():
        raise ArgumentError(f"'{text}' is not a range of chunks; write first:last+1, for example 100:140")
    return slice(*(int(end) if end else None for end in found.groups()))


def _rows(entries: Sequence[dict[str, Any]], of: str, length: int) -> Iterator[list[str]]:
    """What was measured on what, its value for each model, and how the last differs from the first."""
    if "chunks" in entries[0]:
        first, stop = entries[0]["chunks"]
        values = [entry["perplexity"] for entry in entries]
        what = f"perplexity on chunks {first} to {stop - 1} {of} ({stop - first} x {length} tokens)"
        yield [what, *(f"{value:.4f}" for value in values), f"{values[-1] / values[0] - 1:+.1%}"]
    for scores in zip(*(entry.get("tasks", ()) for entry in entries), strict=True):
        one = scores[0]
        errors = (f" ± {score['stderr']:.4f}" if score["stderr"] is not None else "" for score in scores)
        yield [
            f"{one['task']} {one['metric']} on {one['examples']} examples",
            *(f"{score['value']:.4f}{error}" for score, error in zip(scores, errors)),
            f"{scores[-1]['value'] - one['value']:+.4f}",
        ]
