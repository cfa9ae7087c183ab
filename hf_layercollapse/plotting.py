"""Plots of linearity maps, plans and results. Needs matplotlib: `pip install "hf_layercollapse[plot]"`."""

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402


def plot_linearity(linearity, paths):
    """R^2 of every block, and what collapsing it alone costs.

    Args:
        linearity ([`planning.LinearityMap`]): What to show.
        paths (`Sequence[str]`): Files to write; the extension gives the format (`.png`, `.svg`, ...).
    """
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    indices = [block.index for block in linearity.blocks]
    above.bar(indices, [block.r2 for block in linearity.blocks], color="tab:blue")
    above.set_ylabel("$R^2$ of the linear map")
    above.set_ylim(0, 1)
    below.bar(indices, [block.score_change for block in linearity.blocks], color="tab:orange")
    below.axhline(0, color="black", linewidth=0.8)
    below.set_ylabel(f"change of the {linearity.score_name}")
    below.set_xlabel("feed-forward block")
    below.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, paths)


def plot_plan(plan, paths):
    """The curve of all plans, the chosen one marked.

    Args:
        plan ([`CollapsePlan`]): What to show.
        paths (`Sequence[str]`): As in [`plot_linearity`].
    """
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    dense = plan.curve[0].parameters
    shares = [100 * point.parameters / dense for point in plan.curve]
    axes.plot(shares, [point.score for point in plan.curve], marker=".", color="tab:blue")
    axes.plot(shares[plan.chosen], plan.point.score, marker="o", color="tab:red", label="chosen")
    axes.set_xlabel("parameters, % of the dense model")
    axes.set_ylabel(plan.score_name)
    axes.invert_xaxis()
    axes.legend()
    _save(figure, paths)


def plot_curves(results, paths, metric, label):
    """One line for each method of a benchmark.

    Args:
        results (`list[dict]`): With `method`, `ffn_share`, the metric, and optionally `interval` `(low, high)`.
        paths (`Sequence[str]`): As in [`plot_linearity`].
        metric (`str`): Key of the value, and label of its axis.
        label (`str`): Of the horizontal axis.
    """
    figure, axes = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    for method in dict.fromkeys(result["method"] for result in results):
        points = sorted((r["share"], r[metric], r.get("interval")) for r in results if r["method"] == method)
        shares = [100 * share for share, _, _ in points]
        if method == "dense":
            axes.axhline(points[0][1], color="black", linewidth=0.8, linestyle="--", label="dense")
            continue
        (line,) = axes.plot(shares, [value for _, value, _ in points], marker=".", label=method)
        if method == "plan" and all(interval for _, _, interval in points):
            low, high = zip(*(interval for _, _, interval in points), strict=True)
            axes.fill_between(shares, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel(f"{label}, %")
    axes.set_ylabel(metric)
    axes.invert_xaxis()
    axes.legend()
    _save(figure, paths)


def _save(figure, paths):
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
