"""The training recipes and the comparison without training, on tiny models and files."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_layercollapse import find_feed_forward_blocks

from .models import BY_NAME, VOCABULARY, needs_torchvision
from .words import word_tokenizer


RECIPES = Path(__file__).parent.parent / "recipes"
WORDS = [f"w{index}" for index in range(VOCABULARY - 2)]
VIT = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 1,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


@pytest.fixture(autouse=True)
def recipes_on_the_path(monkeypatch):
    """Recipes import each other as scripts in one folder do."""
    monkeypatch.syspath_prepend(str(RECIPES))


def tokenizer():
    return word_tokenizer(["[PAD]", "[UNK]", *WORDS])


def sentences(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for row in range(rows):
        chosen = torch.randint(0, len(WORDS), (4 + row % 7,), generator=generator).tolist()
        yield " ".join(WORDS[index] for index in chosen), row % 3


@pytest.fixture
def text(tmp_path):
    """Options for a tiny BERT and tab-separated sentences, one of them with a quotation mark."""
    folder = tmp_path / "model"
    BY_NAME["bert"].model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    for name, rows in (("train", 120), ("dev", 24)):
        lines = [f'"{sentence}\t{label}' for sentence, label in sentences(rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return [
        f"--model_name_or_path={folder}",
        f"--train_file={tmp_path / 'train.tsv'}",
        f"--validation_file={tmp_path / 'dev.tsv'}",
        "--input_column=sentence",
        "--max_length=16",
    ]


@pytest.fixture
def images(tmp_path):
    """Options for a new ViT and images in MNIST's format."""
    (tmp_path / "config.json").write_text(json.dumps(VIT))
    (tmp_path / "preprocessor_config.json").write_text(
        (RECIPES / "image_classification" / "vit_fashion_mnist" / "preprocessor_config.json").read_text()
    )
    random = np.random.default_rng(0)
    for name, rows in (("train", 64), ("t10k", 20)):
        with gzip.open(tmp_path / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + random.integers(0, 256, (rows, 28, 28), dtype=np.uint8).tobytes())
        with gzip.open(tmp_path / f"{name}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + (np.arange(rows) % 10).astype(np.uint8).tobytes())
    return [
        f"--config_name={tmp_path}",
        f"--train_file={tmp_path / 'train-images-idx3-ubyte.gz'}",
        f"--validation_file={tmp_path / 't10k-images-idx3-ubyte.gz'}",
    ]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def prose(tmp_path):
    """Options for a tiny Llama and plain text."""
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    for name, rows in (("train", 300), ("test", 40)):
        (tmp_path / f"{name}.txt").write_text("\n".join(sentence for sentence, _ in sentences(rows)) + "\n")
    return [
        f"--model_name_or_path={folder}",
        f"--train_file={tmp_path / 'train.txt'}",
        f"--validation_file={tmp_path / 'test.txt'}",
        "--max_length=12",
    ]


def options(tmp_path, *more):
    return [
        f"--output_dir={tmp_path / 'out'}",
        "--max_steps=3",
        "--per_device_train_batch_size=8",
        "--save_strategy=no",
        "--report_to=none",
        "--disable_tqdm=true",
        "--dataloader_pin_memory=false",
        "--calibration_samples=64",
        *more,
    ]


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


READY = ("--initial_alpha=0.96", "--blocks=last:2")


@pytest.mark.parametrize(
    "method, more, share",
    [
        ("dense", (), 1.0),
        ("layer_collapse", READY, (1 + 2 * 256 / 1280) / 3),
        ("fit", ("--share=0.5",), 0.5),
        ("fit", ("--share=0.5", "--distillation_weight=1", "--hidden_state_weight=1"), 0.5),
        ("plan", ("--share=0.5", "--plan_samples=32", "--distillation_weight=1"), 0.5),
        ("drop", ("--blocks=last:1",), 2 / 3),
        ("drop", ("--blocks=last:1", "--distillation_weight=1"), 2 / 3),
    ],
)
def test_text_classification(text, tmp_path, method, more, share):
    from common import run
    from text_classification import TextClassification

    run(TextClassification, "", [*text, *options(tmp_path, f"--method={method}", *more)])
    found = results(tmp_path)
    assert found["feed_forward_share"] == pytest.approx(share, abs=0.1 if method == "plan" else 0.02)
    assert 0 <= found["after"]["eval_accuracy"] <= 1 and found["training"]["train_loss"] > 0
    if method != "drop":  # which no library saves: what gives zero is no layer
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        states = [block.state for block in find_feed_forward_blocks(model)]
        # A plan may leave a block as it is.
        expected = {"dense": [0], "layer_collapse": [2], "fit": [3], "plan": [2, 3]}
        assert states.count("collapsed") in expected[method]


@needs_torchvision
def test_image_classification(images, tmp_path):
    from common import run
    from image_classification import ImageClassification

    run(ImageClassification, "", [*images, *options(tmp_path, "--method=layer_collapse", *READY)])
    assert results(tmp_path)["feed_forward_share"] == pytest.approx((1 + 2 / 8) / 3)


def test_language_modeling(prose, tmp_path):
    from common import run
    from language_modeling import LanguageModeling

    run(LanguageModeling, "", [*prose, *options(tmp_path, "--method=layer_collapse", *READY)])
    found = results(tmp_path)
    assert found["after"]["eval_perplexity"] == pytest.approx(np.exp(found["after"]["eval_loss"]), rel=1e-4)


@pytest.mark.parametrize(
    "task",
    ["text_classification", pytest.param("image_classification", marks=needs_torchvision), "language_modeling"],
)
def test_healing_with_lora_saves_a_model_without_adapters(task, request, tmp_path):
    from common import run
    from tasks import TASKS

    data = request.getfixturevalue({"t": "text", "i": "images", "l": "prose"}[task[0]])
    lora = ("--use_peft", "--lora_r=2", "--learning_rate=1e-2", "--latency_rounds=2", "--distillation_weight=1")
    found = run(TASKS[task], "", [*data, *options(tmp_path, "--method=fit", "--keep_neurons=4", *lora)])
    assert found["trained_parameters"] < 0.5 * found["parameters"]
    assert found["feed_forward_share"] < 0.7 and found["latency"]["ratio"] > 0
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    # Loaded again it is what was evaluated, within the rounding of the merge.
    kind = {"t": "SequenceClassification", "i": "ImageClassification", "l": "CausalLM"}[task[0]]
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "out").eval()
    parsed = parse_data(data)
    task = TASKS[task](parsed)
    scores = task.score(model, task.batches(validation=True))
    measured = found["after"]
    expected = measured["eval_loss"] if "eval_perplexity" in measured else measured["eval_accuracy"]
    assert float(scores.double().mean()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("names", "count"), [(["all-linear"], 19), ([r".*\.(query|value)"], 6), (["query", "key"], 6)]
)
def test_lora_targets(names, count):
    from common import LoraArguments

    adapted = LoraArguments(lora_target_modules=names).adapt(BY_NAME["bert"].model(), "SEQ_CLS", None)
    assert sum(name.endswith("lora_A.default") for name, _ in adapted.named_modules()) == count


