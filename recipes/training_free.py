"""Collapse a trained model without training: quality over the feed-forward weights that are left, all methods.

    python recipes/training_free.py text_classification --model_name_or_path textattack/bert-base-uncased-SST-2 \\
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --input_column sentence
    python recipes/training_free.py recipes/language_modeling/smollm2_wikitext2/training_free.yaml

The first word, or `task` in the YAML file, is text_classification, image_classification or language_modeling; the data
are given as to the script of that name. Blocks, ranks and neurons are chosen, and maps fitted, on rows of the training
split; the validation split is scored once for each point. The methods, each at every size:

- plan: what `plan_collapse` chooses for each block;
- kept neurons: every block a full linear map with as many neurons beside it as the size allows;
- width cut: no linear map, the best neurons only, output weights refitted by least squares;
- least squares, identity, affine, dropped: as many whole blocks as it takes become one linear map (fitted, or as the
  two linear targets give it at alpha = 1), or zero; first those whose loss costs least;
- layers replaced: consecutive whole layers, attention included, become one linear map that merges into the block
  before them (ReplaceMe, arXiv 2505.02819); for decoders.

An interrupted run goes on where it stopped. Writes `results.json`, `plan.json`, `table.md` and, with matplotlib,
`curve.png` and `curve.svg` into `--output_dir`.
"""

import contextlib
import functools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from common import DataArguments, machine, parse, versions
from controls import chosen_blocks, replace_layers, replaceable_layers
from tasks import TASKS
from tqdm.auto import tqdm

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model, functional, plan_collapse
from hf_layercollapse.calibration import collect_moments
from hf_layercollapse.merging import Trial, cost_of, make_merge
from hf_layercollapse.metrics import bootstrap_interval
from hf_layercollapse.patching import alpha_parameters
from hf_layercollapse.profiling import count_parameters


METHODS = ("plan", "kept neurons", "width cut", "least squares", "identity", "affine", "dropped", "layers replaced")


