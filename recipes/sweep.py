"""Many runs of a training recipe: every method at every size with every seed, and a table and a picture of them all.

    python recipes/sweep.py recipes/text_classification/minilm_sst2/sweep.yaml
    python recipes/sweep.py recipes/text_classification/minilm_sst2/sweep.yaml --seeds 0 --max_steps 10

What the YAML file holds:

- task: text_classification, image_classification or language_modeling, whose script's options these are;
- options: of every run;
- start (optional): further options of a run with which each seed begins; all others of the seed start from its model;
- sizes (optional): a list of variables, as `{share: 0.5, blocks: 3}`; `share` names a size;
- runs: name -> options. Where a value holds `{share}`, or another variable, there is one run for each size that has
  it; in all values `{seed}` and `{start}`, the folder of the first model, are variables too;
- seeds, output_dir, and what the picture shows: `picture`, a list of names of runs (optional).

An option on the command line holds for every run, before what the file says of that run. Runs that are done, with the
same options, are not done again, so an interrupted sweep goes on where it stopped, and several processes with other
`--seeds` share one folder. Writes `results.json`, `table.md` and, with matplotlib, `tradeoff.png` and `.svg`.
"""

import contextlib
import gc
import json
import shutil
import statistics
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from string import Formatter

import yaml
from common import ALTERNATIVES, run
from tasks import TASKS

from hf_layercollapse.tables import markdown


# Seeds of the runs that begin with a model of the sweep's own: other batches than those it has just seen.
FURTHER_SEED = 1000


@dataclass
class Sweep:
    """What the YAML file holds; see above."""

    task: str
    output_dir: str
    runs: dict[str, dict]
    options: dict = field(default_factory=dict)
    start: dict | None = None
    sizes: list[dict] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    picture: list[str] | None = None

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {self.task!r}.")
        if any("share" not in size for size in self.sizes):
            raise ValueError(f"Each of `sizes` needs a `share`, got {self.sizes}.")
        known = {"seed", "start", *(name for size in self.sizes for name in size)}
        for name, options in self.runs.items():
            if not _variables(options) <= known:
                raise ValueError(
                    f"Run {name!r} has variables that no size has: {sorted(_variables(options) - known)}."
                )
        unknown = sorted(set(self.picture or ()) - set(self.runs))
        if unknown:
            raise ValueError(f"`picture` names what is no run: {', '.join(unknown)}.")

    @classmethod
    def load(cls, path):
        values = yaml.safe_load(Path(path).read_text())
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{path} has keys that a sweep does not know: {', '.join(unknown)}.")
        return cls(**values)

    @property
    def folder(self):
        return Path(self.output_dir)

    def all_runs(self):
        """`(name, share or None, seed, options)` of every run, seed by seed; the start of a seed has the name None."""
        for seed in self.seeds:
            begin, start = {}, self.folder / "start" / f"seed{seed}"
            if self.start is not None:
                yield None, None, seed, {**self.options, **self.start, "seed": seed, "output_dir": str(start)}
                begin = {"model_name_or_path": str(start)}
            for name, options in self.runs.items():
                sized = any("{" in str(value) for value in _filled(options, {"seed": seed, "start": start}).values())
                for size in self.sizes if sized else [{}]:
                    if not _variables(options) <= size.keys() | {"seed", "start"}:
                        continue
                    share = size.get("share")
                    folder = self.folder / _file_name(name) / f"seed{seed}"
                    if share is not None:
                        folder = self.folder / _file_name(name) / f"{100 * share:.4g}" / f"seed{seed}"
                    variables = {**size, "seed": seed, "start": start}
                    yield (
                        name,
                        share,
                        seed,
                        {
                            **self.options,
                            **begin,
                            **_filled(options, variables),
                            "seed": seed + (FURTHER_SEED if begin else 0),
                            "output_dir": str(folder),
                        },
                    )


class _Open(dict):
    """Leaves variables that have no value yet as they stand."""

    def __missing__(self, name):
        return f"{{{name}}}"


def _filled(options, variables):
    return {
        name: value.format_map(_Open(variables)) if isinstance(value, str) else value
        for name, value in options.items()
    }


def _variables(options):
    """Names in braces."""
    texts = [value for value in options.values() if isinstance(value, str)]
    return {name for text in texts for _, name, _, _ in Formatter().parse(text) if name is not None}


def _file_name(name):
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def as_words(options):
    """Options as a command line; a model of the sweep's own takes the place of a new one."""
    left_out = ALTERNATIVES["model_name_or_path"] if "model_name_or_path" in options else ()
    for name, value in options.items():
        if name not in left_out:
            yield f"--{name}"
            yield from map(str, value if isinstance(value, list) else [value])


