"""Collapse a trained model without training: quality over the feed-forward weights that are left, all methods.

    python recipes/training_free.py text_classification --model_name_or_path textattack/bert-base-uncased-SST-2 \\
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --input_column sentence
    python recipes/training_free.py recipes/language_modeling/smollm2_wikitext2/training_free.yaml

The first word, or `task` in the YAML file, is text_classification, image_classification or language_modeling; the data
are given as to the script of that name. Blocks, ranks and neurons are chosen, and maps fitted, on rows of the training
split, in an order that is shuffled once: of a text they are windows from all over it. The validation split is scored
once for each point, and so are the rows of `--also_test`. The methods, each at every size:

- plan: what `plan_collapse` chooses for each block;
- plan, recovered: the same after `recover_model`, which sees the dense model's predictions and no label;
- rank 1/8 and neurons, full rank and neurons: every block alike, a linear map of that rank with as many neurons beside
  it as the size allows, chosen in the metric of the loss;
- width cut in the metric, width cut: no linear map, the best neurons only, output weights refitted by least squares;
  neurons chosen by the metric of the loss, or by plain variance;
- least squares, identity, affine, dropped: as many whole blocks as it takes become one linear map (fitted, or as the
  two linear targets give it at alpha = 1), or zero; first those whose loss costs least;
- layers replaced: consecutive whole layers, attention included, become one linear map that merges into the block
  before them (ReplaceMe, arXiv 2505.02819); for decoders.

With several `--seeds`, `{seed}` in `--model_name_or_path` is each of them in turn: dense models that were trained
alike. An interrupted run goes on where it stopped. Writes `results.json`, `plan-SEED.json` with a picture of it,
`table.md` and, with matplotlib, `curve.png` and `curve.svg` into `--output_dir`.
"""

import contextlib
import copy
import functools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from common import DataArguments, machine, parse, versions
from controls import chosen_blocks, replace_layers, replaceable_layers
from tasks import TASKS
from tqdm.auto import tqdm

from hf_layercollapse import (
    CollapsePlan,
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    plan_collapse,
    recover_model,
)
from hf_layercollapse.block_sizes import RANK_SHARES, alike, fit_size, sizes_of
from hf_layercollapse.calibration import Calibration
from hf_layercollapse.loss_metric import measure_metrics
from hf_layercollapse.merging import Trial, cost_of, has_constant, make_merge
from hf_layercollapse.metrics import bootstrap_interval
from hf_layercollapse.patching import alpha_parameters
from hf_layercollapse.predictions import predictions_of, without_labels
from hf_layercollapse.profiling import count_parameters
from hf_layercollapse.tables import markdown


# Methods in which every block is alike -> rank of the linear map as a share of the width, and whether neurons and maps
# are chosen in the metric of the loss.
ALIKE = {
    "rank 1/8 and neurons": (1 / 8, True),
    "full rank and neurons": (None, True),
    "width cut in the metric": (0.0, True),
    "width cut": (0.0, False),
}
METHODS = (
    "plan", "plan, recovered", *ALIKE, "least squares", "identity", "affine", "dropped", "layers replaced"
)  # fmt: skip


@dataclass
class TrainingFreeArguments:
    """Which points are measured, and on how much data."""

    task: str = field(default="text_classification", metadata={"help": f"One of {', '.join(TASKS)}."})
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "What {seed} in the model's name stands for, in turn."},
    )
    sizes: list[float] = field(
        default_factory=lambda: [0.5, 0.27, 0.2, 0.125, 0.0625],
        metadata={"help": "Shares of the feed-forward weights that are left, or with --of parameters of all weights."},
    )
    of: str = field(default="feed_forward", metadata={"help": "What sizes are shares of: feed_forward or parameters."})
    also_test: str | None = field(
        default=None, metadata={"help": "A file of further rows that every point is scored on too."}
    )
    fit_samples: int = field(default=2000, metadata={"help": "Training rows that maps are fitted to."})
    score_samples: int = field(default=1000, metadata={"help": "Training rows that plans are scored on."})
    order_samples: int = field(default=500, metadata={"help": "How many of these order whole blocks."})
    neurons_only: bool = field(default=False, metadata={"help": "Whether plans choose no linear maps."})
    recovery_samples: int = field(default=4000, metadata={"help": "Further training rows that a recovery sees."})
    recovery_steps: int = field(default=150, metadata={"help": "Of a recovery, at most."})
    recovery_sizes: list[float] | None = field(
        default=None, metadata={"help": "At which sizes the plan is recovered. Default: at all."}
    )
    recovery_bf16: bool = field(
        default=False, metadata={"help": "Whether a recovery runs under bfloat16 autocast; weights stay float32."}
    )
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


