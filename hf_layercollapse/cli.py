"""`layercollapse`: look at a model's feed-forward blocks, collapse them under a budget, compare what comes of it with
what was there, and export it, from the shell."""

import copy
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import transformers
import typer
from huggingface_hub import ModelCard
from torch import nn
from yaml import YAMLError

from . import processes
from ._version import __version__
from .budgets import parse_budget
from .calibration_data import CalibrationData, longest_row
from .cli_options import (
    DATA_HELP,
    Blocks,
    DataOptions,
    Device,
    JsonFile,
    MaxMemory,
    Model,
    Output,
    Processor,
    TestDataOptions,
    Trust,
    check_files,
    check_new_folder,
    new_folder,
    usable_device,
    with_options,
)
from .collapsing import collapse_model
from .comparison import Comparison, compare_models, weights_folder
from .data_files import format_of, is_path, is_saved, load_rows
from .families import find_feed_forward_blocks, refused_blocks
from .forward_passes import lean
from .loading import load_model, load_processor, load_transformers_model, processor_of, processors_to_save
from .memory import MemoryBudget
from .model_card import add_comparison, create_model_card, loader_of
from .models import (
    carriers_of,
    count_parameters,
    device_of,
    inputs_of,
    is_encoder_decoder,
    outputs_of,
    unwrap,
    written_beside,
)
from .planning import linearity_map, plan_collapse
from .plans import CollapsePlan
from .profiling import Latency, compare_latency, measure_speedup
from .recovery import RecoveryReport, recover_model, step_rows
from .rows import row_count, tokens_in
from .sentence_models import sentence_model
from .tables import table
from .upstream import is_causal_language_model, is_classifier


if TYPE_CHECKING:
    from .reports import CollapseReport


EXIT_CODES = """
Exit codes: 0 done; 1 refused or failed, with one line on stderr that says why; 2 wrong options; 130 interrupted, and
nothing is left half-written.
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Makes transformers models smaller by collapsing feed-forward blocks into linear maps.\n" + EXIT_CODES,
)

# Forwards and backwards that a plan takes for each batch of the data, in times of one forward; measured, see the
# command's estimate.
PLAN_PASSES, COLLAPSE_PASSES, RECOVERY_PASSES = 8, 3, 5

# What choosing and fitting takes of a block, in times of the product of two square matrices as wide as it has features
# and neurons: a plan for SmolLM2-135M took 4.5 s a block of 2,112 beside its passes, and its collapse a fit, 0.4 s, on
# a thread that does a product of 1,024 in 0.022 s. A plan of a large model, which fits in groups, takes more.
PLAN_PRODUCTS, COLLAPSE_PRODUCTS, PRODUCT = 24, 2, 512

# Rows that are read where nothing is said. Of a language model, which predicts every token, no more than have so many
# tokens for each feature and neuron of its widest block, and so many at least: plans of SmolLM2-135M (2,112) were
# measured with 16,384.
SAMPLES, TOKENS_A_FEATURE, LEAST_TOKENS_OF_ALL = 512, 8, 16_384


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(
            f"hf_layercollapse {__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
            f"Python {sys.version.split()[0]}"
        )
        raise typer.Exit()


# Commands that several processes can share the work of.
SHARED = ("inspect", "collapse")


@app.callback()
def program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and stop.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Let errors through as Python raised them, for a report.")
    ] = False,
) -> None:
    _asked["traceback"] = traceback
    if processes.launched() > 1 and context.invoked_subcommand not in SHARED:
        raise ValueError(
            f"{context.invoked_subcommand} runs in one process, and {processes.launched()} were launched; "
            f"{' and '.join(SHARED)} run in several."
        )


# What was asked of the program as a whole.
_asked = {"traceback": False}


@app.command()
@with_options
def inspect(
    model: Model,
    options: DataOptions,
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP} Without it nothing is measured.")] = None,
    blocks: Blocks = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot; .png, .svg or .pdf.")] = None,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Lists a model's feed-forward blocks; with data, how linear each is and what collapsing it alone costs."""
    check_files(plot=plot, json=json_file)
    if data is None and plot is not None:
        raise ValueError("--plot shows what is measured on data: pass --data too.")
    MemoryBudget(max_memory)  # refuses what is none, before the model is loaded
    on, out = usable_device(device), Output(json_file)
    with processes.together():
        live = load_model(model, trust_remote_code, "list" if data is None else "measure").to(on)
    if data is None:
        out.say(_blocks_table(live))
        out.write([{key: getattr(b, key) for key in _COLUMNS} for b in find_feed_forward_blocks(live)])
        return
    with processes.together():
        read, _ = _read_and_said(live, load_processor(live, model, options, trust_remote_code), data, options, out)
        own = read.part(processes.rank(), processes.count())
    result = linearity_map(live, own, blocks or "all", max_memory=max_memory)
    out.say(result)
    out.write(result.to_dict())
    if plot is not None and processes.rank() == 0:
        from .plotting import plot_linearity

        plot_linearity(result, [plot])


