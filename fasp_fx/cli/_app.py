"""The command line: ``fasp-fx prune | sweep | recover | inspect | eval``. Options of ``prune`` that say how
to prune are those of :class:`fasp_fx.PruningConfig`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fasp_fx.base import __version__
from fasp_fx.errors import ArgumentError
from fasp_fx.pruning import FormatName, PruningConfig

from ._console import CAPTURING, PROGRAM, USAGE, console, groups_table, say, session, table

app = typer.Typer(
    name="fasp-fx",
    help="Make models physically smaller by structured pruning, without retraining.",
    epilog="Exit codes: 0 done, 2 the request cannot be met (one line says why), 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def option(text: str, *flags: str, more: bool = True, **settings: Any) -> Any:
    """An option as typer wants it. Its text says the default.

    Args:
        more: it stands under a heading of its own, as what few people need does.
    """
    make: Any = typer.Option
    settings["rich_help_panel"] = "More" if more else None
    return make(*flags, help=text, show_default=False, **settings)


#: a file to read, which is looked for before anything else is done
FILE: dict[str, Any] = {"exists": True, "dir_okay": False, "metavar": "FILE"}
#: of training on text, 1,024 tokens a step (docs/benchmarks.md)
RATE = 1e-4
MODEL = "A model folder, a hub id or a .gguf file; anything AutoModelForCausalLM loads."
Out = Annotated[Path, option("The folder to write; it must not exist yet.", more=False)]
Device = Annotated[
    str | None,
    option("Where to work, such as cpu or cuda:1. Default: the accelerator if there is one.", more=False),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    option("auto, the default: the dtype that the model was stored in."),
]
Checkpoint = Annotated[
    Path | None, option("Keep the state of the work here; the same command goes on from it.", metavar="DIR")
]
Format = Annotated[
    FormatName,
    option(
        "What reads the result. per-layer: transformers, with the code that is saved along; fasp-fx:"
        " transformers, where fasp_fx.hf is imported; plain: whatever reads the architecture, at the price of"
        " equal layers; decilm: vLLM and others; gguf, or with the type of the weights: llama.cpp. Default:"
        " per-layer, and fasp-fx where that cannot say all that goes.",
        more=False,
    ),
]
Overwrite = Annotated[bool, option("Replace an earlier result at --out, and nothing else.", "--overwrite")]
OwnText = Annotated[
    bool,
    option(
        "Text that the model writes itself calibrates besides a file, the default, or not: what only one kind"
        " of text calibrated loses most on others.",
        "--own-text/--no-own-text",
    ),
]
Batches = Annotated[
    int | None, option("Chunks of text to calibrate on. Default: 32; 64 where 'self' is all.", min=1)
]
Length = Annotated[int | None, option("Tokens per chunk. Default: 1024 of a file, 256 of 'self'.", min=2)]
EvalBatches = Annotated[
    int | None,
    option("Chunks of text to measure on. Default: 8 of a file, 16 of what the model writes.", min=1),
]
Text = Annotated[
    Path | None,
    option(
        "Measure perplexity on this text file; chunks that calibrate or train are left out. By default, what"
        " these leave of their own.",
        more=False,
        **FILE,
    ),
]
Seed = Annotated[
    int,
    # torch takes no other for a seed
    option("Seed of the model's text, and of the order of training. Default: 0.", min=0, max=2**63 - 1),
]

#: what else than the options of a pruning an exported program is pruned, or swept, with
OF_PROGRAMS = (
    *("model", "out", "calibration", "config", "device", "checkpoint", "overwrite", "dry_run"),
    *("at", "measured_at", "html"),
)
#: options of a pruning that stand among the first
COMMON = ("sparsity", "quality")
#: budgets that an option asks for, with what it may be given
BUDGETS = {
    "parameters": "of the parameters: 0.8, 80%, 100M",
    "macs": "of the multiply-accumulates of a few tokens: 0.7",
    "bytes": "of the weights' bytes: 400MB",
    "cache_bytes": "of the cache's bytes per token of one sequence: 0.5",
}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(%|(?:[kmgt]i?)?b?)", re.IGNORECASE)


def with_pruning_options(*left_out: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of a pruning, but for those left out, in the place of its last parameter,
    ``**given``.
    """
    declared = [(each.name, each.metadata["form"], each.metadata["text"]) for each in fields(PruningConfig)]
    kinds: dict[str, Any] = {
        name: Annotated[form | None, option(text, more=name not in COMMON)]
        for name, form, text in declared
        if form is not None
    }
    kinds |= {
        name: Annotated[str | None, option(f"A budget: how much may stay {text}.", metavar="AMOUNT")]
        for name, text in BUDGETS.items()
    }
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in kinds.items()
        if name not in left_out
    ]

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        *first, _ = inspect.signature(command, eval_str=True).parameters.values()
        command.__signature__ = inspect.Signature([*first, *parameters])  # type: ignore[attr-defined]
        return command

    return give


