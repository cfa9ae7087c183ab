"""Plots of training, linearity maps, plans and results. Needs matplotlib: `pip install "hf_layercollapse[plot]"`.

For print: colours that differ to every kind of sight (Okabe and Ito, 2008), and in grey, since each also has a marker
and a line of its own.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .config import LayerCollapseConfig
from .planning import LinearityMap
from .plans import CollapsePlan, PlanPoint


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))
ALPHA = "layer_collapse/alpha/"
# More lines than this are told apart by a scale, and not by a legend.
MOST_LINES = 8
# Divergences below this are drawn as none, in nats.
LEAST_DIVERGENCE = 1e-5


def _style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the method at this place."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


def plot_alphas(
    history: Any,
    paths: Iterable[str | os.PathLike[str]],
    collapse_threshold: float = LayerCollapseConfig.collapse_threshold,
) -> None:
    """Alpha of every block over the steps of a training run, and where a block is ready to collapse.

    Args:
        history (`list[dict]` or `str`): `trainer.state.log_history`, or the path of a `trainer_state.json`.
        paths (`Sequence[str]`): Files to write; the extension gives the format (`.png`, `.svg`, ...).
        collapse_threshold (`float`): A block is ready once `1 - alpha` is at most this.

    Raises:
        ValueError: The history holds no alphas.
    """
    curves = _alpha_curves(history)
    figure, axes = _subplots(figsize=(6.5, 4))
    scale = matplotlib.colors.Normalize(min(curves), max(curves))
    # Without its lightest end, which is faint on paper.
    shades = matplotlib.colors.ListedColormap(matplotlib.colormaps["cividis"](np.linspace(0, 0.88, 256)))
    many = len(curves) > MOST_LINES
    for place, (block, curve) in enumerate(curves.items()):
        steps, alphas = zip(*curve, strict=True)
        style = {**_style(place), "markevery": (place * max(1, len(steps) // 40), max(1, len(steps) // 8))}
        if many:
            style = {"color": shades(scale(block)), "linewidth": 1}
        axes.plot(steps, alphas, label=f"block {block}", markersize=5, **style)
    axes.axhline(1 - collapse_threshold, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    # On the left, where curves are low.
    at_left = axes.get_yaxis_transform()
    axes.text(0.01, 1 - collapse_threshold, "ready", transform=at_left, va="bottom", fontsize="small")
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(r"$\alpha$ (0: as pretrained, 1: linear)")
    axes.grid(alpha=0.25, linewidth=0.5)
    if many:
        bar = figure.colorbar(matplotlib.cm.ScalarMappable(scale, shades), ax=axes, label="feed-forward block")
        locator: Any = bar.ax.yaxis.get_major_locator()
        locator.set_params(integer=True)
    else:
        axes.legend(loc="lower right", fontsize="small", frameon=False)
    _save(figure, paths)


def _alpha_curves(history: Any) -> dict[int, list[tuple[int, float]]]:
    """Index of a block -> `[(step, alpha)]`, in the order of the indices."""
    if not isinstance(history, list):
        history = json.loads(Path(history).read_text(encoding="utf-8"))["log_history"]
    logs = [log for log in history if any(name.startswith(ALPHA) for name in log)]
    if not logs:
        raise ValueError("There are no alphas in this history: it is not that of a training run with the penalty.")
    blocks = sorted({int(name.removeprefix(ALPHA)) for log in logs for name in log if name.startswith(ALPHA)})
    # A block that collapses while training runs has no alpha any more.
    return {
        block: [(log["step"], log[f"{ALPHA}{block}"]) for log in logs if f"{ALPHA}{block}" in log] for block in blocks
    }


# What a horizontal axis of sizes shows: key of a row -> its label and factor.
SIZES = {
    "parameters": ("parameters, millions", 1e-6),
    "parameter_share": ("parameters left, %", 100.0),
    "feed_forward_share": ("feed-forward weights left, %", 100.0),
}


def plot_tradeoff(
    rows: Sequence[Mapping[str, Any]],
    paths: Iterable[str | os.PathLike[str]],
    quality: str = "quality",
    lower_is_better: bool = False,
    latency_label: str = "latency, relative to dense",
    size: str = "parameters",
    limits: tuple[float, float] | None = None,
) -> None:
    """Quality over size and over measured time, all methods in one picture.

    Rows with the same method and the same `setting` are repetitions (seeds): a point is at their mean, and its bars
    go from the least to the greatest of them. What is called "dense" is drawn as a level too.

    Args:
        rows (`list[dict]`): With `method`, `quality`, the size, and optionally `latency` (panel left out if no
            row has one), `setting` (default: the size), and `interval`, `(low, high)` of the quality of a row, which
            is drawn where a point has one row only.
        paths (`Sequence[str]`): As in [`plot_alphas`].
        quality (`str`): Label of the vertical axis.
        lower_is_better (`bool`): Turns that axis round, so that better is up.
        latency_label (`str`): Of the horizontal axis of the second panel.
        size (`str`): Key of a row's size: `"parameters"`, a count, or `"parameter_share"` or `"feed_forward_share"`,
            which are in [0, 1].
        limits (`tuple[float, float]`, *optional*): Of the vertical axis, least value first. What lies outside is cut
            off, so that a method that fails does not flatten the others.

    Raises:
        ValueError: There are no rows, or one lacks a value.
    """
    if size not in SIZES:
        raise ValueError(f"`size` must be one of {', '.join(SIZES)}, got {size!r}.")
    missing = [row for row in rows if not {"method", "quality", size} <= row.keys()]
    if not rows or missing:
        raise ValueError(f"Each row needs `method`, `quality` and `{size}`; got {missing[:1] or 'no rows'}.")
    quantities = [(size, *SIZES[size])]
    if any("latency" in row for row in rows):
        quantities.append(("latency", latency_label, 1.0))
    figsize = (1 + 4 * len(quantities), 4.4)
    figure, panels = _subplots(1, len(quantities), sharey=True, squeeze=False, figsize=figsize)
    for axes, (key, label, factor) in zip(panels[0], quantities, strict=True):
        _draw_methods(axes, rows, key, factor, size)
        axes.set_xlabel(label)
        axes.invert_xaxis()
        axes.grid(alpha=0.25, linewidth=0.5)
    panels[0][0].set_ylabel(quality)
    panels[0][0].set_ylim(limits)
    if lower_is_better:
        panels[0][0].invert_yaxis()
    handles, labels = panels[0][0].get_legend_handles_labels()
    # As many columns as there is room for their words.
    columns = max(1, min(4, round(50 * len(quantities) / (8 + max(map(len, labels))))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    _save(figure, paths)


def _draw_methods(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, factor: float, size: str) -> None:
    """The points of every method in one panel, over `key`; "dense" last, and as a level too."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for place, method in enumerate(sorted(methods, key=lambda name: name == "dense")):
        points = _points([row for row in rows if row["method"] == method and key in row], key, factor, size)
        if not points:
            continue
        x, y, x_bars, y_bars = zip(*points, strict=True)
        style = _style(place)
        if method == "dense":
            style = {"color": "black", "marker": "*", "linestyle": "none", "markersize": 10}
            axes.axhline(y[0], color="black", linewidth=0.8, linestyle=(0, (5, 5)), zorder=1)
        axes.errorbar(
            x, y, xerr=np.transpose(x_bars), yerr=np.transpose(y_bars), label=method,
            **{"markersize": 5.5, "linewidth": 1.3, "elinewidth": 0.8, "capsize": 2.5, **style},
        )  # fmt: skip


