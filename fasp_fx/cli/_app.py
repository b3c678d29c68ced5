"""The command line: ``fasp-fx prune | recover | inspect | eval``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..base._version import __version__
from ..errors import ArgumentError
from . import _tables
from ._console import USAGE, results, say, session
from ._plain_text import printable

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

HTML_HELP = (
    "Also write a page to look at: one file, no network. An earlier page there is replaced, anything else is"
    " not."
)
BUDGET_HELP = "A budget: how much may stay"
MODEL_HELP = "A model folder, a hub id or a .gguf file; anything AutoModelForCausalLM loads."


class QualityName(StrEnum):
    """How much time the choice may take."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


class ScoreName(StrEnum):
    """The scores that have a name."""

    fasp = "fasp"
    obs = "obs"
    magnitude = "magnitude"
    random = "random"


class AllocationName(StrEnum):
    """How groups share what is to go."""

    uniform = "uniform"
    every = "global"
    search = "search"


class GranularityName(StrEnum):
    """What can go as one."""

    channel = "channel"
    head = "head"
    expert = "expert"


class IncludeName(StrEnum):
    """The groups that stay unless they are asked for."""

    approximate = "approximate"
    depth = "depth"
    exempt = "exempt"


class TrainName(StrEnum):
    """What can be trained."""

    every = "all"
    vectors = "vectors"
    low_rank = "low-rank"