_COLUMNS: tuple[str, ...] = ("name", "index", "kind", "state", "in_features", "hidden_features", "out_features")
_COLUMNS += ("rank", "parameters", "macs")


def _blocks_table(model: nn.Module) -> str:
    """What blocks a model has, as text."""
    found = find_feed_forward_blocks(model)
    collapsed = any(block.state == "collapsed" for block in found)
    rows = [["block", "kind", "state", "widths", "parameters", "MACs/token"]]
    rows[0] += ["rank", "kept neurons"] if collapsed else []
    for b in found:
        widths = f"{b.in_features} -> {b.hidden_features} -> {b.out_features}"
        rows.append([b.name, b.kind, b.state, widths, f"{b.parameters:,}", f"{b.macs:,}"])
        if b.rank is not None:
            rows[-1] += ["full" if b.rank == b.in_features else str(b.rank), str(b.hidden_features)]
        elif collapsed:
            rows[-1] += ["", ""]
    total = count_parameters(model)
    inside = sum(block.parameters for block in found)
    lines = [table(rows), f"{len(found)} blocks hold {inside:,} of {total:,} parameters ({inside / total:.1%})"]
    return "\n".join(lines + [f"refused: {name}: {reason}" for name, reason in refused_blocks(model).items()])


# Options of `collapse` alone.
Budget = Annotated[
    str | None,
    typer.Option(
        help="parameters=0.8 (share of the model's, or a count), macs=0.5 (share of the feed-forward blocks', or "
        "a count a token), latency=0.8 (share of the dense model's time), or max_drop=0.02 (divergence from "
        "the dense model, in nats)."
    ),
]
RecoverySteps = Annotated[
    int,
    typer.Option(
        min=0,
        help="Steps of training afterwards towards the dense model's predictions on the data, without labels.",
    ),
]
RecoveryBatch = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Rows a step of that training. Default: 32; of long ones so many as have 4,096 tokens, of a language "
        "model 1,024.",
    ),
]
UniformWidth = Annotated[
    bool,
    typer.Option(
        "--uniform-width",
        help="One hidden width for all blocks: `export --to stock` then gives the native architecture with a "
        "smaller number in its config, for whatever serves that.",
    ),
]
MultipleOf = Annotated[
    int, typer.Option(min=1, help="What numbers of neurons, and ranks, are multiples of (64 suits accelerators).")
]