def do(sweep, command_line):
    """All runs that are not done yet."""
    task, start = TASKS[sweep.task], []
    for name, share, seed, options in sweep.all_runs():
        words = [*as_words(options), *command_line]
        start = words if name is None else start  # on which the runs that follow depend too
        path = Path(options["output_dir"]) / "run.json"
        if path.exists() and json.loads(path.read_text())["words"] == [start, words]:
            continue
        # Another model's plan, or half a run.
        shutil.rmtree(path.parent, ignore_errors=True)
        print(f"\n== {name or 'start'}, {'all weights' if share is None else f'{share:.4g}'}, seed {seed}", flush=True)
        results = run(task, __doc__, words)
        kept = {
            "name": name,
            "share": share,
            "seed": seed,
            "words": [start, words],
            "quality": results["after"][f"eval_{task.metric}"],
            "also": results["also"][f"also_{task.metric}"] if "also" in results else None,
            "before": results["before"][f"eval_{task.metric}"],
            **{key: results[key] for key in ("parameters", "feed_forward_share", "seconds", "versions", "machine")},
            "latency": results.get("latency"),
        }
        # Beside, and moved: a run that is there is done.
        path.with_suffix(".tmp").write_text(json.dumps(kept, indent=1) + "\n")
        path.with_suffix(".tmp").replace(path)
        gc.collect()


def report(sweep):
    """Writes the table and the picture of all runs that are done, those of other processes too."""
    rows = []
    for path in sorted(sweep.folder.glob("**/run.json")):
        row = json.loads(path.read_text())
        if row["name"] in sweep.runs:
            rows.append({key: value for key, value in row.items() if key != "words"})
    order = list(sweep.runs)
    rows.sort(key=lambda row: (order.index(row["name"]), -(row["share"] or 1), row["seed"]))
    metric = TASKS[sweep.task].metric
    content = {"metric": metric, "hours": sum(row["seconds"] for row in rows) / 3600, "runs": rows}
    (sweep.folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    text = table(content)
    if any(row.get("also") is not None for row in rows):
        text += "\nThe same on further rows:\n\n" + table(content, "also")
    (sweep.folder / "table.md").write_text(text)
    with contextlib.suppress(ImportError):
        draw(content, sweep.picture or order, [sweep.folder / f"tradeoff.{kind}" for kind in ("png", "svg")])
    return text


def shown(metric, value):
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.2f}"


def table(content, key="quality"):
    """Methods down, sizes across, as Markdown: the mean over seeds and their range, the best of each size in bold.

    Args:
        key (`str`): `"quality"`, or `"also"` for that on further rows; of runs that have it.
    """
    metric, runs = content["metric"], [run_ for run_ in content["runs"] if run_.get(key) is not None]
    shares = sorted({run["share"] or 1.0 for run in runs}, reverse=True)
    groups = {}
    for run_ in runs:
        groups.setdefault((run_["name"], run_["share"] or 1.0), []).append(run_)
    means = {cell: statistics.mean(run_[key] for run_ in group) for cell, group in groups.items()}
    best = {
        share: (max if metric == "accuracy" else min)(value for (_, size), value in means.items() if size == share)
        for share in shares
    }
    rows = [["method", *(f"{100 * share:.4g} %" for share in shares)]]
    for name in dict.fromkeys(run_["name"] for run_ in runs):
        cells = []
        for share in shares:
            group = groups.get((name, share))
            if group is None:
                cells.append("")
                continue
            value = shown(metric, means[name, share])
            cell = f"**{value}**" if value == shown(metric, best[share]) else value
            if len(group) > 1:
                low, high = (shown(metric, pick(run_[key] for run_ in group)) for pick in (min, max))
                cell += f" ({low} to {high})"
            left = statistics.mean(run_["feed_forward_share"] for run_ in group)
            if abs(left - share) > 0.01:
                cell += f" at {100 * left:.3g} %"
            times = [run_["latency"]["ratio"] for run_ in group if run_["latency"] is not None]
            cells.append(cell + (f", {statistics.mean(times):.2f}" if times else ""))
        rows.append([name, *cells])
    seeds = len({run_["seed"] for run_ in runs})
    spread = f"mean of {seeds} seeds (range)" if seeds > 1 else "one seed"
    times = ", and latency relative to the dense model" if any(run_["latency"] for run_ in runs) else ""
    return (
        f"{markdown(rows)}\n\n{metric.capitalize()}, {spread}, by what is left of the feed-forward weights (after "
        f"*at*, where a method leaves another part){times}.\n"
    )


def draw(content, names, paths):
    from hf_layercollapse.plotting import plot_tradeoff

    rows = [
        {
            # What all others are to be compared with is drawn as a level.
            "method": "dense" if run_["name"].startswith("dense") else run_["name"],
            "quality": run_["quality"],
            "feed_forward_share": run_["feed_forward_share"],
            "setting": run_["share"] or 1.0,
            **({"latency": run_["latency"]["ratio"]} if run_["latency"] else {}),
        }
        for run_ in content["runs"]
        if run_["name"] in names
    ]
    plot_tradeoff(rows, paths, content["metric"], content["metric"] == "perplexity", size="feed_forward_share")


def main(words=None):
    words = sys.argv[1:] if words is None else list(words)
    if words and words[0] in ("-h", "--help"):
        print(__doc__)
        return
    if not words or not words[0].endswith((".yaml", ".yml")):
        raise SystemExit(__doc__)
    sweep = Sweep.load(words.pop(0))
    for name, convert in (("seeds", int), ("output_dir", str)):
        if f"--{name}" in words:
            place = words.index(f"--{name}")
            stop = next((i for i in range(place + 1, len(words)) if words[i].startswith("--")), len(words))
            values = [convert(word) for word in words[place + 1 : stop]]
            setattr(sweep, name, values if name == "seeds" else values[0])
            del words[place:stop]
    do(sweep, words)
    print("\n" + report(sweep))


if __name__ == "__main__":
    main()