def read_options(file: Path | None, values: Mapping[str, Any]) -> PruningConfig:
    """The options of a pruning.

    Args:
        file: a configuration as :meth:`fasp_fx.PruningConfig.to_json` writes it.
        values: by the names of parameters; ``None`` or nothing in a list: not given.

    Returns:
        The configuration of the file, with the options in the place of its own.

    Raises:
        FaspError: an option is out of range, or conflicts with another.
    """
    options = {name: value for name, value in values.items() if value not in (None, [])}
    caps = {name.replace("_", "-"): options.pop(name) for name in BUDGETS if name in options}
    amounts = {name: read_amount(f"--{name}", text) for name, text in caps.items()}
    if amounts:
        from fasp_fx.allocation import KINDS

        options["budget"] = tuple(KINDS[name](amount) for name, amount in amounts.items())
    if "restore" in options:
        options["restore"] = "least-squares" if options["restore"] else None
    return PruningConfig.of(
        None if file is None else PruningConfig.from_json(file.read_text(encoding="utf-8")), options
    )


def read_amount(option: str, text: str) -> float:
    """An amount as people type it. A share in (0, 1], such as 0.8 or 80%, is a float; others are an int,
    where K, M, G and T are powers of 1000, Ki, Mi … of 1024, and B says bytes.

    Raises:
        ArgumentError: the text is neither; names the option.
    """
    match = _AMOUNT.fullmatch(text.strip())
    number, unit = match.groups() if match else ("0", "")
    is_whole = unit not in ("", "%") or ("." not in number and not unit)
    power = "bkmgt".find(unit[:1].lower()) if is_whole and unit else 0
    value = float(number) * (1024 if "i" in unit.lower() else 1000) ** power / (100 if unit == "%" else 1)
    if not value or (value < 1 if is_whole else value > 1):
        raise ArgumentError(
            f"{option} '{text:.40}' is no amount; give a share in (0, 1], such as 0.8 or 80%, or how much may"
            " stay, such as 100M"
        )
    return int(value) if is_whole else value


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
@with_pruning_options()
def prune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=f"{MODEL} Or a .pt2 file of torch.export.save, of any model.")],
    out: Annotated[
        Path | None, option("The folder, or .pt2 file, to write; it must not exist yet.", more=False)
    ] = None,
    calibration: Annotated[
        list[str] | None,
        option(
            "A text file, or 'self', the default: text that the model writes itself; may be given again, and"
            " each counts for as much. For a program: a .safetensors, .npz or .pt file with a tensor for each"
            " input, a row for each sample.",
            metavar="FILE|self",
            more=False,
        ),
    ] = None,
    text: Text = None,
    recover: Annotated[
        int,
        option(
            "Train what is left towards the dense model, on so many times as much text as calibrates.",
            metavar="TIMES",
            min=0,
            more=False,
        ),
    ] = 0,
    format: Format | None = None,
    config: Annotated[
        Path | None,
        option(
            "Options from a file, as PruningConfig.to_json() writes them; those given here precede.",
            more=False,
            **FILE,
        ),
    ] = None,
    device: Device = None,
    own_text: OwnText = True,
    batches: Batches = None,
    length: Length = None,
    eval_batches: EvalBatches = None,
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
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, option("Do all of it but write nothing: what goes, and what that costs.", "--dry-run")
    ] = False,
    **given: Any,
) -> None:
    """Prune a language model or an exported program, measure what it cost, and save it.

    Finds the coupled channels of the model by itself, predicts from the calibration text what losing them
    would cost, removes those that cost least, repairs the weights that stay, and writes a smaller model that
    generates like the original, with its tokenizer.

    With `--calibration self` (the default) nothing but the model is needed: it writes 64 texts of 256 tokens
    itself, which is quick and enough for a small model. The protocol behind published figures is real text at
    full length: 32 chunks of 1024 tokens of WikiText-2 to calibrate, chunks 100 to 139 to measure:

    `fasp-fx prune MODEL --calibration wiki.txt --batches 32 --length 1024 --out small`

    `fasp-fx eval small --text wiki.txt --length 1024 --chunks 100:140`

    With `--format gguf-q8_0`, say, no more is removed than a file of that kind can say, and llama.cpp runs
    `small/model.gguf` as it is: layers with widths and heads of their own.

    With `--recover 3` the weights that stay are then trained towards the dense model, on three times as much
    text as calibrates: the same and more of it, which the model writes, or the files hold; where they hold no
    more, the same again. Those that do best on a held-out tenth are kept. `fasp-fx recover` does this later,
    longer, and with other text.

    A `.pt2` file becomes a smaller `.pt2` file, which every runtime takes that took the first. Without
    `--calibration` its channels go by magnitudes. With it, what stays is repaired, and the last fifth of the
    rows measures how far both programs agree:

    `fasp-fx prune model.pt2 --calibration images.safetensors --macs 50% --out small.pt2`

    Example: `fasp-fx prune model.gguf --sparsity 0.2 --out small`, and in Python, after
    `import fasp_fx.hf`, `AutoModelForCausalLM.from_pretrained("small")`.
    """
    with session() as stages:
        if out is None and not dry_run:
            raise ArgumentError("there is nothing to write to; give --out, or --dry-run")
        out = None if dry_run else out
        if Path(model).suffix == PROGRAM:
            _prune_program(context, config, given, out, stages)
            return
        options = read_options(config, given)
        from fasp_fx.training import DistillationConfig

        from . import _prune

        kept = scratch or ((out or Path("here")).absolute().parent if stream else None)
        job = _prune.Job(out, overwrite, format, device, dtype, checkpoint, kept)
        more: Any = {"own_text": own_text, "text": text, "seed": seed, "recover": max(recover, 1)}
        texts = _texts(calibration, length, eval_batches, batches, **more)
        training = DistillationConfig(learning_rate=RATE, seed=seed) if recover else None
        _prune.run(model, job, options, texts, training, stages)


