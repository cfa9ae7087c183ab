"""Pictures: that what is given is what is drawn."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from hf_layercollapse import plan_collapse, plotting
from hf_layercollapse.plotting import plot_alphas, plot_tradeoff
from tests.models import BY_NAME
from tests.training import trainer_for


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = plotting._save

    def keep(figure, paths):
        figures.append(figure)
        save(figure, paths)

    monkeypatch.setattr(plotting, "_save", keep)
    return figures


def test_a_notebooks_backend_stays(tmp_path):
    """Neither the import nor a plot touches pyplot, which a notebook may have set up for itself."""
    code = (
        "import sys, matplotlib; matplotlib.use('pdf'); from matplotlib import pyplot\n"
        "pyplot.figure(); from hf_layercollapse import plotting\n"
        f"plotting.plot_alphas([{{'step': 1, '{plotting.ALPHA}0': 0.5}}], [{str(tmp_path / 'a.png')!r}])\n"
        "assert matplotlib.get_backend() == 'pdf' and len(pyplot.get_fignums()) == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
    assert (tmp_path / "a.png").stat().st_size > 1000


def check_files(png, svg):
    with Image.open(png) as image:
        assert image.size[0] > 600 and len(image.convert("L").getcolors(10**6)) > 10
    assert svg.read_text().startswith("<?xml")


def test_alphas_of_a_run(tmp_path, drawn):
    trainer = trainer_for("bert", tmp_path, {"alpha_learning_rate": 0.2}, args={"max_steps": 5})
    trainer.train()
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    files = tmp_path / "alphas.png", tmp_path / "alphas.svg"
    plot_alphas(trainer.state.log_history, files)
    plot_alphas(str(tmp_path / "trainer_state.json"), [tmp_path / "again.png"], collapse_threshold=0.2)
    check_files(*files)
    for figure in drawn:
        curves = [line for line in figure.axes[0].lines if str(line.get_label()).startswith("block")]
        for block, line in enumerate(curves):
            assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
            logged = [log[f"layer_collapse/alpha/{block}"] for log in trainer.state.log_history[:5]]
            assert list(line.get_ydata()) == logged
        assert len(curves) == len({line.get_marker() for line in curves}) == 3
    with pytest.raises(ValueError, match="no alphas"):
        plot_alphas([{"step": 1, "loss": 2.0}], files)


def test_many_blocks_are_told_apart_by_a_scale(tmp_path, drawn):
    history = [{"step": s, **{f"layer_collapse/alpha/{b}": s / 9 for b in range(24)}} for s in range(10)]
    # The last block collapses half way.
    for log in history[5:]:
        del log["layer_collapse/alpha/23"]
    plot_alphas(history, [tmp_path / "many.png"])
    (figure,) = drawn
    assert len(figure.axes) == 2 and figure.axes[0].get_legend() is None
    assert [len(line.get_xdata()) for line in figure.axes[0].lines[:24]] == [10] * 23 + [5]


def test_quality_over_size_and_latency(tmp_path, drawn):
    rows = [{"method": "dense", "quality": 0.9, "parameters": 4_000_000, "latency": 1.0}]
    for seed in range(3):
        for parameters in (3_000_000, 2_000_000):
            quality = 0.8 + 0.01 * seed + parameters / 1e8
            latency = parameters / 4e6 + 0.02 * seed
            rows.append({"method": "ours", "quality": quality, "parameters": parameters, "latency": latency})
    rows.append({"method": "other", "quality": 0.7, "parameters": 1_000_000, "interval": (0.6, 0.75)})
    files = tmp_path / "curve.png", tmp_path / "curve.svg"
    plot_tradeoff(rows, files, quality="accuracy")
    check_files(*files)
    size, latency = drawn[0].axes
    found = {container.get_label(): container for container in size.containers}
    assert set(found) == {"dense", "ours", "other"}
    line, caps, bars = found["ours"]
    assert list(line.get_xdata()) == [2, 3] and list(line.get_ydata()) == pytest.approx([0.83, 0.84])
    (horizontal, vertical) = bars
    assert [list(segment[:, 1]) for segment in vertical.get_segments()] == [
        pytest.approx([0.82, 0.84]),
        pytest.approx([0.83, 0.85]),
    ]
    other = found["other"][2][1].get_segments()[0][:, 1]
    assert list(other) == pytest.approx([0.6, 0.75])
    # What was not timed is not in the second panel.
    timed = {container.get_label(): container for container in latency.containers}
    assert set(timed) == {"dense", "ours"}
    assert [list(segment[:, 0]) for segment in timed["ours"][2][0].get_segments()][0] == pytest.approx([0.5, 0.54])
    markers = [container[0].get_marker() for container in size.containers]
    assert len(set(markers)) == 3

    plot_tradeoff([{k: v for k, v in row.items() if k != "latency"} for row in rows], files, lower_is_better=True)
    assert len(drawn[1].axes) == 1 and drawn[1].axes[0].yaxis_inverted()


def test_shares_and_limits(tmp_path, drawn):
    rows = [
        {"method": "dense", "quality": 20.0, "parameter_share": 1.0},
        {"method": "ours", "quality": 25.0, "parameter_share": 0.5, "interval": (24.0, 27.0)},
        {"method": "other", "quality": 1000.0, "parameter_share": 0.5},
    ]
    files = tmp_path / "curve.png", tmp_path / "curve.svg"
    plot_tradeoff(rows, files, "perplexity", lower_is_better=True, size="parameter_share", limits=(19.0, 60.0))
    check_files(*files)
    (axes,) = drawn[0].axes
    assert axes.get_ylim() == (60.0, 19.0) and axes.get_xlabel() == "parameters left, %"
    found = {container.get_label(): container for container in axes.containers}
    assert list(found["ours"][0].get_xdata()) == [50]
    # An interval whose end is the point itself, but for rounding.
    rows[1].update(quality=0.1 + 0.2, interval=(0.1, 0.3))
    plot_tradeoff(rows, files, size="parameter_share")
    # Three seeds of one size, whose mean is above all of them by a rounding error.
    seeds = [{"method": "ours", "quality": 0.1, "parameter_share": 0.2, "setting": 0.2}] * 3
    plot_tradeoff(seeds, files, size="parameter_share")
    with pytest.raises(ValueError, match="`size` must be one of parameters"):
        plot_tradeoff(rows, files, size="weight")


def test_rows_that_lack_something():
    with pytest.raises(ValueError, match="no rows"):
        plot_tradeoff([], [])
    with pytest.raises(ValueError, match="needs `method`"):
        plot_tradeoff([json.loads('{"method": "a", "quality": 1}')], [])


def test_a_plan_with_what_is_expected_what_is_measured_and_what_it_was_compared_with(tmp_path, drawn):
    case = BY_NAME["bert"]
    batches = [case.inputs(seed=seed) for seed in range(24)]
    plan = plan_collapse(case.model(), batches, macs=0.3, points=[0.6, 0.3])
    files = tmp_path / "plan.png", tmp_path / "plan.svg"
    plotting.plot_plan(plan, files)
    check_files(*files)
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    expected, measured = lines["expected"].get_ydata(), lines["measured"].get_ydata()
    assert list(expected) == [point.expected for point in plan.curve]
    # The best candidate at each size but the chosen one; not the model as it is, which diverges by nothing.
    others = [point for point in plan.curve[1:] if point != plan.point]
    assert list(measured) == [point.score for point in others if point.score is not None] and len(measured) == 1
    assert list(lines["chosen"].get_ydata()) == [plan.point.score]
    compared = {point.name for point in plan.candidates if point not in plan.curve}
    found = {name.removeprefix("instead: "): line for name, line in lines.items() if name.startswith("instead")}
    assert compared and compared == found.keys()
    assert sum(len(line.get_ydata()) for line in found.values()) == len(plan.candidates) - 2
