"""Dense and collapsed models in every runtime they are served in: difference, size, quality and latency, side by side.

    pip install -c .ci/constraints.txt -e ".[demo,onnx,openvino,torchao]"
    python recipes/export.py

Three models: all-MiniLM-L6, fine-tuned here on the UCI sentences; an image encoder and a causal language model of
known shapes with random weights, for latency and differences only. Each is collapsed without training, exported to
ONNX, OpenVINO and a stock checkpoint, quantized with torchao, and loaded from disk again in each form. Dense and
collapsed take turns in one process. Writes `results.json` and `table.md`, and leaves the dense and the collapsed
models, which `layercollapse export` takes. About ten minutes on two CPU cores; `--models` chooses.
"""

import argparse
import copy
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from quickstart import (
    QuickstartArguments,
    batch_of,
    encode,
    first_batch,
    load_data,
    load_pretrained,
    make_trainer,
    print_heading,
    quiet,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    LlamaConfig,
    TorchAoConfig,
    ViTConfig,
)

from hf_layercollapse import LayerCollapseConfig, collapse_model, export_model
from hf_layercollapse.exporting import decoder_step, load_exported
from hf_layercollapse.profiling import compare_latency, weights_size
from hf_layercollapse.tables import markdown


STATES = ("dense", "collapsed")
FORMATS = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "stock": "PyTorch, stock class"}


@dataclass
class Subject:
    """A model to measure.

    Args:
        name (`str`): In words.
        auto_class: What loads it.
        dense (`PreTrainedModel`): As trained.
        config (`LayerCollapseConfig`): How it collapses.
        calibration (`list[dict]`): Model inputs.
        batch (`dict`): What is exported with, compared on and timed.
        processor (*optional*): Goes into the folders.
        score (`Callable`, *optional*): Accuracy of a model in [0, 1].
        past (`int`, *optional*): For a decoder: tokens in the cache when one more is timed.
    """

    name: str
    auto_class: type
    dense: torch.nn.Module
    config: LayerCollapseConfig
    calibration: list[dict]
    batch: dict
    processor: object = None
    score: Callable | None = None
    past: int | None = None


def minilm(arguments):
    """all-MiniLM-L6, fine-tuned for sentiment analysis."""
    options = QuickstartArguments(output_dir=str(arguments.output_dir / "training"), epochs=arguments.epochs)
    data = load_data(options)
    transformers.set_seed(0)
    model, tokenizer = load_pretrained(options, data)
    encoded = encode(options, data, tokenizer)
    make_trainer(options, model, encoded, tokenizer, options.output_dir, options.epochs, seed=0).train()
    labels = np.asarray(encoded["test"]["label"])

    def batches(split, rows):
        return [batch_of(encoded[split], range(i, min(i + 32, rows)), tokenizer, "cpu") for i in range(0, rows, 32)]

    test = batches("test", len(labels))

    @torch.no_grad()
    def score(model):
        return float(np.mean(np.concatenate([model(**batch).logits.argmax(-1).numpy() for batch in test]) == labels))

    return Subject(
        "all-MiniLM-L6, batch of 32 sentences",
        AutoModelForSequenceClassification,
        model.to("cpu").eval(),
        LayerCollapseConfig(keep_neurons=96),
        batches("train", 1024),
        first_batch(encoded["test"], tokenizer, "cpu"),
        tokenizer,
        score,
    )


def vit(arguments):
    """DeiT-small's and ViT-small's shape, random weights."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6)
    images = torch.randn(16, 3, 224, 224)
    return Subject(
        "ViT-small shape, batch of 2 images",
        AutoModelForImageClassification,
        AutoModelForImageClassification.from_config(config).eval(),
        LayerCollapseConfig(),
        [{"pixel_values": part} for part in images.split(4)],
        {"pixel_values": images[:2]},
    )


def smollm(arguments):
    """SmolLM2-135M's shape, some of its 30 layers, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=arguments.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    ids = torch.randint(0, 49152, (16, 65))
    return Subject(
        f"SmolLM2-135M shape, {arguments.layers} of 30 layers, one token after 64",
        AutoModelForCausalLM,
        AutoModelForCausalLM.from_config(config).eval(),
        LayerCollapseConfig(),
        [{"input_ids": part} for part in ids.split(4)],
        {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])},
        past=64,
    )


SUBJECTS = {"minilm": minilm, "vit": vit, "smollm2": smollm}