@pytest.mark.parametrize(("task", "model"), [("text_classification", "bert"), ("image_classification", "vit")])
def test_lora_trains_the_head(task, model):
    from common import LoraArguments
    from tasks import TASKS

    adapted = LoraArguments().adapt(BY_NAME[model].model(), TASKS[task].peft_task, TASKS[task].head)
    assert all(parameter.requires_grad for parameter in adapted.classifier.modules_to_save.default.parameters())


def test_lora_refuses_what_it_cannot_do(text, tmp_path):
    from common import LoraArguments, run
    from text_classification import TextClassification

    with pytest.raises(ValueError, match="--lora_r must be at least 1"):
        LoraArguments(lora_r=0)
    with pytest.raises(ValueError, match=r"--lora_dropout must be in \[0, 1\)"):
        LoraArguments(lora_dropout=1.5)
    with pytest.raises(ValueError, match="pushes nothing"):
        run(TextClassification, "", [*text, *options(tmp_path, "--method=fit", "--use_peft", "--push_to_hub")])


def test_lora_is_for_what_collapses_before_training(text, tmp_path):
    from common import run
    from text_classification import TextClassification

    with pytest.raises(ValueError, match="--method layer_collapse trains all weights"):
        run(TextClassification, "", [*text, *options(tmp_path, "--method=layer_collapse", "--use_peft")])


