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
- rank 1/8 and neurons, full rank and neurons, width cut in the metric: every block alike, a linear map of that rank
  (none) with as many neurons beside it as the size allows, chosen in the metric of the loss: what the plan was
  compared with, `plan.instead`;
- width cut: no linear map, the neurons that explain most of the output's variance only, output weights refitted by
  least squares, `LayerCollapseConfig(rank=0, keep_neurons=…)`; for models whose blocks are all of one width;
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
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from common import DataArguments, ResultsFile, parse
from controls import replace_layers, replaceable_layers
from tasks import TASKS
from tqdm.auto import tqdm

from hf_layercollapse import (
    CollapsePlan,
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    linearity_map,
    plan_collapse,
    prediction_divergence,
    recover_model,
)
from hf_layercollapse.metrics import bootstrap_interval
from hf_layercollapse.patching import alpha_parameters
from hf_layercollapse.profiling import cost_of, count_parameters, neurons_within
from hf_layercollapse.tables import markdown


# Methods in which every block is alike -> what plans call it, and the rank of its linear maps as a share of the width.
ALIKE = {
    "rank 1/8 and neurons": ("rank 1/8 and neurons", 1 / 8),
    "full rank and neurons": ("full rank and neurons", None),
    "width cut in the metric": ("width cut", 0.0),
}
METHODS = (
    "plan", "plan, recovered", *ALIKE, "width cut", "least squares", "identity", "affine", "dropped",
    "layers replaced"
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


class Results(ResultsFile):
    def __init__(self, arguments, data):
        described = {**asdict(arguments), **asdict(data)}
        which = ("methods", "output_dir", "seeds", "recovery_sizes")
        super().__init__(arguments.output_dir, {name: value for name, value in described.items() if name not in which})

    def finish(self, content):
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
        if data.also_test is not None:
            further = TASKS[arguments.task](self.task.data.to_also_test())
            self.tests[Path(data.also_test).stem] = further.batches(validation=True)
        self.blocks = find_feed_forward_blocks(self.model)
        self.macs = sum(block.macs for block in self.blocks)
        self.parameters = count_parameters(self.model)
        self.dense_values = {}
        examples = {name: sum(len(next(iter(b.values()))) for b in test) for name, test in self.tests.items()}
        results.facts = {
            "metric": self.task.metric,
            "examples": examples,
            "parameters": self.parameters,
            "feed_forward_weights": self.macs,
        }
        self.add("dense", None, self.macs, self.model)

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

    def add(self, method, size, weights, model, removed=None, **more):
        """Scores a model with so many feed-forward weights; `removed`: weights outside the blocks that are gone
        too."""
        row = {
            "seed": self.seed,
            "method": method,
            "size": size,
            "feed_forward_share": weights / self.macs,
            "parameter_share": 1 - (self.macs - weights + (removed or 0)) / self.parameters,
            "divergence": prediction_divergence(model, self.model, self.scoring),
            "tests": {},
            **more,
        }
        for name, batches in self.tests.items():
            values = self.task.score(model, batches).double().numpy()
            row["tests"][name] = self.summary(values, self.dense_values.setdefault(name, values))
        self.results.add(row)
        shown = ", ".join(f"{name} {row['tests'][name][self.task.metric]:.4g}" for name in self.tests)
        seconds = self.results.seconds()
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

    # Methods

    def collapsed(self, **how):
        """`(a copy of the dense model that is collapsed so, the report)`."""
        model = copy.deepcopy(self.model)
        return model, collapse_model(model, calibration_data=self.fit, **how)

    def alike(self, method):
        """What plans are compared with."""
        name, share = ALIKE[method]
        plan = self.plan
        if not any(point.name == name for point in plan.candidates):
            plan = self.make_plan((share,))
        for size, left in self.left(method):
            if not any(point.name == name and point.macs <= left * (1 + 1e-9) for point in plan.candidates):
                continue
            chosen = plan.instead(name, macs=left / self.macs)
            model, _ = self.collapsed(plan=chosen)
            self.add(method, size, chosen.point.macs, model, choices=chosen.point.choices)

    def width_cut(self):
        if len({(block.hidden_features, block.in_features) for block in self.blocks}) > 1:
            print("width cut: this model's blocks are of several widths", flush=True)
            return
        for size, left in self.left("width cut"):
            count = neurons_within(self.blocks[0], left / self.macs, rank=0)
            model, report = self.collapsed(config=LayerCollapseConfig(rank=0, keep_neurons=count))
            choices = {block.name: (0, block.kept_neurons) for block in report.blocks}
            self.add("width cut", size, sum(block.macs_after for block in report.blocks), model, choices=choices)

    def order(self, model, method, put):
        """The blocks in the order of what each costs alone."""
        rising = {}
        for block in tqdm(self.blocks, desc=f"Ordering ({method})", leave=False):
            with put(block):
                rising[block.name] = self.cost(model)
        return self.ordered(rising)

    def cost(self, model):
        """On the rows that order blocks; less is better."""
        return self.sign * float(self.task.score(model, self.ordering).double().mean())

    def ordered(self, rising):
        # Accuracies of single blocks are often equal: then the later block first.
        return sorted(reversed(self.blocks), key=lambda block: rising[block.name])

    def whole(self, method, order, cost):
        """`(size, weights left, blocks)` of each point: as many whole blocks as it takes, in this order."""
        for size, left in self.left(method):
            chosen, weights = [], self.macs
            for block in order:
                if weights <= left * (1 + 1e-9):
                    break
                chosen.append(block)
                weights -= block.macs - cost(block)
            if weights <= left * (1 + 1e-9):
                yield size, weights, chosen

    def put_whole(self, model, method, put, cost):
        """Whole blocks of a model; `put(block)` is a context."""
        for size, weights, chosen in self.whole(method, self.order(model, method, put), cost):
            with contextlib.ExitStack() as stack:
                for block in chosen:
                    stack.enter_context(put(block))
                self.add(method, size, weights, model, blocks=[block.index for block in chosen])

    def least_squares(self):
        found = linearity_map(
            self.model, self.fit, evaluation_data=self.ordering, metric=lambda model: -self.cost(model)
        )
        order = self.ordered({block.name: -block.score_change for block in found.blocks})
        for size, weights, chosen in self.whole("least squares", order, one_map):
            model, _ = self.collapsed(config=LayerCollapseConfig(blocks=[block.name for block in chosen]))
            self.add("least squares", size, weights, model, blocks=[block.index for block in chosen])

    def linear(self, target):
        """Alpha at 1, block by block: what a block computes then is what it computes once it is merged."""
        model = apply_layer_collapse(copy.deepcopy(self.model), LayerCollapseConfig(linear_target=target), self.fit)
        alphas = zip(self.blocks, alpha_parameters(model), strict=True)
        alphas = {block.name: alpha for block, alpha in alphas}

        @contextlib.contextmanager
        def put(block):
            alphas[block.name].data.fill_(1)
            yield
            alphas[block.name].data.fill_(0)

        self.put_whole(model, target, put, one_map)

    def dropped(self):
        model = copy.deepcopy(self.model)

        @contextlib.contextmanager
        def put(block):
            down = model.get_submodule(block.path(block.layout.down))
            handle = down.register_forward_hook(lambda module, args, y: torch.zeros_like(y))
            yield
            handle.remove()

        self.put_whole(model, "dropped", put, lambda block: 0)

    @property
    def sign(self):
        return -1 if self.task.metric == "accuracy" else 1

    def run(self, method):
        if not self.left(method):
            return
        if method in ALIKE:
            self.alike(method)
        elif method in ("identity", "affine"):
            self.linear(method)
        else:
            methods = {
                "plan": self.planned,
                "plan, recovered": self.recovered,
                "width cut": self.width_cut,
                "least squares": self.least_squares,
                "dropped": self.dropped,
                "layers replaced": self.replaced,
            }
            methods[method]()

    @functools.cached_property
    def plan(self):
        """The plans of all sizes."""
        path = self.results.output / f"plan-{self.seed}.json"
        if any(row["method"] == "plan" and row["seed"] == self.seed for row in self.results.rows):
            return CollapsePlan.load(path)
        plan = self.make_plan((0.0,)) if self.arguments.neurons_only else self.make_plan()
        plan.save(path)
        print(plan, flush=True)
        with contextlib.suppress(ImportError):
            from hf_layercollapse.plotting import plot_plan

            plot_plan(plan, [path.with_suffix(".png")])
        return plan

    def make_plan(self, rank_shares=None):
        """A plan with candidates at every size. Default: all ranks that plans choose from."""
        shares = [left / self.macs for _, left in self.limits()]
        how = {} if rank_shares is None else {"rank_shares": rank_shares}
        return plan_collapse(self.model, self.fit, macs=shares[-1], evaluation_data=self.scoring, points=shares, **how)

    def planned(self):
        for size, left in self.left("plan"):
            chosen = self.plan.at(macs=left / self.macs)
            model, _ = self.collapsed(plan=chosen)
            more = {"candidate": chosen.point.name, "choices": chosen.point.choices}
            self.add("plan", size, chosen.point.macs, model, **more)

    def recovered(self):
        for size, left in self.left("plan, recovered"):
            if self.arguments.recovery_sizes is not None and size not in self.arguments.recovery_sizes:
                continue
            chosen = self.plan.at(macs=left / self.macs)
            model = copy.deepcopy(self.model).requires_grad_(True)
            collapse_model(model, plan=chosen, calibration_data=self.fit)
            report = self.recover(model)
            self.add("plan, recovered", size, chosen.point.macs, model.requires_grad_(False), recovery=report)

    def recover(self, model):
        """Trains a model towards the dense model's predictions; what that did, as plain data."""
        arguments = self.arguments
        model.get_input_embeddings().requires_grad_(False)
        rows = self.task.batches(arguments.recovery_samples, skip=arguments.fit_samples + arguments.score_samples)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=arguments.recovery_bf16):
            report = recover_model(
                model, self.model, rows, max_steps=arguments.recovery_steps, evaluation_data=self.scoring
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
            model = copy.deepcopy(self.model)
            first = replace_layers(model, count, self.fit)
            gone, others = count * self.blocks[0].macs, count * (per_layer - self.blocks[0].macs)
            self.add("layers replaced", size, self.macs - gone, model, others, layers=[first, first + count])


def one_map(block):
    """What a block costs as one linear map."""
    return cost_of(block, None, 0)


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
