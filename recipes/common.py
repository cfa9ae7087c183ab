"""What the training recipes share: arguments from YAML and flags, a run from model to result, and its file."""

import copy
import json
import platform
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import accelerate
import datasets
import torch
import transformers
import yaml
from controls import TaughtTrainer, drop_blocks, feed_forward_share, prune_width
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, HfArgumentParser, TrainingArguments, set_seed

from hf_layercollapse import (
    CollapsePlan,
    LayerCollapseConfig,
    LayerCollapseTrainer,
    collapse_model,
    find_feed_forward_blocks,
    plan_collapse,
)
from hf_layercollapse.class_labels import ModelClasses, are_numbers, cell_of, class_numbers, listed
from hf_layercollapse.data_files import load_rows as load_table
from hf_layercollapse.profiling import compare_latency, count_parameters, describe_hardware, neurons_within
from hf_layercollapse.scoring import SECRET


METHODS = {
    "dense": "nothing, the model trains as it is",
    "layer_collapse": "blocks are patched, train with the penalty, and collapse at the end",
    "fit": "blocks become their least-squares maps (`rank`, and neurons up to `share`) before training heals them",
    "plan": "`plan_collapse` chooses what the chosen blocks become, until `share` of all is left; training heals them",
    "drop": "blocks give zero, before training",
    "prune_width": "torch-pruning cuts the blocks' hidden width to `share` of their parameters, before training",
}


# Shares of the feed-forward MACs at which a plan that is kept has measured candidates: what stays of six blocks, four
# times as wide as the model, once three, five or six of them are one matrix.
PLAN_POINTS = [part / 48 for part in (27, 13, 6, 3)]