def parse_data(words):
    from common import DataArguments, parse

    return parse([DataArguments], "", list(words))[0]


def test_options_of_a_file_and_of_the_command_line(text, tmp_path):
    from common import DataArguments, MethodArguments, parse

    (tmp_path / "a.yaml").write_text("dataset_name: some/data\nmodel_name_or_path: some/model\nmethod: drop\n")
    data, method = parse([DataArguments, MethodArguments], "", [str(tmp_path / "a.yaml"), "--train_file", "x.csv"])
    assert (data.model_name_or_path, data.dataset_name, data.train_file) == ("some/model", None, "x.csv")
    assert method.method == "drop"
    (tmp_path / "b.yaml").write_text("modle: some/model\n")
    with pytest.raises(SystemExit):
        parse([DataArguments], "", [str(tmp_path / "b.yaml")])


YAML_FILES = sorted([*RECIPES.glob("*_*/*/*.yaml"), *RECIPES.glob("embeddings/*/*.yaml")])


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_file_is_understood(path):
    from common import DataArguments, LoraArguments, MethodArguments, parse
    from embeddings import EmbeddingArguments
    from sweep import Sweep, as_words
    from training_free import TrainingFreeArguments
    from transformers import TrainingArguments

    from hf_layercollapse import LayerCollapseConfig

    assert path.read_text().startswith("# "), "the launch line comes first"
    kinds = [DataArguments, MethodArguments, LoraArguments, LayerCollapseConfig, TrainingArguments]
    # Half precision is checked against the hardware, which is not there.
    any_hardware = ["--bf16=false", "--fp16=false"]
    if "training_free" in path.stem:
        assert parse([TrainingFreeArguments, DataArguments], "", [str(path)])
    elif path.stem == "embeddings":
        assert parse([EmbeddingArguments], "", [str(path)])
    elif path.stem.startswith("sweep"):
        runs = list(Sweep.load(path).all_runs())
        assert len({options["output_dir"] for *_, options in runs}) == len(runs)
        for *_, options in runs:
            assert not any("{" in str(value) for value in options.values()), "a variable that no size gives"
            assert parse(kinds, "", [*as_words(options), *any_hardware])
    else:
        assert parse(kinds, "", [str(path), *any_hardware])


def test_pairs_of_texts_and_a_new_model(text, tmp_path):
    from common import DataArguments, run
    from text_classification import TextClassification

    arguments = [word for word in text if "model_name" not in word]
    arguments += [f"--config_name={tmp_path / 'model'}", "--config_overrides=num_hidden_layers=1"]
    run(TextClassification, "", [*arguments, "--second_input_column=sentence", *options(tmp_path)])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 1
    names = [word.removeprefix("--").split("=", 1) for word in arguments]
    one, two = (
        TextClassification(DataArguments(**{**dict(names), "max_length": 64, "second_input_column": column}))
        for column in (None, "sentence")
    )
    assert len(two.train[0]["input_ids"]) == 2 * len(one.train[0]["input_ids"])


