"""Folders of sentence-transformers from the shell: what the object itself predicts counts, and comes back as one."""

import json
import sys

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router

from hf_layercollapse import (
    CalibrationData,
    LayerCollapseConfig,
    collapse_model,
    compare_models,
    linearity_map,
    plan_collapse,
)
from hf_layercollapse.cli import load_model
from hf_layercollapse.profiling import weights_size

from .command_line import fails, run
from .sentences import (
    OBJECTS,
    model_of,
    predictions_of,
    random_texts,
    save_encoder,
    sentence_transformer,
)


CLASSES = {"sentence": SentenceTransformer, **OBJECTS}
BATCH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> folder of an object; the `SentenceTransformer` is nothing like the mean of its tokens."""
    encoders = {kind: save_encoder(tmp_path_factory.mktemp("encoder"), kind) for kind in CLASSES}
    more = [Dense(16, 8), Normalize()]
    objects = {kind: model_of(kind, encoders) for kind in OBJECTS}
    objects["sentence"] = sentence_transformer(encoders["sentence"], *more, pooling_mode="cls", truncate_dim=6)
    saved = {kind: tmp_path_factory.mktemp(kind) / "dense" for kind in objects}
    for kind, model in objects.items():
        model.save_pretrained(str(saved[kind]), create_model_card=False)
    return saved


@pytest.fixture(scope="module")
def rows():
    """Those of one text, and those of pairs."""
    texts = random_texts(64, seed=1)
    return texts, list(zip(texts[:32], texts[32:], strict=True))


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    """`(arguments for texts, arguments for pairs)`."""
    folder = tmp_path_factory.mktemp("data")
    texts, pairs = folder / "texts.txt", folder / "pairs.jsonl"
    texts.write_text("\n".join(rows[0]) + "\n")
    Dataset.from_dict(dict(zip(("one", "other"), zip(*rows[1], strict=True), strict=True))).to_json(pairs)
    common = ["--batch-size", BATCH]
    return ["--data", texts, *common], ["--data", pairs, "--column", "one", "--column", "other", *common]


@pytest.fixture
def error(monkeypatch, capsys):
    return lambda *arguments: fails(monkeypatch, capsys, *arguments)


def plain(result):
    """A result as its JSON has it, without what took time or memory."""
    return untimed(json.loads(json.dumps(result.to_dict())))


def untimed(values):
    if isinstance(values, dict):
        return {k: untimed(v) for k, v in values.items() if not ("second" in k or "bytes" in k or "latency" in k)}
    return [untimed(value) for value in values] if isinstance(values, list) else values


@pytest.mark.parametrize("kind", CLASSES)
def test_a_folder_is_the_object_that_it_holds(kind, folders, rows, data, tmp_path):
    pairs = kind == "cross"
    dense, small, found, asked = folders[kind], tmp_path / "small", tmp_path / "found.json", data[pairs]
    model = CLASSES[kind](str(dense), device="cpu")
    read = CalibrationData(rows[pairs], model=model, batch_size=BATCH, samples=512)
    result = run("collapse", dense, *asked, "--budget", "macs=0.5", "--output", small, "--json", found)
    assert result.exit_code == 0, result.output
    assert f"from sentence_transformers import {CLASSES[kind].__name__}" in result.output
    told = untimed(json.loads(found.read_text()))
    plan = plan_collapse(model, read, macs=0.5)
    report = collapse_model(model, plan=plan, calibration_data=read)
    assert told["plan"] == plain(plan)
    assert told["report"] == plain(report)
    # It comes back as one, with all that it had.
    loaded, before = (CLASSES[kind](str(folder), device="cpu") for folder in (small, dense))
    assert [type(module) for module in loaded] == [type(module) for module in before]
    assert torch.equal(predictions_of(loaded), predictions_of(model.eval()))
    assert f'model = {CLASSES[kind].__name__}("' in (small / "README.md").read_text()


def test_inspected_and_compared(folders, rows, data, tmp_path):
    dense, small, found = folders["sentence"], tmp_path / "small", tmp_path / "found.json"
    models = {name: SentenceTransformer(str(dense), device="cpu") for name in ("dense", "collapsed")}
    read = CalibrationData(rows[0], model=models["dense"], batch_size=BATCH, samples=512)
    assert run("inspect", dense, *data[0], "--json", found).exit_code == 0
    assert untimed(json.loads(found.read_text())) == plain(linearity_map(models["dense"], read))
    collapse_model(models["collapsed"], LayerCollapseConfig(keep_neurons=3), calibration_data=read)
    models["collapsed"].save_pretrained(str(small), create_model_card=False)
    card = ["--card", small / "README.md"]
    assert run("compare", dense, small, *data[0], "--rounds", 2, "--json", found, *card).exit_code == 0
    expected = compare_models(models, read, rounds=2)["collapsed"]
    told = json.loads(found.read_text())
    assert told["metric"] == "divergence"
    assert told["models"][1]["quality"] == pytest.approx(expected.quality, rel=1e-6)
    # The `Dense` module's are in a folder of its own.
    weights = [file.stat().st_size for file in small.rglob("model.safetensors")]
    assert told["models"][1]["bytes"] == sum(weights) and len(weights) == 2
    assert "Divergence was measured on" in (small / "README.md").read_text()


def test_two_models_behind_a_router(folders, data, tmp_path):
    """In folders of their own: the texts collapse those blocks that read them."""
    parts = {name: list(SentenceTransformer(str(folders["sentence"]), device="cpu")) for name in ("query", "document")}
    model = SentenceTransformer(modules=[Router(parts, default_route="query")], device="cpu")
    model.save_pretrained(str(tmp_path / "dense"), create_model_card=False)
    small = tmp_path / "small"
    asked = ["--blocks", ".*query.*", "--budget", "macs=0.9", "--output", small]
    result = run("collapse", tmp_path / "dense", *data[0], *asked)
    assert result.exit_code == 0, result.output
    loaded = SentenceTransformer(str(small), device="cpu")
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    card = (small / "README.md").read_text()
    assert 'model = SentenceTransformer("' in card and "library_name: sentence-transformers" in card
    assert weights_size(small) < weights_size(tmp_path / "dense")


def test_an_older_cross_encoder(folders, tmp_path):
    """It had no list of modules: a key in the config told what it was."""
    older = tmp_path / "older"
    model = CrossEncoder(str(folders["cross"]), device="cpu")
    model.transformers_model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    model.transformers_model.save_pretrained(older)
    model.tokenizer.save_pretrained(older)
    loaded = load_model(str(older))
    assert isinstance(loaded, CrossEncoder) and isinstance(loaded.activation_fn, torch.nn.Identity)


def test_what_is_refused(folders, data, tmp_path, error, monkeypatch):
    sentence, cross = folders["sentence"], folders["cross"]
    out = ["--budget", "macs=0.5", "--output", tmp_path / "out"]
    assert "--processor is of transformers models; a SentenceTransformer has its own" in error(
        "inspect", sentence, *data[0], "--processor", sentence
    )
    assert "a CrossEncoder reads pairs" in error("collapse", cross, *data[0], *out)
    assert "cannot be compared on the same inputs" in error("compare", sentence, cross, *data[0])
    config = sentence / "config_sentence_transformers.json"
    other = tmp_path / "other"
    other.mkdir()
    (other / "modules.json").write_text("[]")
    values = json.loads(config.read_text())
    (other / config.name).write_text(json.dumps({**values, "model_type": "MultiVectorEncoder"}))
    assert "holds a MultiVectorEncoder of sentence-transformers; known are SentenceTransformer" in error(
        "inspect", other
    )
    # As where it is not installed.
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert "that needs sentence-transformers, pip install" in error("collapse", sentence, *data[0], *out)
    assert not (tmp_path / "out").exists()


def test_the_transformers_model_inside_is_timed(folders):
    result = run("latency", folders["sentence"], folders["sentence"], "--rounds", 2)
    assert result.exit_code == 0, result.output