@dataclass
class DataArguments:
    """Which model, on which data."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained model: a name on the Hub or a folder."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "In place of it: a folder with the config of a new model, and its processor or tokenizer."},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "With --config_name: fields of the config, as 'n_layer=2,resid_pdrop=0.2'."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Of a pretrained model's weights: float32, bfloat16, or auto, as stored."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data: a name on the Hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "In place of --dataset_name: what to train on; see the script's head."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for the evaluation."})
    train_split: str = field(default="train", metadata={"help": "Split of a data set to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split of a data set to evaluate on."})
    input_column: str | None = field(
        default=None, metadata={"help": "Column of the text or image. Default: 'text' or 'image'."}
    )
    second_input_column: str | None = field(
        default=None, metadata={"help": "Column of the second text, for pairs of them."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the class."})
    class_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "The data's classes, in the order of the model's numbers. Default: as the model's config calls "
            "and orders them, or else the data."
        },
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of a text, at most; or of each block of text."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Rows to train on: the first, shuffled."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Rows to evaluate on: the first."})
    held_out: int = field(
        default=0,
        metadata={
            "help": "Evaluate on this many rows of the training split, which are then not trained on, instead of on "
            "the validation split: what options are chosen with."
        },
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Of all of the model's dropout. Default: as its config has each of them."}
    )
    also_test: str | None = field(
        default=None, metadata={"help": "A file of further rows that results are scored on too."}
    )

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("Pass either --model_name_or_path or --config_name.")
        if (self.dataset_name is None) == (self.train_file is None):
            raise ValueError("Pass either --dataset_name or --train_file (and --validation_file).")

    @property
    def source(self):
        """Where the processor, and the model or its config, are."""
        return self.model_name_or_path or self.config_name

    @property
    def classes(self):
        """Fields of a config for the classes of these names."""
        return {
            "id2label": dict(enumerate(self.class_names)),
            "label2id": {n: i for i, n in enumerate(self.class_names)},
        }

    def keeps_head(self, config, kind):
        """Whether a pretrained model of this config has a head of a kind (`"ForSequenceClassification"`), which goes
        on where it has as many classes as the data."""
        return self.model_name_or_path is not None and any(kind in name for name in config.architectures or ())

    def to_also_test(self):
        """The same with the rows of `also_test` for the evaluation; nothing of it is trained on."""
        files = {"dataset_name": None, "dataset_config_name": None, "train_file": self.also_test, "held_out": 0}
        return replace(self, **files, validation_file=self.also_test, max_train_samples=None, max_eval_samples=None)

    def make_model(self, auto_class, **more):
        """The pretrained model, or a new one; `more` is for its config."""
        if self.dropout is not None:
            options = vars(AutoConfig.from_pretrained(self.source)).items()
            more |= {name: self.dropout for name, value in options if "drop" in name and isinstance(value, float)}
        if self.config_name is None:
            return auto_class.from_pretrained(self.model_name_or_path, dtype=self.dtype, **more)
        new = {name: value for name, value in more.items() if name != "ignore_mismatched_sizes"}
        config = AutoConfig.from_pretrained(self.config_name, **new)
        if self.config_overrides is not None:
            config.update_from_string(self.config_overrides)
        return auto_class.from_config(config)


def labelled(rows, column):
    """The rows that have a class; says how many have none.

    Raises:
        ValueError: None has.
    """
    labels = labels_in(rows, column)
    kept = [index for index, label in enumerate(labels) if label is not None]
    if not kept:
        raise ValueError(f"No row has a class in the column {column!r}." + SECRET)
    if len(kept) < len(labels):
        print(f"{len(labels) - len(kept):,} rows without a class in the column {column!r} are left out")
    return rows if len(kept) == len(labels) else rows.select(kept)


def names_in(rows, column):
    """What the data calls its classes, in the order of their numbers; `None` where it has numbers alone."""
    feature = rows.features[column]
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def labels_in(rows, column):
    """The cells of a column, `None` where it says no class.

    Raises:
        ValueError: The column holds no classes.
    """
    names = names_in(rows, column)
    labels = [cell_of(value, names) for value in rows.with_format(None)[column][:]]
    if any(label is not None and not isinstance(label, (int, str)) for label in labels):
        kind = rows.features[column].dtype
        raise ValueError(f"The column {column!r} must hold a class a row, as text or a whole number, got {kind}.")
    return labels


def names_of_classes(rows, column, config, kept):
    """What the classes of these rows are called, in the order of the model's numbers.

    A model that has the data's names is right about their order. Where it has none that is the data's own: of a
    `ClassLabel` as it numbers them, of other whole numbers and texts, which are names, as they are sorted.

    Args:
        config: Of the model.
        kept (`bool`): Whether its head goes on where it has as many classes: what that predicts is what it was trained
            on, whatever it is called.

    Raises:
        ValueError: The column holds no classes, or a head that is kept has others, or has no names for the data's.
    """
    known, names, found = ModelClasses.of(config), names_in(rows, column), set(labels_in(rows, column))
    if names is not None and are_numbers(names):
        return known.names if known.named and len(known.names) == len(names) else names
    if names is None and found == set(range(len(found))):
        return known.names if len(known.names) == len(found) else [f"LABEL_{number}" for number in range(len(found))]
    texts = names is None and any(isinstance(value, str) for value in found)
    names = [str(value) for value in sorted(found)] if names is None else names
    if {known.number(name) for name in names} == set(range(len(known.names))):
        return known.names
    if not kept or len(names) != len(known.names):
        return names
    if known.named:
        try:
            class_numbers(range(len(names)), names, known, column)
        except ValueError as error:
            raise ValueError(f"{error} Or say in --class_names which of the data's each of them is.") from None
        return known.names
    if texts:
        raise ValueError(
            f"The column {column!r} has the classes {listed(names)}, and the model's have no names: say in "
            "--class_names which of the data's each of them is, in the order of the model's numbers."
        )
    return names


def numbers_of_classes(rows, column, names):
    """`{value of the column: number of its class}`.

    Args:
        names (`list[str]`): Of the model's classes, in the order of their numbers.

    Raises:
        ValueError: There are classes that are not among these.
    """
    found, known = set(labels_in(rows, column)), ModelClasses(dict(enumerate(names)))
    numbers = class_numbers(found, names_in(rows, column), known, column)
    if unknown := sorted(value for value, number in numbers.items() if number not in range(len(names))):
        raise ValueError(f"The column {column!r} has classes that are none of {listed(names)}: {listed(unknown)}.")
    return numbers


@dataclass
class MethodArguments:
    """What happens to the feed-forward blocks."""

    method: str = field(default="dense", metadata={"help": "; ".join(f"{k}: {v}" for k, v in METHODS.items())})
    share: float | None = field(
        default=None,
        metadata={
            "help": "Share of the chosen blocks' weights that 'fit' and 'prune_width' leave, or of all blocks' that "
            "'plan' leaves, in (0, 1)."
        },
    )
    calibration_samples: int = field(default=512, metadata={"help": "Training rows that maps are fitted to."})
    plan_samples: int = field(default=512, metadata={"help": "Further training rows, that 'plan' scores plans on."})
    plan_file: str | None = field(
        default=None, metadata={"help": "Where 'plan' keeps its plan; one that is there is used, at another size too."}
    )
    latency_rounds: int = field(
        default=0, metadata={"help": "Rounds in which the model before and after take turns on one batch. 0: none."}
    )
    save_result: bool = field(default=True, metadata={"help": "Whether the model is saved at the end."})
    train_embeddings: bool = field(default=True, metadata={"help": "Whether token embeddings are trained."})

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if self.method in ("plan", "prune_width") and self.share is None:
            raise ValueError(f"--method {self.method} needs --share.")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"--share must be in (0, 1), got {self.share}.")


@dataclass
class LoraArguments:
    """LoRA (arXiv 2106.09685, by peft) in place of training all weights; merged into them at the end."""

    use_peft: bool = field(
        default=False,
        metadata={
            "help": "Train adapters and, in classifiers, the head, and nothing else. Every method can but "
            "'layer_collapse', on one device or with DDP."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale, times the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of their inputs, in [0, 1)."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Ends of the names of the linears that get one, or one regular expression that names match in "
            "full. Default: all linears, but for the head."
        },
    )

    def __post_init__(self):
        if self.lora_r < 1:
            raise ValueError(f"--lora_r must be at least 1, got {self.lora_r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be in [0, 1), got {self.lora_dropout}.")

    def adapt(self, model, task_type, head):
        """The model under adapters, ready to train.

        Args:
            task_type (`str`, *optional*): peft's name for it.
            head (`list[str]`, *optional*): Names of modules that are trained whole, beside those that peft knows.
        """
        names = self.lora_target_modules or ["all-linear"]
        config = LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=names[0] if len(names) == 1 else names,
            modules_to_save=head,
            task_type=task_type,
        )
        return get_peft_model(model, config)


ALTERNATIVES = {
    "train_file": ("dataset_name", "dataset_config_name"),
    "dataset_name": ("train_file", "validation_file"),
    "model_name_or_path": ("config_name", "config_overrides"),
    "config_name": ("model_name_or_path",),
}


# Options of `TrainingArguments` as files name them -> as transformers before 5.23 does.
OLDER_NAMES = {"activation_checkpointing": "gradient_checkpointing"}


def parse(kinds, description, arguments=None):
    """One object of each dataclass from `[FILE.yaml] [--option value ...]`.

    Options on the command line win over those of the file.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = HfArgumentParser(kinds, description=description, formatter_class=RawDescriptionHelpFormatter)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        path = arguments.pop(0)
        values = yaml.safe_load(Path(path).read_text())
        options = {f.name for kind in kinds for f in fields(kind)}
        for new, old in OLDER_NAMES.items():
            if new not in options and new in values:
                values[old] = values.pop(new)
        unknown = sorted(values.keys() - options)
        if unknown:
            parser.error(f"{path} has options that do not exist: {', '.join(unknown)}")
        # What the command line names in another way, the file does not name.
        for one, others in ALTERNATIVES.items():
            if f"--{one}" in arguments:
                values = {name: value for name, value in values.items() if name not in others}
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(arguments)