@pytest.mark.parametrize(
    ("named", "known", "names"),
    [
        ({0: "neg", 1: "pos"}, None, ["neg", "pos"]),
        ({0: "neg", 1: "pos"}, ["pos", "neg"], ["pos", "neg"]),  # a model that was trained on them
        ({0: 1, 1: 5}, None, ["1", "5"]),  # stars
        ({0: 0, 1: 1}, ["bad", "good"], ["bad", "good"]),
        ({0: 0, 1: 1}, None, ["LABEL_0", "LABEL_1"]),
    ],
)
def test_classes_of_a_file_are_numbers_or_names(text, tmp_path, named, known, names):
    """The head has the data's classes under their names, the model's own where it has them; a file to test on that
    holds one class alone means the same by it."""
    from common import DataArguments
    from text_classification import TextClassification

    if known is not None:
        path = tmp_path / "model" / "config.json"
        of_names = {"id2label": dict(enumerate(known)), "label2id": {name: i for i, name in enumerate(known)}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **of_names}))
    for file, rows, kept in (("train", 20, (0, 1)), ("dev", 6, (0, 1)), ("other", 6, (1,))):
        lines = [f"{sentence},{named[label]}" for sentence, label in sentences(rows) if label in kept]
        (tmp_path / f"{file}.csv").write_text("\n".join(["sentence,label", *lines]) + "\n")
    task = TextClassification(
        DataArguments(
            config_name=str(tmp_path / "model"),
            train_file=str(tmp_path / "train.csv"),
            validation_file=str(tmp_path / "dev.csv"),
            also_test=str(tmp_path / "other.csv"),
            input_column="sentence",
        )
    )
    config = task.make_model().config
    assert [config.id2label[number] for number in range(config.num_labels)] == names
    called = {names.index(str(value)) if str(value) in names else value for value in (named[1],)}
    assert set(TextClassification(task.data.to_also_test()).validation["labels"]) == called
    assert set(task.validation["labels"]) == {0, 1}


def test_columns_that_are_no_classes(text, tmp_path):
    from common import DataArguments
    from text_classification import TextClassification

    def read(train, dev="a,x\nb,y"):
        for file, content in (("train", train), ("dev", dev)):
            (tmp_path / f"{file}.csv").write_text(f"text,label\n{content}\n")
        return TextClassification(
            DataArguments(
                model_name_or_path=str(tmp_path / "model"),
                train_file=str(tmp_path / "train.csv"),
                validation_file=str(tmp_path / "dev.csv"),
            )
        )

    with pytest.raises(ValueError, match="No row has a class in the column 'label'"):
        read("a,\nb,")
    with pytest.raises(ValueError, match="as text or a whole number, got float64"):
        read("a,0.5\nb,0.7")
    with pytest.raises(ValueError, match=r"class indices or \['x', 'y'\], got 'z'"):
        read("a,x\nb,y", "a,x\nb,z")
    with pytest.raises(ValueError, match=r"none of \['LABEL_0', 'LABEL_1'\]: \[2\]"):
        read("a,0\nb,1", "a,0\nb,2")
    for train, labels in (("a,x\nb,\nc,y", [0, 1]), ("a,1\nb,\nc,0", [1, 0]), ("a,None\nb,\nc,No", [1, 0])):
        task = read(train, "a,x\nb," if "x" in train else train)
        assert sorted(task.train["labels"]) == sorted(labels) and len(task.validation) == len(labels) - ("x" in train)