class Results:
    """What has been measured, and its files."""

    def __init__(self, arguments, data):
        self.arguments, self.data = arguments, data
        self.output = Path(arguments.output_dir)
        self.output.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()
        self.rows, self.facts = [], {}
        path = self.output / "results.json"
        content = json.loads(path.read_text()) if path.exists() else None
        # An interrupted run with the same arguments goes on.
        if content is not None and content["arguments"] == self.described():
            self.rows, self.started = content["results"], self.started - content["seconds"]

    def described(self):
        """The arguments that a result depends on."""
        arguments = {**asdict(self.arguments), **asdict(self.data)}
        which = ("methods", "output_dir", "seeds", "recovery_sizes")
        return {name: value for name, value in arguments.items() if name not in which}

    def has(self, seed, method, size):
        return any((row["seed"], row["method"], row["size"]) == (seed, method, size) for row in self.rows)

    def add(self, row):
        if not self.has(row["seed"], row["method"], row["size"]):
            self.rows.append(row)
            self.write()

    def write(self):
        content = {
            "arguments": self.described(),
            **self.facts,
            "seconds": round(time.perf_counter() - self.started),
            "versions": versions(),
            "machine": machine(),
            "results": self.rows,
        }
        (self.output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.output / "table.md").write_text(tables(content))
        with contextlib.suppress(ImportError):
            draw(content, [self.output / f"curve.{kind}" for kind in ("png", "svg")])


