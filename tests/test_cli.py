"""The command line, on tiny models and files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Wav2Vec2FeatureExtractor,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from typer.testing import CliRunner

from hf_layercollapse import LayerCollapseConfig, collapse_model, find_feed_forward_blocks
from hf_layercollapse.budgets import parse_budget
from hf_layercollapse.cli import app, example_inputs, read_data
from hf_layercollapse.cli_options import DataOptions
from hf_layercollapse.comparison import Comparison
from hf_layercollapse.loading import load_model, load_processor
from hf_layercollapse.upstream import TRANSFORMERS

from .command_line import WORDS, fails, lines_of_words, run, save_text_model
from .models import BY_NAME, needs_exporters, needs_torchvision, randomize, tiny_wav2vec2
from .test_stock import t5
from .words import word_tokenizer


@pytest.fixture
def classifier(tmp_path):
    """Folders of a tiny BERT with a tokenizer, and a file of text."""
    rows = [f"{line}\t{row % 3}" for row, line in enumerate(lines_of_words(160))]
    (tmp_path / "data.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return save_text_model(tmp_path / "model"), tmp_path / "data.tsv"


def test_inspect_lists_the_blocks(classifier, tmp_path):
    result = run("inspect", classifier[0], "--json-file", tmp_path / "blocks.json")
    assert result.exit_code == 0
    assert "bert.encoder.layer.2" in result.output and "16 -> 40 -> 16" in result.output
    assert json.loads((tmp_path / "blocks.json").read_text())[0]["macs"] == 1280


def test_inspect_measures_on_data(classifier, tmp_path):
    folder, data = classifier
    plot = tmp_path / "map.svg"
    result = run(
        "inspect",
        folder,
        "--data",
        data,
        "--label-column",
        "label",
        "--plot",
        plot,
        "--json-file",
        tmp_path / "a.json",
    )
    assert "R^2" in result.output and "divergence change" in result.output
    assert plot.read_text().startswith("<?xml")
    assert len(json.loads((tmp_path / "a.json").read_text())["blocks"]) == 3


def test_what_is_read_of_the_data_is_said(classifier, tmp_path, monkeypatch, capsys):
    """Among several columns of text none is guessed: the first may hold the same word in every row."""
    folder, data = classifier
    lines = [line.split("\t") for line in data.read_text().splitlines()[1:]]
    table = tmp_path / "lang.csv"
    table.write_text("lang,text,class\n" + "".join(f"w1 w2 w3,{text},{label}\n" for text, label in lines))
    arguments = ["inspect", folder, "--data", table]
    assert "['lang', 'text']: say which to read with `columns` (from the shell: --column)" in fails(
        monkeypatch, capsys, *arguments
    )
    assert "1 different rows" in fails(monkeypatch, capsys, *arguments, "--column", "lang")
    assert "Two columns can be read together at most" in fails(
        monkeypatch, capsys, *arguments, *["--column", "text"] * 3
    )
    tokens = sum(len(text.split()) for text, _ in lines)
    result = run(*arguments, "--column", "text", "--label-column", "class")
    assert result.exit_code == 0, result.output
    assert f"data: column text, 160 rows, 160 different, {tokens:,} tokens" in result.output
    result = run(*arguments, "--column", "lang", "--column", "text")
    assert f"data: column lang and text, 160 rows, 160 different, {tokens + 3 * 160:,} tokens" in result.output
    # The column of the class is no candidate.
    table.write_text("class,text\n" + "".join(f"w{label},{text}\n" for text, label in lines))
    assert "class indices" in fails(monkeypatch, capsys, *arguments, "--label-column", "class")


def test_how_much_of_the_data_is_read_is_said(classifier, tmp_path):
    folder, data = classifier
    result = run("inspect", folder, "--data", data, "--samples", 40, "--batch-size", 4, "--column", "sentence")
    assert "data: column sentence, 40 of 160 rows (--samples), 40 different, " in result.output
    assert "tokens, in batches of 4, on cpu" in result.output
    # Of a language model so many rows as a plan needs, from all over them.
    folder = save_text_model(tmp_path / "decoder", "gpt2")
    book = tmp_path / "book.txt"
    book.write_text(" ".join(lines_of_words(4000)))
    count = len(book.read_text().split())
    live = load_model(str(folder))
    options = replace(DataOptions(max_length=32, batch_size=32), split="train")
    read = read_data(live, load_processor(live, str(folder), options, False), str(book), options)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in read)
    assert 16_000 < tokens <= 16_384 < count
    assert f"{len(read._rows):,} of {-(-count // 32):,} rows (--samples)" in read.described("--samples")


def test_the_only_split_is_taken_and_said(classifier, tmp_path, monkeypatch, capsys):
    folder, data = classifier
    place = tmp_path / "folder"
    place.mkdir()
    rows = Dataset.from_csv(str(data), sep="\t")
    rows.to_csv(place / "rows.csv")
    compare = ["compare", folder, folder, "--label-column", "label", "--rounds", 2, "--data"]
    result = run(*compare, place)
    assert result.exit_code == 0 and "data: split train, the only one, column sentence, 160 rows" in result.output
    DatasetDict(test=rows).save_to_disk(tmp_path / "saved")
    assert (
        "data: split test, the only one, column sentence"
        in run("inspect", folder, "--data", tmp_path / "saved").output
    )
    # What was asked for is no other, and of several none is guessed.
    assert "split" in fails(monkeypatch, capsys, *compare, place, "--split", "test")
    DatasetDict(a=rows, b=rows).save_to_disk(tmp_path / "several")
    assert "no split 'test'; it has ['a', 'b']" in fails(monkeypatch, capsys, *compare, tmp_path / "several")


def test_memory_by_a_budget(classifier, tmp_path, monkeypatch, capsys):
    folder, data = classifier
    collapse = ["collapse", folder, "--data", data, "--output", tmp_path / "small", "--budget", "macs=0.4"]
    short_of = {"inspect": "new weights", "collapse": "alone needs"}
    for command in (["inspect", folder, "--data", data], collapse):
        assert "positive number of bytes" in fails(monkeypatch, capsys, *command, "--max-memory", "much")
        error = fails(monkeypatch, capsys, *command, "--max-memory", "20KB")
        assert short_of[command[0]] in error and "raise `max_memory`" in error
    assert run(*collapse, "--max-memory", "20MB").exit_code == 0


def test_labels_that_are_kept_secret(classifier, tmp_path, monkeypatch, capsys):
    folder, data = classifier
    secret = tmp_path / "secret.tsv"
    secret.write_text("\n".join(line.rsplit("\t", 1)[0] + "\t-1" for line in data.read_text().splitlines()[:20]))
    secret.write_text(secret.read_text().replace("sentence\t-1", "sentence\tlabel"))
    for command in (["inspect", folder], ["compare", folder, folder]):
        error = fails(monkeypatch, capsys, *command, "--data", secret, "--label-column", "label")
        assert "labels of [-1]" in error and "another split" in error


def test_collapse_saves_a_model_that_loads(classifier, tmp_path):
    folder, data = classifier
    output, plan, plot = tmp_path / "small", tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["--data", data, "--label-column", "label", "--output", output]
    result = run("collapse", folder, *arguments, "--budget", "macs=0.4", "--save-plan", plan, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert f'AutoModelForSequenceClassification.from_pretrained("{output}")' in result.output
    assert plot.stat().st_size > 1000
    loaded = AutoModelForSequenceClassification.from_pretrained(output)
    assert sum(block.macs for block in find_feed_forward_blocks(loaded)) <= 0.4 * 3 * 1280
    assert (output / "tokenizer.json").exists()
    # The same plan again.
    arguments[-1] = tmp_path / "again"
    assert run("collapse", folder, *arguments, "--plan", plan).exit_code == 0
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)
    assert "collapsed" in run("inspect", output).output
    # And a few steps towards the dense model.
    arguments[-1] = tmp_path / "recovered"
    result = run("collapse", folder, *arguments, "--plan", plan, "--recovery-steps", 8, "--recovery-batch-size", 16)
    assert "min or more" in result.output
    assert result.exit_code == 0 and "divergence from the teacher in nats" in result.output
    # The card of each says how it was made.
    cards = [(tmp_path / name / "README.md").read_text() for name in ("small", "recovered")]
    assert all("A plan for the budget `macs=0.4` chose which blocks" in card for card in cards)
    assert ["recovery of 8 steps" in card or "for 8 steps" in card for card in cards] == [False, True]
    recovered = AutoModelForSequenceClassification.from_pretrained(tmp_path / "recovered")
    assert recovered.state_dict().keys() == loaded.state_dict().keys()


@needs_torchvision
def test_images(tmp_path):
    folder = tmp_path / "model"
    BY_NAME["vit"].model().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    rng = np.random.default_rng(0)
    for index in range(80):
        place = tmp_path / "images" / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (9, 10, 3), dtype=np.uint8)).save(place / f"{index}.png")
    output = tmp_path / "small"
    result = run("collapse", folder, "--data", tmp_path / "images", "--budget", "macs=0.5", "--output", output)
    assert result.exit_code == 0, result.output
    assert "divergence" in result.output
    AutoModelForImageClassification.from_pretrained(output)


def test_compare(classifier, tmp_path):
    folder, data = classifier
    small, card, numbers = tmp_path / "small", tmp_path / "card.md", tmp_path / "comparison.json"
    common = ["--data", data, "--label-column", "label"]
    assert run("collapse", folder, *common, "--output", small, "--budget", "macs=0.5").exit_code == 0
    # The card that `collapse` wrote.
    written = ModelCard.load(small / "README.md")
    assert "layercollapse" in written.data.tags and "`bert.encoder.layer.2`" in written.text
    result = run(
        "compare", folder, small, *common, "--control", folder, "--rounds", "3", "--json", numbers, "--card", card
    )
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["dense", "control", "collapsed"] in lines
    (accuracy,) = [line for line in lines if line[:1] == ["accuracy"]]
    assert accuracy[1] == accuracy[3]
    assert "data.tsv" in result.output
    found = Comparison.load(numbers)
    assert found.examples == 160
    assert found["control"].differences["dense"] == (0, 0, 0)
    assert found["collapsed"].parameters < found["dense"].parameters
    assert found["collapsed"].bytes < found["dense"].bytes
    loaded = ModelCard.load(card)
    (entry,) = loaded.data.eval_results
    assert (entry.dataset_name, entry.metric_type) == ("data.tsv", "accuracy")
    assert entry.metric_value == pytest.approx(found["collapsed"].quality, abs=1e-6)
    assert f"Wrote the card {card}." in result.output
    # The one that `collapse` wrote keeps what it says, and what somebody wrote into it.
    (small / "README.md").write_text((small / "README.md").read_text() + "\nWords of my own.\n")
    for _ in range(2):
        result = run("compare", folder, small, *common, "--rounds", 2, "--card", small / "README.md")
        assert f"Added to the card {small / 'README.md'}" in result.output
    loaded = ModelCard.load(small / "README.md")
    before, after = written.text.split("<!-- End of the comparison. -->")
    assert loaded.text.startswith(before.rstrip()) and loaded.text.endswith(f"{after}\nWords of my own.\n")
    assert loaded.text.count("| accuracy |") == 1 and len(loaded.data.eval_results) == 1
    assert (
        loaded.data.to_dict().items() >= {k: v for k, v in written.data.to_dict().items() if k != "model_name"}.items()
    )


def test_cards_are_refused_before_the_work(classifier, tmp_path, monkeypatch, capsys):
    """One that cannot be read before models are loaded, and one of a dense model before data are read."""
    folder, broken = classifier[0], tmp_path / "broken.md"
    for head in ("a: [", "- a", "model-index: 3", "model-index:\n- name: a\n  results:\n  - metrics: []"):
        broken.write_text(f"---\n{head}\n---\nWords.\n")
        before = broken.read_bytes()
        asked = ["compare", "./gone", "./gone", "--data", "gone.txt", "--card", broken]
        assert f"--card {broken} cannot be read as a model card" in fails(monkeypatch, capsys, *asked)
        assert broken.read_bytes() == before
    asked = ["compare", folder, folder, "--data", "gone.txt", "--card", tmp_path / "card.md"]
    assert "The model is dense: a card says" in fails(monkeypatch, capsys, *asked)
    assert not (tmp_path / "card.md").exists()


def test_compare_without_labels(classifier, tmp_path):
    """By predictions; a classifier's accuracy is one option away, a masked language model has none."""
    folder, data = classifier
    result = run("compare", folder, folder, "--data", data, "--rounds", 2)
    assert result.exit_code == 0, result.output
    assert "divergence, nats" in result.output and "--label-column measures the accuracy" in result.output
    masked = tmp_path / "masked"
    randomize(AutoModelForMaskedLM.from_config(BY_NAME["bert"].config())).save_pretrained(masked)
    asked = ["--processor", folder, "--rounds", 2, "--json", tmp_path / "found.json"]
    result = run("compare", masked, masked, "--data", data, *asked)
    assert result.exit_code == 0, result.output
    assert "divergence: 160 examples of" in result.output and "--label-column" not in result.output
    assert json.loads((tmp_path / "found.json").read_text())["measured_in"] == "nats"


