"""`layercollapse`: look at a model's feed-forward blocks, collapse them under a budget, compare what comes of it with
what was there, and export it, from the shell."""

import copy
import json
import sys
import tempfile
from dataclasses import dataclass, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated

import torch
import transformers
from transformers import AutoConfig

from .collapsing import collapse_model
from .comparison import compare_models, weights_folder
from .families import find_feed_forward_blocks, refused_blocks
from .model_card import auto_class_of, create_model_card
from .models import count_parameters, inputs_of
from .planning import linearity_map, plan_collapse
from .plans import CollapsePlan
from .profiling import measure_speedup
from .recovery import recover_model
from .rows import contents
from .scoring import check_classes
from .tables import table


try:
    import typer
except ImportError:
    raise SystemExit('layercollapse needs typer: pip install "hf_layercollapse[cli]"') from None


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Makes transformers models smaller by collapsing feed-forward blocks into linear maps.",
)

TABLES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}

Model = Annotated[str, typer.Argument(help="Name on the Hub, or folder, of a transformers model.", show_default=False)]
DataConfig = Annotated[str | None, typer.Option(help="Configuration of a data set on the Hub.")]
Split = Annotated[str, typer.Option(help="Split of the data to use. Not the one the result is tested on.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(help="Column of the text or image; twice for pairs of texts. Default: the only one that holds any."),
]
Label = Annotated[str | None, typer.Option(help="Column of the class; with it the score is the model's loss.")]
Samples = Annotated[int, typer.Option(min=8, help="Rows of the data to use.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows a batch.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens a text is cut to.")]
TestSplit = Annotated[str, typer.Option(help="Split of the data to test on: one that no model here has seen.")]
TestLabel = Annotated[str | None, typer.Option(help="Column of the class. Not for language models.")]
TestSamples = Annotated[int, typer.Option(min=2, help="Rows of the data to test on.")]
Blocks = Annotated[str, typer.Option(help="'all', 'last:N', 'first:N', or a regular expression of block names.")]
JsonFile = Annotated[Path | None, typer.Option("--json-file", "--json", help="Write the table as JSON.")]
Device = Annotated[str, typer.Option(help="Device to compute on, as torch names it.")]
Trust = Annotated[bool, typer.Option(help="Run code that comes with the model.")]
DATA_HELP = (
    "Text or images: a name on the Hub, a .txt, .csv, .tsv, .json(l) or .parquet file, or a folder of images in "
    "folders named after their classes."
)


@dataclass(frozen=True)
class DataOptions:
    """Which inputs a command reads from its data. The fields are options of every command that has one of these."""

    data_config: DataConfig = None
    split: Split = "train"
    column: Columns = None
    label_column: Label = None
    samples: Samples = 512
    batch_size: Batch = 8
    max_length: Length = 256


@dataclass(frozen=True)
class TestDataOptions(DataOptions):
    """The same of a command that tests."""

    split: TestSplit = "test"
    label_column: TestLabel = None
    samples: TestSamples = 10_000


def with_options(command):
    """Gives a command, in place of its parameter `options`, an option for each field of that parameter's class."""
    parameters = signature(command).parameters
    kind = parameters["options"].annotation
    names = [option.name for option in fields(kind)]

    def run(**values):
        chosen = kind(**{name: values.pop(name) for name in names})
        return command(**values, options=chosen)

    own = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters.values()]
    added = [
        Parameter(option.name, Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type)
        for option in fields(kind)
    ]
    listed = [parameter for parameter in own if parameter.name != "options"] + added
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature(command).replace(parameters=listed)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in listed}
    return run


@app.command()
@with_options
def inspect(
    model: Model,
    options: DataOptions,
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP} Without it nothing is measured.")] = None,
    blocks: Blocks = "all",
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot; .png or .svg.")] = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
):
    """Lists a model's feed-forward blocks; with data, how linear each is and what collapsing it alone costs."""
    _check_plot(plot)
    live = load_model(model, trust_remote_code).to(device)
    if data is None:
        found = find_feed_forward_blocks(live)
        if plot is not None:
            raise ValueError("--plot shows what is measured on data: pass --data too.")
        rows = [["block", "kind", "state", "widths", "parameters", "MACs/token"]]
        for b in found:
            widths = f"{b.in_features} -> {b.hidden_features} -> {b.out_features}"
            rows.append([b.name, b.kind, b.state, widths, f"{b.parameters:,}", f"{b.macs:,}"])
        typer.echo(table(rows))
        total = count_parameters(live)
        inside = sum(block.parameters for block in found)
        typer.echo(f"{len(found)} blocks hold {inside:,} of {total:,} parameters ({inside / total:.1%})")
        for name, reason in refused_blocks(live).items():
            typer.echo(f"refused: {name}: {reason}")
        values = [{key: getattr(b, key) for key in _COLUMNS} for b in found]
    else:
        batches = load_batches(live, model, data, options)
        result = linearity_map(live, batches, blocks)
        typer.echo(str(result))
        values = result.to_dict()
        if plot is not None:
            from .plotting import plot_linearity

            plot_linearity(result, [plot])
    if json_file is not None:
        json_file.write_text(json.dumps(values, indent=1) + "\n")