class Comparison:
    """One dense model, its data, and what its methods give."""

    def __init__(self, arguments, data, seed, results):
        self.arguments, self.seed, self.results = arguments, seed, results
        if data.model_name_or_path is not None:
            data = replace(data, model_name_or_path=data.model_name_or_path.replace("{seed}", str(seed)))
        self.task = TASKS[arguments.task](data)
        self.model = self.task.make_model().eval().requires_grad_(False)
        fitted, scored = arguments.fit_samples, arguments.score_samples
        self.fit = self.task.batches(fitted)
        self.scoring = self.task.batches(scored, skip=fitted)
        self.ordering = self.task.batches(min(arguments.order_samples, scored), skip=fitted)
        self.tests = {"validation": self.task.batches(validation=True)}
        if arguments.also_test is not None:
            path = arguments.also_test
            files = {"dataset_name": None, "dataset_config_name": None, "train_file": path, "validation_file": path}
            further = TASKS[arguments.task](replace(data, **files, max_train_samples=None, max_eval_samples=None))
            self.tests[Path(path).stem] = further.batches(validation=True)
        self.blocks = chosen_blocks(self.model, "all")
        self.macs = sum(block.macs for block in self.blocks)
        self.parameters = count_parameters(self.model)
        self.reference, self.dense_values = self.predictions(), {}
        examples = {name: sum(len(next(iter(b.values()))) for b in test) for name, test in self.tests.items()}
        results.facts = {
            "metric": self.task.metric,
            "examples": examples,
            "parameters": self.parameters,
            "feed_forward_weights": self.macs,
        }
        self.add("dense", None, self.macs)

    def limits(self):
        """`(size, feed-forward weights that are left)` of each point."""
        for size in sorted(self.arguments.sizes, reverse=True):
            left = (
                self.macs * size if self.arguments.of == "feed_forward" else self.macs - (1 - size) * self.parameters
            )
            if left < 0:
                raise ValueError(f"Size {size} is smaller than the model without its feed-forward blocks.")
            yield size, left

    def left(self, method):
        """`(size, feed-forward weights that are left)` of each point that is still to be measured."""
        return [(size, left) for size, left in self.limits() if not self.results.has(self.seed, method, size)]

    def add(self, method, size, weights, removed=None, **more):
        """Scores the model as it is now; `removed`: weights outside the blocks that are gone too."""
        row = {
            "seed": self.seed,
            "method": method,
            "size": size,
            "feed_forward_share": weights / self.macs,
            "parameter_share": 1 - (self.macs - weights + (removed or 0)) / self.parameters,
            "divergence": self.divergence(),
            "tests": {},
            **more,
        }
        for name, batches in self.tests.items():
            values = self.task.score(self.model, batches).double().numpy()
            row["tests"][name] = self.summary(values, self.dense_values.setdefault(name, values))
        self.results.add(row)
        shown = ", ".join(f"{name} {row['tests'][name][self.task.metric]:.4g}" for name in self.tests)
        seconds = time.perf_counter() - self.results.started
        at = "" if size is None else size
        print(f"{seconds:6.0f} s  {self.seed} {method:24} {at:<7} {shown}, KL {row['divergence']:.4g}", flush=True)

    def summary(self, values, dense):
        """The metric with its 95 % interval over examples, and the same for the distance from the dense model."""
        return {
            self.task.metric: float(self.as_metric(values.mean())),
            "interval": bootstrap_interval(values, self.as_metric),
            "from_dense": float(self.as_metric((values - dense).mean())),
            "from_dense_interval": bootstrap_interval(values - dense, self.as_metric),
        }

    def as_metric(self, mean):
        """Mean negative log-likelihood -> perplexity; differences of it become ratios. An accuracy is a mean."""
        return np.exp(mean) if self.task.metric == "perplexity" else mean

    @torch.no_grad()
    def predictions(self):
        """What the model as it is now predicts for the rows that plans are scored on."""
        return [
            predictions_of(self.model, batch, self.model(**without_labels(self.model, batch)))
            for batch in self.scoring
        ]

    def divergence(self):
        """Mean divergence from the dense model's predictions on the rows that plans are scored on."""
        pairs = [
            now.divergence_from(before)
            for found, reference in zip(self.predictions(), self.reference, strict=True)
            for now, before in zip(found, reference, strict=True)
        ]
        return float(torch.cat(pairs).double().mean())

    # Methods

    @functools.cached_property
    def moments(self):
        """Of all neurons of every block, which is all that the methods without a plan need."""
        neurons = {block.name: list(range(block.hidden_features)) for block in self.blocks}
        return Calibration.on(self.model, self.model, self.fit).moments(self.blocks, neurons)

    @functools.cached_property
    def metrics(self):
        """Of the loss, for every block."""
        return measure_metrics(Calibration.on(self.model, self.model, self.fit), self.blocks)[0]

    def uniform(self, method):
        """Every block alike."""
        share, in_metric = ALIKE[method]
        metrics = self.metrics if in_metric else {}
        sizes = {
            block.name: sizes_of(block, self.moments[block.name], metrics.get(block.name), (share,))
            for block in tqdm(self.blocks, desc=f"Choosing neurons ({method})", leave=False)
        }
        for size, left in self.left(method):
            chosen = alike(sizes, left, "macs", share, multiple_of=1)
            if chosen is None:
                continue
            choices = {name: (own.rank, sizes[name].neurons[own.rank][: own.count]) for name, own in chosen.items()}
            with self.fitted(choices, metrics):
                counts = {name: (own.rank, own.count) for name, own in chosen.items()}
                self.add(method, size, sum(own.macs for own in chosen.values()), choices=counts)

    @contextlib.contextmanager
    def fitted(self, choices, metrics):
        """Blocks with these ranks and neurons, fitted as `collapse_model` does it, but from one pass over the data for
        all sizes and methods."""
        with Trial() as trial:
            for block in tqdm(self.blocks, desc="Fitting", leave=False):
                if block.name not in choices:
                    continue
                rank, neurons = choices[block.name]
                moments = self.moments[block.name]
                if not has_constant(block, rank, "native"):
                    moments = moments.without_constant()
                fit = fit_size(moments, neurons, rank, metrics.get(block.name))
                trial.put(make_merge(block, fit, refit=True))
            yield

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
        if method in ALIKE:
            self.uniform(method)
        elif method == "plan":
            self.planned()
        elif method == "plan, recovered":
            self.recovered()
        elif method == "dropped":
            self.whole(method, self.dropped, lambda block: 0)
        elif method == "least squares":
            merges = {
                block.name: make_merge(block, self.moments[block.name].restricted([]).fit(), refit=True)
                for block in self.blocks
            }
            self.whole(method, lambda block: self.merged(merges[block.name]), lambda block: cost_of(block, None, 0))
        elif method in ("identity", "affine"):
            model, self.model = self.model, copy.deepcopy(self.model)
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

    @functools.cached_property
    def plan(self):
        """The plans of all sizes."""
        path = self.results.output / f"plan-{self.seed}.json"
        if any(row["method"] == "plan" and row["seed"] == self.seed for row in self.results.rows):
            return CollapsePlan.load(path)
        shares = [left / self.macs for _, left in self.limits()]
        how = {
            "evaluation_data": self.scoring,
            "points": shares,
            "rank_shares": (0.0,) if self.arguments.neurons_only else RANK_SHARES,
        }
        plan = plan_collapse(self.model, self.fit, macs=shares[-1], **how)
        plan.save(path)
        print(plan, flush=True)
        with contextlib.suppress(ImportError):
            from hf_layercollapse.plotting import plot_plan

            plot_plan(plan, [path.with_suffix(".png")])
        return plan

    def planned(self):
        for size, left in self.left("plan"):
            chosen = self.plan.at(macs=left / self.macs)
            choices = {
                name: (rank, self.plan.neurons[name]["full" if rank is None else str(rank)][:count])
                for name, (rank, count) in chosen.point.choices.items()
            }
            with self.fitted(choices, self.metrics):
                more = {"candidate": chosen.point.name, "choices": chosen.point.choices}
                self.add("plan", size, chosen.point.macs, **more)

    def recovered(self):
        for size, left in self.left("plan, recovered"):
            if self.arguments.recovery_sizes is not None and size not in self.arguments.recovery_sizes:
                continue
            chosen = self.plan.at(macs=left / self.macs)
            model, self.model = self.model, copy.deepcopy(self.model).requires_grad_(True)
            collapse_model(self.model, plan=chosen, calibration_data=self.fit)
            report = self.recover(model)
            self.model.requires_grad_(False)
            self.add("plan, recovered", size, chosen.point.macs, recovery=report)
            self.model = model

    def recover(self, teacher):
        """Trains the model as it is now towards the teacher's predictions; what that did, as plain data."""
        arguments = self.arguments
        self.model.get_input_embeddings().requires_grad_(False)
        rows = self.task.batches(arguments.recovery_samples, skip=arguments.fit_samples + arguments.score_samples)
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=arguments.recovery_bf16):
            report = recover_model(
                self.model, teacher, rows, max_steps=arguments.recovery_steps, evaluation_data=self.scoring
            )
        print(report, flush=True)
        return report.to_dict()

    def replaced(self):
        if not replaceable_layers(self.model):
            print("layers replaced: this model has no such layers", flush=True)
            return
        per_layer = sum(p.numel() for p in replaceable_layers(self.model)[0].parameters())
        for size, left in self.left("layers replaced"):
            count = math.ceil((self.macs - left) / per_layer - 1e-9)
            model, self.model = self.model, copy.deepcopy(self.model)
            first = replace_layers(self.model, count, self.fit)
            gone = count * self.blocks[0].macs
            self.add(
                "layers replaced", size, self.macs - gone, count * per_layer - gone, layers=[first, first + count]
            )
            self.model = model