def main():
    arguments = parse()
    quiet()
    warnings.filterwarnings("ignore", category=FutureWarning)
    started = time.perf_counter()
    load_before = os.getloadavg()[0]
    rows = []
    for name in arguments.models:
        print_heading(f"{name}: {SUBJECTS[name].__doc__}")
        rows += measure(arguments, SUBJECTS[name](arguments), arguments.output_dir / name)
    setting = {
        "seconds": round(time.perf_counter() - started),
        "load_average": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "onnxruntime", "openvino", "torchao")},
    }
    (arguments.output_dir / "results.json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    text = markdown([HEAD, *map(cells_of, rows)])
    text += "\n\n" + ", ".join(f"{key} {value}" for key, value in setting.items())
    (arguments.output_dir / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\nWritten to {arguments.output_dir}/table.md and results.json.")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), help="what to measure")
    parser.add_argument("--epochs", type=float, default=2.0, help="epochs that all-MiniLM-L6 is fine-tuned for")
    parser.add_argument("--layers", type=int, default=8, help="layers of the decoder: tracing 30 takes a while")
    parser.add_argument("--rounds", type=int, default=20, help="how often each model is timed, in turn with the other")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/export"), help="where models and results go")
    return parser.parse_args()


def measure(arguments, subject, folder):
    """Rows of the table: one for each runtime."""
    shutil.rmtree(folder, ignore_errors=True)
    models = {"dense": subject.dense, "collapsed": copy.deepcopy(subject.dense)}
    collapse_model(models["collapsed"], subject.config, calibration_data=subject.calibration)
    step = None if subject.past is None else decoder_step(models["dense"], subject.batch, subject.past)
    for state, model in models.items():
        model.eval().save_pretrained(folder / state)
        if subject.processor is not None:
            subject.processor.save_pretrained(folder / state)
    rows = []

    def add(runtime, live, sizes, differences):
        timed = {state: cached(model, step) for state, model in live.items()}
        times = compare_latency(timed, subject.batch if step is None else step, arguments.rounds, progress=False)
        low, high = times["collapsed"].ratio_quartiles
        rows.append(
            {
                "model": subject.name,
                "runtime": runtime,
                "difference": differences,
                "bytes": sizes,
                "milliseconds": {state: times[state].median * 1e3 for state in STATES},
                "ratio": times["collapsed"].ratio,
                "ratio_quartiles": (low, high),
                "accuracy": {state: subject.score(live[state]) if subject.score else None for state in STATES},
            }
        )
        print("  ".join(cells_of(rows[-1])), flush=True)

    sizes = {state: weights_size(folder / state) for state in STATES}
    add("PyTorch", models, sizes, dict.fromkeys(STATES))
    for to, runtime in FORMATS.items():
        live, sizes_, differences = dict(models), dict(sizes), dict.fromkeys(STATES)
        for state in STATES if to != "stock" else ("collapsed",):
            report = export_model(models[state], subject.batch, folder / f"{state}-{to}", to)
            if report.stock is not None:
                print(report.stock)
            live[state], sizes_[state] = load_exported(folder / f"{state}-{to}"), report.bytes
            differences[state] = report.difference
        add(runtime, live, sizes_, differences)
        del live
        if to != "stock":  # nothing else needs them, and they are large
            for state in STATES:
                shutil.rmtree(folder / f"{state}-{to}")
    for kind, config in torchao_configs().items():
        live, sizes_, differences = {}, {}, {}
        for state in STATES:
            saved = folder / f"{state}-int8"
            live[state], differences[state] = quantized(subject, folder / state, saved, config, models[state])
            sizes_[state] = weights_size(saved)
            shutil.rmtree(saved)
        add(f"torchao, {kind}", live, sizes_, differences)
    return rows


def torchao_configs():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    return {"dynamic int8": Int8DynamicActivationInt8WeightConfig(), "weight-only int8": Int8WeightOnlyConfig()}


@torch.no_grad()
def quantized(subject, folder, saved, config, reference):
    """`(model, largest logit difference)`: quantized on loading, saved, and loaded again from there."""
    load = subject.auto_class.from_pretrained
    first = load(folder, quantization_config=TorchAoConfig(config)).eval()
    first.save_pretrained(saved)
    model = load(saved).eval()
    logits = model(**subject.batch).logits
    if not torch.equal(logits, first(**subject.batch).logits):
        raise SystemExit(f"{saved} does not compute the same after reloading.")
    return model, float((logits - reference(**subject.batch).logits).abs().max())


class StepOfPyTorch(torch.nn.Module):
    """One step of a PyTorch decoder that leaves the cache as it was: PyTorch's grows in place."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, past_key_values, **inputs):
        output = self.model(**inputs, past_key_values=past_key_values, use_cache=True)
        past_key_values.crop(-inputs["input_ids"].shape[1])
        return output


def cached(model, step):
    return StepOfPyTorch(model) if step is not None and isinstance(model, transformers.PreTrainedModel) else model


HEAD = ["model", "runtime", "logits, difference", "size", "latency", "relative (quartiles)", "accuracy"]


def cells_of(row):
    difference, low_high = row["difference"], row["ratio_quartiles"]
    return [
        row["model"],
        row["runtime"],
        ", ".join("-" if difference[state] is None else f"{difference[state]:.0e}" for state in STATES),
        ", ".join(f"{row['bytes'][state] / 1e6:.1f}" for state in STATES) + " MB",
        ", ".join(f"{row['milliseconds'][state]:.1f}" for state in STATES) + " ms",
        f"{row['ratio']:.2f} ({low_high[0]:.2f} to {low_high[1]:.2f})",
        ", ".join("-" if row["accuracy"][state] is None else f"{row['accuracy'][state]:.1%}" for state in STATES),
    ]


def _version(package):
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