_COLUMNS = ("name", "index", "kind", "state", "in_features", "hidden_features", "out_features", "parameters", "macs")


@app.command()
@with_options
def collapse(
    model: Model,
    options: DataOptions,
    data: Annotated[str, typer.Option(help=DATA_HELP, show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for the collapsed model.", show_default=False)],
    budget: Annotated[
        str | None,
        typer.Option(
            help="parameters=0.8 (share of the model's, or a count), macs=0.5 (share of the feed-forward blocks', or "
            "a count a token), latency=0.8 (share of the dense model's time), or max_drop=0.02 (divergence from "
            "the dense model, in nats)."
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan that was made before, in place of --budget.")] = None,
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan, with the curve of all plans (JSON).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of that curve; .png or .svg.")] = None,
    recovery_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Steps of training afterwards towards the dense model's predictions on the data, without labels.",
        ),
    ] = 0,
    blocks: Blocks = "all",
    uniform_width: Annotated[
        bool,
        typer.Option(
            "--uniform-width",
            help="One hidden width for all blocks: `export --to stock` then gives the native architecture with a "
            "smaller number in its config, for whatever serves that.",
        ),
    ] = False,
    multiple_of: Annotated[
        int, typer.Option(min=1, help="What numbers of neurons, and ranks, are multiples of (64 suits accelerators).")
    ] = 1,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
):
    """Collapses a model under a budget, with no training or a short one without labels, and saves it."""
    _check_plot(plot)
    if (budget is None) == (plan is None):
        raise ValueError("Pass either --budget or --plan.")
    wanted = parse_budget(budget) if budget is not None else None
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise ValueError(f"--output {output} exists and is not empty.")
    made = CollapsePlan.load(plan) if plan is not None else None
    live = load_model(model, trust_remote_code).to(device)
    batches = load_batches(live, model, data, options)
    if made is None:
        shape = {"uniform_width": uniform_width, "multiple_of": multiple_of}
        made = plan_collapse(live, batches, **wanted, blocks=blocks, **shape)
    typer.echo(str(made) + "\n")
    if save_plan is not None:
        made.save(save_plan)
    if plot is not None:
        from .plotting import plot_plan

        plot_plan(made, [plot])
    if not made.point.choices:
        raise ValueError("No block can collapse within this budget; nothing was saved.")
    teacher = copy.deepcopy(live) if recovery_steps else None
    report = collapse_model(live, plan=made, calibration_data=batches)
    recovery = recover_model(live, teacher, batches, max_steps=recovery_steps) if recovery_steps else None
    live.save_pretrained(output)
    base = None if Path(model).exists() else model
    create_model_card(live, report, name=output.name, base_model=base).save(output / "README.md")
    processor = _processor_of(live, model)
    if processor is not None:
        processor.save_pretrained(output)
    typer.echo(str(report))
    if recovery is not None:
        typer.echo(f"\n{recovery}")
    typer.echo(
        f"\nSaved in {output}. Load it with\n\n    import hf_layercollapse\n"
        f"    from transformers import {auto_class_of(live.config)}\n\n"
        f'    model = {auto_class_of(live.config)}.from_pretrained("{output}")'
    )


@app.command()
@with_options
def compare(
    dense: Annotated[str, typer.Argument(help="Name on the Hub, or folder, of the dense model.", show_default=False)],
    collapsed: Annotated[str, typer.Argument(help="The collapsed model.", show_default=False)],
    options: TestDataOptions,
    data: Annotated[str, typer.Option(help=DATA_HELP, show_default=False)],
    control: Annotated[
        str | None, typer.Option(help="A third model to compare with, such as the dense one after as many more steps.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Timed calls of each model, in turn.")] = 30,
    json_file: JsonFile = None,
    card: Annotated[Path | None, typer.Option(help="Write a model card of COLLAPSED with these numbers.")] = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
):
    """Compares two models on the same data: accuracy or perplexity, size and latency, side by side."""
    names = {"dense": dense, "control": control, "collapsed": collapsed}
    names = {name: folder for name, folder in names.items() if folder is not None}
    models = {name: load_model(folder, trust_remote_code).to(device) for name, folder in names.items()}
    batches = load_batches(models["dense"], dense, data, options)
    result = compare_models(
        models,
        batches,
        folders={name: weights_folder(folder) for name, folder in names.items()},
        rounds=rounds,
        source=(data, options.data_config, None if Path(data).exists() else options.split),
    )
    typer.echo(str(result))
    if json_file is not None:
        result.save(json_file)
    if card is not None:
        base = None if Path(dense).exists() else dense
        create_model_card(models["collapsed"], None, result, name=Path(collapsed).name, base_model=base).save(card)


@app.command()
def export(
    model: Model,
    to: Annotated[str, typer.Option(help="onnx, openvino or stock (a native checkpoint).", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for what is exported.", show_default=False)],
    benchmark: Annotated[
        str | None,
        typer.Option(help="Another model, the dense one: it is exported too, and both are timed in turn."),
    ] = None,
    cache: Annotated[
        bool | None, typer.Option(help="A graph with a key-value cache. Default: if the model generates text.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of the example batch, which is timed.")] = 8,
    length: Annotated[int, typer.Option(min=4, help="Tokens of each row, the longest that is compared.")] = 32,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16. Default: that of the weights for a stock checkpoint, else float32."
        ),
    ] = None,
    trust_remote_code: Trust = False,
):
    """Exports a dense, patched or collapsed model, compared with the PyTorch model in the runtime itself."""
    from .exporting import decoder_step, export_model, load_exported
    from .profiling import compare_latency

    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f"--dtype must be float32, float16 or bfloat16, got {dtype!r}.")
    live = load_model(model, trust_remote_code)
    if dtype is not None or to != "stock":
        live = live.to(getattr(torch, dtype or "float32"))
    processor = _processor_of(live, model)
    inputs = example_inputs(live, processor, batch_size, length)
    report = export_model(live, inputs, output, to, cache=cache, processor=processor)
    typer.echo(str(report))
    if benchmark is None:
        return
    dense = load_model(benchmark, trust_remote_code).to(live.dtype)
    with tempfile.TemporaryDirectory() as work:
        if to != "stock":
            export_model(dense, inputs, Path(work) / "dense", to, cache=cache)
            dense = load_exported(Path(work) / "dense")
        batch = decoder_step(live, inputs, length - 1) if report.cache else inputs
        times = compare_latency({benchmark: dense, model: load_exported(output)}, batch)
    rows = [["", "latency", "relative", "quartiles"]]
    for name, latency in times.items():
        low, high = latency.ratio_quartiles
        rows.append([name, f"{latency.median * 1e3:.2f} ms", f"{latency.ratio:.2f}", f"{low:.2f} to {high:.2f}"])
    typer.echo(f"\n{table(rows)}")


@app.command()
def latency(
    dense: Annotated[str, typer.Argument(help="Name on the Hub, or folder, of the dense model.", show_default=False)],
    collapsed: Annotated[str, typer.Argument(help="The collapsed model.", show_default=False)],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of the timed batch.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each row.")] = 128,
    compiled: Annotated[bool, typer.Option(help="Time both compiled by torch.compile too.")] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Timed calls of each model, in turn.")] = 30,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
):
    """Times two models in turn, against what their MACs promise, and says where that cannot show."""
    models = [load_model(name, trust_remote_code).to(device) for name in (dense, collapsed)]
    inputs = example_inputs(models[0], _processor_of(models[0], dense), batch_size, length)
    inputs = inputs_of(inputs, device)
    modes = ["eager", "compiled"] if compiled else ["eager"]
    for speedup in measure_speedup(*models, inputs, modes, rounds):
        typer.echo(str(speedup))


def example_inputs(model, processor, rows, length):
    """A batch of random tokens or images, as the processor would give them to this model."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        images = torch.randint(0, 256, (rows, 3, 256, 256), generator=generator, dtype=torch.uint8)
        return {"pixel_values": processor(list(images.numpy()), return_tensors="pt")["pixel_values"].to(model.dtype)}
    special = set(processor.all_special_ids)
    words = torch.tensor([token for token in range(model.config.vocab_size) if token not in special])
    inputs = {"input_ids": words[torch.randint(0, len(words), (rows, length), generator=generator)]}
    taken = signature(model.forward).parameters
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if name in processor.model_input_names and name in taken:
            inputs[name] = torch.full_like(inputs["input_ids"], value)
    return inputs


def parse_budget(text) -> dict[str, float | int]:
    """`"macs=0.5"` as `{"macs": 0.5}`.

    Raises:
        ValueError: It is no budget.
    """
    name, equals, value = text.partition("=")
    names = ("parameters", "macs", "latency", "max_drop")
    if not equals or name not in names:
        raise ValueError(f"--budget must be {', '.join(f'{name}=...' for name in names)}; got {text!r}.")
    try:
        return {name: int(value) if value.isdigit() and int(value) > 1 else float(value)}
    except ValueError:
        raise ValueError(f"--budget {text!r}: {value!r} is not a number.") from None


def _check_plot(plot):
    if plot is None:
        return
    if plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot must end in .png, .svg or .pdf, got {plot}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError('--plot needs matplotlib: pip install "hf_layercollapse[plot]".') from None


def load_model(name, trust_remote_code=False):
    """The model that a folder or a Hub name holds, in the class that was saved."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    auto_class = getattr(transformers, auto_class_of(config))
    return auto_class.from_pretrained(name, trust_remote_code=trust_remote_code).eval()


def _processor_of(model, name):
    if model.main_input_name == "pixel_values":
        return transformers.AutoImageProcessor.from_pretrained(name)
    return transformers.AutoTokenizer.from_pretrained(name)


def load_batches(model, name, data, options: DataOptions):
    """Batches of model inputs from a data set, on the CPU.

    Raises:
        ValueError: The data have no such column, or none that the model reads.
    """
    import datasets

    label_column = options.label_column
    suffix, path = Path(data).suffix, Path(data)
    if suffix in TABLES and not path.exists():
        raise ValueError(f"--data {data}: there is no such file.")
    if path.is_dir():
        rows = datasets.load_dataset("imagefolder", data_dir=data, split=options.split)
    elif suffix in TABLES:
        tabs = {"delimiter": "\t", "quoting": 3} if suffix == ".tsv" else {}
        rows = datasets.load_dataset(TABLES[suffix], data_files={options.split: data}, split=options.split, **tabs)
    else:
        rows = datasets.load_dataset(data, options.data_config, split=options.split)
    images = model.main_input_name == "pixel_values"
    columns = _columns(rows.features, options, images, data)
    for chosen in (*columns, label_column):
        if chosen is not None and chosen not in rows.features:
            raise ValueError(f"--data {data} has no column {chosen!r}; it has {sorted(rows.features)}.")
    rows = rows.filter(
        lambda row: all(row[column] is not None and (images or row[column].strip() != "") for column in columns)
    )
    if not len(rows):
        raise ValueError(f"--data {data} has no row with anything in {' and '.join(columns)}.")
    rows = rows.shuffle(seed=0).select(range(min(options.samples, len(rows))))
    processor = _processor_of(model, name)
    batches = []
    for start in range(0, len(rows), options.batch_size):
        part = rows[start : start + options.batch_size]
        if images:
            batch = dict(processor([image.convert("RGB") for image in part[columns[0]]], return_tensors="pt"))
        else:
            if processor.pad_token is None:
                processor.pad_token = processor.eos_token
            cut = {"truncation": True, "max_length": options.max_length}
            batch = dict(processor(*(part[column] for column in columns), padding=True, return_tensors="pt", **cut))
        if label_column is not None:
            if not all(isinstance(value, int) for value in part[label_column]):
                raise ValueError(f"Column {label_column!r} must hold class indices, got {part[label_column][0]!r}.")
            batch["labels"] = torch.tensor(part[label_column])
            check_classes(model, batch["labels"])
        batches.append(batch)
    typer.echo(_described(batches, columns))
    return batches


def _columns(features, options, images, data):
    """The columns that inputs are made of: those that were named, or the only one there is.

    Raises:
        ValueError: There is none or several, or too many were named.
    """
    import datasets

    if options.column:
        most = 1 if images else 2
        if len(options.column) > most:
            raise ValueError(f"--column can be given {most} times for this model, got {options.column}.")
        return options.column
    kind, wanted = ("images", datasets.Image) if images else ("text", datasets.Value)
    found = [
        name
        for name, feature in features.items()
        if isinstance(feature, wanted) and (images or feature.dtype in ("string", "large_string"))
    ]
    found = [name for name in found if name != options.label_column] or found
    if not found:
        raise ValueError(f"--data {data} has no column of {kind}: {sorted(features)}.")
    if len(found) > 1:
        raise ValueError(
            f"--data {data} has several columns of {kind}, {found}: say which to read with --column"
            + (", or two of them for pairs of texts." if not images else ".")
        )
    return found


def _described(batches, columns):
    """What was read of the data, in one line."""
    rows = [content for batch in batches for content in contents(batch)]
    parts = [f"{len(rows):,} rows", f"{len(set(rows)):,} different"]
    if "input_ids" in batches[0]:
        masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
        parts.append(f"{sum(int(mask.sum()) for mask in masks):,} tokens")
    return f"data: column {' and '.join(columns)}, {', '.join(parts)}"


def main():
    """Console entry point: errors that the user can mend are one line."""
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"layercollapse: {message}", file=sys.stderr)
        raise SystemExit(1) from None