def as_classes(folder, names, rows):
    """A parquet file that names its classes, and a data set's arguments for it."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    data = Dataset.from_dict({"text": [text for text, _ in rows], "label": [n for _, n in rows]}, features=features)
    data.to_parquet(folder / "classes.parquet")
    return {name: str(folder / "classes.parquet") for name in ("train_file", "validation_file")}


def test_a_head_that_is_kept_keeps_its_classes(text, tmp_path):
    """What a fine-tuned model predicts is what it calls it, in whatever order the data has these names."""
    from common import DataArguments
    from text_classification import TextClassification

    source = {"model_name_or_path": str(tmp_path / "model")}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    own = ["Entailment", "neutral", "contradiction"]
    theirs = ["contradiction", "entailment", "neutral"]

    def task(called, names, **more):
        model.config.id2label, model.config.label2id = dict(enumerate(called)), {n: i for i, n in enumerate(called)}
        model.save_pretrained(tmp_path / "model")
        rows = [(sentence, number) for sentence, number in sentences(12)]
        return TextClassification(DataArguments(**source, **as_classes(tmp_path, names, rows), **more))

    kept = task(own, theirs)
    assert sorted(kept.validation["labels"]) == [0] * 4 + [1] * 4 + [2] * 4
    of_text = {sentence: theirs[number].lower() for sentence, number in sentences(12)}
    ids = {tuple(tokenizer()(sentence)["input_ids"]): name for sentence, name in of_text.items()}
    for row in kept.validation:
        assert own[row["labels"]].lower() == ids[tuple(row["input_ids"])]
    config = kept.make_model().config
    assert [config.id2label[number] for number in range(3)] == own
    with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\].*\['Entailment'.*--class_names"):
        task(own, ["a", "b", "c"])
    said = task(own, ["a", "b", "c"], class_names=["b", "c", "a"])
    assert said.make_model().config.id2label == {0: "b", 1: "c", 2: "a"}
    assert task(["LABEL_0", "LABEL_1", "LABEL_2"], theirs).data.class_names == theirs
    # A head of another size is a new one.
    assert task(own, ["a", "b", "c", "d"]).data.class_names == ["a", "b", "c", "d"]


def test_texts_do_not_say_the_order_of_a_head_without_names(text, tmp_path):
    from common import DataArguments
    from text_classification import TextClassification

    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(f"{s},{'xyz'[n]}" for s, n in sentences(12)) + "\n")
    files = {name: str(tmp_path / "a.csv") for name in ("train_file", "validation_file")}
    new = {"config_name": str(tmp_path / "model")}
    assert TextClassification(DataArguments(**new, **files)).data.class_names == ["x", "y", "z"]
    trained = {"model_name_or_path": str(tmp_path / "model")}
    with pytest.raises(ValueError, match="the model's have no names: say in --class_names"):
        TextClassification(DataArguments(**trained, **files))
    said = TextClassification(DataArguments(**trained, **files, class_names=["z", "x", "y"]))
    assert said.make_model().config.id2label == {0: "z", 1: "x", 2: "y"}


def test_the_classes_of_a_published_model_of_mnli():
    """It has no names for its classes, and numbers them otherwise than GLUE does (QData/TextAttack, issue 684)."""
    from common import numbers_of_classes

    path = RECIPES / "text_classification" / "bert_base_mnli" / "plan.yaml"
    names = yaml.safe_load(path.read_text())["class_names"]
    glue = Features({"label": ClassLabel(names=["entailment", "neutral", "contradiction"])})
    rows = Dataset.from_dict({"label": [0, 1, 2]}, features=glue)
    assert numbers_of_classes(rows, "label", names) == {0: 1, 1: 2, 2: 0}


def test_a_teacher_teaches_a_control_what_it_predicts(text, tmp_path):
    """The term that the control adds is the distance from the teacher: none where the student is the teacher."""
    from common import run
    from text_classification import TextClassification

    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    still = ("--max_steps=1", "--learning_rate=0", "--logging_steps=1", "--method=dense")
    losses = [
        run(TextClassification, "", [*text, *options(tmp_path, *still, *more)])["training"]["train_loss"]
        for more in ((), ("--distillation_weight=5",))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    dropped = ("--method=drop", "--blocks=last:2")
    losses += [
        run(TextClassification, "", [*text, *options(tmp_path, *still, *dropped, *more)])["training"]["train_loss"]
        for more in ((), ("--distillation_weight=5",))
    ]
    assert losses[3] > losses[2] + 1e-4


@pytest.fixture
def sweep(text, tmp_path):
    """A small YAML file of a sweep."""
    given = dict(word.removeprefix("--").split("=", 1) for word in [*text, *options(tmp_path)])
    del given["output_dir"]
    model = given.pop("model_name_or_path")
    content = {
        "task": "text_classification",
        "output_dir": str(tmp_path / "sweep"),
        "seeds": [0, 1],
        "options": {**given, "max_length": 16, "save_result": False, "also_test": given["train_file"]},
        "start": {"model_name_or_path": model, "save_result": True},
        "sizes": [{"share": 0.8}, {"share": 0.6, "blocks": 1}],
        "runs": {
            "dense": {"method": "dense", "latency_rounds": 2},
            "planned": {"method": "plan", "share": "{share}", "plan_samples": 32, "plan_file": "{start}/plan.json"},
            "dropped": {"method": "drop", "blocks": "last:{blocks}", "latency_rounds": 2},
            "to a size": {"method": "layer_collapse", "budget": "macs={share}"},
        },
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(content))  # which is YAML too
    return path


@pytest.mark.slow
def test_a_sweep_runs_everything_once_and_goes_on(sweep, tmp_path, capsys):
    from sweep import main

    main([str(sweep), "--seeds", "0"])
    plan = tmp_path / "sweep" / "start" / "seed0" / "plan.json"
    made = plan.stat().st_mtime_ns
    # Another process with the other seed; the table has both.
    capsys.readouterr()
    main([str(sweep), "--seeds", "1"])
    assert "seed 0" not in capsys.readouterr().out and plan.stat().st_mtime_ns == made
    rows = json.loads((tmp_path / "sweep" / "results.json").read_text())["runs"]
    assert [(row["name"], row["share"], row["seed"]) for row in rows] == [
        (name, share, seed)
        for name, shares in (
            *(("dense", [None]), ("planned", [0.8, 0.6])),
            *(("dropped", [0.6]), ("to a size", [0.8, 0.6])),  # how many to drop is said of one size only
        )
        for share in shares
        for seed in (0, 1)
    ]
    for row in rows:
        assert row["feed_forward_share"] <= (row["share"] or 1) + 0.07
        assert (row["latency"] is None) == (row["name"] not in ("dense", "dropped"))
        assert 0 <= row["also"] <= 1
    # All of a seed begin with its first model, and two seeds differ.
    assert len({row["before"] for row in rows if row["name"] == "dense"}) <= 2
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert table.startswith("| method | 100 % | 80 % | 60 % |") and "mean of 2 seeds (range)" in table
    assert "at 66.7 %" in table  # one of three blocks dropped
    assert table.count("| method |") == 2 and "further rows" in table
    assert (tmp_path / "sweep" / "tradeoff.png").stat().st_size > 1000
    main([str(sweep)])
    assert "== " not in capsys.readouterr().out
    # Other options: done again.
    main([str(sweep), "--seeds", "0", "--learning_rate", "1e-5"])
    assert "== planned, 0.6, seed 0" in capsys.readouterr().out


def test_a_sweep_says_what_is_wrong_with_its_file(sweep):
    from sweep import Sweep

    content = json.loads(sweep.read_text())
    for change, message in (
        ({"task": "magic"}, "`task` must be one of"),
        ({"sizes": [{"blocks": 1}]}, "needs a `share`"),
        ({"picture": ["magic"]}, "names what is no run: magic"),
        ({"magic": 1}, "keys that a sweep does not know: magic"),
        ({"runs": {"magic": {"blocks": "last:{magic}"}}}, "variables that no size has: \\['magic'\\]"),
    ):
        sweep.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message):
            Sweep.load(sweep)


SMALL = ["--fit_samples=64", "--score_samples=32", "--order_samples=16", "--sizes", "0.5", "0.25"]


def test_comparison_without_training(text, tmp_path):
    from training_free import METHODS, main

    further = f"--also_test={tmp_path / 'train.tsv'}"
    more = ["--recovery_samples=16", "--recovery_steps=2", "--recovery_sizes", "0.25", further]
    main(["text_classification", *text, *SMALL, *more, f"--output_dir={tmp_path / 'out'}"])
    found = results(tmp_path)
    rows = found["results"]
    methods = [name for name in METHODS if name != "layers replaced"]  # for decoders
    assert {row["method"] for row in rows} == {"dense", *methods}
    assert [row["size"] for row in rows if row["method"] == "plan, recovered"] == [0.25]
    assert found["examples"].keys() == {"validation", "train"} and found["examples"]["validation"] == 24
    for row in rows[1:]:
        assert row["feed_forward_share"] <= row["size"] + 1e-9, row
        for test in row["tests"].values():
            low, high = test["interval"]
            assert low <= test["accuracy"] <= high
    by_method = {(row["method"], row["size"]): row["divergence"] for row in rows}
    assert by_method["dense", None] == 0
    # What is planned is chosen by just this number.
    alike = ("rank 1/8 and neurons", "full rank and neurons", "width cut in the metric")
    found = [by_method[name, 0.5] for name in alike if (name, 0.5) in by_method]
    assert found and by_method["plan", 0.5] <= min(found) * (1 + 1e-3)
    table = (tmp_path / "out" / "table.md").read_text()
    assert (
        table.startswith("| feed-forward weights left | plan | plan, recovered |") and "validation: accuracy" in table
    )
    assert table.count("| 25 % |") == 3  # a table a test, and one of the divergence
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000


def test_an_interrupted_comparison_goes_on(text, tmp_path):
    from training_free import main

    arguments = ["text_classification", *text, *SMALL, f"--output_dir={tmp_path / 'out'}"]
    main([*arguments, "--methods", "dropped"])
    before = results(tmp_path)
    before["results"][1]["divergence"] = 123.4
    (tmp_path / "out" / "results.json").write_text(json.dumps(before))
    main([*arguments, "--methods", "dropped", "width cut"])
    after = results(tmp_path)["results"]
    assert after[: len(before["results"])] == before["results"]
    assert {row["method"] for row in after[len(before["results"]) :]} == {"width cut"}
    # Another seed of the dense model has rows of its own, beside these.
    main([*arguments, "--methods", "dropped", "--seeds", "7"])
    both = results(tmp_path)["results"]
    assert both[: len(after)] == after and {row["seed"] for row in both[len(after) :]} == {7}
    # With other arguments it begins anew.
    main([*arguments, "--methods", "dropped", "--order_samples=8"])
    assert all(row["divergence"] != 123.4 for row in results(tmp_path)["results"])


def test_comparison_without_training_of_a_decoder(prose, tmp_path):
    from training_free import main

    sizes = ["--sizes", "0.9", "--of=parameters", "--methods", "plan", "dropped", "layers replaced"]
    main(["language_modeling", *prose, *SMALL[:3], *sizes, f"--output_dir={tmp_path / 'out'}"])
    dense, *rows = results(tmp_path)["results"]
    assert [row["method"] for row in rows] == ["plan", "dropped", "layers replaced"]
    before = dense["tests"]["validation"]["perplexity"]
    for row in rows:
        test = row["tests"]["validation"]
        assert row["parameter_share"] <= 0.9 and test["perplexity"] > 1
        assert test["from_dense"] == pytest.approx(test["perplexity"] / before)


def plant(folder, row):
    """A row that a run of other arguments left."""
    folder.mkdir(exist_ok=True)
    content = {"arguments": {"fit_samples": 1}, "seconds": 0, "results": [row]}
    (folder / "results.json").write_text(json.dumps(content))


def test_ablations_of_a_plan(text, tmp_path):
    from plan_ablations import main
    from training_free import main as compare

    compare(["text_classification", *text, *SMALL, "--methods", "plan", f"--output_dir={tmp_path / 'out'}"])
    plan, model = f"--plan={tmp_path / 'out' / 'plan-0.json'}", str(tmp_path / "model")
    files = [f"--train_file={tmp_path / 'train.tsv'}", f"--test_file={tmp_path / 'dev.tsv'}"]
    rows = ["--fit_samples=64", "--held_samples=32", "--recovery_samples=24", "--sizes", "0.5"]
    plant(tmp_path / "ablations", {"size": 0.5, "what": "least squares", "divergence": -1.0, "accuracy": 0.0})
    main([model, plan, *files, *rows, f"--output_dir={tmp_path / 'ablations'}"])
    found = {row["what"]: row for row in json.loads((tmp_path / "ablations" / "results.json").read_text())["results"]}
    planned = next(row for row in results(tmp_path)["results"] if (row["method"], row["size"]) == ("plan", 0.5))
    # Where it begins is the plan, fitted anew; a rotation of many rows is held to less than least squares.
    assert found["least squares"]["divergence"] == pytest.approx(planned["divergence"], rel=0.2)
    assert len(found) == 6 + 8 and all(row["divergence"] > 0 for row in found.values())


def test_one_width_beside_any_widths(prose, tmp_path):
    from uniform_width import main, variants

    sizes = [
        "--multiple_of=8",
        "--length=12",
        "--fit_windows=12",
        "--test_windows=4",
        "--sizes",
        "0.9",
        f"--output_dir={tmp_path}",
    ]
    texts = [f"--fit={tmp_path / 'train.txt'}", f"--test={tmp_path / 'test.txt'}"]
    plant(tmp_path, {"size": 0.9, "variant": "one width", "perplexity": 1.0, "parameters": 1, "widths": [1]})
    main([str(tmp_path / "model"), *texts, *sizes])
    found = json.loads((tmp_path / "results.json").read_text())
    dense, *measured = found["results"]
    assert [row["variant"] for row in measured] == list(variants(8))
    for row in measured:
        assert row["perplexity"] > 1 and row["parameters"] <= 0.9 * dense["parameters"]
        assert "multiple" not in row["variant"] or all(width % 8 == 0 for width in row["widths"])
        assert "one width" not in row["variant"] or len(set(row["widths"])) == 1
    # What is there is not measured again.
    found["results"][1]["perplexity"] = 1.5
    (tmp_path / "results.json").write_text(json.dumps(found))
    main([str(tmp_path / "model"), *texts, *sizes])
    assert json.loads((tmp_path / "results.json").read_text()) == found


def test_whole_sentences_are_held_out(tmp_path):
    from split_by_sentence import main

    rows = [
        ("a very good film indeed", 1),
        ("very good film", 1),
        ("film", 0),
        ("one more bad plot line", 0),
        ("bad plot", 0),
        ("film of the year , by far", 1),
        ("the year , by far", 1),
    ]
    (tmp_path / "all.tsv").write_text("sentence\tlabel\n" + "".join(f"{text} \t{label}\n" for text, label in rows))
    main([f"--train_file={tmp_path / 'all.tsv'}", f"--output_dir={tmp_path}", "--rows=2", "--words=3"])

    def read(name):
        lines = (tmp_path / name).read_text().splitlines()
        assert lines[0] == "sentence\tlabel"
        return [tuple(line.split("\t")) for line in lines[1:]]

    tested, training = read("held_out.tsv"), read("train.tsv")
    assert len(tested) == 2 and all(len(text.split()) >= 3 for text, _ in tested)
    known = {text: str(label) for text, label in rows}
    assert all(known[text] == label for text, label in [*tested, *training])
    sentences = [text for text, _ in rows if not any(text != other and text in other for other, _ in rows)]
    for sentence in sentences:
        phrases = {text for text in known if text in sentence}
        trained = phrases & {text for text, _ in training}
        # A sentence is tested on or trained on, with all that is part of it.
        assert not trained or not phrases & {text for text, _ in tested}


def test_replacing_no_layer_changes_nothing_and_linear_layers_are_replaced_exactly(prose):
    """ReplaceMe's fit is exact where what the layers add is linear in what the block before them adds."""
    from controls import replace_layers, replaceable_layers

    model = llama()
    layers = replaceable_layers(model)
    count = len(layers)
    # Layers that add nothing: the map is the identity.
    for layer in layers[1:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    data = [{"input_ids": torch.randint(0, VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(0))}]
    expected = model(**data[0]).logits
    replace_layers(model, count - 1, data)
    assert len(model.get_decoder().layers) == 1
    torch.testing.assert_close(model(**data[0], use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_width_is_cut_to_the_share():
    from controls import feed_forward_share, prune_width

    model = BY_NAME["bert"].model()
    blocks = find_feed_forward_blocks(model)
    # The second cut leaves fewer neurons than the blocks have inputs.
    for share, left in ((0.5, 0.5), (0.25, 0.125)):
        prune_width(model, "all", share, {"input_ids": torch.arange(8)[None]})
        assert feed_forward_share(model, blocks) == left


def test_wrong_options():
    from common import DataArguments, MethodArguments
    from training_free import TrainingFreeArguments

    with pytest.raises(ValueError, match="either --dataset_name or --train_file"):
        DataArguments(model_name_or_path="some/model")
    with pytest.raises(ValueError, match="--method must be one of dense, layer_collapse"):
        MethodArguments(method="magic")
    with pytest.raises(ValueError, match="needs --share"):
        MethodArguments(method="prune_width")
    with pytest.raises(ValueError, match="--methods must be of plan"):
        TrainingFreeArguments(methods=["magic"])
