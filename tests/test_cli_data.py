"""The command line on other people's files and places: what it reads, and what it refuses before the work."""

import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PillowImage
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_layercollapse import CollapsePlan
from hf_layercollapse.calibration_data import CalibrationData
from hf_layercollapse.cli import main
from hf_layercollapse.cli_options import new_folder
from hf_layercollapse.data_files import load_rows
from hf_layercollapse.modeling_layercollapse import SAVING_PREFIX
from hf_layercollapse.upstream import TRANSFORMERS

from .command_line import fails, lines_of_words, run, save_text_model
from .models import BY_NAME, needs_torchvision


LINES = lines_of_words(120)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """It takes 40 tokens."""
    return save_text_model(tmp_path_factory.mktemp("gpt2") / "model", "gpt2")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit") / "model"
    BY_NAME["vit"].model().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


@pytest.fixture
def error(monkeypatch, capsys):
    return lambda *arguments: fails(monkeypatch, capsys, *arguments)


def read(*arguments):
    """What `inspect` says of the data."""
    result = run("inspect", *arguments)
    assert result.exit_code == 0, result.output
    return next(line for line in result.stdout.splitlines() if line.startswith("data: "))


# ---- What people have ----

ROWS = [{"text": line, "label": index % 3} for index, line in enumerate(LINES)]


def _table(separator):
    return separator.join(["text", "label"]) + "\n" + "\n".join(f"{r['text']}{separator}{r['label']}" for r in ROWS)


FILES = {
    "a.csv": lambda path: path.write_text(_table(",")),
    "UP.CSV": lambda path: path.write_text(_table(",")),
    "a.Tsv": lambda path: path.write_text(_table("\t")),
    "a.csv.gz": lambda path: path.write_bytes(gzip.compress(_table(",").encode())),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.JSONL": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "a.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
    "a.arrow": lambda path: os.replace(_arrow(path.parent), path),
    "saved": lambda path: Dataset.from_list(ROWS).save_to_disk(path),
    "dict": lambda path: DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(path),
    "folder": lambda path: (path.mkdir(), (path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))),
}


def _arrow(folder):
    Dataset.from_list(ROWS).save_to_disk(folder / "whole")
    return folder / "whole" / "data-00000-of-00001.arrow"


@pytest.mark.parametrize("name", FILES)
def test_files_and_folders(name, bert, tmp_path):
    FILES[name](tmp_path / name)
    said = read(bert, "--data", tmp_path / name, "--label-column", "label")
    assert said.startswith("data: column text, 120 rows, 120 different") and "all there are (fewer than 512)" in said


def test_text_files(bert, gpt2, text_file, error):
    """A line is a text; of a language model's file all is one document, read to its end."""
    tokens = sum(len(line.split()) for line in LINES)
    assert f"column text, 120 rows, 120 different, {tokens} tokens" in read(bert, "--data", text_file)
    text_file.with_name("UP.TXT.gz").write_bytes(gzip.compress(text_file.read_bytes()))
    for path in (text_file, text_file.with_name("UP.TXT.gz")):
        said = read(gpt2, "--data", path)
        assert f"column text, {-(-tokens // 40)} rows of 1 text," in said and f"{tokens} tokens" in said
    folder = text_file.parent / "documents"
    folder.mkdir()
    for part in range(3):
        (folder / f"{part}.txt").write_text("\n".join(LINES[part::3]) + "\n")
    assert " rows of 3 texts, " in (said := read(gpt2, "--data", folder)) and f"{tokens} tokens" in said
    assert f"column text, 120 rows, 120 different, {tokens} tokens" in read(bert, "--data", folder)