def _prune_program(
    context: typer.Context, config: Path | None, given: dict[str, Any], out: Path | None, stages: Any
) -> None:
    """Prune an exported program as a command says."""
    file, values = _file_of(context, given), context.params
    if file is None and config is None:  # what needs no data stands for what is not given
        if given["restore"]:
            raise ArgumentError("--restore repairs by data; give --calibration")
        given = {**given, "restore": False, "score": given["score"] or "magnitude"}
    options = read_options(config, given)
    from . import _exported

    job = _exported.Job(
        Path(values["model"]), out, values["overwrite"], file, values["device"], values["checkpoint"]
    )
    _exported.run(job, options, stages)


def _file_of(context: typer.Context, given: dict[str, Any]) -> Path | None:
    """The file with the rows for an exported program, if any.

    Raises:
        ArgumentError: there are several, or an option is given that speaks of language models.
    """
    wheres = {name: context.get_parameter_source(name) for name in context.params}
    asked = {name for name, where in wheres.items() if where is not None and where.name == "COMMANDLINE"}
    if strange := sorted(asked - {*given, *OF_PROGRAMS}):
        raise ArgumentError(
            f"--{strange[0].replace('_', '-')} is for language models, and this is an exported program; leave"
            " it out"
        )
    sources = context.params["calibration"]
    if sources and len(sources) > 1:
        raise ArgumentError("--calibration of an exported program is one file; put all rows into one")
    return Path(sources[0]) if sources else None


def _texts(
    sources: list[str] | None,
    length: int | None,
    eval_batches: int | None,
    batches: int | None,
    *,
    own_text: bool = False,
    **more: Any,
) -> Any:
    """The text of a command.

    Args:
        sources: files, and ``"self"``.
        length, eval_batches, batches: ``None``: as usual for files, or where the model writes all.
        own_text: whether what the model writes comes besides the files.
        more: further fields of what is returned.
    """
    from ._models import SELF, Texts

    sources = sources or [SELF]
    sources = [*sources, SELF] if own_text and SELF not in sources else sources
    usual = (256, 16, 64) if sources == [SELF] else (1024, 8, 32)
    asked = (length, eval_batches, batches)
    length, eval_batches, batches = (one or other for one, other in zip(asked, usual))
    return Texts(tuple(sources), length=length, eval_batches=eval_batches, batches=batches, **more)