def run(task, description, arguments=None):
    """One run: data, model, method, training, collapse, evaluation; writes the model and `results.json`.

    Args:
        task: The class in the recipe that knows the data and the head.
    """
    kinds = [DataArguments, MethodArguments, LoraArguments, LayerCollapseConfig, TrainingArguments]
    data, recipe, lora, config, arguments = parse(kinds, description, arguments)
    if lora.use_peft and recipe.method == "layer_collapse":
        raise ValueError(
            "--use_peft heals what collapsed before training, or trains a control: --method layer_collapse trains all "
            f"weights. Methods for it are {', '.join(name for name in METHODS if name != 'layer_collapse')}."
        )
    if lora.use_peft and arguments.push_to_hub:
        raise ValueError(
            "--use_peft merges adapters once training is over, and pushes nothing: leave out --push_to_hub. The "
            "folder that it saves can be pushed afterwards."
        )
    started = time.perf_counter()
    set_seed(arguments.seed)
    # Images are turned into tensors when a batch needs them; the Trainer would remove the columns they come from.
    arguments.remove_unused_columns = False
    with arguments.main_process_first(desc="reading the data"):
        task = task(data)
        further = None if data.also_test is None else type(task)(task.data.to_also_test()).validation
    model = task.make_model()
    if not recipe.train_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    blocks = find_feed_forward_blocks(model)
    dense_parameters = count_parameters(model)
    heals = recipe.method in ("fit", "plan") and config.distils
    dense = None
    if recipe.latency_rounds or (config.distils and recipe.method != "layer_collapse"):
        dense = copy.deepcopy(model).requires_grad_(False)
    with arguments.main_process_first(desc="collapsing"):  # whose plan the others find in `plan_file`
        report = prepare(task, model, recipe, config)
    trained = lora.adapt(model, task.peft_task, task.head) if lora.use_peft else model
    trainer_class, teaching = LayerCollapseTrainer, {}
    if heals or recipe.method == "layer_collapse":
        # Which makes a teacher of its own from a model that is dense.
        teaching = {"layer_collapse_config": config, "teacher": dense if heals else None}
    elif config.distils:
        trainer_class, teaching = TaughtTrainer, {"teacher": dense, "config": config}
    trainer = trainer_class(
        trained,
        args=arguments,
        **teaching,
        calibration_data=task.batches(recipe.calibration_samples),
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.processor,
        data_collator=task.collate,
        compute_metrics=task.metrics,
        preprocess_logits_for_metrics=task.shorten_logits,
    )
    # Also where a launcher asks for it and no argument does.
    if lora.use_peft and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "--use_peft merges adapters into whole weights: run it on one device or with DDP, not under FSDP or "
            "DeepSpeed."
        )
    results = {"before": trainer.evaluate()}
    results["trained_parameters"] = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    if arguments.num_train_epochs or arguments.max_steps > 0:
        resume = arguments.resume_from_checkpoint
        results["training"] = trainer.train(resume_from_checkpoint=resume if resume != "true" else True).metrics
    if recipe.method == "layer_collapse":
        report = trainer.collapse(allow_none=True)
        print(report)
    if lora.use_peft:
        # A model again, that needs no adapter; what is evaluated is what is saved.
        model = trained.merge_and_unload(safe_merge=True)
        trainer = LayerCollapseTrainer(
            model,
            args=arguments,
            eval_dataset=task.validation,
            processing_class=task.processor,
            data_collator=task.collate,
            compute_metrics=task.metrics,
            preprocess_logits_for_metrics=task.shorten_logits,
        )
    results["after"] = trainer.evaluate()
    if further is not None:
        results["also"] = trainer.evaluate(further, metric_key_prefix="also")
    if recipe.save_result:
        trainer.save_model()
    if recipe.latency_rounds:
        batch = {name: value.to(arguments.device) for name, value in task.batches(32, batch_size=32)[0].items()}
        # Without the autocast that training put around one of them.
        after = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        models = {"dense": dense.to(arguments.device), "after": after}
        times = compare_latency(models, batch, recipe.latency_rounds, progress=False)["after"]
        results["latency"] = {"ratio": times.ratio, "quartiles": times.ratio_quartiles}
    results.update(
        method=recipe.method,
        feed_forward_share=feed_forward_share(model, blocks),
        parameters=count_parameters(model),
        dense_parameters=dense_parameters,
        report=None if report is None else report.to_dict(),
        data=asdict(data),
        recipe=asdict(recipe),
        lora=asdict(lora),
        layer_collapse_config=config.to_dict(),
        seed=arguments.seed,
        seconds=round(time.perf_counter() - started),
        versions=versions(),
        machine=machine(),
    )
    if trainer.is_world_process_zero():
        (Path(arguments.output_dir) / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        evaluated = {**results["after"], **results.get("also", {})}
        shown = {name: value for name, value in evaluated.items() if isinstance(value, float)}
        print(json.dumps({"method": recipe.method, "feed_forward_share": results["feed_forward_share"], **shown}))
    return results


def prepare(task, model, recipe, config):
    """What a method does before training, in place; a report where something collapsed."""
    if recipe.method == "fit":
        if recipe.share is not None:
            # Blocks of one width each, as all but a few models have.
            config.keep_neurons = neurons_within(find_feed_forward_blocks(model)[0], recipe.share, config.rank)
        report = collapse_model(model, config, calibration_data=task.batches(recipe.calibration_samples))
        print(report)
        return report
    if recipe.method == "plan":
        plan = make_plan(task, model, recipe, config.blocks).at(macs=recipe.share)
        report = collapse_model(model, plan=plan, calibration_data=task.batches(recipe.calibration_samples))
        print(report)
        return report
    if recipe.method == "drop":
        drop_blocks(model, config.blocks)
    if recipe.method == "prune_width":
        prune_width(model, config.blocks, recipe.share, task.batches(32)[0])
    return None


def make_plan(task, model, recipe, blocks):
    """The plan in `plan_file`, or a new one, which is kept there."""
    if recipe.plan_file is not None and Path(recipe.plan_file).exists():
        return CollapsePlan.load(recipe.plan_file)
    plan = plan_collapse(
        model,
        task.batches(recipe.calibration_samples),
        macs=recipe.share,
        evaluation_data=task.batches(recipe.plan_samples, skip=recipe.calibration_samples),
        blocks=blocks,
        points=None if recipe.plan_file is None else PLAN_POINTS,
    )
    if recipe.plan_file is not None:
        plan.save(recipe.plan_file)
    return plan


def load_rows(data, loaders, prepare=None):
    """`(train, validation)` as data sets, from the Hub, a folder or files; `prepare` makes rows of what was read."""
    if data.dataset_name is not None:
        found = datasets.load_dataset(data.dataset_name, data.dataset_config_name)
        train = found[data.train_split]
        validation = None if data.held_out else found[data.validation_split]
    else:
        train = _load_file(data.train_file, loaders)
        validation = None if data.held_out else _load_file(data.validation_file, loaders)
    if prepare is not None:
        train, validation = prepare(train), validation and prepare(validation)
    train = train.shuffle(seed=0)
    if data.held_out:
        validation, train = train.select(range(data.held_out)), train.select(range(data.held_out, len(train)))
    return first_rows(train, data.max_train_samples), first_rows(validation, data.max_eval_samples)


def first_rows(rows, count):
    return rows if count is None else rows.select(range(min(count, len(rows))))


def _load_file(path, loaders):
    if path is None:
        raise ValueError("Pass --validation_file too, or --held_out.")
    for endings, load in loaders.items():
        if path.endswith(endings):
            return load(path)
    raise ValueError(f"{path} must end in one of {', '.join(e for endings in loaders for e in endings)}.")


TABLES = {(".csv", ".tsv", ".json", ".jsonl", ".parquet"): load_table}


class ResultsFile:
    """Rows of an experiment in `results.json`, written one by one; a run of the same arguments that was interrupted
    goes on. What else is made of them, `finish(content)` of a subclass writes.

    Args:
        output_dir (`str`): Folder of the file.
        arguments (`dict`): Those that a result depends on.
    """

    KEY = ("seed", "method", "size")  # what tells rows apart

    def __init__(self, output_dir, arguments):
        self.output, self.arguments = Path(output_dir), arguments
        self.output.mkdir(parents=True, exist_ok=True)
        self.started, self.rows, self.facts = time.perf_counter(), [], {}
        path = self.output / "results.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        self.goes_on = content.get("arguments") == arguments
        if self.goes_on:
            self.rows, self.started = content["results"], self.started - content["seconds"]

    def has(self, *key):
        return any(tuple(row[name] for name in self.KEY) == key for row in self.rows)

    def seconds(self):
        """Since the experiment began, without the time between its runs."""
        return time.perf_counter() - self.started

    def add(self, row):
        if self.has(*(row[name] for name in self.KEY)):
            return
        self.rows.append(row)
        content = {
            "arguments": self.arguments,
            **self.facts,
            "seconds": round(self.seconds()),
            "versions": versions(),
            "machine": machine(),
            "results": self.rows,
        }
        (self.output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        self.finish(content)


def versions():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def machine():
    """The hardware in a few words."""
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        return f"{torch.accelerator.device_count()} x {describe_hardware(device)}"
    names = [line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} thread(s)"


def _cpu_info():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