def test_compare_sounds(tmp_path):
    folder, data = tmp_path / "model", tmp_path / "sounds.parquet"
    tiny_wav2vec2().save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    waves = np.random.default_rng(0).normal(size=(16, 800))
    sounds = [{"array": wave.tolist(), "sampling_rate": 16_000} for wave in waves]
    Dataset.from_dict({"audio": sounds, "label": [0, 1] * 8}).to_parquet(data)
    result = run("compare", folder, folder, "--data", data, "--label-column", "label", "--rounds", 2)
    assert result.exit_code == 0, result.output
    assert "MACs per sound" in result.output and "accuracy: 16 examples" in result.output


def test_errors_are_one_line(classifier, tmp_path, monkeypatch, capsys):
    folder, data = classifier

    def error(*arguments):
        return fails(monkeypatch, capsys, *arguments)

    out = ["--output", tmp_path / "out"]
    assert "--budget" in error("collapse", folder, "--data", data, *out)
    assert "--budget must be" in error("collapse", folder, "--data", data, *out, "--budget", "size=3")
    assert "no such file" in error("collapse", folder, "--data", "gone.tsv", *out, "--budget", "macs=0.5")
    assert "no column 'x'" in error("inspect", folder, "--data", data, "--column", "x")
    assert "class indices" in error("inspect", folder, "--data", data, "--label-column", "sentence")
    assert "cannot be met" in error("collapse", folder, "--data", data, *out, "--budget", "parameters=0.01")
    assert "pass that too" in error(
        "collapse", folder, "--data", data, *out, "--budget", "macs=0.5", "--recovery-batch-size", 4
    )
    assert "pass --data" in error("inspect", folder, "--plot", "a.png")
    assert "must end in" in error("inspect", folder, "--plot", "a.bmp")
    assert "not an empty folder" in error(
        "collapse", folder, "--data", data, "--output", folder, "--budget", "macs=0.5"
    )
    error("inspect", tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


def test_latency(classifier, tmp_path):
    folder, data = classifier
    small = tmp_path / "small"
    run("collapse", folder, "--data", data, "--label-column", "label", "--budget", "macs=0.3", "--output", small)
    result = run("latency", folder, small, "--batch-size", 3, "--length", 12, "--rounds", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("eager: ") and "the MACs promise" in result.stdout
    assert "do not depend on the batch" in result.stdout


@needs_exporters
def test_export(classifier, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the extra onnx is not installed")
    folder, data = classifier
    small = tmp_path / "small"
    run("collapse", folder, "--data", data, "--label-column", "label", "--budget", "macs=0.3", "--output", small)
    output = tmp_path / "onnx"
    arguments = ["--to", "onnx", "--output", output, "--length", 12, "--batch-size", 3]
    result = run("export", small, *arguments, "--benchmark", folder)
    assert result.exit_code == 0, result.output
    assert "largest difference in ONNX Runtime" in result.stdout and "3 of 3" in result.stdout
    latencies = [line for line in result.stdout.split("\n") if line.endswith(tuple("0123456789")) and " ms " in line]
    assert [line.split()[0] for line in latencies] == [str(folder), str(small)]
    assert (output / "model.onnx").exists() and (output / "tokenizer.json").exists()


@needs_torchvision
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_export_to_stock(dtype, tmp_path):
    """In the dtype of the folder."""
    model = BY_NAME["vit"].model()
    data = [BY_NAME["vit"].inputs(seed=seed) for seed in range(20)]
    collapse_model(model, LayerCollapseConfig(rank=4), calibration_data=data)
    model.to(dtype).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    result = run("export", tmp_path / "model", "--to", "stock", "--output", tmp_path / "stock")
    assert result.exit_code == 0, result.output
    assert "intermediate_size 40 -> 8" in result.stdout
    assert (tmp_path / "stock" / "preprocessor_config.json").exists()
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["model_type"] == "vit" and f"torch.{config['dtype']}" == str(dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "stock" / "model.safetensors").values()} == {dtype}


def test_uniform_width(classifier, tmp_path):
    folder, data = classifier
    common = ["--data", data, "--budget", "macs=0.5", "--uniform-width", "--multiple-of", 8]
    result = run("collapse", folder, *common, "--output", tmp_path / "small")
    assert result.exit_code == 0, result.output
    blocks = find_feed_forward_blocks(AutoModelForSequenceClassification.from_pretrained(tmp_path / "small"))
    assert {(block.hidden_features, block.state) for block in blocks} == {(16, "collapsed")}


def test_an_encoder_decoder_gets_tokens_for_both_parts():
    tokenizer = word_tokenizer(["[PAD]", "[UNK]", *WORDS])
    inputs = example_inputs(t5(), tokenizer, 2, 5, 32)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        name: (2, 5) for name in ("input_ids", "attention_mask", "decoder_input_ids")
    }


def test_export_errors_are_one_line(classifier, tmp_path, monkeypatch, capsys):
    def error(*arguments):
        return fails(monkeypatch, capsys, "export", *arguments)

    out = ["--output", tmp_path / "out"]
    assert "must be one of" in error(classifier[0], "--to", "tflite", *out)
    assert "Expected a collapsed model" in error(classifier[0], "--to", "stock", *out)
    assert ("--dtype must be" if TRANSFORMERS >= (5, 23) else "needs transformers 5.23") in error(
        classifier[0], "--to", "onnx", "--dtype", "int8", *out
    )
    assert "not an empty folder" in error(classifier[0], "--to", "stock", "--output", classifier[0])
    assert not (tmp_path / "out").exists()


def test_budgets():
    assert parse_budget("macs=0.5") == {"macs": 0.5}
    assert parse_budget("parameters=1000000") == {"parameters": 1_000_000}
    assert parse_budget("max_drop=1") == {"max_drop": 1.0}
    with pytest.raises(ValueError, match="not a number"):
        parse_budget("macs=half")


@pytest.mark.parametrize("command", ["inspect", "collapse", "compare"])
def test_help_says_the_defaults(command):
    output = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert ("10000" if command == "compare" else "512") in output and "default" in output and "--max-length" in output