@app.command()
@with_options
def collapse(
    model: Model,
    options: DataOptions,
    data: Annotated[str, typer.Option(help=DATA_HELP, show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for the collapsed model.", show_default=False)],
    budget: Budget = None,
    plan: Annotated[Path | None, typer.Option(help="A plan that was made before, in place of --budget.")] = None,
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan, with the curve of all plans (JSON).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of that curve; .png, .svg or .pdf.")] = None,
    recovery_steps: RecoverySteps = 0,
    recovery_batch_size: RecoveryBatch = None,
    blocks: Blocks = None,
    uniform_width: UniformWidth = False,
    multiple_of: MultipleOf = 1,
    json_file: JsonFile = None,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Collapses a model under a budget, with no training or a short one without labels, and saves it."""
    _check_together(budget, plan, blocks, uniform_width, multiple_of, save_plan)
    _check_recovery(recovery_steps, recovery_batch_size)
    wanted = parse_budget(budget, "--budget") if budget is not None else {}
    MemoryBudget(max_memory)
    check_files(save_plan=save_plan, plot=plot, json=json_file)
    on, out, started = usable_device(device), Output(json_file), time.perf_counter()
    made = _plan_in(plan) if plan is not None else None
    steps = {"max_steps": recovery_steps, "batch_size": recovery_batch_size}
    with new_folder(output) as folder:
        with processes.together():
            live, processors, read = _model_and_data(model, data, options, on, out, trust_remote_code)
            out.say(_estimate(live, read, made is None, steps))
        if made is None:
            shape: dict[str, Any] = {**wanted, "uniform_width": uniform_width, "multiple_of": multiple_of}
            made = plan_collapse(live, read, blocks=blocks or "all", max_memory=max_memory, **shape)
        with processes.together():
            _show_plan(made, out, save_plan, plot)
        report, recovery = _collapsed_and_recovered(live, made, read, steps, max_memory)
        with processes.together():
            card = {"report": report, "plan": made, "recovery": recovery, "name": output.name}
            _save_collapsed(live, processors, card, folder, model)
    _say_collapsed(out, live, report, recovery, output)
    out.write({**_results(made, report, recovery, output), "seconds": time.perf_counter() - started})


def _plan_in(path: Path) -> CollapsePlan:
    """The plan that `--plan` names.

    Raises:
        ValueError: There is no such file, or it holds no plan.
    """
    if not path.is_file():
        raise ValueError(f"--plan {path}: there is no such file.")
    try:
        return CollapsePlan.load(path)
    except ValueError as error:
        raise ValueError(f"--plan {error}") from error


def _model_and_data(
    model: str, data: str, options: DataOptions, device: torch.device, out: Output, trust_remote_code: bool
) -> tuple[Any, Any, CalibrationData]:
    """`(the model, the processors that go beside it, this process's part of the data)`, as the command line names
    them."""
    live = load_model(model, trust_remote_code, "save").to(device)
    processor = load_processor(live, model, options, trust_remote_code)
    given = options.processor
    beside = [] if processor is None else processors_to_save(processor, model, given, trust_remote_code)
    everything, _ = _read_and_said(live, processor, data, options, out)
    return live, beside, everything.part(processes.rank(), processes.count())


def _check_together(
    budget: str | None,
    plan: Path | None,
    blocks: str | None,
    uniform_width: bool,
    multiple_of: int,
    save_plan: Path | None,
) -> None:
    """Raises unless there is a budget or a plan; beside a plan that was made before, also for what makes one."""
    if (budget is None) == (plan is None):
        raise ValueError("Pass either --budget or --plan.")
    if plan is not None and (blocks is not None or uniform_width or multiple_of != 1 or save_plan is not None):
        raise ValueError("--plan says which blocks collapse, and how: leave out --blocks, --uniform-width, "
                         "--multiple-of and --save-plan.")  # fmt: skip


def _check_recovery(steps: int, batch_size: int | None) -> None:
    if steps and processes.launched() > 1:
        raise ValueError("--recovery-steps trains in one process: leave it out, or launch one.")
    if batch_size is not None and not steps:
        raise ValueError("--recovery-batch-size is of the training that --recovery-steps asks for: pass that too.")


def _show_plan(plan: CollapsePlan, out: Output, save_plan: Path | None, plot: Path | None) -> None:
    """Says a plan, writes it and plots it where that was asked for; raises if it collapses nothing."""
    out.say(f"{plan}\n")
    first = processes.rank() == 0
    if save_plan is not None and first:
        plan.save(save_plan)
    if plot is not None and first:
        from .plotting import plot_plan

        plot_plan(plan, [plot])
    if not plan.point.choices:
        raise ValueError("No block can collapse within this budget; nothing was saved.")


def _collapsed_and_recovered(
    model: nn.Module,
    plan: CollapsePlan,
    batches: Any,
    steps: dict[str, Any],
    max_memory: int | str | dict[Any, Any] | None,
) -> "tuple[CollapseReport, RecoveryReport | None]":
    """Collapses a model in place, and trains it if steps of that are to follow: `(CollapseReport, RecoveryReport or
    None)`."""
    teacher = copy.deepcopy(model) if steps["max_steps"] else None
    report = collapse_model(model, plan=plan, calibration_data=batches, max_memory=max_memory)
    if teacher is None:
        return report, None
    return report, recover_model(model, teacher, batches, **steps)


def _save_collapsed(model: Any, beside: Sequence[Any], card: Mapping[str, Any], folder: Any, source: str) -> None:
    """Writes a collapsed model with its card (what it is made from) and its processors, where a folder was made for
    that."""
    if folder is None:
        return
    sentences = sentence_model(model)
    if sentences is None:
        for each in (model, *beside):
            each.save_pretrained(folder)
    else:
        sentences.save_pretrained(str(folder), create_model_card=False)
    base = None if Path(source).exists() else source
    create_model_card(model, **card, base_model=base).save(folder / "README.md")


def _say_collapsed(
    out: Output, model: Any, report: "CollapseReport", recovery: RecoveryReport | None, output: Path
) -> None:
    out.say(report)
    if recovery is not None:
        out.say(f"\n{recovery}")
    loader = loader_of(model)
    out.say(
        f"\nSaved in {output}. Load it with\n\n    import hf_layercollapse\n"
        f"    from {loader.module} import {loader.name}\n\n"
        f'    model = {loader.call}("{output}")'
    )


def _results(
    plan: CollapsePlan, report: "CollapseReport", recovery: RecoveryReport | None, output: Path
) -> dict[str, Any]:
    """What a collapse gave, as plain data."""
    return {
        "output": str(output),
        "plan": plan.to_dict(),
        "report": report.to_dict(),
        "recovery": None if recovery is None else recovery.to_dict(),
    }


def _estimate(model: nn.Module, batches: CalibrationData, planned: bool, steps: Mapping[str, Any]) -> str:
    """How long it is going to take at least, from the time of one batch, and of one product of matrices."""
    given = next(iter(batches))
    batch = lean(unwrap(model)[0], inputs_of(given, device_of(model)))
    with torch.no_grad():
        started = time.perf_counter()
        outputs_of(model, batch)
        one = time.perf_counter() - started
    passes = (PLAN_PASSES if planned else 0) + COLLAPSE_PASSES
    products = (PLAN_PRODUCTS if planned else 0) + COLLAPSE_PRODUCTS
    widths = [block.in_features + block.hidden_features for block in find_feed_forward_blocks(model)]
    fitting = products * _product(device_of(model)) * sum((width / PRODUCT) ** 3 for width in widths)
    rows = row_count(given) or batches.batch_size
    of_a_step = steps["batch_size"] or step_rows(unwrap(model)[0], tokens_in(given) / rows)
    recovery = RECOVERY_PASSES * steps["max_steps"] * of_a_step / rows
    seconds = one * (passes * len(batches) + recovery) + fitting
    return f"one batch takes the model {one:.2g} s, so all of it takes about {max(1, round(seconds / 60))} min or more"


def _product(device: torch.device) -> float:
    """Seconds of a product of two square matrices."""
    matrix, times = torch.ones(PRODUCT, PRODUCT, device=device), []
    for _ in range(3):  # the first also loads what it runs with
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        times.append(time.perf_counter() - started)
    return min(times)


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
    card: Annotated[
        Path | None,
        typer.Option(help="Add these numbers to this model card of COLLAPSED; write one where there is none."),
    ] = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Compares two models on the same data: quality, size and latency, side by side.

    Quality is the perplexity of causal language models; with --label-column the accuracy of classifiers; else how far
    predictions are from those of DENSE.
    """
    check_files(json=json_file, card=card)
    page = read_card(card) if card is not None and card.exists() else None
    on, out = usable_device(device), Output(json_file)
    given = {"dense": dense, "control": control, "collapsed": collapsed}
    names = {name: folder for name, folder in given.items() if folder is not None}
    models = {name: load_model(folder, trust_remote_code).to(on) for name, folder in names.items()}
    _check_alike(models)
    if card is not None and page is None:
        base = None if Path(dense).exists() else dense
        page = create_model_card(models["collapsed"], name=Path(collapsed).name, base_model=base)
    processor = load_processor(models["dense"], dense, options, trust_remote_code)
    read, split = _read_and_said(models["dense"], processor, data, options, out)
    result = compare_models(
        models,
        read,
        folders={name: weights_folder(str(folder)) for name, folder in names.items()},
        rounds=rounds,
        source=(data, options.data_config, None if Path(data).exists() else split),
    )
    out.say(result)
    if result.metric == "divergence" and options.label_column is None and is_classifier(models["dense"]):
        out.say("Without labels predictions are compared; --label-column measures the accuracy.")
    out.write(result.to_dict())
    if card is not None and page is not None:
        _say_in_card(out, card, page, models["collapsed"], result, Path(collapsed).name)


def read_card(path: Path) -> ModelCard:
    """The model card that a file holds.

    Raises:
        ValueError: It cannot be read as one.
    """
    try:
        return ModelCard.load(path)
    except (ValueError, YAMLError) as error:
        raise ValueError(f"--card {path} cannot be read as a model card, and stays as it is: {error}") from error


def _say_in_card(out: Output, path: Path, card: ModelCard, model: Any, result: Comparison, name: str) -> None:
    """Adds a comparison to a card, and writes that."""
    new = not path.exists()
    add_comparison(card, model, result, name=name)
    with written_beside(path) as beside:
        card.save(beside)
    out.say(f"\nWrote the card {path}." if new else f"\nAdded to the card {path}, the rest of which is as it was.")


# Options of `export` alone.
Benchmark = Annotated[
    str | None,
    typer.Option(help="Another model, the dense one: it is exported too, and both are timed in turn."),
]
Cache = Annotated[
    bool | None, typer.Option(help="A graph with a key-value cache. Default: if the model generates text.")
]
ExampleLength = Annotated[
    int | None, typer.Option(min=4, help="Tokens of each row, the longest that is compared. Default: 32.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float16 or bfloat16. Default: that of the weights for a stock checkpoint, else float32."
    ),
]


@app.command()
def export(
    model: Model,
    to: Annotated[str, typer.Option(help="onnx, openvino or stock (a native checkpoint).", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for what is exported.", show_default=False)],
    benchmark: Benchmark = None,
    cache: Cache = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of the example batch, which is timed.")] = 8,
    length: ExampleLength = None,
    dtype: Dtype = None,
    processor: Processor = None,
    json_file: JsonFile = None,
    trust_remote_code: Trust = False,
) -> None:
    """Exports a dense, patched or collapsed model, compared with the PyTorch model in the runtime itself."""
    from .exporting import check_format, export_model

    check_format(to)
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f"--dtype must be float32, float16 or bfloat16, got {dtype!r}.")
    check_new_folder(output)
    check_files(json=json_file)
    out = Output(json_file)
    live = load_transformers_model(model, trust_remote_code, "save")
    if dtype is not None or to != "stock":
        live = live.to(getattr(torch, dtype or "float32"))
    dense = None if benchmark is None else load_transformers_model(benchmark, trust_remote_code).to(live.dtype)
    if dense is not None:
        _check_alike({benchmark: dense, model: live})
    reader = processor_of(live, processor or model, trust_remote_code)
    beside = processors_to_save(reader, model, processor, trust_remote_code)
    inputs = example_inputs(live, reader, batch_size, length, 32)
    report = export_model(live, inputs, output, to, cache=cache, processor=beside)
    out.say(report)
    times = {}
    if dense is not None:
        times = _time_exports((benchmark, model), dense, live, inputs, report, cache)
        out.say(f"\n{_latency_table(times)}")
    out.write({**report.to_dict(), "latency": {name: _numbers(latency) for name, latency in times.items()}})


def _time_exports(
    names: Any, dense: Any, live: Any, inputs: Mapping[str, Any], report: Any, cache: bool | None
) -> Any:
    """Times a dense model, exported to the same format, and the export of this report in turn, under these names."""
    from .exporting import decoder_step, export_model, load_exported

    with tempfile.TemporaryDirectory() as work:
        if report.to != "stock":
            export_model(dense, inputs, Path(work) / "dense", report.to, cache=cache)
            dense = load_exported(Path(work) / "dense")
        batch = decoder_step(live, inputs, inputs["input_ids"].shape[1] - 1) if report.cache else inputs
        return compare_latency(dict(zip(names, (dense, load_exported(report.folder)), strict=True)), batch)


def _latency_table(times: Any) -> str:
    rows = [["", "latency", "relative", "quartiles"]]
    for name, latency in times.items():
        low, high = latency.ratio_quartiles
        rows.append([name, f"{latency.median * 1e3:.2f} ms", f"{latency.ratio:.2f}", f"{low:.2f} to {high:.2f}"])
    return table(rows)


@app.command()
def latency(
    dense: Annotated[str, typer.Argument(help="Name on the Hub, or folder, of the dense model.", show_default=False)],
    collapsed: Annotated[str, typer.Argument(help="The collapsed model.", show_default=False)],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of the timed batch.")] = 8,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each row. Default: 128, or the model's most.")
    ] = None,
    compiled: Annotated[bool, typer.Option(help="Time both compiled by torch.compile too.")] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Timed calls of each model, in turn.")] = 30,
    processor: Processor = None,
    json_file: JsonFile = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Times two models in turn, against what their MACs promise, and says where that cannot show."""
    check_files(json=json_file)
    on, out = usable_device(device), Output(json_file)
    models = {name: load_transformers_model(name, trust_remote_code).to(on) for name in (dense, collapsed)}
    _check_alike(models)
    live = models[dense]
    reader = processor_of(live, processor or dense, trust_remote_code)
    inputs = inputs_of(example_inputs(live, reader, batch_size, length, 128), on)
    modes = ["eager", "compiled"] if compiled else ["eager"]
    found = measure_speedup(live, models[collapsed], inputs, modes, rounds)
    for speedup in found:
        out.say(speedup)
    out.write(
        [
            {
                "mode": speedup.mode,
                "dense": _numbers(speedup.dense),
                "collapsed": _numbers(speedup.collapsed),
                "speedup": speedup.measured,
                "promised_by_macs": speedup.promised,
            }
            for speedup in found
        ]
    )


def _numbers(latency: Latency) -> dict[str, Any]:
    return {
        "seconds": latency.median,
        "quartiles": latency.quartiles,
        "ratio": latency.ratio,
        "ratio_quartiles": latency.ratio_quartiles,
    }


def example_inputs(model: Any, processor: Any, rows: int, length: int | None, usual: Any) -> Any:
    """A batch of random tokens or images, as the processor would give them to this model.

    Args:
        length (`int`, *optional*): Tokens of each row. Default: `usual`, or the most that the model takes.
    """
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        images = torch.randint(0, 256, (rows, 3, 256, 256), generator=generator, dtype=torch.uint8)
        pixels = processor(list(images.numpy()), return_tensors="pt")["pixel_values"].to(model.dtype)
        return runnable(model, {"pixel_values": pixels})
    if model.main_input_name != "input_ids":
        raise ValueError(f"Example inputs are made for texts and images; this model reads {model.main_input_name}.")
    length = min(usual, longest_row(None, model, processor)) if length is None else length
    length = longest_row(length, model, processor)
    special = set(processor.all_special_ids)
    known = model.config.get_text_config().vocab_size
    words = torch.tensor([token for token in range(known) if token not in special])
    inputs = {"input_ids": words[torch.randint(0, len(words), (rows, length), generator=generator)]}
    taken = signature(model.forward).parameters
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if name in processor.model_input_names and name in taken:
            inputs[name] = torch.full_like(inputs["input_ids"], value)
    if is_encoder_decoder(model) and "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return runnable(model, inputs)


def runnable(model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """These inputs, with which the model has run once.

    Raises:
        ValueError: It does not run with them; the message has the cause.
    """
    try:
        with torch.no_grad():
            outputs_of(model, lean(unwrap(model)[0], inputs_of(inputs, device_of(model))))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    # Of whatever kind: what a model's own code meets where an input is not there.
    except Exception as error:
        raise ValueError(
            f"A {type(model).__name__} does not run on these inputs alone ({', '.join(inputs)}): "
            f"{type(error).__name__}: {error}. From Python it can be given all that it reads."
        ) from error
    return inputs


def _check_alike(models: Any) -> None:
    """Refuses models that cannot be given the same inputs, or do not predict the same kind of thing.

    Raises:
        ValueError: As said.
    """
    (first, model), *others = models.items()
    for name, other in others:
        kinds = [_reads_and_gives(each) for each in (model, other)]
        words = [_vocabulary_of(each) for each in (model, other)]
        if kinds[0] != kinds[1] or words[0] != words[1]:
            raise ValueError(
                f"{first} is a {type(model).__name__} and {name} a {type(other).__name__}"
                + (f", with vocabularies of {words[0]:,} and {words[1]:,}" if all(words) else "")
                + ": they cannot be compared on the same inputs."
            )


def _reads_and_gives(model: Any) -> tuple[str, ...]:
    """What tells models apart that are given the same inputs for the same kind of prediction."""
    sentences = sentence_model(model)
    if sentences is not None:
        return (type(sentences).__name__,)
    return loader_of(model).name, model.main_input_name


def _vocabulary_of(model: Any) -> int:
    """Tokens that the first transformers model in it knows; 0 where its config does not say it."""
    sizes = (carrier.config.to_dict().get("vocab_size") for _, carrier in carriers_of(model))
    return next(sizes, None) or 0


def read_data(model: Any, processor: Any, data: str, options: DataOptions) -> CalibrationData:
    """Batches of model inputs from a file, a folder or a data set, of the split that the options name.

    Raises:
        ValueError: The data cannot be read, have no such column, or nothing that the model reads, or not all that it
            needs.
    """
    rows = load_rows(data, options.data_config, options.split, document=is_causal_language_model(model))
    try:
        read = CalibrationData(
            rows,
            processor,
            model,
            columns=options.column,
            label_column=options.label_column,
            max_length=options.max_length,
            batch_size=options.batch_size,
            samples=options.samples or SAMPLES,
            max_tokens=None if options.samples else _most_tokens(model),
        )
        runnable(model, next(iter(read)))
    except ValueError as error:
        raise ValueError(f"--data {data}: {error}") from error
    return read


def _most_tokens(model: Any) -> int | None:
    """Of how many tokens rows are read where nothing is said; `None` where only their number counts."""
    if not is_causal_language_model(model):
        return None
    widths = [block.in_features + block.hidden_features for block in find_feed_forward_blocks(model)]
    return max(LEAST_TOKENS_OF_ALL, TOKENS_A_FEATURE * max(widths, default=0))


def split_of(data: str, options: DataOptions) -> str:
    """The split that was asked for; or the usual one; or the only one, where there is one."""
    if options.split is not None:
        return options.split
    found = _splits(data, options.data_config)
    return found[0] if len(found) == 1 else options.usual_split


def _splits(data: str, data_config: str | None) -> list[str]:
    """The splits that data have; none of what is one by itself, or is not there."""
    from datasets import load_dataset_builder

    path = Path(data).expanduser()
    if (path / "dataset_dict.json").is_file():
        return json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if path.is_file() or is_saved(path) or (not path.is_dir() and (is_path(data) or format_of(path)[0] is not None)):
        return []
    try:
        builder = load_dataset_builder(str(path) if path.is_dir() else data, data_config)
    except ValueError as error:
        raise ValueError(f"{data} cannot be read: {error}") from error
    return list(builder.info.splits or builder.config.data_files or [])


def _read_and_said(
    model: Any, processor: Any, data: str, options: DataOptions, out: Output
) -> tuple[CalibrationData, str]:
    """`(data, the split that they are)`, said in one line with where it is computed."""
    split, device = split_of(data, options), device_of(model)
    read = read_data(model, processor, data, replace(options, split=split))
    only = f"split {split}, the only one, " if split != (options.split or options.usual_split) else ""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    unused = f" (--device {accelerator.type} is there too)" if accelerator and device.type == "cpu" else ""
    out.say(f"data: {only}{read.described('--samples')}, in batches of {read.batch_size}, on {device}{unused}")
    return read, split


def main() -> None:
    """Console entry point: errors that the user can mend are one line."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if _asked["traceback"]:
            raise
        message = " ".join(str(error).split())
        print(f"layercollapse: {message}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
