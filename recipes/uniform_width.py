"""What one width for all blocks, multiples of 64 and a missing constant term cost a decoder: perplexity, side by side.

    python recipes/uniform_width.py MODEL --fit wikitext2/valid.txt --test wikitext2/test.txt

Width cuts of every feed-forward block, without training: `plan_collapse` of neurons alone, in which blocks keep as
many as costs least or all alike, in multiples of something, with a constant term where the class has none or not.
Fitted to windows from all over the first text, chosen on others of it, measured on the first windows of the second.
Writes `results.json`, row by row, and `table.md`; an interrupted run goes on where it stopped, one with other
arguments begins anew.
"""

import argparse
import copy
import math
from pathlib import Path

import torch
from common import ResultsFile
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_layercollapse import collapse_model, plan_collapse
from hf_layercollapse.profiling import count_parameters
from hf_layercollapse.tables import table


ANY, ONE = {"rank_shares": (0.0,)}, {"uniform_width": True}


def variants(multiple_of):
    """In words -> options of `plan_collapse`."""
    return {
        "any widths, constant": {**ANY, "constant_term": "always"},
        "any widths": ANY,
        f"any widths, multiples of {multiple_of}": {**ANY, "multiple_of": multiple_of},
        "one width, constant": {**ONE, "constant_term": "always"},
        "one width": ONE,
        f"one width, multiple of {multiple_of}": {**ONE, "multiple_of": multiple_of},
    }


def windows(tokenizer, path, length, count, spread):
    """Batches of one window each: the first ones, or evenly spread over the text."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    whole = len(ids) // length
    starts = [index * whole // count if spread else index for index in range(count)]
    return [{"input_ids": ids[start * length : (start + 1) * length][None]} for start in starts]


@torch.no_grad()
def perplexity(model, batches):
    losses = [float(model(**batch, labels=batch["input_ids"]).loss) for batch in batches]
    return math.exp(sum(losses) / len(losses))


def measure(dense, size, options, fitting, held, test):
    """One row: a plan for this share of the parameters, collapsed and measured."""
    plan = plan_collapse(dense, fitting, parameters=size, evaluation_data=held, **options)
    model = copy.deepcopy(dense)
    collapse_model(model, plan=plan, calibration_data=fitting)
    return {
        "perplexity": perplexity(model, test),
        "parameters": count_parameters(model),
        "candidate": plan.point.name,
        "expected_divergence": plan.point.expected,
        "divergence": plan.point.score,
        "widths": [count for _, count in plan.point.choices.values()],
        "seconds": round(plan.seconds),
    }


class Results(ResultsFile):
    KEY = ("size", "variant")

    def __init__(self, options):
        self.variants = variants(options.multiple_of)
        described = {name: value for name, value in vars(options).items() if name not in ("output_dir", "sizes")}
        super().__init__(options.output_dir, described)

    def add(self, row):
        print(f"{row['size'] or ''} {row['variant']}: {row['perplexity']:.3f}, {row['parameters']:,}", flush=True)
        super().add(row)

    def finish(self, content):
        dense, *measured = content["results"]
        sizes = sorted({row["size"] for row in measured}, reverse=True)
        found = {}
        for row in measured:
            share = row["parameters"] / dense["parameters"]
            found[row["size"], row["variant"]] = f"{row['perplexity']:.2f} ({share:.2%})"
        rows = [["", *(f"{size:.0%} of parameters" for size in sizes)]]
        rows += [[name, *(found.get((size, name), "") for size in sizes)] for name in self.variants]
        (self.output / "table.md").write_text(table(rows) + "\n")


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A decoder: a folder, or a name on the Hub.")
    parser.add_argument("--fit", required=True, help="Text that is fitted to.")
    parser.add_argument("--test", required=True, help="Text that is measured on.")
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a window.")
    parser.add_argument("--fit_windows", type=int, default=16)
    parser.add_argument("--held_windows", type=int, default=2, help="Of the first text, to choose on.")
    parser.add_argument("--test_windows", type=int, default=8)
    parser.add_argument("--multiple_of", type=int, default=64)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.9, 0.8], help="Shares of all parameters.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/uniform_width"))
    options = parser.parse_args(words)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    every = windows(tokenizer, options.fit, options.length, options.fit_windows + options.held_windows, spread=True)
    held = every[:: len(every) // options.held_windows][: options.held_windows]
    fitting = [window for window in every if not any(window is other for other in held)]
    test = windows(tokenizer, options.test, options.length, options.test_windows, spread=False)
    results = Results(options)
    if not results.has(None, "dense"):
        dense = {"perplexity": perplexity(model, test), "parameters": count_parameters(model)}
        results.add({"size": None, "variant": "dense", **dense})
    for size in options.sizes:
        for name, how in results.variants.items():
            if not results.has(size, name):
                results.add({"size": size, "variant": name, **measure(model, size, how, fitting, held, test)})
    print((results.output / "table.md").read_text(), end="")


if __name__ == "__main__":
    main()