@app.command()
@with_pruning_options("sparsity", *BUDGETS)
def sweep(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=f"{MODEL} Or a .pt2 file of torch.export.save, of any model.")],
    calibration: Annotated[
        list[str] | None,
        option("As for `fasp-fx prune`; of a program needed.", metavar="FILE|self", more=False),
    ] = None,
    at: Annotated[
        list[float] | None,
        option("A sparsity to predict; may be given again. Default: 0.1 to 0.9.", more=False),
    ] = None,
    measured_at: Annotated[
        list[float] | None,
        option("One to prune for and measure, which takes its time. Default: 0.5.", more=False),
    ] = None,
    html: Annotated[
        Path | None, option("Also write a page with pictures, as `fasp-fx inspect` does.", metavar="FILE")
    ] = None,
    device: Device = None,
    own_text: OwnText = True,
    batches: Batches = None,
    length: Length = None,
    **given: Any,
) -> None:
    """Show what removing more and more would cost.

    One measurement predicts the cost of each sparsity; for those of `--measured-at`, the model is pruned in
    memory, and compared with the dense one on an eighth of the calibration data, which is held out for that.
    Nothing is written but the page. Options that say how to prune are those of `fasp-fx prune`.

    Example: `fasp-fx sweep model.gguf --at 0.1 --at 0.2 --at 0.3 --measured-at 0.2 --html costs.html`
    """
    with session() as stages:
        from fasp_fx.interop import write_page

        from ._devices import find_device

        how: dict[str, Any] = {"at": at, "measured_at": measured_at, "config": read_options(None, given)}
        how = {name: value for name, value in how.items() if value is not None}
        data: Any
        if model.endswith(PROGRAM):
            module, data = "._exported", _file_of(context, given)
            if data is None:
                raise ArgumentError("a program cannot write its own data; give --calibration FILE")
        else:
            module = "._prune"
            data = _texts(calibration, length, 1, batches, own_text=own_text, text=None, seed=0)
        found = import_module(module, __package__).swept(model, data, find_device(device), stages, how)
        stages.end()
        if html is not None:
            write_page(found, f"{Path(model).name}: what pruning would cost", html)
        say(str(found), keep="\n")