def test_texts_longer_than_the_model_takes(gpt2, bert, tmp_path, error):
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(LINES[i : i + 20])}) for i in range(0, 120, 20)))
    tokens = sum(len(line.split()) for line in LINES)
    assert f"{tokens} tokens" in read(gpt2, "--data", path) and f"{tokens} tokens" in read(bert, "--data", path)
    assert "100 tokens are too long for this model, which takes 40" in error(
        "inspect", gpt2, "--data", path, "--max-length", "100"
    )
    result = run("latency", gpt2, gpt2, "--rounds", "2")
    assert result.exit_code == 0, result.output
    assert "which takes 40" in error("latency", gpt2, gpt2, "--length", "41")
    assert ("which takes 40" if TRANSFORMERS >= (5, 23) else "needs transformers 5.23") in error(
        "export", gpt2, "--to", "onnx", "--output", tmp_path / "x", "--length", "41"
    )


def test_conversations(gpt2, tmp_path, error):
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "user", "content": line}], "n": 1.5} for line in LINES]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert "no chat template" in error("inspect", gpt2, "--data", path)
    folder = tmp_path / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    tokenizer.chat_template = "{% for message in messages %}w0 {{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    tokens = sum(len(line.split()) + 1 for line in LINES)
    said = read(gpt2, "--data", path, "--processor", folder)
    assert f"column messages, 120 rows, 120 different, {tokens} tokens" in said
    assert "Column 'n' holds a float" in error("inspect", gpt2, "--data", path, "--column", "n")


def test_lists_and_numbers(bert, tmp_path, error):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"lists": ["w1", "w2", "w3"], "numbers": 3, "none": None}) for _ in range(9)))
    assert "'lists' holds a list of str" in error("inspect", bert, "--data", path, "--column", "lists")
    assert "'numbers' holds a int" in error("inspect", bert, "--data", path, "--column", "numbers")
    assert "all 9 rows are empty" in error("inspect", bert, "--data", path, "--column", "none")
    assert "no column with any text" in error("inspect", bert, "--data", path)


def test_names_of_classes(bert, tmp_path):
    """As the model's config spells them, or numbered by a data set."""
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "\n".join(f"{line},LABEL_{i % 3}" for i, line in enumerate(LINES)))
    assert "120 rows" in read(bert, "--data", path, "--label-column", "label")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_list(ROWS, features=features).save_to_disk(tmp_path / "classes")
    assert "120 rows" in read(bert, "--data", tmp_path / "classes", "--label-column", "label")
    path.write_text("text,label\n" + "\n".join(f"{line},{i % 3 if i else ''}" for i, line in enumerate(LINES)))
    assert "119 rows, 119 different" in (said := read(bert, "--data", path, "--label-column", "label"))
    assert "1 without a label left out" in said


@needs_torchvision
def test_folders_are_classes_by_their_names(tmp_path):
    """`compare` finds a model right that calls each image as the folder is called that it lies in."""
    model, processor = BY_NAME["vit"].model(), ViTImageProcessorPil(size={"height": 8, "width": 8})
    names = ["Real", "Fake", "Drawn"]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    rng = np.random.default_rng(0)
    images = [PillowImage.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(24)]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
        model.classifier.bias -= logits.mean(0)
        predicted = (logits - logits.mean(0)).argmax(-1).tolist()
    assert len(set(predicted)) > 1
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    for index, (image, number) in enumerate(zip(images, predicted, strict=True)):
        place = tmp_path / "images" / names[number]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{index}.png")
    asked = ["compare", tmp_path / "model", tmp_path / "model", "--data", tmp_path / "images", "--split", "train"]
    asked += ["--label-column", "label", "--rounds", "2"]
    result = run(*asked, "--json", tmp_path / "found.json")
    assert "classes by name: " in result.output
    assert json.loads((tmp_path / "found.json").read_text())["models"][0]["quality"] == 1.0
    (tmp_path / "images" / names[predicted[0]]).rename(tmp_path / "images" / "Painted")
    with pytest.raises(ValueError, match=r"\['Painted'\] is not one of these"):
        run(*asked)


