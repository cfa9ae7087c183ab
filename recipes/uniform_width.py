"""What one width for all blocks, multiples of 64 and a missing constant term cost a decoder: perplexity, side by side.

    python recipes/uniform_width.py MODEL --fit wikitext2/valid.txt --test wikitext2/test.txt

Width cuts of every gated feed-forward block, without training. One pass over windows from all over the first text
gives the second moments of all neurons, one backward pass over three of them how much outputs matter to the loss.
Neurons are chosen in that metric, greedily, for every variant alike; weights are least squares. What differs is how
many neurons each block keeps (as many as the sum of expected losses wants, or all alike), in multiples of what, and
whether the fit has a constant term. Each is measured on the first windows of the second text. Writes `results.json`
and `table.md`.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from common import machine, versions
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_layercollapse import functional
from hf_layercollapse.blocks import bind_blocks
from hf_layercollapse.calibration import collect_moments
from hf_layercollapse.loss_metric import loss_metrics
from hf_layercollapse.merging import Trial, make_merge
from hf_layercollapse.profiling import count_parameters
from hf_layercollapse.tables import table


# (in words, all blocks alike, multiple of, constant term)
VARIANTS = [
    ("any widths, constant", False, 1, True),
    ("any widths", False, 1, False),
    ("any widths, multiples of 64", False, 64, False),
    ("one width, constant", True, 1, True),
    ("one width", True, 1, False),
    ("one width, multiple of 64", True, 64, False),
]


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


def of_neurons(moments):
    """The moments of the neurons alone."""
    width = moments.width
    kept = {"mean_f": moments.mean_f[width:], "cov_fo": moments.cov_fo[width:].clone()}
    return replace(moments, width=0, cov_ff=moments.cov_ff[width:, width:].clone(), **kept)


def curve(moments, metric):
    """`(neurons in the order of choice, expected loss in nats with the first k of them)`."""
    root, matrix = metric.root(), functional.shrunk(metric.matrix, metric.shrinkage)
    count, nothing = len(moments.neurons), moments.cov_ff.new_zeros(0, 0)
    order, explained = functional.greedy_neurons(moments.cov_ff, moments.cov_fo @ root, 0, count, given=nothing)
    # The whole: what the block gives, as its own neurons explain it.
    total = torch.trace(functional.regress(moments.cov_ff, moments.cov_fo).T @ moments.cov_fo @ matrix)
    return order, 0.5 * (total - explained).clamp_min(0)


def sizes(losses, room, multiple, alike):
    """Neurons of each block, `room` in all."""
    hidden = min(len(loss) for loss in losses.values()) - 1
    if alike:
        return dict.fromkeys(losses, room // len(losses) // multiple * multiple)
    steps = torch.arange(multiple, hidden + 1, multiple)
    low, high = 0.0, 1e3  # nats a neuron
    for _ in range(100):
        price = (low + high) / 2
        found = {name: int(steps[(loss[steps] + price * steps).argmin()]) for name, loss in losses.items()}
        low, high = (price, high) if sum(found.values()) > room else (low, price)
    return {name: int(steps[(loss[steps] + high * steps).argmin()]) for name, loss in losses.items()}


def measure(model, blocks, moments, orders, counts, test):
    """`(perplexity, parameters)` with these neurons."""
    with Trial() as trial:
        for block in blocks:
            positions = sorted(orders[block.name][: counts[block.name]])
            fit = moments[block.name].restricted(positions).fit(0)
            fit = replace(fit, right_ri=fit.right_ri.new_zeros(0, block.in_features))
            trial.put(make_merge(block, fit, refit=True))
        return perplexity(model, test), count_parameters(model)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A gated decoder: a folder, or a name on the Hub.")
    parser.add_argument("--fit", required=True, help="Text that is fitted to.")
    parser.add_argument("--test", required=True, help="Text that is measured on.")
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a window.")
    parser.add_argument("--fit_windows", type=int, default=16)
    parser.add_argument("--test_windows", type=int, default=8)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.9, 0.8], help="Shares of all parameters.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/uniform_width"))
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    fitting = windows(tokenizer, options.fit, options.length, options.fit_windows, spread=True)
    test = windows(tokenizer, options.test, options.length, options.test_windows, spread=False)
    blocks = bind_blocks(model)
    parameters, dense = count_parameters(model), perplexity(model, test)
    print(f"dense: {dense:.3f}", flush=True)
    metrics = loss_metrics(model, model, blocks, fitting[:: max(1, len(fitting) // 3)][:3])
    neurons = {block.name: list(range(block.hidden_features)) for block in blocks}
    moments = collect_moments(model, model, blocks, fitting, neurons)
    centred = {name: of_neurons(moments.pop(name)) for name in list(moments)}
    about = {True: centred, False: {name: found.without_constant() for name, found in centred.items()}}
    curves = {
        constant: {name: curve(found, metrics[name]) for name, found in moments.items()}
        for constant, moments in about.items()
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for size in options.sizes:
        saved = (1 - size) * parameters
        for name, alike, multiple, constant in VARIANTS:
            per_neuron = blocks[0].macs / blocks[0].hidden_features
            extra = sum(block.out_features for block in blocks) if constant else 0
            room = int(sum(block.hidden_features for block in blocks) - (saved + extra) / per_neuron)
            orders = {block: order for block, (order, _) in curves[constant].items()}
            losses = {block: loss for block, (_, loss) in curves[constant].items()}
            counts = sizes(losses, room, multiple, alike)
            value, left = measure(model, blocks, about[constant], orders, counts, test)
            expected = sum(float(losses[block][count]) for block, count in counts.items())
            results.append(
                {
                    "size": size,
                    "variant": name,
                    "perplexity": value,
                    "parameters": left,
                    "expected_loss": expected,
                    "widths": list(counts.values()),
                }
            )
            print(f"{size:.0%} {name}: {value:.3f}, {left / parameters:.2%}", flush=True)
            described = {key: str(value) for key, value in vars(options).items()}
            content = {"arguments": described, "dense": dense, "parameters": parameters, "results": results}
            content |= {"machine": machine(), "versions": versions()}
            (options.output_dir / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    rows = [["", *(f"{size:.0%} of parameters" for size in options.sizes)]]
    for name, *_ in VARIANTS:
        found = [row for row in results if row["variant"] == name]
        rows.append([name, *(f"{row['perplexity']:.2f} ({row['parameters'] / parameters:.2%})" for row in found)])
    (options.output_dir / "table.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