def _points(rows: Sequence[Mapping[str, Any]], key: str, factor: float, size: str) -> list[Any]:
    """`(x, y, (below, above) of x, (below, above) of y)` of each setting, from small to large x."""
    settings: dict[str, Any] = {}
    for row in rows:
        settings.setdefault(row.get("setting", row[size]), []).append(row)
    points = []
    for group in settings.values():
        x, y = np.array([factor * row[key] for row in group]), np.array([row["quality"] for row in group])
        low, high = y.min(), y.max()
        if len(group) == 1 and group[0].get("interval") is not None:
            low, high = group[0]["interval"]
        points.append((x.mean(), y.mean(), _bars(x.mean(), x.min(), x.max()), _bars(y.mean(), low, high)))
    return sorted(points)


def _bars(point: float, low: float, high: float) -> tuple[float, float]:
    """`(below, above)`; a mean of equal values, and an interval's point, may lie outside by a rounding error."""
    return max(0.0, point - low), max(0.0, high - point)


def plot_linearity(linearity: LinearityMap, paths: Iterable[str | os.PathLike[str]]) -> None:
    """R^2 of every block, and what collapsing it alone costs.

    Args:
        linearity ([`planning.LinearityMap`]): What to show.
        paths (`Sequence[str]`): As in [`plot_alphas`].
    """
    figure, (above, below) = _subplots(2, 1, sharex=True, figsize=(7, 5))
    indices = [block.index for block in linearity.blocks]
    above.bar(indices, [block.r2 for block in linearity.blocks], color=COLORS[0])
    above.set_ylabel("$R^2$ of the linear map")
    above.set_ylim(min(0, *(block.r2 for block in linearity.blocks)), 1)
    below.bar(
        indices, [block.score_change for block in linearity.blocks], color=COLORS[1], hatch="//", edgecolor="white"
    )
    below.axhline(0, color="black", linewidth=0.8)
    below.set_ylabel(f"change of the {linearity.score_name}")
    below.set_xlabel("feed-forward block")
    below.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, paths)