@needs_torchvision
def test_only_images_that_are_used_are_decoded(vit, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for index in range(60):
        place = tmp_path / "images" / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        PillowImage.fromarray(rng.integers(0, 255, (9, 10, 3), dtype=np.uint8)).save(place / f"{index}.png")
    decoded, decode = [], Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *args, **kwargs: decoded.append(1) or decode(*args, **kwargs))
    passes = []
    whole = CalibrationData.__iter__
    monkeypatch.setattr(CalibrationData, "__iter__", lambda self: passes.append(1) or whole(self))
    assert "column image, 16 of 60 rows" in read(vit, "--data", tmp_path / "images", "--samples", "16")
    assert len(decoded) <= 16 * len(passes) + 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b"\n \n\n", "no column with any text"),
        ("latin.csv", b"text\ncaf\xe9 au lait\n", "is not UTF-8"),
        ("semi.csv", b"a;b\nx,y;1\nz;2\n", "more fields than its head names"),
        (
            "semi.csv",
            b"text;label\nw1 w2;1\nw3;0\n",
            "has one column, 'text;label', which looks like several with ';'",
        ),
        ("tabs.csv", b"text\tlabel\nw1 w2\t1\n", r"has one column, 'text\tlabel'"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3,4\n", "cannot be read"),
        ("broken.json", b'{"text": "a"', "cannot be read"),
        ("a.docx", b"PK", "ending that is not known; known are .csv"),
        ("a.parquet", b"no parquet", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, bert, tmp_path, error):
    (tmp_path / name).write_bytes(content)
    assert message in error("inspect", bert, "--data", tmp_path / name)


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_words_for_nothing_are_words(name, separator, tmp_path):
    """In a file, and in a folder of such files, which is read with the same options."""
    rows = [
        ("text", "class"),
        ("None", "NA"),
        ('"N/A' if separator == "\t" else "N/A", "None"),
        ("w1", ""),
        ("", "null"),
    ]
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / name, tmp_path / "folder" / name):
        path.write_text("\n".join(separator.join(row) for row in rows) + "\n")
        found = load_rows(str(path if path.parent == tmp_path else path.parent))
        assert found["text"][:] == [rows[1][0], rows[2][0], "w1", None] and found["class"][:] == [
            "NA",
            "None",
            None,
            "null",
        ]


def test_an_error_is_said_once(bert, tmp_path, monkeypatch, capfd):
    (tmp_path / "latin.csv").write_bytes(b"text\ncaf\xe9 au lait\n")
    monkeypatch.setattr(sys, "argv", ["layercollapse", "inspect", str(bert), "--data", str(tmp_path / "latin.csv")])
    with pytest.raises(SystemExit):
        main()
    assert capfd.readouterr().err.count("utf-8' codec") == 1