def _short(form):
    """A format for numbers that may be huge."""
    return lambda value: form.format(value) if value < 10_000 else form.replace("f}", "g}").format(value)


def tables(content):
    """The results as Markdown: sizes down, methods across, the best of each size in bold; one table a test, and one of
    the divergence from the dense model."""
    metric, results = content["metric"], content["results"]
    of = "feed-forward weights" if content["arguments"]["of"] == "feed_forward" else "parameters"
    if metric == "perplexity":
        best_of, shown, distance = min, _short("{:.1f}"), _short("x {:.2f}")
    else:
        best_of, shown, distance = max, lambda value: f"{100 * value:.1f}", lambda value: f"{100 * value:+.1f}"
    dense = [row for row in results if row["method"] == "dense"]
    parts = []
    for name, examples in content["examples"].items():

        def cell(rows, name=name):
            values = [row["tests"][name][metric] for row in rows]
            if len(rows) < len(dense):
                return f"(seed {', '.join(str(row['seed']) for row in rows)})"
            if len(rows) > 1:
                return f"({shown(min(values))} to {shown(max(values))})"
            low, high = (distance(end) for end in rows[0]["tests"][name]["from_dense_interval"])
            return f"({low} to {high})"

        parts.append(_table(results, of, lambda row, name=name: row["tests"][name][metric], best_of, shown, cell))
        values = [row["tests"][name][metric] for row in dense]
        said = f"{name}: {metric} of the dense model {shown(np.mean(values))} on {examples:,} examples"
        if len(dense) > 1:
            parts.append(f"{said}, mean of {len(dense)} seeds; in brackets the range over seeds.")
        else:
            low, high = (shown(end) for end in dense[0]["tests"][name]["interval"])
            parts.append(
                f"{said} (95 % interval {low} to {high}); in brackets the 95 % interval of the distance from it, "
                "paired by example (bootstrap)."
            )
    parts.append(_table(results, of, lambda row: row["divergence"], min, "{:.4f}".format, lambda rows: ""))
    parts.append("Divergence from the dense model's predictions (nats) on the training rows that plans are scored on.")
    return "\n\n".join(parts) + "\n"