def plot_plan(plan: CollapsePlan, paths: Iterable[str | os.PathLike[str]]) -> None:
    """What plans of every size are expected to lose, and what was measured: the curve, what it was compared with, and
    the chosen one.

    Args:
        plan ([`CollapsePlan`]): What to show.
        paths (`Sequence[str]`): As in [`plot_alphas`].
    """
    figure, axes = _subplots(figsize=(6, 4))
    dense = plan.curve[0].parameters

    def draw(points: Sequence[PlanPoint], value: Callable[[PlanPoint], float | None], **style: Any) -> None:
        points = [point for point in points if value(point) is not None]
        if points:
            shares = [100 * point.parameters / dense for point in points]
            axes.plot(shares, [value(point) for point in points], **style)

    curve = plan.curve
    style: dict[str, Any] = {"color": COLORS[0], "marker": "."}
    if plan.score_name == "divergence":
        draw(curve, lambda point: point.expected, color=COLORS[0], label="expected")
        # The dense model diverges by nothing from itself; the chosen one has its own mark.
        curve, style["linestyle"] = [point for point in curve[1:] if point != plan.point], "none"
    draw(curve, lambda point: point.score, label="measured", **style)
    others = [point for point in plan.candidates if point not in plan.curve]
    for place, name in enumerate(dict.fromkeys(point.name for point in others), start=2):
        style = {**_style(place), "linestyle": "none", "markersize": 7}
        draw(
            [point for point in others if point.name == name],
            lambda point: point.score,
            label=f"instead: {name}",
            **style,
        )
    draw([plan.point], lambda point: point.score, color=COLORS[1], marker="s", linestyle="none", label="chosen")
    if plan.score_name == "divergence":
        # What is compared may be a hundred times as far off.
        axes.set_yscale("log")
        axes.set_ylim(bottom=LEAST_DIVERGENCE)
        axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_xlabel("parameters, % of the dense model")
    axes.set_ylabel("divergence from the dense model" if plan.score_name == "divergence" else plan.score_name)
    axes.invert_xaxis()
    axes.legend(fontsize="small", frameon=False)
    _save(figure, paths)


def _subplots(
    rows: int = 1, columns: int = 1, figsize: tuple[float, float] | None = None, **kwargs: Any
) -> tuple[Figure, Any]:
    """A figure that is drawn for a file only: no window, and no backend of a notebook, is touched."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def _save(figure: Figure, paths: Iterable[str | os.PathLike[str]]) -> None:
    for path in paths:
        figure.savefig(path, dpi=150)
