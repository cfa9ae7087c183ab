"""The pictures of README and the pages: what the method does, and what came of it.

    python recipes/pictures.py

Writes `recipes/pictures/method.png` and `results.png`. The second is drawn from the runs in
`recipes/text_classification/minilm_sst2/sweep/results.json`. `linearity.png` and `plan.png` beside them are what
`layercollapse inspect --plot` and `layercollapse collapse --plot` drew; the page on the command line says of what.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from hf_layercollapse.plotting import COLORS


HERE = Path(__file__).parent
SWEEP = HERE / "text_classification" / "minilm_sst2" / "sweep" / "results.json"

BLUE, ORANGE, GREEN, PINK, _, SKY, GREY, BLACK = COLORS

# Runs of the sweep -> words, colour, marker, points that its last number stands higher.
METHODS = {
    "plan, healed, teacher": ("plan, then 300 steps with a teacher", BLUE, "o", -4),
    "plan, healed": ("plan, the same steps, no teacher", SKY, "v", 5),
    "width pruned, teacher": ("torch-pruning, the same steps and teacher", ORANGE, "s", 0),
    "dropped, last blocks": ("last blocks dropped, the same steps, no teacher", GREEN, "^", 0),
    "paper: PReLU, last blocks": ("penalty as in the paper (PReLU), no teacher; our code", PINK, "D", 0),
}


def draw_method(path):
    """A feed-forward block before, while, and after it is collapsed."""
    figure = Figure(figsize=(10, 2.75), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = ("as pretrained", "patched: alpha goes from 0 to 1", "collapsed")
    sizes = ("4.7 million weights", "the activation turns linear", "0.6 million weights")
    for axes, title, size in zip(panels, titles, sizes, strict=True):
        axes.set_xlim(0, 10)
        axes.set_ylim(-0.6, 6.4)
        axes.set_aspect("equal")
        axes.axis("off")
        axes.set_title(title, fontsize=12, fontweight="bold")
        axes.text(5, -0.5, size, ha="center", fontsize=11)
    for axes, alphas in ((panels[0], (0.0,)), (panels[1], (0.0, 0.35, 0.7, 1.0))):
        _flow(axes, "x", 0.1, 1.2)
        _matrix(axes, 1.3, 0.8, 1.1, 4.4, "up\n768 x\n3072")
        _activation(axes, alphas)
        _matrix(axes, 7.3, 0.8, 1.1, 4.4, "down\n3072\nx 768")
        _flow(axes, "y", 8.6, 9.6, left=False)
    axes = panels[2]
    _flow(axes, "x", 2.3, 3.4)
    _matrix(axes, 3.6, 1.6, 2.8, 2.8, "W, b\n768 x 768", color=BLUE)
    _flow(axes, "y", 6.5, 7.6, left=False)
    figure.savefig(path, dpi=110)


def _matrix(axes, x, y, width, height, words, color=GREY):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, alpha=0.3, edgecolor=color, linewidth=1.5))
    axes.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=9)


def _flow(axes, word, start, end, left=True):
    axes.add_patch(FancyArrowPatch((start + 0.3 * left, 3), (end - 0.3 * (not left), 3), arrowstyle="-|>", color=BLACK,
                                   mutation_scale=12))  # fmt: skip
    axes.text(start if left else end, 3, word, ha="center", va="center", fontsize=12, style="italic")


def _activation(axes, alphas):
    """GELU, and what it becomes."""
    z = np.linspace(-2.2, 2.2, 100)
    gelu = z / (1 + np.exp(-1.702 * z))
    axes.plot([2.8, 6.9], [3, 3], color=GREY, linewidth=0.6)
    axes.plot([4.85, 4.85], [1.0, 5.0], color=GREY, linewidth=0.6)
    for place, alpha in enumerate(alphas):
        last = place == len(alphas) - 1
        color = ORANGE if last else GREY
        values = (1 - alpha) * gelu + alpha * z
        axes.plot(4.85 + 0.85 * z, 3 + 0.85 * values, color=color, linewidth=2.4 if last else 1.2)
    name = "activation" if len(alphas) == 1 else "(1 - alpha) GELU + alpha line"
    axes.text(4.85, 5.45, name, ha="center", fontsize=9)


def draw_results(path):
    """Accuracy over what is left of the feed-forward weights, in words that need no other page."""
    runs = json.loads(SWEEP.read_text(encoding="utf-8"))["runs"]
    figure = Figure(figsize=(7.6, 4.3), layout="constrained")
    axes = figure.subplots()
    dense = mean(100 * run["quality"] for run in runs if run["name"] == "dense, same steps")
    axes.axhline(dense, color=BLACK, linewidth=1, linestyle=(0, (5, 4)))
    axes.text(-5, dense + 0.15, f"the whole model: {dense:.1f}", fontsize=10, va="bottom", ha="right")
    for name, (words, color, marker, higher) in METHODS.items():
        points = {}
        for run in runs:
            if run["name"] == name:
                points.setdefault(run["share"], []).append((100 * run["feed_forward_share"], 100 * run["quality"]))
        seeds = [points[share] for share in sorted(points, reverse=True)]
        x = [mean(share for share, _ in found) for found in seeds]
        y = [mean(quality for _, quality in found) for found in seeds]
        low, high = ([bound(quality for _, quality in found) for found in seeds] for bound in (min, max))
        bars = [np.subtract(y, low), np.subtract(high, y)]
        axes.errorbar(x, y, yerr=bars, color=color, marker=marker, label=words, linewidth=2, capsize=3, markersize=7)
        axes.annotate(f"{y[-1]:.1f}", (x[-1], y[-1]), xytext=(9, higher), textcoords="offset points", va="center",
                      color=color, fontsize=10, fontweight="bold")  # fmt: skip
    axes.set_xlim(64, -6)
    axes.set_xlabel("feed-forward weights that are left, %")
    axes.set_ylabel("accuracy on SST-2, %")
    axes.set_title("MiniLM, collapsed: accuracy by what is left of its feed-forward blocks", fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(loc="lower left", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "pictures", help="folder for the pictures")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    draw_method(folder / "method.png")
    draw_results(folder / "results.png")


if __name__ == "__main__":
    main()