def _table(results, of, value, best_of, shown, bracket):
    methods = [method for method in METHODS if any(row["method"] == method for row in results)]
    lines = [[f"{of} left", *methods]]
    for size in sorted({row["size"] for row in results if row["size"] is not None}, reverse=True):
        found = {method: [r for r in results if (r["method"], r["size"]) == (method, size)] for method in methods}
        means = {method: float(np.mean([value(row) for row in rows])) for method, rows in found.items() if rows}
        best = shown(best_of(means.values()))
        cells = []
        for method, rows in found.items():
            mean = shown(means[method]) if rows else ""
            cells.append(f"{f'**{mean}**' if mean == best else mean} {bracket(rows)}".strip() if rows else "")
        lines.append([f"{100 * size:.4g} %", *cells])
    return markdown(lines)


def draw(content, paths):
    """All methods in one picture, cut off where a method has lost ten points, or where its perplexity has tripled; on
    the last of the tests."""
    from hf_layercollapse.plotting import plot_tradeoff

    metric, results = content["metric"], content["results"]
    size = "feed_forward_share" if content["arguments"]["of"] == "feed_forward" else "parameter_share"
    test = list(content["examples"])[-1]
    dense = float(np.mean([row["tests"][test][metric] for row in results if row["method"] == "dense"]))
    rows = []
    for result in results:
        found = result["tests"][test]
        row = {"method": result["method"], "quality": found[metric], size: result[size], "setting": result["size"]}
        if result["method"] == "plan":
            low, high = found["from_dense_interval"]
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
    results = Results(arguments, data)
    for seed in arguments.seeds:
        comparison = Comparison(arguments, data, seed, results)
        for method in arguments.methods:
            comparison.run(method)
    print("\n" + (results.output / "table.md").read_text())


if __name__ == "__main__":
    main()