@app.command()
def recover(
    folder: Annotated[str, typer.Argument(help="A folder that `fasp-fx prune` wrote.")],
    dense: Annotated[str, option(f"The model that was pruned. {MODEL}", more=False)],
    out: Out,
    data: Annotated[
        list[str] | None,
        option(
            "A text file to train on, or 'self', the default: text that the dense model writes itself; may be"
            " given again.",
            metavar="FILE|self",
            more=False,
        ),
    ] = None,
    text: Text = None,
    epochs: Annotated[int, option("How often the text is trained on. Default: 2.", min=1, more=False)] = 2,
    learning_rate: Annotated[
        float, option(f"The highest; it rises at first and falls to zero. Default: {RATE:g}.", more=False)
    ] = RATE,
    batches: Annotated[
        int | None,
        option(
            "Chunks of text to train on, of which a tenth is held out. Default: 32; 64 where 'self' is all.",
            min=2,
            more=False,
        ),
    ] = None,
    length: Length = None,
    eval_batches: EvalBatches = None,
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
        from fasp_fx.training import DistillationConfig

        from . import _prune

        job = _prune.Job(out, overwrite, device=device, checkpoint=checkpoint)
        texts = _texts(data, length, eval_batches, batches, text=text, seed=seed, use="training")
        config = DistillationConfig(epochs=epochs, learning_rate=learning_rate, seed=seed)
        _prune.recover_and_save(Path(folder), dense, job, texts, config, stages)


@app.command("inspect")
def show_groups(
    model: Annotated[
        str,
        typer.Argument(
            help=f"{MODEL[:-1]}, what `fasp-fx prune` wrote, or a .pt2 file of torch.export.save."
        ),
    ],
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
    html: Annotated[
        Path | None,
        option(
            "Also write a page to look at: one file, no network. An earlier page there is replaced, anything"
            " else is not.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Show the coupled groups of a model: what can be pruned, what cannot, and why.

    Of a language model only the configuration is read; no weight is loaded. Prunable groups are the ones that
    `prune` shrinks; exempt ones are the query and key channels, which meet in a product of two activations;
    approximate ones cross an operator that mixes their channels, such as a norm; frozen ones cannot be
    removed, for the reason shown.

    Of what `prune` wrote, the report of that pruning is shown. With `--html FILE` the same goes to a
    page with a chart of the widths and a table that sorts.

    Example: `fasp-fx inspect HuggingFaceTB/SmolLM2-135M`
    """
    with session() as stages:
        from fasp_fx.interop import write_page
        from fasp_fx.pruning import analyze, counted

        source: Any = import_module("._exported" if model.endswith(PROGRAM) else "._models", __package__)
        report = source.report_in(model)
        if report is not None:
            if html is not None:
                write_page(report, f"{Path(model).resolve().name}, {report.sparsity:.0%} removed", html)
            say(str(report), keep="\n")
            return
        stages.begin("reading what it is")
        empty, example = source.load_structure(model)
        asked: Any = {"granularity": granularity or PruningConfig.granularity, "include": include or ()}
        stages.begin(CAPTURING)
        analysis: Any = analyze(empty, (), example, **asked)  # whole: it has no weights, or was exported so
        stages.end()
        if html is not None:
            write_page(analysis, model, html)
        console().print(groups_table(analysis))
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


@app.command()
def convert(
    folder: Annotated[str, typer.Argument(help="A folder that `fasp-fx prune` wrote.")],
    out: Out,
    format: Format = "per-layer",
    overwrite: Overwrite = False,
) -> None:
    """Write a pruned model in another format, if that can say what was pruned.

    Example: `fasp-fx convert small --format gguf-f16 --out small-f16`
    """
    with session() as stages:
        from . import _prune

        _prune.convert_and_save(Path(folder), format, _prune.Job(out, overwrite), stages)


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [OTHER ...]",
            help=f"{MODEL} Or what `fasp-fx prune` wrote.",
        ),
    ],
    text: Annotated[Path, option("The text file to measure on.", more=False, **FILE)],
    length: Annotated[int, option("Tokens per chunk of text. Default: 1024.", min=2, more=False)] = 1024,
    chunks: Annotated[
        str,
        option("Only chunks A to B - 1 of the text. Default: all.", metavar="A:B", more=False),
    ] = ":",
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure perplexity of dense and pruned language models, side by side.

    The file is tokenised whole, without special tokens, and cut into consecutive chunks; each chunk's
    predictions count alike. Of each model is also said how often it holds the same token for the most
    probable as the first.

    Example: `fasp-fx eval model.gguf small --text wiki.txt --chunks 100:140`
    """
    with session() as stages:
        chosen = read_range(chunks)
        import torch

        from fasp_fx.hf import predictions

        from . import _models
        from ._devices import find_device

        texts, predicted, what, where = [], [], "", find_device(device)
        for model in models:  # one is in memory at a time
            stages.begin(f"loading {model}")
            module, tokenizer = _models.load_any(model, where, dtype)
            tokens = _models.read_chunks(text, tokenizer, length)
            numbers = range(len(tokens))[chosen]
            if not numbers:
                raise ArgumentError(
                    f"the range {chunks} holds none of the {len(tokens)} chunks of the text; chunks are 0 to"
                    f" {len(tokens) - 1}"
                )
            _models.check_length(module, length)
            _models.check_tokens(module, tokens, f"'{text}'")
            stages.begin(f"measuring perplexity of {model} on {len(numbers)} chunks")
            predicted.append(predictions(module, tokens[chosen], stages.update))
            texts.append(tokens[chosen])
            what = (
                f"perplexity on chunks {numbers[0]} to {numbers[-1]} of {text.name}"
                f" ({len(numbers)} x {length} tokens)"
            )
        stages.end()
        values = [one.perplexity for one in predicted]
        rows = [[what, *(f"{value:.4f}" for value in values), f"{values[-1] / values[0] - 1:+.1%}"]]
        alike = all(torch.equal(one, texts[0]) for one in texts)
        if alike and len(predicted) > 1:
            same = map(predicted[0].same, predicted)
            shares = [f"{100 * part:.2f} ± {100 * doubt:.2f}" for part, doubt in same]
            rows.append(["next tokens as the first model's, percent", *shares, ""])
        console().print(table(["", *(Path(model).name for model in models), "first to last"], rows))
        if not alike:
            say("note: the models cut the text into different tokens, so their figures cannot be compared")


def read_range(text: str) -> slice:
    """``"a:b"``, ``"a:"`` or ``":b"`` as the chunks to choose.

    Raises:
        ArgumentError: it does not parse.
    """
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if match is None:
        raise ArgumentError(f"'{text}' is not a range of chunks; write first:last+1, for example 100:140")
    return slice(*(int(end) if end else None for end in match.groups()))