@dataclass
class TrainingFreeArguments:
    """Which points are measured, and on how much data."""

    task: str = field(default="text_classification", metadata={"help": f"One of {', '.join(TASKS)}."})
    sizes: list[float] = field(
        default_factory=lambda: [0.5, 0.375, 0.25, 0.2, 0.1875, 0.15625, 0.125],
        metadata={"help": "Shares of the feed-forward weights that are left, or with --of parameters of all weights."},
    )
    of: str = field(default="feed_forward", metadata={"help": "What sizes are shares of: feed_forward or parameters."})
    fit_samples: int = field(default=2000, metadata={"help": "Training rows that maps are fitted to."})
    score_samples: int = field(default=1000, metadata={"help": "Training rows that plans are scored on."})
    order_samples: int = field(default=500, metadata={"help": "How many of these order whole blocks."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to measure."})
    output_dir: str = field(default="runs/training_free", metadata={"help": "Where the results go."})

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"The task must be one of {', '.join(TASKS)}, got {self.task!r}.")
        if self.of not in ("feed_forward", "parameters"):
            raise ValueError(f"--of must be feed_forward or parameters, got {self.of!r}.")
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            raise ValueError(f"--methods must be of {', '.join(METHODS)}; got {', '.join(unknown)}.")


class Comparison:
    """One model, its data, and the results so far."""

    def __init__(self, arguments, data):
        self.arguments, self.data = arguments, data
        self.output = Path(arguments.output_dir)
        self.output.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()
        self.task = TASKS[arguments.task](data)
        self.model = self.task.make_model().eval().requires_grad_(False)
        self.fit = self.task.batches(arguments.fit_samples)
        self.scoring = self.task.batches(arguments.score_samples, skip=arguments.fit_samples)
        self.ordering = self.task.batches(
            min(arguments.order_samples, arguments.score_samples), skip=arguments.fit_samples
        )
        self.test = self.task.batches(validation=True)
        self.blocks = chosen_blocks(self.model, "all")
        self.macs = sum(block.macs for block in self.blocks)
        self.parameters = count_parameters(self.model)
        self.results = []
        self.add("dense", None, self.macs, write=False)
        self.results += self.done_before()

    def limits(self):
        """`(size, feed-forward weights that are left)` of each point."""
        for size in sorted(self.arguments.sizes, reverse=True):
            left = (
                self.macs * size if self.arguments.of == "feed_forward" else self.macs - (1 - size) * self.parameters
            )
            if left < 0:
                raise ValueError(f"Size {size} is smaller than the model without its feed-forward blocks.")
            yield size, left

    def done_before(self):
        """Points of an interrupted run with the same arguments."""
        path = self.output / "results.json"
        content = json.loads(path.read_text()) if path.exists() else None
        if content is None or content["arguments"] != self.described():
            return []
        self.started -= content["seconds"]
        return [result for result in content["results"] if result["method"] != "dense"]

    def described(self):
        """The arguments that a result depends on."""
        arguments = {**asdict(self.arguments), **asdict(self.data)}
        return {name: value for name, value in arguments.items() if name not in ("methods", "output_dir")}

    def left(self, method):
        """`(size, feed-forward weights that are left)` of each point that is still to be measured."""
        done = {(result["method"], result["size"]) for result in self.results}
        return [(size, left) for size, left in self.limits() if (method, size) not in done]

    def add(self, method, size, weights, removed=None, write=True, **more):
        """Scores the model as it is now; `removed`: weights outside the blocks that are gone too."""
        values = self.task.score(self.model, self.test).double().numpy()
        self.results.append(
            {
                "method": method,
                "size": size,
                "feed_forward_share": weights / self.macs,
                "parameter_share": 1 - (self.macs - weights + (removed or 0)) / self.parameters,
                "values": values,
                **more,
            }
        )
        result = self.results[-1]
        result.update(self.summary(values))
        done = f"{time.perf_counter() - self.started:6.0f} s  {method:16} {'' if size is None else size:<8}"
        print(f"{done} {self.task.metric} {result[self.task.metric]:.4g}", flush=True)
        if write:
            self.write()

    def summary(self, values):
        """The metric with its 95 % interval over examples, and the same for the distance from the dense model."""
        dense = self.results[0]["values"]
        return {
            self.task.metric: float(self.as_metric(values.mean())),
            "interval": bootstrap_interval(values, self.as_metric),
            "from_dense": float(self.as_metric((values - dense).mean())),
            "from_dense_interval": bootstrap_interval(values - dense, self.as_metric),
        }

    def as_metric(self, mean):
        """Mean negative log-likelihood -> perplexity; differences of it become ratios. An accuracy is a mean."""
        return np.exp(mean) if self.task.metric == "perplexity" else mean

    def write(self):
        results = [{k: v for k, v in result.items() if k != "values"} for result in self.results]
        content = {
            "arguments": self.described(),
            "metric": self.task.metric,
            "examples": len(self.results[0]["values"]),
            "parameters": self.parameters,
            "feed_forward_weights": self.macs,
            "seconds": round(time.perf_counter() - self.started),
            "versions": versions(),
            "machine": machine(),
            "results": results,
        }
        (self.output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.output / "table.md").write_text(table(content))
        with contextlib.suppress(ImportError):
            draw(content, [self.output / f"curve.{kind}" for kind in ("png", "svg")])

    # Methods

    @functools.cached_property
    def moments(self):
        """Of all neurons of every block, which is all that the methods without a plan need."""
        neurons = {block.name: list(range(block.hidden_features)) for block in self.blocks}
        return collect_moments(self.model, self.model, self.blocks, self.fit, neurons)

    def uniform(self, method, rank):
        """Every block alike: `rank` is 0, or `None` for full."""
        counts = {}
        for size, left in self.left(method):
            block = self.blocks[0]
            keep = int((left / self.macs * block.macs - cost_of(block, rank, 0)) / cost_of(block, 0, 1) + 1e-6)
            if keep > 0 or (keep == 0 and rank is None):
                counts[size] = keep
        if not counts:
            return
        orders = {}
        for block in tqdm(self.blocks, desc=f"Choosing neurons ({method})", leave=False):
            moments = self.moments[block.name]
            given = moments.cov_ff.new_zeros(0, moments.width) if rank == 0 else None
            # The first of them are the choice for every smaller size.
            orders[block.name], _ = functional.greedy_neurons(
                moments.cov_ff, moments.cov_fo, moments.width, max(counts.values()), given
            )
        for size, keep in counts.items():
            with Trial() as trial:
                for block in tqdm(self.blocks, desc=f"Fitting ({method})", leave=False):
                    fit = self.moments[block.name].restricted(sorted(orders[block.name][:keep])).fit(rank)
                    trial.put(make_merge(block, fit, refit=True))
                weights = sum(cost_of(block, rank, keep) for block in self.blocks)
                self.add(method, size, weights, kept_neurons=keep)

    def order(self, method, put):
        """The blocks in the order of what each costs alone."""
        rising = {}
        for block in tqdm(self.blocks, desc=f"Ordering ({method})", leave=False):
            with put(block):
                rising[block.name] = self.sign * float(self.task.score(self.model, self.ordering).double().mean())
        # Accuracies of single blocks are often equal: then the later block first.
        return sorted(reversed(self.blocks), key=lambda block: rising[block.name])

    def whole(self, method, put, cost):
        """As many blocks as it takes; `put(block)` is a context."""
        order = self.order(method, put)
        for size, left in self.left(method):
            chosen, weights = [], self.macs
            for block in order:
                if weights <= left * (1 + 1e-9):
                    break
                chosen.append(block)
                weights -= block.macs - cost(block)
            if weights > left * (1 + 1e-9):
                continue
            with contextlib.ExitStack() as stack:
                for block in chosen:
                    stack.enter_context(put(block))
                self.add(method, size, weights, blocks=[block.index for block in chosen])

    @property
    def sign(self):
        return -1 if self.task.metric == "accuracy" else 1

    def run(self, method):
        if not self.left(method):
            return
        if method == "kept neurons":
            self.uniform(method, None)
        elif method == "width cut":
            self.uniform(method, 0)
        elif method == "plan":
            self.plan()
        elif method == "dropped":
            self.whole(method, self.dropped, lambda block: 0)
        elif method == "least squares":
            merges = {
                block.name: make_merge(block, self.moments[block.name].restricted([]).fit(), refit=True)
                for block in self.blocks
            }
            self.whole(method, lambda block: self.merged(merges[block.name]), lambda block: cost_of(block, None, 0))
        elif method in ("identity", "affine"):
            model, self.model = self.model, self.task.make_model().eval().requires_grad_(False)
            apply_layer_collapse(self.model, LayerCollapseConfig(linear_target=method), self.fit)
            alphas = alpha_parameters(self.model)
            by_name = {block.name: alpha for block, alpha in zip(self.blocks, alphas, strict=True)}
            self.whole(method, lambda block: self.linear(by_name[block.name]), lambda block: cost_of(block, None, 0))
            self.model = model
        elif method == "layers replaced":
            self.replaced()

    @contextlib.contextmanager
    def merged(self, merge):
        with Trial() as trial:
            trial.put(merge)
            yield

    @contextlib.contextmanager
    def linear(self, alpha):
        """A block at alpha = 1 computes what it computes once collapsed."""
        alpha.data.fill_(1)
        yield
        alpha.data.fill_(0)

    @contextlib.contextmanager
    def dropped(self, block):
        handle = block.down.register_forward_hook(lambda module, args, y: torch.zeros_like(y))
        yield
        handle.remove()

    def plan(self):
        shares = [left / self.macs for _, left in self.limits()]
        plan = plan_collapse(self.model, self.fit, macs=shares[-1], evaluation_data=self.scoring, points=shares)
        plan.save(self.output / "plan.json")
        for size, left in self.left("plan"):
            chosen = plan.at(macs=left / self.macs)
            model, self.model = self.model, self.task.make_model().eval().requires_grad_(False)
            collapse_model(self.model, plan=chosen, calibration_data=self.fit)
            self.add("plan", size, chosen.point.macs, choices=chosen.point.choices)
            self.model = model

    def replaced(self):
        if not replaceable_layers(self.model):
            print("layers replaced: this model has no such layers", flush=True)
            return
        per_layer = sum(p.numel() for p in replaceable_layers(self.model)[0].parameters())
        for size, left in self.left("layers replaced"):
            count = math.ceil((self.macs - left) / per_layer - 1e-9)
            model, self.model = self.model, self.task.make_model().eval().requires_grad_(False)
            first = replace_layers(self.model, count, self.fit)
            gone = count * self.blocks[0].macs
            self.add(
                "layers replaced", size, self.macs - gone, count * per_layer - gone, layers=[first, first + count]
            )
            self.model = model


def _short(form):
    """A format for numbers that may be huge."""
    return lambda value: form.format(value) if value < 10_000 else form.replace("f}", "g}").format(value)


def table(content):
    """The results as Markdown: sizes down, methods across, the best of each size in bold."""
    dense, *results = content["results"]
    metric = content["metric"]
    methods = [method for method in METHODS if any(result["method"] == method for result in results)]
    if metric == "perplexity":
        best_of, shown, distance = min, _short("{:.1f}"), _short("x {:.2f}")
    else:
        best_of, shown, distance = max, lambda value: f"{100 * value:.1f}", lambda value: f"{100 * value:+.1f}"
    of = "feed-forward weights" if content["arguments"]["of"] == "feed_forward" else "parameters"
    lines = [f"| {of} left | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for size in dict.fromkeys(result["size"] for result in results):
        row = {result["method"]: result for result in results if result["size"] == size}
        best = shown(best_of(result[metric] for result in row.values()))
        cells = []
        for result in (row.get(method) for method in methods):
            if result is None:
                cells.append("")
                continue
            value = shown(result[metric])
            low, high = (distance(end) for end in result["from_dense_interval"])
            cells.append((f"**{value}**" if value == best else value) + f" ({low} to {high})")
        lines.append(f"| {100 * size:.4g} % | " + " | ".join(cells) + " |")
    low, high = (shown(value) for value in dense["interval"])
    lines.append(
        f"\nDense: {metric} {shown(dense[metric])} (95 % interval {low} to {high}) on {content['examples']:,} "
        "examples; in brackets the 95 % interval of the distance from it, paired by example (bootstrap)."
    )
    return "\n".join(lines) + "\n"


def draw(content, paths):
    """All methods in one picture, cut off where a method has lost ten points, or where its perplexity has tripled."""
    from hf_layercollapse.plotting import plot_tradeoff

    metric, results = content["metric"], content["results"]
    size = "feed_forward_share" if content["arguments"]["of"] == "feed_forward" else "parameter_share"
    dense, rows = results[0][metric], []
    for result in results:
        row = {"method": result["method"], "quality": result[metric], size: result[size]}
        if result["method"] == "plan":
            low, high = result["from_dense_interval"]
            row["interval"] = (dense * low, dense * high) if metric == "perplexity" else (dense + low, dense + high)
        rows.append(row)
    worse = metric == "perplexity"
    limits = (0.95 * dense, 3 * dense) if worse else (dense - 0.1, dense + 0.01)
    plot_tradeoff(rows, paths, metric, worse, size=size, limits=limits)


def main(words=None):
    words = sys.argv[1:] if words is None else list(words)
    if words and words[0] in TASKS:
        words = ["--task", *words]
    arguments, data = parse([TrainingFreeArguments, DataArguments], __doc__, words)
    comparison = Comparison(arguments, data)
    for method in arguments.methods:
        comparison.run(method)
    print("\n" + table(json.loads((comparison.output / "results.json").read_text())))


if __name__ == "__main__":
    main()
