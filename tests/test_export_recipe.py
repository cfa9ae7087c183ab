"""recipes/export.py, on a tiny model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_layercollapse import LayerCollapseConfig

from .models import BY_NAME, needs_exporters


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    """The script as a module, imported as when it is run."""
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino", "torchao"):
        pytest.importorskip(package, reason="the recipe needs the extras onnx, openvino and torchao")
    monkeypatch.syspath_prepend(str(RECIPES))
    import export

    yield export
    for name in ("export", "quickstart", "data", "data.uci_sentences"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@needs_exporters
def test_one_model_in_every_runtime(recipe, tmp_path, monkeypatch, capsys):
    case = BY_NAME["vit"]

    def tiny(arguments):
        return recipe.Subject(
            "tiny",
            case.auto_class,
            case.model(),
            LayerCollapseConfig(rank=4, keep_neurons=2),
            [case.inputs(seed=seed) for seed in range(20)],
            case.inputs(),
            score=lambda model: 0.5,
        )

    monkeypatch.setitem(recipe.SUBJECTS, "vit", tiny)
    monkeypatch.setattr(recipe, "quiet", lambda: None)
    arguments = SimpleNamespace(models=["vit"], output_dir=tmp_path, rounds=2, epochs=1, layers=1)
    monkeypatch.setattr(recipe, "parse", lambda: arguments)
    tiny.__doc__ = "A tiny model."
    recipe.main()

    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["runtime"] for row in rows] == [
        "PyTorch",
        "ONNX Runtime",
        "OpenVINO",
        "PyTorch, stock class",
        "torchao, dynamic int8",
        "torchao, weight-only int8",
    ]
    for row in rows[1:4]:
        assert row["difference"]["collapsed"] < 1e-5
    for row in rows[4:]:
        assert 0 < row["difference"]["collapsed"] < 0.5
    # In a graph of a model this small the weights are the least.
    assert all(row["bytes"][state] > 0 for row in rows for state in ("dense", "collapsed"))
    for row in (rows[0], rows[3]):
        assert row["bytes"]["collapsed"] < row["bytes"]["dense"]
    table = (tmp_path / "table.md").read_text().split("\n")
    assert all(line.count("|") == 8 for line in table[:8]) and "load_average" in table[-2]
    # What `layercollapse export` takes is left.
    assert {"dense", "collapsed"} <= {path.name for path in (tmp_path / "vit").iterdir()}