def test_what_is_not_there(bert, tmp_path, text_file, error):
    assert "no such file or folder" in error("inspect", bert, "--data", tmp_path / "none")
    assert "no such file or folder" in error("inspect", bert, "--data", "none.csv.gz")
    saved = tmp_path / "dict"
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(saved)
    assert "no split 'test'; it has ['train']" in error("compare", bert, bert, "--data", saved, "--split", "test")
    assert "there is no such folder" in error("inspect", tmp_path / "none")
    assert "it has no config.json" in error("inspect", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in error("inspect", tmp_path)


# ---- Refused before the work ----


@pytest.fixture
def unplanned(monkeypatch):
    """Fails if a model is loaded."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for name in ("load_model", "load_transformers_model"):
        monkeypatch.setattr(f"hf_layercollapse.cli.{name}", load)


def test_places_that_cannot_be_written(bert, text_file, tmp_path, error, unplanned):
    out, budget = ["--output", tmp_path / "out"], ["--budget", "macs=0.9"]
    collapse = ["collapse", bert, "--data", text_file]
    for option, name in (("--save-plan", "plan.json"), ("--plot", "plan.png"), ("--json", "out.json")):
        assert "there is no folder" in error(*collapse, *out, *budget, option, tmp_path / "no" / name)
    assert "is a folder" in error(*collapse, *out, *budget, "--save-plan", tmp_path)
    assert "cannot be made" in error(*collapse, *budget, "--output", "/proc/x3")
    assert "there is no folder" in error(*collapse, *budget, "--output", tmp_path / "no" / "out")
    assert "there is no folder" in error("inspect", bert, "--data", text_file, "--plot", tmp_path / "no" / "a.svg")
    compare = ["compare", bert, bert, "--data", text_file, "--label-column", "label"]
    assert "there is no folder" in error(*compare, "--card", tmp_path / "no" / "README.md")
    assert "there is no folder" in error("latency", bert, bert, "--json", tmp_path / "no" / "a.json")
    export = ["export", bert, "--to", "stock"]
    assert "there is no folder" in error(*export, "--output", tmp_path / "no" / "out")
    assert "not an empty folder" in error(*export, "--output", bert)
    assert "there is no folder" in error(*export, *out, "--json", tmp_path / "no" / "a.json")
    assert not (tmp_path / "out").exists()


def test_options_that_contradict(bert, text_file, tmp_path, error, unplanned):
    collapse = ["collapse", bert, "--data", text_file, "--output", tmp_path / "out"]
    plan = [*collapse, "--plan", tmp_path / "plan.json"]
    for more in (["--blocks", "last:2"], ["--uniform-width"], ["--multiple-of", "8"], ["--save-plan", "a.json"]):
        assert "--plan says which blocks" in error(*plan, *more)
    assert "Pass either" in error(*plan, "--budget", "macs=0.5")
    assert f"--plan {tmp_path / 'plan.json'}: there is no such file" in error(*plan)
    (tmp_path / "plan.json").write_text("[]")
    assert f"--plan {tmp_path / 'plan.json'}: This is no collapse plan" in error(*plan)
    (tmp_path / "plan.json").write_text("text")
    assert f"--plan {tmp_path / 'plan.json'} is not JSON" in error(*plan)
    for budget in ("macs=0", "macs=1.5", "parameters=-2", "latency=2", "max_drop=-1", "parameters=nan"):
        assert "must be" in error(*collapse, "--budget", budget)


def test_a_budget_that_cannot_be_met(bert, text_file, tmp_path, error, monkeypatch):
    def search(*args, **kwargs):
        raise AssertionError("the data was read")

    monkeypatch.setattr("hf_layercollapse.calibration.split_data", search)
    collapse = ["collapse", bert, "--data", text_file, "--output", tmp_path / "out"]
    assert "cannot be met" in error(*collapse, "--budget", "parameters=0.001")
    assert not list(tmp_path.glob(f"{SAVING_PREFIX}*"))


def test_devices(bert, text_file, error, unplanned):
    for device in ("cuda:7", "gpu", "meta", "ipu"):
        assert f"--device {device.split(':')[0]}" in error("inspect", bert, "--data", text_file, "--device", device)
        assert "--device" in error("latency", bert, bert, "--device", device)


def test_models_that_do_not_fit_together(bert, gpt2, vit, text_file, tmp_path, error):
    for command in (["compare", bert, gpt2, "--data", text_file], ["latency", bert, vit], ["latency", gpt2, bert]):
        assert "cannot be compared on the same inputs" in error(*command)
    headless = tmp_path / "headless"
    AutoModel.from_pretrained(bert).save_pretrained(headless)
    assert "cannot be compared on the same inputs" in error("compare", bert, headless, "--data", text_file)


def test_a_folder_without_a_head_or_a_tokenizer(bert, text_file, tmp_path, error):
    headless = tmp_path / "headless"
    AutoModel.from_pretrained(bert).save_pretrained(headless)
    assert "say where one is with --processor" in error("inspect", headless, "--data", text_file)
    out = ["--output", tmp_path / "small", "--budget", "macs=0.5", "--processor", bert]
    assert run("collapse", headless, "--data", text_file, *out).exit_code == 0
    assert type(AutoModel.from_pretrained(tmp_path / "small")).__name__ == "BertModel"
    compared = run("compare", headless, headless, "--data", text_file, "--split", "train", "--processor", bert)
    assert compared.exit_code == 0 and "divergence: 120 examples of" in compared.output
    weights = tmp_path / "small" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "weights of" in error("inspect", tmp_path / "small")


# ---- Scripts ----


def test_json_of_every_command(bert, text_file, tmp_path):
    """In a file, or on stdout, where words go to stderr then."""
    small = tmp_path / "small"
    data = tmp_path / "a.csv"
    data.write_text(_table(","))
    collapse = ["collapse", bert, "--data", data, "--budget", "macs=0.5", "--output", small]
    collapse += ["--recovery-steps", 2, "--uniform-width"]
    result = run(*collapse, "--json", tmp_path / "collapse.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "collapse.json").read_text())
    assert found["output"] == str(small) and found["report"]["blocks"] and found["recovery"]["curve"]
    assert CollapsePlan.from_dict(found["plan"]).budget == {"macs": 0.5}
    for command in (
        ["inspect", small],
        ["inspect", bert, "--data", text_file],
        ["compare", bert, small, "--data", data, "--label-column", "label", "--rounds", 2],
        ["latency", bert, small, "--rounds", 2],
        ["export", small, "--to", "stock", "--output", tmp_path / "stock"],
    ):
        result = run(*command, "--json", "-")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) and result.stderr
    (timed,) = json.loads(run("latency", bert, small, "--rounds", 2, "--json", "-").stdout)
    assert timed["mode"] == "eager" and timed["dense"]["seconds"] > 0 and timed["promised_by_macs"] > 1


def test_inspect_shows_what_a_collapse_left(bert, text_file, tmp_path):
    small = tmp_path / "small"
    assert run("collapse", bert, "--data", text_file, "--budget", "macs=0.4", "--output", small).exit_code == 0
    plan = CollapsePlan.from_dict(
        json.loads(
            run(
                *["collapse", bert, "--data", text_file, "--budget", "macs=0.4", "--output", tmp_path / "again"],
                *["--json", "-"],
            ).stdout
        )["plan"]
    )
    found = json.loads(run("inspect", small, "--json", "-").stdout)
    for block in found:
        rank, kept = plan.point.choices.get(block["name"], (None, None))
        if kept is not None:
            assert (block["rank"], block["hidden_features"]) == (16 if rank is None else rank, kept)
    words = run("inspect", small).output
    assert "kept neurons" in words.splitlines()[0] and "rank" not in run("inspect", bert).output


def test_versions_and_exit_codes():
    result = run("--version")
    assert result.exit_code == 0 and "hf_layercollapse" in result.output and "transformers" in result.output
    assert "130 interrupted" in " ".join(run("--help").output.split())
    assert run("inspect").exit_code == 2
    assert run("inspect", "x", "--no-such-option").exit_code == 2


def test_tracebacks_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["layercollapse", "--traceback", "inspect", str(tmp_path)])
    with pytest.raises(ValueError, match="no config.json"):
        main()


def test_code_that_comes_with_a_tokenizer(bert, text_file, tmp_path, error):
    folder = save_text_model(tmp_path / "own")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"], config["auto_map"] = "OwnTokenizer", {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    path.write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    assert "120 rows" in read(folder, "--data", text_file, "--trust-remote-code")


def test_an_estimate_before_the_long_part(bert, text_file, tmp_path):
    result = run("collapse", bert, "--data", text_file, "--budget", "macs=0.5", "--output", tmp_path / "small")
    assert "so all of it takes about 1 min" in result.output


def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("half way")
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "config.json").exists()


def test_interrupted(bert, text_file, tmp_path):
    """Ctrl-C in the middle of the work: exit code 130, and no folder."""
    arguments = ["collapse", bert, "--data", text_file, "--budget", "macs=0.5", "--output", tmp_path / "out"]
    arguments += ["--recovery-steps", "100000"]
    program = "from hf_layercollapse.cli import main; main()"
    # A program in the background of a shell, as these tests may be, ignores the signal, and so would what it starts.
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob(f"{SAVING_PREFIX}*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(f"{SAVING_PREFIX}*"))


def test_a_collapse_loads(bert, text_file, tmp_path):
    """What new_folder moved into its place is whole."""
    small = tmp_path / "small"
    assert run("collapse", bert, "--data", text_file, "--budget", "macs=0.5", "--output", small).exit_code == 0
    AutoModelForSequenceClassification.from_pretrained(small)
