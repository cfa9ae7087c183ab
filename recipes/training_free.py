"""Collapse a trained text classifier without training: accuracy over the feed-forward weights that are left.

    python recipes/training_free.py --model textattack/bert-base-uncased-SST-2 --dataset stanfordnlp/sst2
    python recipes/training_free.py --model runs/sst2 --train_file train.tsv --validation_file dev.tsv

Blocks, ranks and neurons are chosen, and maps fitted, on rows of the training split; the validation split is scored
once for each point. The methods, at the same number of feed-forward weights:

- plan: what `plan_collapse` chooses for each block;
- full rank + kept: every block a full linear map with as many neurons beside it as the size allows;
- width cut: no linear map, the best neurons only, output weights refitted by least squares;
- dropped: whole blocks give zero, first those whose loss costs least;
- identity, affine: every block the linear map that the two linear targets give at alpha = 1, without any fit.

Needs an hour on one CPU core for a model of 20 M parameters with the default sizes. Writes `results.json` and, with
matplotlib, `curve.png` and `curve.svg` into the output folder.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_layercollapse import (
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    plan_collapse,
)
from hf_layercollapse.families import modules_of
from hf_layercollapse.metrics import accuracy_interval, paired_difference
from hf_layercollapse.patching import alpha_parameters


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a trained sequence classifier: Hub name or folder")
    parser.add_argument("--dataset", help="Hub name of the data")
    parser.add_argument("--dataset_config", help="configuration of the data")
    parser.add_argument("--train_file", help="in place of --dataset: .csv, .tsv, .json")
    parser.add_argument("--validation_file", help="in place of --dataset")
    parser.add_argument("--text_column", default="sentence", help="column of the text")
    parser.add_argument("--label_column", default="label", help="column of the class")
    parser.add_argument("--fit_rows", type=int, default=1500, help="training rows that maps are fitted to")
    parser.add_argument("--score_rows", type=int, default=500, help="training rows that plans are scored on")
    parser.add_argument("--max_length", type=int, default=64, help="tokens a text is cut to")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.375, 0.25, 0.2, 0.1875, 0.15625, 0.125])
    parser.add_argument("--seed", type=int, default=0, help="of the choice of training rows")
    parser.add_argument("--output_dir", default="runs/training_free", help="where the results go")
    return parser.parse_args()


def load(args):
    if args.dataset:
        return datasets.load_dataset(args.dataset, args.dataset_config)
    files = {"train": args.train_file, "validation": args.validation_file}
    if args.train_file.endswith((".csv", ".tsv")):
        tabs = {"delimiter": "\t", "quoting": 3} if args.train_file.endswith(".tsv") else {}
        return datasets.load_dataset("csv", data_files=files, **tabs)
    return datasets.load_dataset("json", data_files=files)


def batches(rows, tokenizer, args, size=32):
    """Batches of texts of similar length, with labels."""
    rows = sorted(zip(rows[args.text_column], rows[args.label_column], strict=True), key=lambda row: len(row[0]))
    made = []
    for start in range(0, len(rows), size):
        texts, labels = zip(*rows[start : start + size], strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=args.max_length, return_tensors="pt")
        made.append({**batch, "labels": torch.tensor(labels)})
    return made


@torch.no_grad()
def right(model, data):
    """Whether each example is right."""
    model.eval()
    return np.concatenate([(model(**batch).logits.argmax(-1) == batch["labels"]).cpu().numpy() for batch in data])


def drop(model, blocks):
    """Makes blocks give zero."""
    for block in blocks:
        down = modules_of(model, block).down
        torch.nn.init.zeros_(down.weight)
        if down.bias is not None:
            torch.nn.init.zeros_(down.bias)


@torch.no_grad()
def loss(model, data):
    counts = [len(batch["labels"]) for batch in data]
    return sum(float(model(**batch).loss) * n for batch, n in zip(data, counts, strict=True)) / sum(counts)


def main():
    args = parse()
    started = time.time()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    data = load(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = data["train"].shuffle(seed=args.seed)
    fit = batches(train.select(range(args.fit_rows))[:], tokenizer, args)
    score = batches(train.select(range(args.fit_rows, args.fit_rows + args.score_rows))[:], tokenizer, args)
    test = batches(data["validation"][:], tokenizer, args)

    def model():
        return AutoModelForSequenceClassification.from_pretrained(args.model).eval()

    dense = model()
    blocks = find_feed_forward_blocks(dense)
    macs = sum(block.macs for block in blocks)
    dense_right = right(dense, test)
    results = []

    def add(method, made, plan=None):
        correct = right(made, test)
        left = sum(b.macs for b in find_feed_forward_blocks(made)) / macs if method != "dropped" else plan
        difference = paired_difference(correct, dense_right)
        results.append(
            {
                "method": method,
                "ffn_share": left,
                "accuracy": float(correct.mean()),
                "interval": accuracy_interval(int(correct.sum()), len(correct)),
                "difference_from_dense": difference,
            }
        )
        if method == "plan":
            results[-1]["choices"] = plan.point.choices
        print(f"{time.time() - started:6.0f} s  {method:18}  {left:6.1%}  {100 * correct.mean():.2f}", flush=True)
        write(args, output, results, started)

    add("dense", dense)
    for target in ("identity", "affine"):
        made = model()
        apply_layer_collapse(made, LayerCollapseConfig(linear_target=target), fit)
        for alpha in alpha_parameters(made):
            torch.nn.init.ones_(alpha)
        collapse_model(made)
        add(target, made)

    for share in args.shares:
        for method, rank in (("full rank + kept", None), ("width cut", 0)):
            made, first = model(), blocks[0]
            per_neuron = (first.in_features + first.out_features) + (first.kind == "gated") * first.in_features
            base = 0 if rank == 0 else first.in_features * first.out_features
            keep = round((share * first.macs - base) / per_neuron)
            if keep < 0:
                continue
            collapse_model(made, LayerCollapseConfig(rank=rank, keep_neurons=keep), fit)
            add(method, made)

    rising = []
    for block in blocks:
        made = model()
        drop(made, [block])
        rising.append((loss(made, score), block))
    order = [block for _, block in sorted(rising, key=lambda item: item[0])]
    for count in range(1, len(blocks) + 1):
        made = model()
        drop(made, order[:count])
        add("dropped", made, 1 - sum(block.macs for block in order[:count]) / macs)

    plan = plan_collapse(dense, fit, macs=min(args.shares), evaluation_data=score, whole_curve=True)
    plan.save(output / "plan.json")
    for share in args.shares:
        made, chosen = model(), plan.at(macs=share)
        collapse_model(made, plan=chosen, calibration_data=fit)
        add("plan", made, chosen)


def write(args, output, results, started):
    content = {
        "arguments": vars(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU thread(s)",
        "seconds": round(time.time() - started),
        "results": results,
    }
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    try:
        from hf_layercollapse.plotting import plot_curves
    except ImportError:
        return
    plot_curves(results, [output / "curve.png", output / "curve.svg"], "accuracy", "share of feed-forward weights")


if __name__ == "__main__":
    main()