class DtypeName(StrEnum):
    """The dtypes that can be asked for."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Device = Annotated[
    str | None,
    typer.Option(
        help="Where to work, such as cpu or cuda:1. Default: the accelerator if there is one.",
        show_default=False,
    ),
]
Dtype = Annotated[DtypeName, typer.Option(help="auto: the dtype that the model was stored in.")]
Granularity = Annotated[
    list[GranularityName] | None,
    typer.Option(
        help=(
            "What goes as one: channels, whole attention heads, whole experts; may be given again. Default:"
            " channel."
        ),
        show_default=False,
    ),
]
Include = Annotated[
    list[IncludeName] | None,
    typer.Option(
        help=(
            "Also prune what crosses a norm, or query and key channels, which otherwise stay; may be given"
            " again."
        ),
        show_default=False,
    ),
]


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
def prune(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[
        Path, typer.Option(help="The folder to write; it must not exist yet.", show_default=False)
    ],
    sparsity: Annotated[
        float | None,
        typer.Option(
            help=(
                "Fraction to remove of the linear weights of the layers, between 0 and 1. Default: 0.2"
                " without a budget."
            ),
            show_default=False,
        ),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT", help=f"{BUDGET_HELP} of the parameters: 0.8, 80%, 100M.", show_default=False
        ),
    ] = None,
    macs: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT", help=f"{BUDGET_HELP} of the multiply-accumulates: 0.7.", show_default=False
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            metavar="AMOUNT",
            help=f"{BUDGET_HELP} of the weights' bytes: 400MB.",
            show_default=False,
        ),
    ] = None,
    cache_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help=f"{BUDGET_HELP} of the cache's bytes per token of one sequence: 0.5.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(metavar="FILE|self", help="A text file, or 'self': text that the model writes itself."),
    ] = "self",
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measure perplexity on this text file; chunks that calibrated are left out. By default, what"
            " calibration leaves of its own.",
            show_default=False,
        ),
    ] = None,
    round_to: Annotated[
        int | None,
        typer.Option(
            help="Keep widths that are multiples of this; hardware likes 16. Default: any width.",
            show_default=False,
        ),
    ] = None,
    quality: Annotated[
        QualityName,
        typer.Option(
            help=(
                "fast: the method of FASP; balanced: by predicted losses, better and longer; best: by losses"
                " measured on more text."
            )
        ),
    ] = QualityName.balanced,
    score: Annotated[
        ScoreName | None,
        typer.Option(
            help="How channels are valued; magnitude and random are baselines. Default: by --quality.",
            show_default=False,
        ),
    ] = None,
    allocation: Annotated[
        AllocationName | None,
        typer.Option(
            help=(
                "uniform: all groups lose alike; global: those that matter least lose most; search: from"
                " there by trying, in some minutes more. "
                "Default: by --quality."
            ),
            show_default=False,
        ),
    ] = None,
    recover: Annotated[
        int,
        typer.Option(
            metavar="EPOCHS",
            help="Train what is left towards the dense model, so often over the calibration text.",
            show_default=False,
        ),
    ] = 0,
    restore: Annotated[
        bool, typer.Option("--restore/--no-restore", help="Repair the weights that stay, by least squares.")
    ] = True,
    granularity: Granularity = None,
    include: Include = None,
    uniform_layers: Annotated[
        bool, typer.Option("--uniform-layers", help="Keep layers alike that are, as some runtimes need it.")
    ] = False,
    batches: Annotated[
        int | None,
        typer.Option(
            help="Chunks of text to calibrate on. Default: 32 of a calibration file, 96 with 'self'.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per chunk. Default: 1024 with a calibration file, 256 with 'self'.",
            show_default=False,
        ),
    ] = None,
    eval_batches: Annotated[int, typer.Option(help="Chunks of text to measure perplexity on.")] = 8,
    device: Device = None,
    dtype: Dtype = DtypeName.auto,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help=(
                "Keep to what the model's own config can say, and write a standard checkpoint that needs no"
                " fasp_fx."
            ),
        ),
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep what was decided here; the same command goes on from it.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what it would take (memory, disk, operations, time), and do nothing."
        ),
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help=(
                "Keep the weights in files, and in memory those that are used: for models larger than the"
                " memory. Batches run on --device."
            ),
        ),
    ] = False,
    scratch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where --stream keeps the weights. Default: beside the folder to write.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result at --out, and nothing else.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the text that the model writes.")] = 0,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help=HTML_HELP, show_default=False)
    ] = None,
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

    Instead of `--sparsity`, one or several budgets say how much may stay: a share of the dense model's, or an
    amount. Shares of multiply-accumulates are those of a few tokens.

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
        from ._prune_command import Request, run

        run(
            Request(
                model=model,
                out=out,
                sparsity=sparsity,
                budget={"parameters": parameters, "macs": macs, "bytes": size, "cache-bytes": cache_bytes},
                calibration=None if calibration == "self" else Path(calibration),
                text=text,
                recover=recover,
                quality=quality.value,
                score=score.value if score is not None else None,
                allocation=allocation.value if allocation is not None else None,
                restore=restore,
                granularity=_values(granularity),
                include=_values(include),
                uniform_layers=uniform_layers,
                batches=batches if batches is not None else 96 if calibration == "self" else 32,
                length=length if length is not None else 256 if calibration == "self" else 1024,
                eval_batches=eval_batches,
                device=device,
                dtype=dtype.value,
                plain=plain,
                overwrite=overwrite,
                seed=seed,
                html=html,
                checkpoint=checkpoint,
                dry_run=dry_run,
                stream=stream,
                scratch=scratch,
                **({} if round_to is None else {"round_to": round_to}),
            ),
            stages,
            results(),
        )


@app.command()
def recover(
    folder: Annotated[str, typer.Argument(help="A folder that `fasp-fx prune` wrote.")],
    dense: Annotated[str, typer.Option(help=f"The model that was pruned. {MODEL_HELP}", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="The folder to write; it must not exist yet.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|self",
            help="A text file to train on, or 'self': text that the dense model writes itself.",
        ),
    ] = "self",
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measure perplexity on this text file; chunks that train are left out. By default, what"
            " training leaves of --data.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="How often the text is trained on.")] = 2,
    learning_rate: Annotated[
        float, typer.Option(help="The highest; it rises at first and falls to zero.")
    ] = 3e-5,
    train: Annotated[
        TrainName,
        typer.Option(
            help="All weights; vectors: biases and gains of norms; low-rank: products of narrow matrices."
        ),
    ] = TrainName.every,
    rank: Annotated[int, typer.Option(help="Columns of the matrices of --train low-rank.")] = 16,
    batches: Annotated[
        int, typer.Option(help="Chunks of text to train on, of which a tenth is held out.")
    ] = 32,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per chunk. Default: 1024 with a file, 256 with 'self'.", show_default=False
        ),
    ] = None,
    eval_batches: Annotated[int, typer.Option(help="Chunks of text to measure perplexity on.")] = 8,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the state of the training here; the same command goes on from it.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result at --out, and nothing else.")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Seed of the text that the model writes, and of the order of the chunks.")
    ] = 0,
) -> None:
    """Train a pruned language model towards the dense one it was made of.

    The dense model runs once over the text, and what it predicts is kept on disk while the pruned model
    learns to predict the same (distillation; no labels are needed), 1,024 tokens a step, in texts of 256
    where chunks can be cut into such. A tenth of the text judges: the weights that do best on it are saved,
    which are the old ones if training brings nothing.

    Example: `fasp-fx recover small --dense model.gguf --data wiki.txt --batches 96 --out better`
    """
    with session() as stages:
        from ._recover_command import Request, run
        from ._texts import Wanted

        own = data == "self"
        run(
            Request(
                folder=folder,
                dense=dense,
                out=out,
                texts=Wanted(
                    None if own else Path(data),
                    batches,
                    text,
                    eval_batches,
                    length if length is not None else 256 if own else 1024,
                    seed,
                ),
                epochs=epochs,
                learning_rate=learning_rate,
                train=train.value,
                rank=rank,
                checkpoint=checkpoint,
                device=device,
                overwrite=overwrite,
            ),
            stages,
            results(),
        )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP[:-1]}, or a folder that `fasp-fx prune` wrote.")],
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON: names, dimensions and index ranges [first, last + 1] of every group."
        ),
    ] = False,
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="One row for every group, with full names, instead of one for all identical layers."
        ),
    ] = False,
    granularity: Granularity = None,
    include: Include = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help=HTML_HELP, show_default=False)
    ] = None,
) -> None:
    """Show the coupled groups of a language model: what can be pruned, what cannot, and why.

    Only the configuration is read; no weight is loaded. Prunable groups are the ones that `prune` shrinks;
    exempt ones are the query and key channels, which meet in a product of two activations; approximate ones
    cross an operator that mixes their channels, such as a norm; frozen ones cannot be removed, for the reason
    shown.

    Of a folder that `prune` wrote, the report of that pruning is shown. With `--html FILE` the same goes to a
    page with a graph of the groups, a chart of the widths and a table that sorts.

    Example: `fasp-fx inspect HuggingFaceTB/SmolLM2-135M`
    """
    with session() as stages:
        from ..interop.page import check_page, write_page
        from ..pruning._prune import analyze
        from ..pruning.report import counted
        from ..storage._folder import is_save
        from . import _models
        from ._arguments import check_path
        from ._saved import is_saved

        check_path("the model", model)
        if html is not None:
            check_path("--html", html)
            check_page(html)
        asked = bool(granularity or include)  # a plain folder holds a model like any other
        if is_saved(model) or (not asked and is_save(Path(model), "plain")):
            if asked:
                raise ArgumentError(
                    f"'{model}' was pruned already, so --granularity and --include change nothing in its"
                    " report; leave them out"
                )
            _inspect_saved(Path(model), as_json=as_json, html=html)
            return
        _models.quieten()
        source = _models.Source.of(model)
        stages.begin("reading the configuration")
        empty = _models.load_empty(source)
        stages.begin("capturing and analysing the model")
        example = {"input_ids": torch.zeros(1, 16, dtype=torch.long), "use_cache": False}
        analysis = analyze(
            empty, (), example, granularity=_values(granularity) or ("channel",), include=_values(include)
        )
        stages.end()
        if html is not None:
            write_page(analysis, str(source), html)
        if as_json:
            typer.echo(json.dumps(_tables.groups_json(str(source), analysis)))
            return
        console = results()
        console.print(_tables.groups_table(analysis, every=every))
        say(
            console,
            f"at most {analysis.max_sparsity:.1%} of the linear weights of {counted(analysis.include)} can be"
            " removed",
        )
        for name, count in analysis.without_rule.items():
            say(console, f"{name} has no rule and froze what it touches ({count} times)")
        for note in analysis.program.notes:
            say(console, f"note: {note}")


def _values(names: Iterable[StrEnum] | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.value for name in names or ()))


def _inspect_saved(folder: Path, *, as_json: bool, html: Path | None) -> None:
    """Show the report of a pruning."""
    from ..interop.page import write_page
    from ..pruning.report import Report
    from ..storage._folder import kind_of, read_text

    kind_of(folder)  # which refuses another version
    report = Report.from_json(read_text(folder / "report.json"))
    if html is not None:
        write_page(report, f"{folder.resolve().name}, {report.sparsity:.0%} removed", html)
    typer.echo(report.to_json() if as_json else printable(str(report), keep="\n"))


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [OTHER ...]", help=f"{MODEL_HELP} Also a folder that `fasp-fx prune` wrote."
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure perplexity on this text file.", show_default=False),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE.jsonl",
            help="A task of lm-eval, or a file of questions; may be given again.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per chunk of text.")] = 1024,
    chunks: Annotated[
        str | None,
        typer.Option(
            metavar="A:B", help="Only chunks A to B - 1 of the text. Default: all.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only so many examples of each task. Default: all.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts per call of the model in tasks.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = None,
    dtype: Dtype = DtypeName.auto,
) -> None:
    """Measure perplexity and zero-shot tasks of dense and pruned language models, side by side.

    Perplexity: the file is tokenised whole, without special tokens, and cut into consecutive chunks; each
    chunk's predictions count alike.

    Tasks run through EleutherAI's lm-evaluation-harness (`pip install "fasp_fx[eval]"`). Those it knows by
    name take their data from the Hugging Face hub. A file of your own needs no network; it holds one
    multiple-choice question per line:

    `{"query": "Question: What is ice?", "choices": ["water", "stone"], "gold": 0}`

    Of each choice counts the summed log-likelihood after the query: as it is (acc), per character (acc_norm),
    per byte of UTF-8 (acc_bytes).

    Example: `fasp-fx eval model.gguf small --text wiki.txt --chunks 100:140 --task arc_challenge.jsonl
    --limit 200`
    """
    with session() as stages:
        from ._eval_command import Request, run

        run(
            Request(
                models=tuple(models),
                text=text,
                tasks=tuple(task or ()),
                length=length,
                chunks=chunks,
                limit=limit,
                batch_size=batch_size,
                as_json=as_json,
                device=device,
                dtype=dtype.value,
            ),
            stages,
            results(),
        )


def main() -> None:
    """Entry point of the ``fasp-fx`` script."""
    app()


if __name__ == "__main__":
    main()
